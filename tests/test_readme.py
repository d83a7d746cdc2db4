"""Does the README tell the truth? Its code, tables, commands and numbers against the project."""

import copy
import inspect
import json
import math
import re
import shlex
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import bugs
import probe
import pytest
import torch
import transformers

import data
import dpo
import results
import train
from model import GPT2, GPT2Config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results/README.md").read_text()
FILES = ("dpo.py", "data.py", "model.py", "train.py", "judge.py")  # in reading order


def table(first: str) -> list[list[str]]:
    """The cells of each row of the table whose header begins with `first`."""
    rows = README[README.index(f"\n| {first} |"):].split("\n\n")[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|"))] for row in rows]


def commands() -> list[str]:
    """Every command of a code block or between backticks."""
    blocks = re.findall(r"^    (\S.*(?:\.py|pytest|pip install|git clone).*)$", README, re.M)
    inline = re.findall(r"`((?:\.venv/bin/)?(?:uv run|python) [^`]*)`", README)
    return blocks + inline


def test_the_first_screen_shows_equation_7_as_it_stands_in_dpo():
    block = README[README.index("    chosen_reward ="):].split("\n\n")[0]
    lines = [line.strip() for line in block.splitlines()]
    code = [line.strip() for line in inspect.getsource(dpo.dpo_loss).splitlines()]
    assert len(lines) == 3
    assert lines == [line for line in code if line in lines]


def test_the_first_command_stands_within_thirty_lines():
    lines = README.splitlines()
    first = next(number for number, line in enumerate(lines, 1) if line.startswith("    python"))
    assert first <= 30


def test_the_pair_by_hand_is_what_dpo_loss_computes():
    """Tokens, sums, rewards, margin, loss, and the weight of the gradient."""
    encoding = data.encoding_of(demo=False)
    for answer in (" Blue.", " Red."):
        assert f'`"{answer}"`' in README
        assert len(encoding.encode_ordinary(answer)) + 1 == 3      # and end-of-text
    sums = []
    rewards = []
    for _, policy, policy_sum, reference, reference_sum, reward in table("| policy"):
        for tokens, total in ((policy, policy_sum), (reference, reference_sum)):
            logps = [float(logp) for logp in tokens.split()]
            assert len(logps) == 3
            assert sum(logps) == pytest.approx(float(total))
            sums.append(float(total))
        rewards.append(float(reward.split("= ")[1]))
        assert eval(reward.split(" = ")[0]) == pytest.approx(rewards[-1])

    policy_chosen, reference_chosen, policy_rejected, reference_rejected = (
        torch.tensor([number], requires_grad=True) for number in sums)
    loss, chosen_reward, rejected_reward = dpo.dpo_loss(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.5)
    loss.sum().backward()
    assert [chosen_reward.item(), rejected_reward.item()] == pytest.approx(rewards)
    margin, found_loss = re.search(
        r"The margin, chosen minus rejected, is 0\.25 \+ 0\.50 = (\S+), and\s+the"
        r"\s+loss\s+is\s+-log\s+sigmoid\(0\.75\)\s+=\s+(\S+)\.\s", README).groups()
    assert float(margin) == rewards[0] - rewards[1]
    assert float(found_loss) == pytest.approx(loss.item(), abs=5e-4)
    slopes = [float(slope) for slope in re.findall(r"^    by the .* (\S+)$", README, re.M)]
    chosen_slope = policy_chosen.grad.item()
    assert slopes == pytest.approx(
        [chosen_slope / 0.5, chosen_slope, policy_rejected.grad.item()], abs=5e-4)


def test_the_symbols_are_names_of_dpo_loss():
    names = set()
    for _, code in table("in the paper"):
        names.update(re.findall(r"`(\w+)`", code))
    known = {*inspect.signature(dpo.dpo_loss).parameters, "chosen_reward", "rejected_reward"}
    assert names == known - {"beta"}                   # which is beta in the paper, too


def test_the_files_stand_in_reading_order():
    assert [row[0] for row in table("file")] == [f"`{name}`" for name in FILES]


def test_every_command_names_a_file_and_options_that_exist():
    options = {"train.py": {setting.name for setting in fields(train.Config)} | {"help"}}
    found = commands()
    assert len(found) >= 12
    for command in found:
        for name in re.findall(r"(?:tests/)?\w+\.py\b", command):
            assert (ROOT / name).exists(), command
            known = options.get(name)
            if known is None:
                known = set(re.findall(r'"--(\w+)"', (ROOT / name).read_text()))
            for option in re.findall(r"--(\w+)", command.split(name)[1]):
                assert option in known, (command, option)
    of_judge = set(re.findall(r'"--(\w+)"', (ROOT / "judge.py").read_text()))
    for option in re.findall(r"`--(\w+)", README):                 # mentioned alone
        assert option in options["train.py"] | of_judge, option
    for path in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / path).exists(), path


