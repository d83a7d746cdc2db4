"""Results on real pairs: python tests/results.py --model FOLDER --hh_dir FOLDER

Trains with train.py and appends what came out to results/runs.csv, a line for each run. Lines that
are there are not made again, so a stopped call goes on. `--table` prints the tables of
results/README.md from that file. `--polite` trains on the pairs of tests/polite.py. `--grid` tries
rates and epochs in the training part of fold 0, compares their validation losses, and appends to
results/grid.csv.

Read from top to bottom:

1. the pool     the pairs, without those that the stand-in model may know; five folds
2. baselines    what ranks answers without DPO
3. runs         the rows of the tables, and one run of train.py
4. the grid     which rates and epochs learn, by validation loss
5. the tables   from runs.csv alone
"""

import argparse
import csv
import gzip
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import conftest
import polite

import data
import dpo
import judge
import train

ROOT = Path(train.__file__).parent
CSV = ROOT / "results" / "runs.csv"
FOLDS = 5
SUBSETS = ("harmless-base", "helpful-base")            # of a fold's folder: all pairs are in these

# 1. The pool ------------------------------------------------------------------------------------


def openings(hh_dir: Path) -> set[str]:
    """The first question of every dialogue of several turns in the train files, as a prompt.

    The stand-in model was pretrained on such dialogues. A pair with the same question may have one
    of its answers there, word for word.
    """
    found = set()
    for path in sorted(hh_dir.glob("*/train.jsonl.gz")):
        with gzip.open(path) as file:
            for line in file:
                for dialogue in json.loads(line).values():
                    if dialogue.count(data.HUMAN) > 1:
                        first, _, _ = dialogue.partition(data.ASSISTANT)
                        found.add(first + data.ASSISTANT)
    return found


def clean_pool(hh_dir: Path) -> dict[str, list[data.Pair]]:
    """The pairs of each kind, "harmless" and "helpful", of the train and test files together."""
    known = openings(hh_dir)
    pool = {"harmless": [], "helpful": []}
    usable = 0
    for path in sorted(hh_dir.glob("*/*.jsonl.gz")):
        kind = "harmless" if "harmless" in path.parent.name else "helpful"
        pairs, _ = data.read_pairs(path)
        usable += len(pairs)
        pool[kind] += [pair for pair in pairs if pair.prompt not in known]
    kept = sum(len(pairs) for pairs in pool.values())
    print(f"pool   {usable:,} pairs, {usable - kept:,} left out whose question opens a dialogue of "
          f"several turns: {len(pool['harmless']):,} harmless and {len(pool['helpful']):,} helpful")
    return pool


def fold_of(pair: data.Pair) -> int:
    """The fold in which this pair is tested, from 0 to FOLDS - 1. Equal prompts are in one fold.

    "fold" is put before the prompt, as data.split takes the validation pairs by the prompt's own
    fraction: without it, all validation pairs would be of fold 0.
    """
    return int(data.fraction_of(f"fold {pair.prompt}") * FOLDS)


def write_fold(pool: dict[str, list[data.Pair]], fold: int, folder: Path) -> None:
    """The fold as files of hh-rlhf's form: test has its own pairs, train has all others."""
    for kind, pairs in pool.items():
        lines = {"train": [], "test": []}
        for pair in pairs:
            row = {"chosen": pair.prompt + pair.chosen, "rejected": pair.prompt + pair.rejected}
            lines["test" if fold_of(pair) == fold else "train"].append(json.dumps(row))
        for split, texts in lines.items():
            path = folder / f"{kind}-base" / f"{split}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress("\n".join(texts).encode(), mtime=0))


def pairs_of_fold(folder: Path, split: str) -> tuple[list[data.Pair], str]:
    """A fold's pairs in the order in which train.py reads them; and of each, "h" or "-": harmless?
    """
    pairs = []
    kinds = ""
    for subset in SUBSETS:
        found, _ = data.read_pairs(folder / subset / f"{split}.jsonl.gz")
        pairs += found
        kinds += ("h" if subset == "harmless-base" else "-") * len(found)
    return pairs, kinds


