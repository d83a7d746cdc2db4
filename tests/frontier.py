"""Reward against KL in the demo's world, whose truth is known: python tests/frontier.py

The paper's figure 2 for DPO with several beta, beside the exact optimum of RLHF's objective,
pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x) (its equation 4). The true reward is 4 for an
answer with an exclamation mark and 0 for others, so pi* depends on the reference's share of such
answers alone. KL is sampled: a mean of log pi(y|x) - log pi_ref(y|x) over the policy's answers.
Needs matplotlib, as requirements-dev.txt names it.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from judge import Answer, answer_logp
from model import GPT2, generate

REWARD = data.DEMO_REWARD
BETAS = (0.5, 1.0, 2.0, 4.0, 8.0)


class Point(NamedTuple):
    """What a run with one beta came to."""
    beta: float
    share: float               # of the reference's answers that have the reward
    kl: float                  # of the policy to the reference, nats an answer
    kl_error: float            # the standard error of it
    reward: float              # the mean over the policy's answers


def optimum(share: float, beta: float) -> tuple[float, float]:
    """KL and mean reward of pi*, where the reference gives `share` of its answers the reward."""
    odds = share / (1 - share) * math.exp(REWARD / beta)
    p = odds / (1 + odds)
    kl = p * math.log(p / share) + (1 - p) * math.log((1 - p) / (1 - share))
    return kl, REWARD * p


def cheerful(answers: list[list[int]]) -> float:
    """The share of the answers that have an exclamation mark."""
    return sum(ord("!") in answer for answer in answers) / len(answers)


def measure(beta: float, count: int) -> Point:
    """A demo run with this beta, measured on `count` answers."""
    with tempfile.TemporaryDirectory() as out:
        code = train.main(["--demo", "--out", f"{out}/run", "--beta", str(beta)])
        if code not in (0, 1):                         # 1: the demo's goal, which is not ours here
            raise SystemExit(f"train.py ended with {code}")
        reference = GPT2.from_pretrained(Path(out, "run", "sft")).requires_grad_(False)
        policy = GPT2.from_pretrained(Path(out, "run", "best")).requires_grad_(False)

    texts = sorted({pair.prompt for pair in data.demo_pairs(3000, 1)})
    copies = math.ceil(count / len(texts))
    prompts = [list(text.encode()) for text in texts * copies][:count]
    before = generate(reference, prompts, 30, end_token=256, seed=5)
    answers = generate(policy, prompts, 30, end_token=256, seed=5)

    ratios = []
    for prompt, tokens in zip(prompts, answers, strict=True):
        answer = Answer(prompt, tokens, text="", end="")
        ratios.append(answer_logp(policy, answer) - answer_logp(reference, answer))
    ratios = torch.tensor(ratios)
    return Point(beta, cheerful(before), ratios.mean().item(),
                 (ratios.std() / math.sqrt(count)).item(), REWARD * cheerful(answers))


def draw(points: list[Point], picture: Path) -> None:
    """The exact optimum as a line, with a circle for each beta, and the runs as crosses."""
    from matplotlib.figure import Figure  # of requirements-dev.txt
    figure = Figure((6, 4), layout="constrained")
    axis = figure.subplots()
    share = sum(point.share for point in points) / len(points)
    line = [optimum(share, 0.3 * 1.1**i) for i in range(60)]
    axis.plot(*zip(*line, strict=True), color="black", label="exact optimum, every beta")
    for i, point in enumerate(points):
        axis.plot(*optimum(share, point.beta), "o", color=f"C{i}", fillstyle="none", markersize=10)
        axis.plot(point.kl, point.reward, "x", color=f"C{i}", markersize=8,
                  label=f"DPO, beta {point.beta:g}")
    axis.set(xlabel="KL(policy || reference), nats an answer", ylabel="true reward, of 4 at most",
             title="circles: the optimum of that beta")
    axis.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--picture", default="pictures/frontier.png")
    parser.add_argument("--answers", type=int, default=2000, help="of the policy, for each beta")
    args = parser.parse_args()
    points = [measure(beta, args.answers) for beta in BETAS]
    print("| beta | KL of DPO | optimal KL | reward of DPO | optimal reward |\n" + 5 * "|---" + "|")
    for point in points:
        best_kl, best_reward = optimum(point.share, point.beta)
        print(f"| {point.beta} | {point.kl:.3f} ± {1.96 * point.kl_error:.3f} | {best_kl:.3f} | "
              f"{point.reward:.2f} | {best_reward:.2f} |")
    draw(points, Path(args.picture))


if __name__ == "__main__":
    main()