def test_links_into_other_pages_name_a_heading_there():
    for path, heading in re.findall(r"\]\((?!http)([^)#]+)#([^)]+)\)", README):
        titles = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.M)
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert heading in anchors, heading


def test_the_options_in_the_symptoms_parse():
    for option in re.findall(r"`(--\w+ [^`]+)`", README):
        if "--url" not in option:
            train.parse(shlex.split(option))


def test_at_most_1600_words_of_prose():
    """Code, tables and sample output not counted."""
    lines = [line for line in README.splitlines() if not line.startswith(("    ", "|", "<!--"))]
    assert len(" ".join(lines).split()) <= 1600


def test_the_easy_pairs_are_those_of_runs_csv():
    _, lines = results.newest(results.read_csv(results.CSV), is_polite=True)
    for line in lines:
        found = results.with_interval(line["scores"])
        on_one_line = " ".join(README.split())
        assert found in on_one_line.replace("(95% interval ", "(")


def test_the_real_pairs_are_those_of_runs_csv():
    """Both rows of DPO keep their first weights, and the longer answer is the best baseline."""
    _, lines = results.newest(results.read_csv(results.CSV), is_polite=False)
    folds = results.whole_folds(lines)
    longer = {line["fold"]: line["scores"] for line in lines if line["row"] == "the longer answer"}
    scores = "".join(longer[fold] for fold in folds)
    on_one_line = " ".join(README.split())
    assert f"[{len(scores):,} unseen real pairs]" in on_one_line
    assert results.with_interval(scores) in on_one_line
    assert "all pairs are ties: accuracy 0.500." in on_one_line
    of_words = [line["margins"] for line in results.read_csv(probe.CSV)
                if line["row"] == probe.WORDS]
    margins = [float(margin) for margin in " ".join(of_words).split()]
    assert f"ranks {results.with_interval(results.scores_of(margins))} right" in on_one_line
    of_dpo = [line for line in lines if line["row"] in results.ROWS and line["fold"] in folds]
    assert {line["best_step"] for line in of_dpo} == {"0"}
    assert set("".join(line["scores"] for line in of_dpo)) == {"1"}


def test_the_defaults_are_those_of_the_program():
    adapters = train.Config()
    everything = train.Config(adapter="none")
    rates = f"{adapters.lr:.0e} for adapters, {everything.lr:.0e} for all weights"
    rows = {row[0]: row[1] for row in table("option")}
    assert rows == {
        "`--beta`": str(adapters.beta),
        "`--lr`": rates.replace("e-0", "e-"),
        "`--adapter`": f"`{adapters.adapter}`",
        "`--batch_pairs`": str(adapters.batch_pairs),
        "`--micro_pairs`": str(adapters.micro_pairs),
        "`--epochs`": "as many as make about 250 updates, at least "
                       f"{train.epochs_for(10**6, 32)}, at most {train.epochs_for(1, 32)}",
        "`--vals`": str(adapters.vals),
        "`--patience`": str(adapters.patience),
        "`--resume`": "",
    }
    assert f"\n{len(bugs.BUGS)} bugs that DPO code has had" in README


def test_the_interval_of_the_first_edition_is_wilsons():
    """81 of 148 pairs."""
    low, high = dpo.wilson_interval(81 / 148, 148)
    assert f"On 148 other ones it was {81 / 148:.3f} ({low:.3f} to {high:.3f})," in README