# 2. Baselines -----------------------------------------------------------------------------------


def scores_of(differences: list[float]) -> str:
    """A character for each pair: "2" the chosen answer ranks higher, "0" lower, "1" equal."""
    scores = ""
    for difference in differences:
        if difference > 0:
            scores += "2"
        elif difference < 0:
            scores += "0"
        else:
            scores += "1"
    return scores


def logps_of(path: Path, pairs: list[data.Pair]) -> tuple[Tensor, Tensor]:
    """(2, pairs) each: the log-probabilities by the model in the folder, and the lengths."""
    model = judge.load(path)
    device = model.wte.weight.device
    tokens, _ = data.tokenize(pairs, data.encoding_of(demo=False), 512, 256)
    assert len(tokens) == len(pairs)
    batches = (batch.to(device) for batch in data.by_length(tokens, 32))
    with torch.no_grad():
        logps = dpo.reference_logps(lambda model, batch: dpo.packed_logps(model, batch), model,
                                    batches, len(tokens))
    lengths = torch.tensor([[len(pair.chosen) for pair in tokens],
                            [len(pair.rejected) for pair in tokens]])
    return logps, lengths


def baselines(sft: Path, pairs: list[data.Pair], kinds: str) -> Iterator[dict]:
    """What ranks the pairs without DPO: the length in tokens, and the SFT model itself."""
    logps, lengths = logps_of(sft, pairs)
    per_token = logps / lengths
    yield {"row": "the longer answer", "scores": scores_of((lengths[0] - lengths[1]).tolist()),
           "kinds": kinds}
    yield {"row": "SFT, summed", "scores": scores_of((logps[0] - logps[1]).tolist())}
    yield {"row": "SFT, per token", "scores": scores_of((per_token[0] - per_token[1]).tolist())}


# 3. Runs ----------------------------------------------------------------------------------------

ADAPTERS = "DPO, adapters"
ALL_WEIGHTS = "DPO, all weights"
ROWS = {                       # options beside train.py's defaults; the first row makes the SFT
    ADAPTERS: {},
    ALL_WEIGHTS: {"adapter": "none"},
}
FURTHER = {                    # on fold 0 alone
    "beta 0.05": {"beta": 0.05},
    "beta 0.3": {"beta": 0.3},
    "per token (sigmoid_norm)": {"loss": "sigmoid_norm", "beta": 2.0},
    "with an SFT term": {"sft_coef": 0.1},
    "replaced MLPs, random": {"adapter": "replace", "adapter_width": 256, "sft_epochs": 4,
                              "sft_lr": 1e-3},
    "replaced MLPs, strongest neurons": {"adapter": "replace", "adapter_width": 256,
                                         "adapter_init": "pretrained", "sft_epochs": 4,
                                         "sft_lr": 3e-4},
}
POLITE = "polite pairs"        # those of tests/polite.py, in place of a fold
FLOAT32 = {"dtype": "float32"}  # bfloat16 is too coarse for margins of a hundredth of a nat
METRICS = ("loss", "rewards/margins", "rewards/accuracies", "chosen_below_reference")
FIELDS = ("row", "fold", "seed", "commit", "machine", "dtype", "command", "seconds", "memory_gb",
          "parameters", "best_step", *METRICS, "kl", "words", "distinct-1", "distinct-2", "ended",
          "kinds", "scores")


def machine() -> str:
    """The GPU, if there is one, and the processor, with the flags that matter for speed."""
    text = subprocess.getoutput("lscpu")
    name = re.search(r"Model name: *(.*)", text)[1]
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
             if re.search(rf"\b{flag}\b", text)]
    processor = f"{name}, {os.cpu_count()} cores, {' '.join(flags)}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {processor}"
    return processor


def training_commit() -> str:
    """The last commit that changed the training code. Rows of a table must have the same one."""
    files = "dpo.py data.py model.py train.py"
    changed = subprocess.getoutput(f"git -C {ROOT} status --porcelain {files}")
    assert not changed, f"the training code has changes that are not committed:\n{changed}"
    return subprocess.getoutput(f"git -C {ROOT} log -1 --format=%h -- {files}")


