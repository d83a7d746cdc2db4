"""The README's results on real pairs: python tests/results.py --model FOLDER --hh_dir FOLDER

A run of train.py for each row, whose command is printed; rows without an SFT of their own begin
with the first row's. Then answers to the test prompts are sampled from every model, the same number
of tokens at most, at temperature 1. Rows that rows.json in --out holds already are not run again.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import tiktoken
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import conftest

import data
import dpo
import judge
import train
from model import GPT2

SHARED = {"subsets": "helpful-base,helpful-rejection-sampled", "epochs": 2, "val_share": 0.1}
PARALLEL, NONE = {"lr": 1e-3}, {"adapter": "none", "lr": 2e-5}
REPLACE = NONE | {"adapter": "replace", "adapter_width": 256, "sft_epochs": 4}
ROWS = {"parallel": PARALLEL | {"sft_epochs": 2, "sft_lr": 1e-4}, "none": NONE,
        "replace, scratch": REPLACE | {"sft_lr": 1e-3},
        "replace, pretrained": REPLACE | {"adapter_init": "pretrained", "sft_lr": 3e-4},
        **{f"parallel, beta {beta}": PARALLEL | {"beta": beta} for beta in (0.05, 0.3, 0.5)},
        **{f"{name}, seed {seed}": options | {"seed": seed} for seed in (1, 2)
           for name, options in (("parallel", PARALLEL), ("none", NONE))}}
UNSURE = re.compile(r"(?i)not sure|n.t (?:\w+ )?(?:know|understand)|sorry|what do you mean")


def command(options: dict) -> list[str]:
    """train.py's arguments."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def describe(folder: Path, reference: GPT2, pairs: list[data.Pair], out: Path) -> dict[str, float]:
    """What the model's answers are like; KL to the reference in nats an answer; nats a token of the
    chosen answers, by which models with different references can be compared.
    """
    model, prompts = GPT2.from_pretrained(folder).requires_grad_(False), [p.prompt for p in pairs]
    tokens = data.tokenize(pairs, tiktoken.get_encoding("gpt2"), 512, 256)[0]
    batches = (batch for batch, in data.batches(tokens, 32, None, sides=("chosen",)))
    nats = dpo.evaluate(train.Policy(model), batches, dpo.sft_objective)["loss"]
    options = SimpleNamespace(seed=0, temperature=1.0, max_new_tokens=128)
    log = judge.Log(out / "answers.jsonl", "prompt", "key")
    answers = judge.sample_answers(model, str(folder), prompts, options, 256, log)
    texts = [answer["text"] for answer in answers]
    kl = torch.tensor([judge.answer_logp(model, answer) - judge.answer_logp(reference, answer)
                       for answer in answers])
    return judge.describe(texts, answers) | {
        "nats": nats, "KL": kl.mean().item(), "KL error": (1.96 * kl.std() / len(kl) ** 0.5).item(),
        "unsure": sum(bool(UNSURE.search(text)) for text in texts) / len(texts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="as for train.py")
    parser.add_argument("--hh_dir", default="hh-rlhf", help="as for train.py")
    parser.add_argument("--out", default="out/results", help="a folder for the runs")
    args = parser.parse_args()
    conftest.offline_vocabulary()
    out = Path(args.out)
    pairs = [pair for path in data.fetch_hh(args.hh_dir, SHARED["subsets"].split(","), "test")
             for pair in data.read_pairs(path)[0]]
    pairs = sorted({pair.prompt: pair for pair in pairs}.values())  # a prompt is one sample
    done = out / "rows.json"
    rows = json.loads(done.read_text()) if done.exists() else {}
    for name, options in ROWS.items():
        folder, own = out / re.sub(r"\W+", "_", name), "sft_epochs" in options
        sft = (folder if own else out / "parallel") / "sft"
        if name not in rows:
            words, start = command({"hh_dir": args.hh_dir, "out": folder, **SHARED, **(
                {"model": args.model} if own else {"model": sft, "sft_epochs": 0}), **options}
                ), time.perf_counter()
            print("+ python train.py", *words, flush=True)
            code = train.main([*words, "--resume"])
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
            best = {x["stage"]: x for x in lines if x["kind"] == "val"}  # the last of each
            rows[name] = {"seconds": time.perf_counter() - start, "code": code, **lines[-1],
                          "best_step": best["dpo"]["best_step"], "SFT": best.get("sft")}
        reference = GPT2.from_pretrained(sft).requires_grad_(False)
        rows[name] |= describe(folder / "best", reference, pairs, folder)
        done.write_text(json.dumps(rows, indent=1))
        if own:
            rows[f"{name}: SFT"] = describe(sft, reference, pairs, out)
    rows["before SFT"] = describe(Path(args.model), GPT2.from_pretrained(out / "parallel" / "sft"),
                                  pairs, out)
    rows["chosen"] = judge.describe([pair.chosen for pair in pairs], [])
    done.write_text(json.dumps(rows, indent=1))
    columns = {"loss": ("loss", ".4f"), "accuracy": ("rewards/accuracies", ".3f"),
               "±": ("accuracy_half_interval", ".3f"), "margin": ("rewards/margins", ".3f"),
               "nats": ("nats", ".3f"), "KL": ("KL", ".2f"), "±  ": ("KL error", ".2f"),
               "words": ("words", ".1f"), "distinct-1": ("distinct-1", ".3f"),
               "distinct-2": ("distinct-2", ".3f"), "ended": ("ended by itself", ".2f"),
               "unsure": ("unsure", ".2f"), "best at": ("best_step", ""), "s": ("seconds", ".0f")}
    print("| |", " | ".join(columns), "|\n" + "|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} |", " | ".join(
            f"{row[key]:{form}}" if key in row else "" for key, form in columns.values()), "|")


if __name__ == "__main__":
    main()
