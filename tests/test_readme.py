"""Does the README tell the truth? Its tables, commands and example against the code."""

import copy
import math
import re
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import dpo
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FILES = ("dpo.py", "data.py", "model.py", "train.py", "judge.py")  # in reading order


def table(first: str) -> list[list[str]]:
    """The cells of each row of the table whose header begins with `first`."""
    rows = README[README.index(f"\n| {first} |"):].split("\n\n")[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_option_table_is_that_of_the_program():
    """Every option in its order, with its default, and what --help says."""
    rows = table("option")
    assert [name for name, _, _ in rows] == [f"`--{f.name}`" for f in fields(train.Config)]
    for (_, default, text), setting in zip(rows, fields(train.Config), strict=True):
        expected = setting.metadata["help"]
        if setting.metadata["choices"]:
            expected += f" ({', '.join(setting.metadata['choices'])})"
        assert text == expected, setting.name
        if setting.name == "subsets":
            assert default == "all four"
        else:
            assert default == str(setting.default), setting.name


def test_the_files_stand_in_reading_order():
    assert [row[0] for row in table("file")] == [f"`{name}`" for name in FILES]


def test_every_command_names_a_file_and_options_that_exist():
    judge_options = re.findall(r'"--(\w+)"', (ROOT / "judge.py").read_text())
    options = {"train.py": {f.name for f in fields(train.Config)} | {"help"},
               "judge.py": {*judge_options, "help"}}
    found = re.findall(r"((?:tests/)?\w+\.py)((?: +--\w+(?: [^-`\s]\S*)?)*)", README)
    assert len(found) > 15
    for file, words in found:
        assert (ROOT / file).exists(), file
        for option in re.findall(r"--(\w+)", words):
            where = options.get(file) or re.findall(r'"--(\w+)"', (ROOT / file).read_text())
            assert option in where, (file, option)
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    benchmark = {"scaling", "precision", "epoch", "against"}
    known = set().union(*options.values(), benchmark)
    for option in re.findall(r"`--(\w+)", README):  # mentioned alone
        assert option in known, option


def test_every_metric_in_the_table_is_one_that_is_logged():
    metrics = dpo.dpo_metrics(torch.zeros(2), torch.zeros(2), beta=0.1)
    logged = metrics.keys() | {"grad_norm", "skipped"}  # these two are train_step's
    names = set()
    for row in table("name"):
        names.update(re.findall(r"`([\w/]+)`", row[0]))
    assert names <= logged and len(names) == 8


def example(text: str) -> str:
    """The code that begins with the import from dpo, and ends where its indentation does."""
    start = text.index("    from dpo import")
    lines = []
    for line in text[start:].splitlines():
        if line and not line.startswith("    "):
            break
        lines.append(line)
    return textwrap.dedent("\n".join(lines)).strip()


def test_the_example_is_that_of_dpo():
    assert example(README) == example(dpo.__doc__)


def test_the_example_trains_a_transformers_model_from_its_own_log_probabilities():
    """Run as it stands, on two batches. The reference is compared with one row at a time."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=30, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    batches = []
    for number in range(2):
        mask = torch.zeros(16, 9, dtype=torch.bool)
        for row in range(16):
            mask[row, 1 + row % 4:4 + row % 6] = True  # responses of 1 to 7 tokens
        batches.append(SimpleNamespace(tokens=torch.randint(30, (16, 9)), mask=mask,
                                       numbers=torch.arange(8 * number, 8 * number + 8)))
    before = copy.deepcopy(model).eval()
    names = {"torch": torch, "model": model, "batches": batches}
    exec(example(README), names)

    for batch in batches:
        expected = []
        for row, is_response in zip(batch.tokens, batch.mask, strict=True):
            logp = before(row[None]).logits[0].log_softmax(-1)
            places = is_response.nonzero()[:, 0].tolist()
            expected.append(sum(logp[t - 1, row[t]] for t in places))
        reference = names["reference"][:, batch.numbers].flatten()
        torch.testing.assert_close(reference, torch.stack(expected), rtol=1e-5, atol=1e-5)
    # The last update began as good as at the reference, as the rate was 2e-7 at most.
    assert names["metrics"]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert names["metrics"]["grad_norm"] > 0 and names["metrics"]["skipped"] == 0
    assert not torch.equal(before.transformer.wte.weight, model.transformer.wte.weight)


@pytest.mark.parametrize("name", FILES)
def test_nothing_but_the_four_packages_is_imported(name):
    known = {"torch", "tiktoken", "numpy", "requests"} | {file[:-3] for file in FILES}
    imported = re.findall(r"^\s*(?:import|from) (\w+)", (ROOT / name).read_text(), re.M)
    assert set(imported) - known - set(sys.stdlib_module_names) == set()