def train_once(options: dict) -> dict:
    """One run of train.py in a process of its own: its command, seconds, memory and metrics."""
    words = []
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    print("+ python train.py", *words, flush=True)
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words, "--resume"],
                               stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"train.py ended with {status}"

    out = Path(options["out"])
    test = lines_of(out)[-1]
    assert test["event"] == "test"
    dtype = json.loads((out / "config.json").read_text())["options"]["dtype"]
    memory = round(usage.ru_maxrss / 2**20, 2)         # of the process; a GPU has memory of its own
    if torch.accelerator.current_accelerator(check_available=True):
        memory = ""
    return {
        "command": command_of(options),
        "seconds": round(time.perf_counter() - started, 1),
        "memory_gb": memory,
        "dtype": dtype,
        "best_step": test["step"],
        **{name: test[name] for name in METRICS},
    }


def command_of(options: dict) -> str:
    """The command, with only the last parts of folders: the others are of this machine."""
    words = ["train.py"]
    for name, value in options.items():
        if name in ("model", "hh_dir", "out", "pairs"):
            value = Path(value).name
        words += [f"--{name}", str(value)]
    return " ".join(words)


def lines_of(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]


def trained_parameters(out: Path) -> int:
    """How many numbers DPO trained: those that last.pt holds."""
    saved = torch.load(out / "last.pt", weights_only=True)
    return sum(weight.numel() for weight in saved["model"].values())


def margins_of(out: Path, pairs: list[data.Pair]) -> Tensor:
    """(pairs,): how much further the best model of a run is from its SFT model at the chosen answer
    than at the rejected one, in nats. Times beta it is the margin of the rewards."""
    policy, _ = logps_of(out / "best", pairs)
    reference, _ = logps_of(out / "sft", pairs)
    return (policy[0] - reference[0]) - (policy[1] - reference[1])


def loss_and_error(margins: Tensor, beta: float) -> tuple[float, float]:
    """DPO's mean loss, and half of the width of its 95% interval over the pairs."""
    losses = -F.logsigmoid(beta * margins)
    return losses.mean().item(), 1.96 * losses.std().item() / math.sqrt(len(losses))


def dpo_row(folder: Path, name: str, options: dict, pairs: list[data.Pair],
            sampled: bool) -> dict:
    """Train, test again pair by pair, and look at sampled answers."""
    out = folder / re.sub(r"\W+", "_", name)
    line = {"row": name} | train_once({"out": out} | FLOAT32 | options)
    margins = margins_of(out, pairs)
    line["scores"] = scores_of(margins.tolist())
    if options.get("loss", "sigmoid") == "sigmoid":
        accuracy = statistics.fmean(int(score) / 2 for score in line["scores"])
        assert abs(accuracy - line["rewards/accuracies"]) < 2 / len(pairs), (accuracy, line)
    line["parameters"] = trained_parameters(out)
    if sampled:
        paths = {"tuned": out / "best", "sft": out / "sft"}
        prompts = sorted({pair.prompt for pair in pairs})
        answers = judge.kept_answers(out / "answers.jsonl", name, paths["tuned"],
                                     data.encoding_of(demo=False), prompts, 256,
                                     judge.Sampling(1.0, 1.0, 128, 0))
        line |= judge.describe([answer.text for answer in answers])
        line["ended"] = statistics.fmean(answer.end == "end-of-text" for answer in answers)
        line["kl"] = judge.kl_to_sft(paths, answers)
    return line


