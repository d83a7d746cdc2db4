"""What could be learnt of the real pairs? python tests/probe.py --model FOLDER --hh_dir FOLDER

A linear model in place of DPO. The reward of an answer is a weighted sum of its features, where DPO
has beta * log(pi / pi_ref). The loss is DPO's, -log sigmoid(reward of chosen - reward of rejected),
plus a weight decay. It is fitted to the same five folds as in tests/results.py. Writes
results/probe.csv; `--table` prints the table of results/README.md from that file.
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
HIDDEN = "the model's last hidden states"              # their mean over the answer's tokens
ROWS = (LENGTH, LENGTH_BY_KIND, WORDS, WORDS_BY_KIND, HIDDEN)
SIDES = ("chosen", "rejected")


def words_of(text: str) -> list[str]:
    """Words of two or more letters or digits, in small letters."""
    return re.findall(r"\w\w+", text.lower())


def length_features(pairs: list[data.Pair]) -> Tensor:
    """(pairs, 1): log(1 + the number of words between spaces), chosen minus rejected."""
    lengths = [[math.log1p(len(getattr(pair, side).split())) for side in SIDES] for pair in pairs]
    chosen, rejected = torch.tensor(lengths, dtype=torch.float64).unbind(1)
    return (chosen - rejected)[:, None]


def word_features(pairs: list[data.Pair], trained: list[bool]) -> Tensor:
    """(pairs, words): the answers' tf-idf, chosen minus rejected.

    Of the words that stand in at least 3 answers of the training part. In an answer a word counts

        (1 + log(times in this answer)) * (1 + log((1 + answers) / (1 + answers with the word)))

    and an answer is scaled to the norm 1 before the difference is taken.
    """
    counts = {side: [Counter(words_of(getattr(pair, side))) for pair in pairs] for side in SIDES}
    answers_with = Counter()
    for side in SIDES:
        for count, is_trained in zip(counts[side], trained, strict=True):
            if is_trained:
                answers_with.update(count.keys())          # 1 for each answer
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
    """(pairs, C): the last layer's hidden states, their mean over an answer's tokens, chosen minus
    rejected, by the model in the folder."""
    model = judge.load(Path(path))
    token_pairs, _ = data.tokenize(pairs, data.encoding_of(demo=False), max_tokens=512,
                                   max_prompt_tokens=256)
    assert len(token_pairs) == len(pairs)
    rows = []
    for pair in token_pairs:
        means = []
        for side in SIDES:
            ids = torch.tensor([[*pair.prompt, *getattr(pair, side)]],
                               device=model.wte.weight.device)
            length = ids.shape[1]
            positions = torch.arange(length, device=ids.device)[None, :]
            # One text in the row, so a token sees itself and those before it.
            attn_mask = torch.ones(1, length, length, dtype=torch.bool, device=ids.device).tril()
            hidden = model.hidden(ids, positions, attn_mask)[0]
            means.append(hidden[len(pair.prompt):].mean(0).double().cpu())
        rows.append(means[0] - means[1])
    return torch.stack(rows)


def fit(features: Tensor, weight_decay: float) -> Tensor:
    """The weights (F,) that minimise the mean of -log sigmoid(features @ weights), plus
    weight_decay / 2 times their squared length. One step of LBFGS has up to 300 iterations."""
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
    part, after a fit to the other three quarters. No pair of the test is looked at.
    """
    root_mean_square = features[trained].square().sum(1).mean().sqrt()
    features = features / root_mean_square             # so a decay is the same for all features
    losses = {}
    for decay in DECAYS:
        weights = fit(features[trained & ~held_out], decay)
        losses[decay] = -F.logsigmoid(features[trained & held_out] @ weights).mean().item()
    best = min(losses, key=losses.get)
    weights = fit(features[trained], best)
    return best, features[~trained] @ weights


def measure(args: argparse.Namespace) -> Iterator[dict]:
    """A line of probe.csv for each kind of features and each fold."""
    conftest.offline_vocabulary()
    pool = results.clean_pool(Path(args.hh_dir))
    pairs = pool["harmless"] + pool["helpful"]
    is_harmless = torch.arange(len(pairs)) < len(pool["harmless"])
    folds = torch.tensor([results.fold_of(pair) for pair in pairs])
    # fold_of takes another hash of the prompt, so this is a quarter of each fold.
    held_out = torch.tensor([data.fraction_of(pair.prompt) < 0.25 for pair in pairs])

    def by_kind(features: Tensor) -> Tensor:
        """(pairs, 2 F): a weight of its own for each kind of prompt."""
        mask = is_harmless[:, None]
        return torch.cat([features.masked_fill(~mask, 0.0), features.masked_fill(mask, 0.0)], dim=1)

    length = length_features(pairs)
    hidden = hidden_features(args.model, pairs)
    shared = {"commit": results.training_commit(), "machine": results.machine()}
    for fold in range(results.FOLDS):
        trained = folds != fold
        words = word_features(pairs, trained.tolist())
        rows = {
            LENGTH: length,
            LENGTH_BY_KIND: by_kind(length),
            WORDS: words,
            WORDS_BY_KIND: by_kind(torch.cat([length, words], dim=1)),
            HIDDEN: hidden / hidden[trained].square().mean(0).sqrt(),
        }
        for name, features in rows.items():
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
        losses = (-F.logsigmoid(torch.tensor(margins))).tolist()
        above = [loss - math.log(2) for loss in losses]        # log 2: where all rewards are equal
        error = 1.96 * statistics.stdev(above) / math.sqrt(len(above))
        rows.append([name, results.with_interval(results.scores_of(margins)),
                     f"{statistics.fmean(above):+.4f} +- {error:.4f}"])
    header = ["a linear model of", f"accuracy on {len(margins):,} pairs", "loss, above ln 2"]
    return judge.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="the folder of a GPT-2, for its hidden states")
    parser.add_argument("--hh_dir", default="hh-rlhf", help="a folder that holds all subsets")
    parser.add_argument("--table", action="store_true", help="print the table, and stop")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    if not args.model:
        parser.error("expected --model")
    lines = list(measure(args))
    CSV.unlink(missing_ok=True)                        # not before the new ones are there
    for line in lines:
        results.append_csv(CSV, FIELDS, line)
    print(table())


if __name__ == "__main__":
    main()