def test_the_optimum_of_the_demo_follows_from_its_start():
    """At beta 1 the best policy multiplies the odds of an answer with "!" by e to its reward, 4."""
    before = float(re.search(r"before DPO  (\S+)% of", README)[1])
    odds = before / (100 - before)
    after = odds * math.exp(data.DEMO_REWARD)
    optimum = after / (1 + after)
    assert [line.split() for line in block_from("before  ", RESULTS).splitlines()] == [
        ["before", str(before), "/", f"{100 - before:.1f}", "=", f"{odds:.3f}"],
        ["after", f"{odds:.3f}", "*", "e^4", "=", f"{odds:.3f}", "*",
         f"{math.exp(data.DEMO_REWARD):.1f}", "=", f"{after:.1f}"],
        ["share", f"{after:.1f}", "/", "(1", "+", f"{after:.1f})", "=", f"{optimum:.1%}"]]
    after, count = re.search(r"after  DPO +(\S+)% of (\d+)", README).groups()
    obeying = round(float(after) / 100 * int(count))
    low, high = dpo.wilson_interval(obeying / int(count), int(count))
    text = (f"The demo's {after}% of {count} answers agrees (95% interval {low:.1%} to "
            f"{high:.1%}).")
    assert text in " ".join(RESULTS.split())
    assert low < optimum < high


def block_from(line: str, page: str = README) -> str:
    """The indented block of a page that begins with this line, blank lines inside it too."""
    lines = []
    for text in page[page.index(f"\n    {line}") + 1:].splitlines():
        if text and not text.startswith("    "):
            break
        lines.append(text)
    return textwrap.dedent("\n".join(lines)).strip()


def test_the_lines_of_one_update_are_train_step():
    """One batch of three pairs: equal weights after them and after train_step."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=30))
    other = copy.deepcopy(model)
    pairs = [data.TokenPair([1, 2], [3, 4, 9], [5, 9]), data.TokenPair([6], [7], [8, 9]),
             data.TokenPair([2, 2, 2], [1, 9], [3, 3, 3, 9])]
    batch = data.pad(pairs)
    reference = -10 * torch.rand(6)

    def loss_function(model, batch):
        logps = dpo.sequence_logps(model, batch.tokens, batch.mask)
        return dpo.dpo_metrics(logps, reference, beta=0.7)
    dpo.train_step(other, [batch], torch.optim.AdamW(other.parameters()), loss_function)

    exec(block_from("logits = model(tokens"), {
        "model": model, "tokens": batch.tokens, "mask": batch.mask, "beta": 0.7,
        "reference_chosen": reference[:3], "reference_rejected": reference[3:],
        "optimizer": torch.optim.AdamW(model.parameters()), "nn": torch.nn,
        "dpo_loss": dpo.dpo_loss})
    for weight, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, expected)
        assert weight.grad is None


def test_the_example_trains_a_model_of_transformers(tmp_path, monkeypatch, capsys):
    """Run as it stands, in a folder with a file of pairs, and a small GPT-2 in the folder gpt2."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8)
    transformers.GPT2LMHeadModel(config).save_pretrained("gpt2")
    with open("mine.jsonl", "w") as file:
        for number in range(11):
            row = {"prompt": f"Add {number} and 1.", "chosen": f"{number + 1}!", "rejected": "No."}
            file.write(json.dumps(row) + "\n")
    capsys.readouterr()
    names = {}
    exec(block_from("import data"), names)
    assert [len(batch.tokens) for batch in names["batches"]] == [16, 6]
    assert names["history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(last) == names["history"][1]["rewards/accuracies"]


@pytest.mark.parametrize("name", FILES)
def test_nothing_but_the_four_packages_is_imported(name):
    known = {"torch", "tiktoken", "numpy", "requests"} | {file[:-3] for file in FILES}
    imported = re.findall(r"^\s*(?:import|from) (\w+)", (ROOT / name).read_text(), re.M)
    assert set(imported) - known - set(sys.stdlib_module_names) == set()