def read_csv(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append_csv(path: Path, names: tuple[str, ...], line: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, names)
        if is_new:
            writer.writeheader()
        writer.writerow(line)


def measure(args: argparse.Namespace) -> None:
    """All rows that runs.csv lacks, fold by fold."""
    conftest.offline_vocabulary()
    pool = clean_pool(Path(args.hh_dir))
    shared = {"seed": 0, "commit": training_commit(), "machine": machine()}
    folds = range(FOLDS) if args.fold is None else [args.fold]
    for fold in folds:
        folder = Path(args.out) / f"fold{fold}"
        write_fold(pool, fold, folder / "hh")
        pairs, kinds = pairs_of_fold(folder / "hh", "test")
        done = {line["row"] for line in read_csv(CSV)
                if line["fold"] == str(fold) and line["commit"] == shared["commit"]}
        sft = folder / re.sub(r"\W+", "_", ADAPTERS) / "sft"
        rows = dict(ROWS)
        if fold == 0:
            rows |= FURTHER
        for name, options in rows.items():
            if name in done or not re.search(args.only, name):
                continue
            start = {"hh_dir": folder / "hh", "subsets": ",".join(SUBSETS), "model": args.model}
            if name != ADAPTERS:
                start |= {"model": sft, "sft_epochs": 0}
            line = dpo_row(folder, name, start | options, pairs, fold == 0)
            append_csv(CSV, FIELDS, shared | {"fold": fold} | line)
        name = BASELINES[0]
        if name not in done and re.search(args.only, name):
            for line in baselines(sft, pairs, kinds):
                append_csv(CSV, FIELDS, shared | {"fold": fold} | line)


def measure_polite(args: argparse.Namespace) -> None:
    """The polite pairs, without an option beside --pairs and --model."""
    conftest.offline_vocabulary()
    shared = {"seed": 0, "commit": training_commit(), "machine": machine(), "fold": "polite"}
    done = {line["commit"] for line in read_csv(CSV) if line["row"] == POLITE}
    if shared["commit"] in done:
        return
    folder = Path(args.out) / "polite"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "polite.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in polite.polite_pairs()))
    options = train.Config()
    splits, _ = data.split(data.read_pairs(path)[0], [], options.val_share, options.test_share)
    line = dpo_row(folder, POLITE, {"model": args.model, "pairs": path}, splits["test"], False)
    append_csv(CSV, FIELDS, shared | line)
    for baseline in baselines(folder / "polite_pairs" / "sft", splits["test"], ""):
        append_csv(CSV, FIELDS, shared | baseline)


# 4. The grid ------------------------------------------------------------------------------------

GRID_CSV = ROOT / "results" / "grid.csv"
GRID_FIELDS = ("adapter", "lr", "epochs", "updates", "start_loss", "best_loss", "best_error",
               "best_step", "last_loss", "last_accuracy", "pairs", "commit", "machine", "dtype",
               "command", "seconds")
GRID = [                       # the first one makes the SFT that all share
    *({"adapter": "parallel", "lr": lr, "epochs": 1} for lr in (1e-3, 3e-5, 1e-4, 3e-4, 3e-3)),
    *({"adapter": "none", "lr": lr, "epochs": 1} for lr in (3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4)),
    *({"adapter": "parallel", "lr": lr, "epochs": 3} for lr in (3e-5, 1e-4)),
]
GRID_SHARED = FLOAT32 | {"subsets": ",".join(SUBSETS), "val_share": 0.25, "patience": 99,
                         "vals": 13}


def grid_run(start: dict, options: dict, pairs: list[data.Pair]) -> dict:
    """A line of grid.csv: one run, of whose validation losses the lowest and the last are kept."""
    run = train_once(start | options)
    out = start["out"]
    vals = [line for line in lines_of(out) if (line["event"], line["stage"]) == ("val", "dpo")]
    best = min(vals, key=lambda line: line["loss"])
    loss, error = loss_and_error(margins_of(out, pairs), beta=0.1)
    assert abs(loss - best["loss"]) < 1e-4, (loss, best)
    return options | {
        "updates": vals[-1]["step"], "start_loss": vals[0]["loss"], "best_loss": best["loss"],
        "best_error": error, "best_step": best["step"], "last_loss": vals[-1]["loss"],
        "last_accuracy": vals[-1]["rewards/accuracies"], "pairs": len(pairs),
        "dtype": run["dtype"], "command": run["command"], "seconds": run["seconds"],
    }


def try_grid(args: argparse.Namespace) -> None:
    """All runs that grid.csv lacks. Only their validation losses count; no test is looked at."""
    conftest.offline_vocabulary()
    folder = Path(args.out) / "grid"
    write_fold(clean_pool(Path(args.hh_dir)), 0, folder / "hh")
    trained, _ = pairs_of_fold(folder / "hh", "train")
    tested, _ = pairs_of_fold(folder / "hh", "test")
    pairs = data.split(trained, tested, GRID_SHARED["val_share"], 0.2)[0]["val"]
    common = {"commit": training_commit(), "machine": machine()}
    done = {(line["command"], line["commit"]) for line in read_csv(GRID_CSV)}

    def line_of(options: dict) -> dict | None:
        name = "_".join(str(value) for value in options.values())
        start = GRID_SHARED | {"hh_dir": folder / "hh", "out": folder / name}
        if options is GRID[0]:
            start |= {"model": args.model, "sft_epochs": 1}
        else:
            start |= {"model": folder / "parallel_0.001_1" / "sft", "sft_epochs": 0}
        if (command_of(start | options), common["commit"]) in done:
            return None
        return grid_run(start, options, pairs)

    with ThreadPoolExecutor(args.jobs) as pool:
        first = [line_of(GRID[0])]
        for line in itertools.chain(first, pool.map(line_of, GRID[1:])):
            if line is not None:
                append_csv(GRID_CSV, GRID_FIELDS, common | line)


# 5. The tables ----------------------------------------------------------------------------------

BASELINES = ("the longer answer", "SFT, summed", "SFT, per token")


def mean_score(scores: str) -> float:
    return statistics.fmean(int(score) / 2 for score in scores)


def with_interval(scores: str) -> str:
    """Accuracy, with Wilson's interval over the pairs."""
    if not scores:
        return ""
    mean = mean_score(scores)
    low, high = dpo.wilson_interval(mean, len(scores))
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def difference(scores: str, baseline: str) -> str:
    """The mean difference on the same pairs, with its interval."""
    differences = [(int(a) - int(b)) / 2 for a, b in zip(scores, baseline, strict=True)]
    error = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.fmean(differences):+.3f} +- {error:.3f}"


