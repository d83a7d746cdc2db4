"""The bug collection: known bugs of DPO code, what each one does, and the test that catches it.

    python tests/bugs.py                 each bug: run its test, train the demo with it, print a row
    python tests/bugs.py --only NAME     one of them
    python tests/bugs.py --no_training   the tests alone: each must fail
    python tests/bugs.py --list          the names
    python tests/bugs.py --table         the table of results/README.md, from results/bugs.csv

A bug is a small patch. It names the text that it changes, and fails loudly where that text is gone.
Each is applied to a copy of the project, so the project itself stays as it is.
"""

import argparse
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "results" / "bugs.csv"

# 1. The bugs ------------------------------------------------------------------------------------


class Bug(NamedTuple):
    name: str
    what: str                  # it does, in a sentence
    seen: str                  # where, or where the same symptom was told; "" if nowhere in public
    test: str                  # that catches it
    patches: list[tuple[str, str, str]]            # (file, old text, new text)
    reached: bool = True       # does the demo run this code?


BUGS = [
    # Log-probabilities.
    Bug("no shift", "a token is predicted from itself, not from the token before it",
        "0xallam/Direct-Preference-Optimization",
        "tests/test_data.py::test_a_worked_batch",
        [("data.py", "[prompt_length - 1, *range(start, stop)]",
          "[*range(start, stop), stop - 1]")]),
    Bug("mean, not sum", "log-probabilities are means over tokens, so long answers weigh less",
        "eric-mitchell/direct-preference-optimization #40, trl #789, minimind #298",
        "tests/test_dpo.py::test_packed_logps_are_sequence_logps_with_their_gradients",
        [("dpo.py", "own_logps.sum(1)", "own_logps.sum(1) / batch.response_lengths")]),
    Bug("prompt counted", "the prompt's tokens count as if they were of the response",
        "OpenRLHF #235, #237, #294",
        "tests/test_data.py::test_a_worked_batch",
        [("data.py", "[prompt_length - 1, *range(start, stop)]",
          "[*range(prompt_length), *range(start, stop)]"),
         ("data.py", "responses.append(getattr(pair, side))",
          "responses.append(np.concatenate([pair.prompt[1:], getattr(pair, side)]))")]),
    Bug("padding counted", "in padded rows, all that follows the prompt counts, padding too",
        "0xallam/Direct-Preference-Optimization",
        "tests/test_dpo.py::test_it_does_not_matter_what_stands_in_the_padding",
        [("dpo.py", "    is_response = mask[:, 1:]   ",
          "    is_response = mask[:, 1:].cumsum(1) > 0   ")], reached=False),
    Bug("end of text masked", "end-of-text is left out of the sum, as it is also used for padding",
        "trl PR #6357",
        "tests/test_dpo.py::test_the_end_of_text_token_counts",
        [("dpo.py", "    response_count = len(",
          "    logps = logps.masked_fill(batch.targets == len(head) - 1, 0.0)\n"
          "    response_count = len(")]),
    Bug("first token lost", "the first token of each response is left out of the sum",
        "minimind #395",
        "tests/test_data.py::test_a_worked_batch",
        [("data.py", "[prompt_length - 1, *range(start, stop)]", "[*range(start, stop)]"),
         ("data.py", "responses.append(getattr(pair, side))",
          "responses.append(getattr(pair, side)[1:])")]),
    Bug("sums in bfloat16", "log-probabilities are added up in the number format of the products",
        "trl #878",
        "tests/test_dpo.py::test_sequence_logps_sum_in_float32_when_logits_are_bfloat16",
        [("dpo.py", "        return x.float()\n", "        return x\n")], reached=False),
    Bug("second response's positions", "in a packed row the rejected response's positions go on "
        "after the chosen one's, not after the prompt's", "nanoVLM PR #204",
        "tests/test_data.py::test_a_worked_batch",
        [("data.py", "positions.extend(range(prompt_length, prompt_length + len(response)))",
          "positions.extend(range(start, stop))")]),
    Bug("responses see each other", "in a packed row the rejected response sees the chosen one",
        "trl #784, transformers #25452", "tests/test_data.py::test_a_worked_batch",
        [("data.py", "(in_prompt | same_part) & not_after", "not_after")]),

    # The loss.
    Bug("chosen and rejected swapped", "the loss prefers the rejected response", "",
        "tests/test_dpo.py::test_the_loss_and_the_rewards_of_the_worked_pair",
        [("dpo.py", "-F.logsigmoid(chosen_reward - rejected_reward)",
          "-F.logsigmoid(rejected_reward - chosen_reward)")]),
    Bug("beta left out of the rewards",
        "the rewards are plain log-ratios (the demo's beta is 1, so it shows nothing)", "",
        "tests/test_dpo.py::test_the_loss_and_the_rewards_of_the_worked_pair",
        [("dpo.py", "    chosen_reward = beta * (", "    chosen_reward = ("),
         ("dpo.py", "    rejected_reward = beta * (", "    rejected_reward = (")]),
    Bug("beta twice", "the margin of the rewards, which hold beta, is multiplied by beta again "
        "(the demo's beta is 1, so it shows nothing)", "",
        "tests/test_dpo.py::test_the_loss_and_the_rewards_of_the_worked_pair",
        [("dpo.py", "-F.logsigmoid(chosen_reward - rejected_reward)",
          "-F.logsigmoid(beta * (chosen_reward - rejected_reward))")]),
    Bug("log(sigmoid)", "log(sigmoid(x)) instead of logsigmoid(x): infinite where x is below -104",
        "tinker-cookbook PR #188, DeepSpeedExamples #423",
        "tests/test_dpo.py::test_a_margin_far_below_0_has_a_finite_loss",
        [("dpo.py", "-F.logsigmoid(chosen_reward - rejected_reward)",
          "-torch.log(torch.sigmoid(chosen_reward - rejected_reward))")]),

    # The reference.
    Bug("gradient through the reference", "the reference is the policy itself, with its graph",
        "trl #4023 (symptom)",
        "tests/test_train.py::test_half_precision_trains_and_goes_on_bit_for_bit",
        [("train.py", "metrics = dpo.dpo_metrics(logps, batch.reference_logps, config.beta)",
          "metrics = dpo.dpo_metrics(logps, logps, config.beta)")]),
    Bug("the reference is the policy of now", "the reference is not kept, but asked anew in each "
        "update, of the weights of that moment", "",
        "tests/test_train.py::test_half_precision_trains_and_goes_on_bit_for_bit",
        [("train.py", "metrics = dpo.dpo_metrics(logps, batch.reference_logps, config.beta)",
          "metrics = dpo.dpo_metrics(logps, logps.detach(), config.beta)")]),
    Bug("another checkpoint as the reference",
        "the reference is not the model that DPO starts from", "trl #1236",
        "tests/test_train.py::test_before_the_first_update_the_policy_is_the_reference",
        [("train.py", "reference_tables[name] = dpo.reference_logps(logps_of, model, tracked, "
          "len(pairs))",
          "reference_tables[name] = dpo.reference_logps(logps_of, "
          "GPT2(model.config).to(machine.device), tracked, len(pairs))")]),
    Bug("reference of other pairs", "the kept log-probabilities are read in another order", "",
        "tests/test_data.py::test_a_batch_has_its_own_pairs_reference_chosen_first",
        [("data.py", "reference_table[0, indices]", "reference_table[0, :len(indices)]"),
         ("data.py", "reference_table[1, indices]", "reference_table[1, :len(indices)]")]),
    Bug("dropout in the policy alone", "dropout is on in training, and off for the reference",
        "trl #639, #744; 0xallam/Direct-Preference-Optimization",
        "tests/test_model.py::test_the_same_tokens_give_the_same_logits_in_training_mode",
        [("model.py", 'x = F.gelu(x, approximate="tanh")',
          'x = F.dropout(F.gelu(x, approximate="tanh"), 0.1, torch.is_grad_enabled())')]),
    Bug("adapter that is no identity", "the adapter's last layer starts at random, not at 0", "",
        "tests/test_model.py::test_a_parallel_adapter_is_the_identity_at_first_and_alone_trains",
        [("model.py", "            nn.init.zeros_(adapter.c_proj.weight)", "            pass")]),

    # Updates.
    Bug("rate of 0 for ever", "the warm-up begins at 0, and the scheduler never steps",
        "trl #1627 (symptom)",
        "tests/test_fit.py::test_the_rate_is_what_the_optimizer_uses",
        [("train.py", "lr = dpo.cosine_lr(state.step, peak_lr", "lr = dpo.cosine_lr(0, peak_lr"),
         ("dpo.py", "peak * (step + 1) / warmup_steps", "peak * step / warmup_steps")]),
    Bug("frozen weights",
        "the last layer of an adapter, which is 0, does not train, so only biases do",
        "trl #1311 (symptom)",
        "tests/test_model.py::test_a_parallel_adapter_is_the_identity_at_first_and_alone_trains",
        [("model.py", "            nn.init.zeros_(adapter.c_proj.weight)",
          "            nn.init.zeros_(adapter.c_proj.weight).requires_grad_(False)")]),
    Bug("adapter of zeros",
        "both layers of an adapter start at 0, so only its last bias trains", "",
        "tests/test_model.py::test_a_parallel_adapter_is_the_identity_at_first_and_alone_trains",
        [("model.py", "            nn.init.zeros_(adapter.c_proj.weight)",
          "            nn.init.zeros_(adapter.c_proj.weight)\n"
          "            nn.init.zeros_(adapter.c_fc.weight)")]),
    Bug("head without a gradient",
        "the embedding, which is also the head, trains by one path alone", "",
        "tests/test_dpo.py::test_packed_logps_are_sequence_logps_with_their_gradients",
        [("dpo.py", "    head = model.wte.weight  ", "    head = model.wte.weight.detach()  ")]),
    Bug("gradients not cleared", "each update also has the gradients of all earlier ones", "",
        "tests/test_first_edition.py",
        [("dpo.py", "\n    optimizer.zero_grad()\n", "\n")]),
    Bug("nan is trained on", "an update is made although its loss or gradient is not finite",
        "minimind #365",
        "tests/test_dpo.py::test_a_gradient_that_is_not_finite_changes_nothing",
        [("dpo.py", "    if finite:\n        scaler.step(optimizer)", "    if True:\n"
          "        scaler.step(optimizer)")], reached=False),
    Bug("means over micro-batches", "each micro-batch weighs the same, however many pairs it has",
        "mlx-lm PR #1413",
        "tests/test_dpo.py::test_micro_batches_weigh_by_their_pairs",
        [("dpo.py", 'loss = metrics["loss"].sum() / pair_count',
          'loss = metrics["loss"].mean() / len(micro_batches)')], reached=False),
    Bug("short batch like a full one", "a validation's last, short batch weighs like a full one",
        "",
        "tests/test_dpo.py::test_val_step_returns_means_over_the_pairs_of_uneven_batches",
        [("dpo.py", "        values = torch.cat([part[name] for part in parts])  ",
          "        values = torch.stack([part[name].mean() for part in parts])  ")]),
    Bug("worse weights saved", "each validation saves its weights, whether they are better or not",
        "", "tests/test_fit.py::test_the_best_is_kept_when_later_ones_are_worse",
        [("train.py", 'if metrics["loss"] < state.best_loss:', "if True:")]),
    Bug("order lost at resume",
        "a resumed run begins its epoch anew: some pairs come twice, others never",
        "ms-swift #10050, accelerate PR #4071",
        "tests/test_fit.py::test_a_killed_run_goes_on_from_any_save",
        [("train.py", "start=state.step, reference_table", "start=0, reference_table")],
        reached=False),

    # Data.
    Bug("prompt cut for one side", "how much of a long prompt stays depends on the chosen response "
        "alone", "LlamaFactory #4402", "tests/test_data.py::"
        "test_a_prompt_is_cut_once_from_the_left_and_leaves_the_rest_to_both_responses",
        [("data.py", "        prompt = whole_prompt[-max_prompt_tokens:]",
          "        prompt = whole_prompt[-max(1, max_tokens - len(whole_chosen)):]")],
        reached=False),
    Bug("end of text on a cut response", "a response that was cut ends with end-of-text, so the "
        "model learns to stop in the middle", "",
        "tests/test_data.py::"
        "test_a_response_is_cut_from_the_right_and_then_has_no_end_of_text",
        [("data.py", "        chosen = whole_chosen[:room]",
          "        chosen = [*whole_chosen[:-1][:room - 1], encoding.eot_token]"),
         ("data.py", "        rejected = whole_rejected[:room]",
          "        rejected = [*whole_rejected[:-1][:room - 1], encoding.eot_token]")],
        reached=False),
    Bug("no end of text", "responses end without an end-of-text token, so the model never stops",
        "eric-mitchell/direct-preference-optimization #35",
        "tests/test_data.py::test_a_response_keeps_its_space_and_gets_one_end_of_text",
        [("data.py", "[*encoding.encode_ordinary(pair.chosen), encoding.eot_token]",
          "encoding.encode_ordinary(pair.chosen)"),
         ("data.py", "[*encoding.encode_ordinary(pair.rejected), encoding.eot_token]",
          "encoding.encode_ordinary(pair.rejected)")]),
    Bug("split by row", "pairs are split by themselves, so a prompt of the test is trained on", "",
        "tests/test_data.py::"
        "test_no_pair_is_lost_and_equal_prompts_are_in_one_split_in_any_order",
        [("data.py", "fraction = fraction_of(pair.prompt)", "fraction = fraction_of(str(pair))")]),

    # Model.
    Bug("c_proj transposed", "attention's square matrix is loaded as it stands in OpenAI's file",
        "",
        "tests/test_model.py::test_logits_and_gradients_are_those_of_transformers",
        [("model.py", '"attn.c_attn.weight", "attn.c_proj.weight", ', '"attn.c_attn.weight", ')],
        reached=False),
    Bug("attention not causal", "a token sees the tokens that come after it", "",
        "tests/test_data.py::test_a_worked_batch",
        [("data.py", "(in_prompt | same_part) & not_after", "(in_prompt | same_part)")]),
    Bug("answers go on after padding",
        "of prompts of several lengths, the first token is predicted at the end of the longest",
        "transformers #26569",
        "tests/test_model.py::"
        "test_greedy_is_the_same_alone_in_a_batch_without_a_cache_and_in_transformers",
        [("model.py", "hidden[rows, lengths - 1]", "hidden[:, -1]")]),

    # The judge.
    Bug("unreadable verdicts dropped", "verdicts that can't be read vanish without being counted",
        "alpaca_eval #307, #340",
        "tests/test_judge.py::test_a_worked_win_rate",
        [("judge.py", "    scores = [verdict.score for verdict in verdicts if verdict.score is not "
          "None]", "    verdicts = [verdict for verdict in verdicts if verdict.score is not None]\n"
          "    scores = [verdict.score for verdict in verdicts]")], reached=False),
    Bug("unreadable verdicts are losses", "a verdict that can't be read counts against the model",
        "alpaca_eval #307, #340",
        "tests/test_judge.py::test_a_worked_win_rate",
        [("judge.py", "    scores = [verdict.score for verdict in verdicts if verdict.score is not "
          "None]", "    scores = [verdict.score or 0.0 for verdict in verdicts]")], reached=False),
    Bug("one order", "the judge sees the model's answer first, always; its liking for a place "
        "counts as a win", "Zheng et al. 2023, arXiv:2306.05685",
        "tests/test_judge.py::test_both_orders_are_asked",
        [("judge.py", "    second = judge(prompt, other, answer)",
          '    second = {"A": "B", "B": "A"}.get(first)')], reached=False),
]

