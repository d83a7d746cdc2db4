"""What could be learnt of the real pairs? python tests/probe.py --model FOLDER --hh_dir FOLDER

A linear model in place of DPO: it gives each answer a reward, a weighted sum of the answer's
features, and is fitted by DPO's own loss (with these rewards) to the same five folds as in
tests/results.py. Appends to results/probe.csv; `--table` prints the table of results/README.md
from that file.
"""

import argparse
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import conftest

import data
import judge
import results

CSV = results.ROOT / "results" / "probe.csv"
FIELDS = ("row", "fold", "weight_decay", "commit", "machine", "margins")
DECAYS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
LENGTH = "length"
LENGTH_BY_KIND = "length, helpful and harmless apart"
WORDS = "words"
WORDS_BY_KIND = "words and length, helpful and harmless apart"
HIDDEN = "the model's last hidden states"
ROWS = (LENGTH, LENGTH_BY_KIND, WORDS, WORDS_BY_KIND, HIDDEN)
SIDES = ("chosen", "rejected")


def words_of(text: str) -> list[str]:
    return re.findall(r"\w\w+", text.lower())


def length_features(pairs: list[data.Pair]) -> Tensor:
    """(pairs, 1): the log of the number of words, chosen minus rejected."""
    lengths = [[math.log1p(len(getattr(pair, side).split())) for side in SIDES] for pair in pairs]
    chosen, rejected = torch.tensor(lengths, dtype=torch.float64).unbind(1)
    return (chosen - rejected)[:, None]


def word_features(pairs: list[data.Pair], trained: list[bool]) -> Tensor:
    """(pairs, words): which words stand in the answers, chosen minus rejected.

    tf-idf, with the words that stand in at least 3 answers of the training part: a word counts
    1 + log(how often it stands there), times log of how rare it is, and an answer has the norm 1.
    """
    counts = {side: [Counter(words_of(getattr(pair, side))) for pair in pairs] for side in SIDES}
    answers_with = Counter()
    for side in SIDES:
        for count, is_trained in zip(counts[side], trained, strict=True):
            if is_trained:
                answers_with.update(count.keys())
    vocabulary = sorted(word for word, count in answers_with.items() if count >= 3)
    column = {word: number for number, word in enumerate(vocabulary)}
    answer_count = 2 * sum(trained)

    features = {side: torch.zeros(len(pairs), len(vocabulary), dtype=torch.float64)
                for side in SIDES}
    for side in SIDES:
        for number, count in enumerate(counts[side]):
            for word, times in count.items():
                if word in column:
                    rarity = math.log((1 + answer_count) / (1 + answers_with[word])) + 1
                    features[side][number, column[word]] = (1 + math.log(times)) * rarity
    return F.normalize(features["chosen"]) - F.normalize(features["rejected"])


@torch.no_grad()
def hidden_features(path: str, pairs: list[data.Pair]) -> Tensor:
    """(pairs, C): the mean of the last hidden states over an answer's tokens, chosen minus
    rejected, by the model in the folder, as it was pretrained."""
    model = judge.load(Path(path))
    tokens, _ = data.tokenize(pairs, data.encoding_of(demo=False), 512, 256)
    assert len(tokens) == len(pairs)
    rows = []
    for pair in tokens:
        means = []
        for side in SIDES:
            ids = torch.tensor([[*pair.prompt, *getattr(pair, side)]],
                               device=model.wte.weight.device)
            length = ids.shape[1]
            positions = torch.arange(length, device=ids.device)[None, :]
            sees = torch.ones(1, length, length, dtype=torch.bool, device=ids.device).tril()
            hidden = model.packed_hidden(ids, positions, sees)[0]
            means.append(hidden[len(pair.prompt):].mean(0).double().cpu())
        rows.append(means[0] - means[1])
    features = torch.stack(rows)
    return features / features.std(0)


def fit(features: Tensor, weight_decay: float) -> Tensor:
    """The weights (F,) that minimise the mean of -log sigmoid(features @ weights), and
    weight_decay / 2 times their squared length."""
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -F.logsigmoid(features @ weights).mean() + weight_decay / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def margins_of_fold(features: Tensor, trained: Tensor, held_out: Tensor) -> tuple[float, Tensor]:
    """The weight decay, and the margins of the pairs that are not trained on.

    The decay is the one of DECAYS with the lowest loss on the `held_out` quarter of the training
    part, after fitting the other three. No pair of the test is looked at.
    """
    losses = {}
    for decay in DECAYS:
        weights = fit(features[trained & ~held_out], decay)
        losses[decay] = -F.logsigmoid(features[trained & held_out] @ weights).mean().item()
    best = min(losses, key=losses.get)
    return best, features[~trained] @ fit(features[trained], best)


def measure(args: argparse.Namespace) -> Iterator[dict]:
    """A line for each row and fold."""
    conftest.offline_vocabulary()
    pool = results.clean_pool(Path(args.hh_dir))
    pairs = pool["harmless"] + pool["helpful"]
    kind = torch.tensor([1.0] * len(pool["harmless"]) + [-1.0] * len(pool["helpful"])).double()
    folds = torch.tensor([results.fold_of(pair) for pair in pairs])
    held_out = torch.tensor([data.fraction_of(pair.prompt) < 0.25 for pair in pairs])
    length = length_features(pairs)
    length_by_kind = torch.cat([length, length * kind[:, None]], dim=1)
    hidden = hidden_features(args.model, pairs)
    shared = {"commit": results.training_commit(), "machine": results.machine()}
    for fold in range(results.FOLDS):
        trained = folds != fold
        words = word_features(pairs, trained.tolist())
        words_by_kind = torch.cat([words, words * kind[:, None]], dim=1)
        rows = {
            LENGTH: length,
            LENGTH_BY_KIND: length_by_kind,
            WORDS: words,
            WORDS_BY_KIND: torch.cat([length_by_kind, words_by_kind], dim=1),
            HIDDEN: hidden,
        }
        for name, features in rows.items():
            features = features / features.square().sum(1).mean().sqrt()   # one size for DECAYS
            decay, margins = margins_of_fold(features, trained, held_out)
            text = " ".join(f"{margin:.3f}" for margin in margins.tolist())
            yield shared | {"row": name, "fold": fold, "weight_decay": decay, "margins": text}


def table() -> str:
    """Accuracy and loss over all folds, from probe.csv."""
    lines = results.read_csv(CSV)
    rows = []
    for name in ROWS:
        margins = []
        for line in lines:
            if line["row"] == name:
                margins += [float(margin) for margin in line["margins"].split()]
        gains = [F.softplus(torch.tensor(-margin)).item() - math.log(2) for margin in margins]
        error = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains))
        rows.append([name, results.with_interval(results.scores_of(margins)),
                     f"{statistics.fmean(gains):+.4f} +- {error:.4f}"])
    header = ["a linear model of", f"accuracy on {len(margins):,} pairs", "loss, above ln 2"]
    return judge.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="a GPT-2, for its hidden states")
    parser.add_argument("--hh_dir", default="hh-rlhf", help="a folder that holds all subsets")
    parser.add_argument("--table", action="store_true", help="print the table, and stop")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    if not args.model:
        parser.error("expected --model")
    CSV.unlink(missing_ok=True)
    for line in measure(args):
        results.append_csv(CSV, FIELDS, line)
    print(table())


if __name__ == "__main__":
    main()