def where(scores: str, marks: str, mark: str) -> str:
    """The scores of the pairs that have this mark."""
    return "".join(score for score, own in zip(scores, marks, strict=True) if own == mark)


def whole_folds(lines: list[dict]) -> list[str]:
    """The folds that have every row of the main table."""
    found = {(line["row"], line["fold"]) for line in lines}
    whole = []
    for fold in range(FOLDS):
        if all((name, str(fold)) in found for name in (*BASELINES, *ROWS)):
            whole.append(str(fold))
    return whole


def main_table(lines: list[dict]) -> str:
    """Baselines, and DPO, in all folds that are whole. lines: of one commit."""
    folds = whole_folds(lines)
    scores = {}
    kinds = ""
    for name in (*BASELINES, *ROWS):
        own = {line["fold"]: line for line in lines if line["row"] == name}
        scores[name] = "".join(own[fold]["scores"] for fold in folds)
        if name == BASELINES[0]:
            kinds = "".join(own[fold]["kinds"] for fold in folds)
    longer = scores[BASELINES[0]]                      # it marks the pairs by length, too
    best = max(BASELINES, key=lambda name: mean_score(scores[name]))

    rows = []
    for name, own in scores.items():
        rows.append([name, with_interval(own),
                     difference(own, scores[best]) if name not in BASELINES else "",
                     with_interval(where(own, kinds, "-")), with_interval(where(own, kinds, "h")),
                     with_interval(where(own, longer, "2")), with_interval(where(own, longer, "0")),
                     with_interval(where(own, longer, "1"))])
    header = ["", f"accuracy on {len(longer):,} pairs, folds {', '.join(folds)}",
              f"against \"{best}\"", "helpful", "harmless", "chosen is longer",
              "chosen is shorter", "equally long"]
    return judge.table(header, rows)


