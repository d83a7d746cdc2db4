"""The README's results on real pairs: python tests/results.py --model FOLDER --hh_dir FOLDER

One SFT, then a run of train.py for each row, whose command is printed. Then answers to the test
prompts are sampled from every model, the same number of tokens at most, at temperature 1.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import conftest

import data
import judge
import train
from model import GPT2

SUBSETS = "helpful-base,helpful-rejection-sampled"
PARALLEL, NONE = {"lr": 1e-3}, {"adapter": "none", "lr": 2e-5}
REPLACE = {"adapter": "replace", "adapter_width": 256, "lr": 3e-4, "sft_coef": 1.0}
ROWS = {"parallel": PARALLEL, "none": NONE, "replace, scratch": REPLACE,
        "replace, pretrained": REPLACE | {"adapter_init": "pretrained"},
        **{f"parallel, beta {beta}": PARALLEL | {"beta": beta} for beta in (0.05, 0.3, 0.5)},
        **{f"{name}, seed {seed}": options | {"seed": seed} for seed in (1, 2)
           for name, options in (("parallel", PARALLEL), ("none", NONE))}}
UNSURE = re.compile(r"(?i)not sure|n.t (?:\w+ )?(?:know|understand)|sorry|what do you mean")


def command(options: dict) -> list[str]:
    """train.py's arguments."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def describe(folder: Path, reference: GPT2, prompts: list[str], out: Path) -> dict[str, float]:
    """What the model's answers are like; KL to the reference in nats an answer."""
    model = GPT2.from_pretrained(folder).requires_grad_(False)
    options = SimpleNamespace(seed=0, temperature=1.0, max_new_tokens=128)
    log = judge.Log(out / "answers.jsonl", "prompt", "key")
    answers = judge.sample_answers(model, str(folder), prompts, options, 256, log)
    texts = [answer["text"] for answer in answers]
    kl = torch.tensor([judge.answer_logp(model, answer) - judge.answer_logp(reference, answer)
                       for answer in answers])
    return judge.describe(texts, answers) | {
        "KL": kl.mean().item(), "KL error": (1.96 * kl.std() / len(kl) ** 0.5).item(),
        "unsure": sum(bool(UNSURE.search(text)) for text in texts) / len(texts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="as for train.py")
    parser.add_argument("--hh_dir", default="hh-rlhf", help="as for train.py")
    parser.add_argument("--out", default="out/results", help="a folder for the runs")
    parser.add_argument("--only", default="", help="rows whose names hold this")
    args = parser.parse_args()
    conftest.offline_vocabulary()
    out = Path(args.out)
    shared = {"hh_dir": args.hh_dir, "subsets": SUBSETS}
    sft = shared | {"model": args.model, "sft_epochs": 2, "sft_lr": 1e-4, "out": out / "parallel",
                    "epochs": 2} | PARALLEL
    after = shared | {"model": out / "parallel" / "sft", "sft_epochs": 0, "epochs": 2}
    pairs = [pair for path in data.fetch_hh(args.hh_dir, SUBSETS.split(","), "test")
             for pair in data.read_pairs(path)[0]]
    prompts, rows = sorted({pair.prompt for pair in pairs}), {}
    for name, options in ROWS.items():
        if args.only in name:
            options = sft if name == "parallel" else after | {
                "out": out / re.sub(r"\W+", "_", name)} | options
            words, start = command(options), time.perf_counter()
            print("+ python train.py", *words, flush=True)
            code = train.main(words)
            rows[name] = {"seconds": time.perf_counter() - start, "code": code}
            folder = Path(options["out"])
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
            test = next(line for line in lines if line["kind"] == "test")
            reference = GPT2.from_pretrained(out / "parallel" / "sft").requires_grad_(False)
            rows[name] |= test | describe(folder / "best", reference, prompts, folder) | {
                "best_step": [x["best_step"] for x in lines if x["kind"] == "val"][-1]}
            (out / "rows.json").write_text(json.dumps(rows, indent=1))
    rows["after SFT"] = describe(out / "parallel" / "sft", reference, prompts, out)
    rows["before SFT"] = describe(Path(args.model), reference, prompts, out)
    rows["chosen"] = judge.describe([pair.chosen for pair in pairs], [])
    (out / "rows.json").write_text(json.dumps(rows, indent=1))
    columns = {"loss": ("loss", ".4f"), "accuracy": ("rewards/accuracies", ".3f"),
               "±": ("accuracy_half_interval", ".3f"), "margin": ("rewards/margins", ".3f"),
               "chosen": ("rewards/chosen", ".2f"), "KL": ("KL", ".2f"), "±  ": ("KL error", ".2f"),
               "words": ("words", ".1f"), "distinct-1": ("distinct-1", ".3f"),
               "distinct-2": ("distinct-2", ".3f"), "ended": ("ended by itself", ".2f"),
               "unsure": ("unsure", ".2f"), "best at": ("best_step", ""), "s": ("seconds", ".0f")}
    print("| |", " | ".join(columns), "|\n" + "|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} |", " | ".join(
            f"{row[key]:{form}}" if key in row else "" for key, form in columns.values()), "|")


if __name__ == "__main__":
    main()