# 2. A patched copy, its test, its demo ----------------------------------------------------------


def copy_project(folder: Path) -> None:
    """The code, its tests, and what they read."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.txt"), *ROOT.glob("*.md"), *ROOT.glob("*.cff"),
                 ROOT / "pyproject.toml"]:
        shutil.copy(path, folder)
    for name in ("tests", "results"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def apply(bug: Bug, folder: Path) -> None:
    """Patch the copy. Raises ValueError for a text that does not stand there exactly once."""
    for name, old, new in bug.patches:
        text = (folder / name).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{bug.name}: {old!r} stands in {name} {text.count(old)} times, "
                             f"expected once: mend the patch")
        (folder / name).write_text(text.replace(old, new))


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Python in the copy, with one thread, so that two at once don't disturb each other."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment,
                          capture_output=True, text=True)


def passes(folder: Path, *tests: str) -> bool:
    """Do these tests pass in the copy? Raises ValueError where they can't be found or run."""
    done = run(folder, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests)
    if done.returncode not in (0, 1):
        raise ValueError(f"{tests}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    return done.returncode == 0


def demo(folder: Path) -> dict:
    """What the demo shows: its first sign, and what it ends with."""
    done = run(folder, "train.py", "--demo", "--out", "run")
    path = folder / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if line["stage"] == "dpo"]
    if done.returncode not in (0, 1) or not lines:
        message = done.stderr.split("error  ")[-1].split(", expected")[0]
        return {"first sign": f"train.py stops: {' '.join(message.split())}"}
    vals = [line for line in lines if line["event"] == "val"]
    updates = [line for line in lines if line["event"] == "train"]
    shares = re.search(r"after +DPO +(\S+)% of \d+ fresh answers .*, (\S+)% are", done.stdout)
    first = updates[0]
    return {
        "first sign": f"loss {vals[0]['loss']:.4f} at first, {first.get('loss', math.nan):.4f} in "
                      f"the first ten updates; gradient {first.get('grad_norm', math.nan):.2g}",
        "obey": shares[1],
        "well formed": shares[2],
        "accuracy": f"{lines[-1]['rewards/accuracies']:.3f}",
        "margin": f"{lines[-1]['rewards/margins']:+.2f}",
        "chosen logp": f"{vals[-1]['logps/chosen'] - vals[0]['logps/chosen']:+.2f}",
    }