def fold_table(lines: list[dict]) -> str:
    """Fold 0: all runs, with what else was measured."""
    rows = []
    for line in lines:
        if line["fold"] == "0" and line["command"]:
            numbers = [line["row"], with_interval(line["scores"]), line["best_step"]]
            for name in ("loss", "rewards/margins", "chosen_below_reference"):
                numbers.append(float(line[name]))
            numbers.append(line["kl"])
            for name in ("words", "distinct-1", "distinct-2", "ended"):
                numbers.append(float(line[name]))
            numbers += [f"{int(line['parameters']):,}", line["seconds"], line["memory_gb"]]
            rows.append(numbers)
    header = ["", "accuracy", "best update", "loss", "margin", "chosen below reference", "KL, nats",
              "words", "distinct-1", "distinct-2", "ended with end-of-text",
              "parameters that train", "seconds", "GB"]
    return judge.table(header, rows)


def polite_table(lines: list[dict]) -> str:
    """The polite pairs: DPO, and always the longer answer, on the same pairs."""
    rows = []
    for line in lines:
        if line["fold"] == "polite":
            numbers = []
            for name in ("loss", "rewards/margins"):
                numbers.append(float(line[name]) if line[name] else "")
            rows.append([line["row"], with_interval(line["scores"]), *numbers, line["best_step"],
                         line["seconds"]])
    header = ["", "accuracy", "loss", "margin", "best update", "seconds"]
    return judge.table(header, rows)


def grid_table(lines: list[dict]) -> str:
    """The grid: validation losses of DPO by what trained, rate and epochs."""
    rows = []
    for line in lines:
        low, high = dpo.wilson_interval(float(line["last_accuracy"]), int(line["pairs"]))
        rows.append([line["adapter"], f"{float(line['lr']):.0e}", line["epochs"], line["updates"],
                     f"{float(line['best_loss']):.4f} +- {float(line['best_error']):.4f}",
                     line["best_step"], f"{float(line['last_loss']):.4f}",
                     f"{float(line['last_accuracy']):.3f} ({low:.3f} to {high:.3f})"])
    header = ["`--adapter`", "`--lr`", "`--epochs`", "updates", "lowest loss", "at update",
              "loss at the end", "accuracy at the end"]
    return judge.table(header, rows)


def newest(lines: list[dict], is_polite: bool) -> tuple[str, list[dict]]:
    """The lines of the newest commit, of the polite pairs or of others; before them their source.
    """
    lines = [line for line in lines if (line.get("fold") == "polite") == is_polite]
    commit = lines[-1]["commit"]
    lines = [line for line in lines if line["commit"] == commit]
    machines = sorted({f"{line['machine']}, {line['dtype']}" for line in lines if line["dtype"]})
    return f"Training code of commit {commit}, on {'; '.join(machines)}.", lines


def tables() -> str:
    """The tables of results/README.md, from runs.csv and grid.csv."""
    lines = read_csv(CSV)
    source, polite_lines = newest(lines, is_polite=True)
    parts = [source, polite_table(polite_lines)]
    source, fold_lines = newest(lines, is_polite=False)
    parts += [source, main_table(fold_lines), fold_table(fold_lines)]
    grid_lines = read_csv(GRID_CSV)
    if grid_lines:
        source, grid_lines = newest(grid_lines, is_polite=False)
        parts += [source, grid_table(grid_lines)]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="as for train.py")
    parser.add_argument("--hh_dir", default="hh-rlhf", help="a folder that holds all subsets")
    parser.add_argument("--out", default="out/results", help="a folder for the runs")
    parser.add_argument("--only", default="", help="rows whose names match this expression")
    parser.add_argument("--fold", type=int, choices=range(FOLDS),
                        help="this fold alone, to let other folds run elsewhere at the same time")
    parser.add_argument("--grid", action="store_true", help="compare rates and epochs instead")
    parser.add_argument("--jobs", type=int, default=1, help="runs of the grid at the same time")
    parser.add_argument("--polite", action="store_true", help="train on polite pairs instead")
    parser.add_argument("--table", action="store_true", help="print the tables, and stop")
    args = parser.parse_args()
    if args.table:
        print(tables())
    elif not args.model:
        parser.error("expected --model")
    elif args.grid:
        try_grid(args)
    elif args.polite:
        measure_polite(args)
    else:
        measure(args)


if __name__ == "__main__":
    main()
