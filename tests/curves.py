"""Draw a run's curves of DPO, training and validation: python tests/curves.py out"""

import argparse
import json
from pathlib import Path

NAMES = ("loss", "rewards/accuracies", "rewards/chosen", "rewards/rejected")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("out", nargs="?", default="out", help="the run's folder")
    parser.add_argument("--to", default="", help="the picture; else curves.png in the run's folder")
    args = parser.parse_args()
    from matplotlib.figure import Figure  # of requirements-dev.txt
    lines = [json.loads(line) for line in Path(args.out, "metrics.jsonl").read_text().splitlines()]
    figure = Figure((12, 3), layout="constrained")
    for axis, name in zip(figure.subplots(1, 4), NAMES, strict=True):
        for event in ("train", "val"):
            steps = []
            values = []
            for line in lines:
                # A line has no metrics where all its updates were skipped.
                if line["stage"] == "dpo" and line["event"] == event and name in line:
                    steps.append(line["step"])
                    values.append(line[name])
            axis.plot(steps, values, label=event)
        axis.set(title=name, xlabel="updates of DPO")
        axis.legend()
    figure.savefig(args.to or Path(args.out, "curves.png"))


if __name__ == "__main__":
    main()
