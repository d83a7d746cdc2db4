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
    from matplotlib.figure import Figure  # no requirement of the tests
    rows = [json.loads(line) for line in Path(args.out, "metrics.jsonl").read_text().splitlines()]
    figure = Figure((12, 3), layout="constrained")
    for axis, name in zip(figure.subplots(1, 4), NAMES, strict=True):
        for kind in ("train", "val"):
            some = [r for r in rows if (r["stage"], r["kind"]) == ("dpo", kind)]
            axis.plot([r["step"] for r in some], [r[name] for r in some], label=kind)
        axis.set(title=name, xlabel="updates of DPO")
        axis.legend()
    figure.savefig(args.to or Path(args.out, "curves.png"))


if __name__ == "__main__":
    main()
