"""Does the README tell the truth? Its tables, commands and example against the code."""

import re
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers

import dpo
import judge
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FILES = ("model.py", "data.py", "dpo.py", "train.py", "judge.py")


def table(first: str) -> list[list[str]]:
    """The cells of each row of the table whose header begins with `first`."""
    rows = README[README.index(f"\n| {first} |"):].split("\n\n")[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_option_table_is_that_of_the_program():
    """Every option in its order, with its default, and what --help says."""
    rows = table("option")
    assert [name for name, _, _ in rows] == [f"`--{f.name}`" for f in fields(train.Config)]
    for (_, default, text), f in zip(rows, fields(train.Config), strict=True):
        choices = f.metadata["choices"]
        assert text == f.metadata["help"] + (f": {', '.join(choices)}" if choices else ""), f.name
        assert default == ("all four" if f.name == "subsets" else str(f.default)), f.name


def test_the_files_stand_in_reading_order_with_their_lines():
    assert [row[:2] for row in table("file")] == [
        [f"`{name}`", str(len((ROOT / name).read_text().splitlines()))] for name in FILES]


def test_every_command_names_a_file_and_options_that_exist():
    options = {"train.py": {f.name for f in fields(train.Config)} | {"help"},
               "judge.py": judge.OPTIONS.keys() | {"help"}}
    found = re.findall(r"((?:tests/)?\w+\.py)((?: +--\w+(?: [^-`\s]\S*)?)*)", README)
    assert len(found) > 15
    for file, words in found:
        assert (ROOT / file).exists(), file
        for option in re.findall(r"--(\w+)", words):
            where = options.get(file) or re.findall(r'"--(\w+)"', (ROOT / file).read_text())
            assert option in where, (file, option)
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    known = set().union(*options.values(), {"scaling", "precision", "epoch"})  # the benchmark's
    for option in re.findall(r"`--(\w+)", README):  # mentioned alone
        assert option in known, option


def test_every_metric_in_the_table_is_one_that_is_logged():
    logp = torch.zeros(2)
    batch = type("Batch", (), {"lengths": torch.ones(2), "pairs": torch.zeros(1).long()})
    logged = dpo.dpo_objective(torch.zeros(1, 2), 0.1)(logp, batch)
    logged = logged.keys() | {"grad_norm", "skipped"}
    names = {name for row in table("name") for name in re.findall(r"`([\w/]+)`", row[0])}
    assert names <= logged and len(names) == 8


def test_the_example_for_transformers_models_gives_their_log_probabilities():
    """Run as it stands, against one row at a time."""
    start = README.index("    from dpo import")
    code = textwrap.dedent(README[start:README.index("\n\n", start)])
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=30, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens, mask = torch.randint(30, (4, 9)), torch.zeros(4, 9, dtype=torch.bool)
    for row, (first, last) in enumerate(((2, 5), (4, 9), (1, 3), (6, 7))):
        mask[row, first:last] = True
    names = {"model": model, "tokens": tokens, "mask": mask, "reference": torch.zeros(4)}
    exec(code, names)
    expected = []
    for row, where in zip(tokens, mask, strict=True):
        logp = model(row[None]).logits[0].log_softmax(-1)
        expected.append(sum(logp[t - 1, row[t]] for t in where.nonzero()[:, 0].tolist()))
    torch.testing.assert_close(names["logp"], torch.stack(expected))
    assert names["loss"].shape == (2,)


def test_it_is_short():
    assert len(README.splitlines()) < 250
    for name in FILES:
        assert max(map(len, (ROOT / name).read_text().splitlines())) <= 100


@pytest.mark.parametrize("name", FILES)
def test_nothing_but_the_four_packages_is_imported(name):
    known = {"torch", "tiktoken", "numpy", "requests"} | {file[:-3] for file in FILES}
    imported = re.findall(r"^\s*(?:import|from) (\w+)", (ROOT / name).read_text(), re.M)
    standard = set(__import__("sys").stdlib_module_names)
    assert set(imported) - known - standard == set()