SHOWN = ("obey", "well formed", "accuracy", "margin", "chosen logp")


def try_bug(bug: Bug | None, training: bool) -> dict:
    """One row. Without a bug: the demo as it should be."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder)
        if bug is None:
            row = {"bug": "(none)", "what": "the code as it is", "seen": "", "test": ""}
        else:
            apply(bug, folder)
            row = {"bug": bug.name, "what": bug.what, "seen": bug.seen, "test": bug.test}
            row["caught"] = "no" if passes(folder, bug.test) else "yes"
        if training and bug is not None and not bug.reached:
            row |= {"first sign": "not reached"}
        elif training:
            row |= demo(folder)
    row["seconds"] = f"{time.perf_counter() - started:.0f}"
    return row


# 3. The table, and the command line --------------------------------------------------------------

FIELDS = ("commit", "bug", "what", "seen", "test", "caught", "first sign", *SHOWN, "seconds")


def commit() -> str:
    """The last commit that changed what the demo runs."""
    files = ["dpo.py", "data.py", "model.py", "train.py", "judge.py", "tests/bugs.py"]
    done = subprocess.run(["git", "log", "-1", "--format=%h", "--", *files], cwd=ROOT,
                          capture_output=True, text=True)
    return done.stdout.strip()


def rows_of(bugs: list[Bug | None], training: bool) -> Iterator[dict]:
    """The rows, two at a time, in order. A line on the screen for each that is done."""
    with ThreadPoolExecutor(2) as pool:
        for done, row in enumerate(pool.map(lambda bug: try_bug(bug, training), bugs), 1):
            print(f"{done}/{len(bugs)} | {row['bug']} | caught: {row.get('caught', '')} | "
                  f"{row['seconds']} s | {row.get('first sign', '')}", flush=True)
            yield row


def table() -> str:
    """The table of results/README.md, with the commit of which it is."""
    with open(CSV, newline="") as file:
        rows = list(csv.DictReader(file))
    commits = {row["commit"] for row in rows}
    assert len(commits) == 1, f"rows of several commits: {commits}"
    header = ["bug", "what it does", "seen in", "first sign", "obey, %", "well formed, %",
              "accuracy", "margin", "chosen's logp", "caught by"]
    lines = [f"`python tests/bugs.py`, commit {commits.pop()}:", "",
             "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        test = row["test"].split("::")[-1].removeprefix("tests/")
        cells = [row["bug"], row["what"], row["seen"], row["first sign"],
                 *(row[name] for name in SHOWN), f"`{test}`" if test else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="a bug's name")
    parser.add_argument("--list", action="store_true", help="print the names, and stop")
    parser.add_argument("--table", action="store_true", help="print the table, and stop")
    parser.add_argument("--no_training", action="store_true", help="run the tests alone")
    args = parser.parse_args()
    if args.list:
        print(*(bug.name for bug in BUGS), sep="\n")
        return 0
    if args.table:
        print(table())
        return 0
    bugs = [bug for bug in BUGS if args.only in ("", bug.name)]
    if not bugs:
        parser.error(f"--only is {args.only!r}, expected a name of --list")

    with tempfile.TemporaryDirectory() as name:        # a test that always fails catches nothing
        copy_project(Path(name))
        tests = sorted({bug.test for bug in bugs})
        if not passes(Path(name), *tests):
            print("these tests fail without a bug, too:", *tests, sep="\n")
            return 1
    healthy = [] if args.no_training else [None]
    rows = list(rows_of([*healthy, *bugs], not args.no_training))
    if not args.only and not args.no_training:
        CSV.parent.mkdir(exist_ok=True)
        with open(CSV, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows({"commit": commit()} | row for row in rows)
        print(table())
    missed = [row["bug"] for row in rows if row.get("caught") == "no"]
    print(f"{len(bugs)} bugs, {len(bugs) - len(missed)} caught by their tests")
    if missed:
        print("not caught:", ", ".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
