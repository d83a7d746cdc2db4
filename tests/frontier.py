"""Reward against KL in the demo's world, whose truth is known: python tests/frontier.py

The paper's figure 2 for DPO with several beta, beside the exact optimum of RLHF's objective,
pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x) (its equation 4). The true reward is 4 for an
answer with an exclamation mark and 0 for others, so pi* depends on the reference's share of such
answers alone. KL is sampled: a mean of log pi(y|x) - log pi_ref(y|x) over the policy's answers.
Needs matplotlib.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from judge import answer_logp
from model import GPT2, generate

REWARD = 4.0


def optimum(share: float, beta: float) -> tuple[float, float]:
    """KL and mean reward of pi*, where the reference gives `share` of its answers the reward."""
    odds = share / (1 - share) * math.exp(REWARD / beta)
    p = odds / (1 + odds)
    kl = p * math.log(p / share) + (1 - p) * math.log((1 - p) / (1 - share))
    return kl, REWARD * p


def measure(beta: float, answers: int) -> tuple[float, float, float, float]:
    """A demo run with this beta: the reference's share, then the policy's KL, its error, reward."""
    with tempfile.TemporaryDirectory() as out:
        train.main(["--demo", "--out", f"{out}/run", "--beta", str(beta)])
        reference, policy = (GPT2.from_pretrained(Path(out, "run", x)) for x in ("sft", "best"))
    prompts = sorted({pair.prompt for pair in data.demo_pairs(3000, 1)})
    prompts = [list(p.encode()) for p in prompts * math.ceil(answers / len(prompts))][:answers]
    shares, ratios = [], []
    for model in (reference, policy):
        new = generate(model, prompts, 30, end_token=256, seed=5)
        shares.append(sum(ord("!") in answer for answer in new) / answers)
    with torch.no_grad():
        for before, tokens in zip(prompts, new, strict=True):
            answer = {"before": before, "tokens": tokens}
            ratios.append(answer_logp(policy, answer) - answer_logp(reference, answer))
    kl = torch.tensor(ratios)
    return shares[0], kl.mean().item(), (kl.std() / math.sqrt(answers)).item(), REWARD * shares[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--picture", default="pictures/frontier.png")
    parser.add_argument("--answers", type=int, default=2000, help="of the policy, for each beta")
    args = parser.parse_args()
    rows = [(beta, *measure(beta, args.answers)) for beta in (0.5, 1.0, 2.0, 4.0, 8.0)]
    print("| beta | KL of DPO | optimal KL | reward of DPO | optimal reward |\n" + 5 * "|---" + "|")
    for beta, share, kl, error, reward in rows:
        best_kl, best = optimum(share, beta)
        print(f"| {beta} | {kl:.3f} ± {1.96 * error:.3f} | {best_kl:.3f} | "
              f"{reward:.2f} | {best:.2f} |")
    from matplotlib.figure import Figure
    figure = Figure((6, 4), layout="constrained")
    axis, share = figure.subplots(), sum(row[1] for row in rows) / len(rows)
    line = [optimum(share, 0.3 * 1.1**i) for i in range(60)]
    axis.plot(*zip(*line, strict=True), color="black", label="exact optimum, every beta")
    for i, (beta, _, kl, _, reward) in enumerate(rows):
        axis.plot(*optimum(share, beta), "o", color=f"C{i}", fillstyle="none", markersize=10)
        axis.plot(kl, reward, "x", color=f"C{i}", markersize=8, label=f"DPO, beta {beta:g}")
    axis.set(xlabel="KL(policy || reference), nats an answer", ylabel="true reward, of 4 at most",
             title="circles: the optimum of that beta")
    axis.legend()
    Path(args.picture).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    main()
