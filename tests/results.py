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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import conftest

import data
import dpo
import judge
import train
from model import GPT2

SHARED = {"subsets": "helpful-base,helpful-rejection-sampled", "epochs": 2, "val_share": 0.1}
PARALLEL = {"lr": 1e-3}
NONE = {"adapter": "none", "lr": 2e-5}
REPLACE = NONE | {"adapter": "replace", "adapter_width": 256, "sft_epochs": 4}
ROWS = {
    "parallel": PARALLEL | {"sft_epochs": 2, "sft_lr": 1e-4},
    "none": NONE,
    "replace, scratch": REPLACE | {"sft_lr": 1e-3},
    "replace, pretrained": REPLACE | {"adapter_init": "pretrained", "sft_lr": 3e-4},
    "parallel, beta 0.05": PARALLEL | {"beta": 0.05},
    "parallel, beta 0.3": PARALLEL | {"beta": 0.3},
    "parallel, beta 0.5": PARALLEL | {"beta": 0.5},
    "parallel, seed 1": PARALLEL | {"seed": 1},
    "none, seed 1": NONE | {"seed": 1},
    "parallel, seed 2": PARALLEL | {"seed": 2},
    "none, seed 2": NONE | {"seed": 2},
}
UNSURE = re.compile(r"(?i)not sure|n.t (?:\w+ )?(?:know|understand)|sorry|what do you mean")
COLUMNS = {  # of the table that is printed: the name in rows.json, and the format
    "loss": ("loss", ".4f"),
    "accuracy": ("rewards/accuracies", ".3f"),
    "from": ("accuracy_low", ".3f"),
    "to": ("accuracy_high", ".3f"),
    "margin": ("rewards/margins", ".3f"),
    "nats": ("nats", ".3f"),
    "KL": ("KL", ".2f"),
    "±": ("KL error", ".2f"),
    "words": ("words", ".1f"),
    "distinct-1": ("distinct-1", ".3f"),
    "distinct-2": ("distinct-2", ".3f"),
    "ended": ("ended by itself", ".2f"),
    "unsure": ("unsure", ".2f"),
    "best at": ("best_step", ""),
    "s": ("seconds", ".0f"),
}


def run(options: dict, folder: Path) -> dict:
    """Train with these options; what the run's log says of its test, and of its best steps."""
    words = []
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    print("+ python train.py", *words, flush=True)
    start = time.perf_counter()
    code = train.main([*words, "--resume"])
    seconds = time.perf_counter() - start
    if code != 0:
        raise SystemExit(f"train.py ended with {code}")

    best = {}                                          # of each stage the last validation
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["event"] == "val":
            best[line["stage"]] = line
    assert line["event"] == "test", line
    return {"seconds": seconds, **line, "best_step": best["dpo"]["best_step"],
            "SFT": best.get("sft")}


def nats_a_token(model: GPT2, pairs: list[data.Pair]) -> float:
    """Of the chosen answers: by it, models with different references can be compared."""
    tokens, _ = data.tokenize(pairs, data.encoding_of(demo=False), 512, 256)

    def loss_function(model: GPT2, batch: data.Batch) -> dict[str, torch.Tensor]:
        chosen = dpo.packed_logps(model, batch)
        return {"loss": dpo.sft_loss(chosen, batch.response_tokens)}

    batches = data.by_length(tokens, 32, sides=("chosen",))
    return dpo.val_step(model, batches, loss_function)["loss"]


def describe(folder: Path, reference: GPT2, pairs: list[data.Pair], out: Path) -> dict[str, float]:
    """What the model's answers are like, and their KL to the reference, in nats an answer."""
    model = GPT2.from_pretrained(folder).requires_grad_(False)
    prompts = [pair.prompt for pair in pairs]
    options = SimpleNamespace(seed=0, temperature=1.0, max_new_tokens=128)
    log = judge.Log(out / "answers.jsonl", "prompt", "key")
    answers = judge.sample_answers(model, str(folder), prompts, options, 256, log)
    texts = [answer["text"] for answer in answers]

    ratios = []
    for answer in answers:
        policy_logp = judge.answer_logp(model, answer)
        reference_logp = judge.answer_logp(reference, answer)
        ratios.append(policy_logp - reference_logp)
    ratios = torch.tensor(ratios)
    unsure = sum(UNSURE.search(text) is not None for text in texts)
    return judge.describe(texts, answers) | {
        "nats": nats_a_token(model, pairs),
        "KL": ratios.mean().item(),
        "KL error": (1.96 * ratios.std() / len(ratios) ** 0.5).item(),
        "unsure": unsure / len(texts),
    }


def print_table(rows: dict[str, dict]) -> None:
    """The rows as Markdown."""
    print("| |", " | ".join(COLUMNS), "|\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for name, row in rows.items():
        cells = []
        for key, form in COLUMNS.values():
            cells.append(f"{row[key]:{form}}" if key in row else "")
        print(f"| {name} |", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="as for train.py")
    parser.add_argument("--hh_dir", default="hh-rlhf", help="as for train.py")
    parser.add_argument("--out", default="out/results", help="a folder for the runs")
    args = parser.parse_args()
    conftest.offline_vocabulary()
    out = Path(args.out)

    pairs = []
    for path in data.fetch_hh(args.hh_dir, SHARED["subsets"].split(","), "test"):
        pairs += data.read_pairs(path)[0]
    pairs = sorted({pair.prompt: pair for pair in pairs}.values())  # a prompt is one sample

    done = out / "rows.json"
    rows = json.loads(done.read_text()) if done.exists() else {}
    shared_sft = out / "parallel" / "sft"
    for name, options in ROWS.items():
        folder = out / re.sub(r"\W+", "_", name)
        if "sft_epochs" in options:
            sft = folder / "sft"
            start = {"model": args.model}
        else:
            sft = shared_sft
            start = {"model": sft, "sft_epochs": 0}
        if name not in rows:
            files = {"hh_dir": args.hh_dir, "out": folder}
            rows[name] = run(files | SHARED | start | options, folder)
        reference = GPT2.from_pretrained(sft).requires_grad_(False)
        rows[name] |= describe(folder / "best", reference, pairs, folder)
        if "sft_epochs" in options:
            rows[f"{name}: SFT"] = describe(sft, reference, pairs, out)
        done.write_text(json.dumps(rows, indent=1))

    reference = GPT2.from_pretrained(shared_sft).requires_grad_(False)
    rows["before SFT"] = describe(Path(args.model), reference, pairs, out)
    rows["chosen"] = judge.describe([pair.chosen for pair in pairs], [])
    done.write_text(json.dumps(rows, indent=1))
    print_table(rows)


if __name__ == "__main__":
    main()
