"""The whole job, on a GPT-2 so small that it takes a second: options, stages, stops, full disks.

Runs that are killed, or that meet in one folder, are real processes: children of one that has
imported everything (`Jobs`), so that each begins at once. The others call train.main here. All are
on the CPU, where a run repeats bit for bit; tests/test_gpu.py is for a GPU.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file

import data
import dpo
import train
from model import GPT2, GPT2Config, add_adapters, save_pretrained

SUBSETS = ("harmless-base", "helpful-base")
CLOCK = ("tokens_per_second", "seconds_left")  # all that may differ between two equal runs
ROWS = 21                      # single-turn pairs in each subset's file of training pairs
TESTS = 4                      # and in its file of test pairs


# With these options and `bytes_as_tokens` a run has bytes for tokens, as the demo has: GPT-2's
# vocabulary takes most of the time of a small model.
BYTES = {"model": "bytes", "max_tokens": 64, "max_prompt_tokens": 42}


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Iterator[None]:
    """train.py finds no GPU, though there may be one."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: None)
        yield


# A world to train in: models, and files like those of hh-rlhf.

def dialogue(prompt: str, answer: str) -> str:
    return f"\n\nHuman: {prompt}\n\nAssistant: {answer}"


def rows(count: int, rng: random.Random) -> list[dict]:
    """Sums; the chosen answer is polite in four of five, so that there is something to learn."""
    made = []
    for number in rng.sample(range(99 * 99), count):
        a, b = divmod(number, 99)
        prompt = f"What is {a} plus {b}?"
        polite = dialogue(prompt, f"Gladly! That is {a + b}.")
        rude = dialogue(prompt, f"No idea. {rng.choice('Go Ask Look Run'.split())} away.")
        if rng.random() < 0.8:
            made.append({"chosen": polite, "rejected": rude})
        else:
            made.append({"chosen": rude, "rejected": polite})
    return made


def odd_rows() -> list[dict]:
    """Rows that are dropped: three of two turns, one with two prompts, one with equal answers."""
    two_turns = dialogue("Hi", "Hello.") + dialogue("Bye", "Bye.")
    why = dialogue("Why?", "So.")
    return [
        {"chosen": two_turns, "rejected": two_turns + "!"},
        {"chosen": two_turns, "rejected": two_turns + "!"},
        {"chosen": two_turns, "rejected": two_turns + "!"},
        {"chosen": why, "rejected": dialogue("Why not?", "So.")},
        {"chosen": why, "rejected": why},
    ]


def write_rows(path: Path, lines: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with models in gpt2/ and bytes/, hh-rlhf in hh/, and own pairs in pairs.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    rng = random.Random(5)
    torch.manual_seed(1)
    save_pretrained(GPT2(GPT2Config(2, 2, 16, 32, 50257, 64)), folder / "gpt2")
    save_pretrained(GPT2(GPT2Config(2, 2, 16, 64, 257, 64)), folder / "bytes")
    for subset in SUBSETS:
        write_rows(folder / "hh" / subset / "train.jsonl.gz", rows(ROWS, rng) + odd_rows())
        write_rows(folder / "hh" / subset / "test.jsonl.gz", rows(TESTS, rng))
    write_rows(folder / "pairs.jsonl", rows(40, rng))
    return folder


def argv(world: Path, out: str | Path, **options) -> list[str]:
    """Arguments of a short run on the world's files."""
    options = {"model": world / "gpt2", "hh_dir": world / "hh", "subsets": ",".join(SUBSETS),
               "out": world / out, "dtype": "float32", "max_tokens": 32, "max_prompt_tokens": 20,
               "val_share": 0.25, "test_share": 0.25, "sft_lr": 3e-3, "lr": 3e-3, "epochs": 1,
               "batch_pairs": 8, "vals": 1, "patience": 99, "log_every": 1} | options
    if options["model"] == "bytes":
        options["model"] = world / "bytes"
    words = []
    for name, value in options.items():
        words.append(f"--{name}")
        if value is not True:
            words.append(str(value))
    return words


def lines_of(out: Path, *without: str) -> list[dict]:
    """The lines of a run's metrics.jsonl, without these names."""
    lines = []
    for text in (out / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        lines.append({name: line[name] for name in line if name not in without})
    return lines


def of(lines: list[dict], stage: str, event: str) -> list[dict]:
    return [line for line in lines if (line["stage"], line["event"]) == (stage, event)]


def tokens_of(world: Path, split: str, in_bytes: bool = False) -> list[data.TokenPair]:
    """The pairs of a split as the runs of `argv` have them, or those with BYTES."""
    found = {"train": [], "test": []}
    for name, pairs in found.items():
        for subset in SUBSETS:
            pairs += data.read_pairs(world / "hh" / subset / f"{name}.jsonl.gz")[0]
    splits, _ = data.split(found["train"], found["test"], 0.25, 0.25)
    max_tokens = BYTES["max_tokens"] if in_bytes else 32
    max_prompt_tokens = BYTES["max_prompt_tokens"] if in_bytes else 20
    encoding = data.encoding_of(demo=in_bytes)
    return data.tokenize(splits[split], encoding, max_tokens, max_prompt_tokens)[0]


def begin(words: list[str], audit: dict | None = None) -> None:
    """Begin a run's folder, and stop there."""
    config = train.parse(words)
    run = train.open_run(config, train.choose_machine(config), audit or {})
    run.metrics.close()        # and with it the lock


def bytes_as_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let train.py take bytes for GPT-2's tokens."""
    encoding = data.encoding_of(demo=True)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)


# Options and files: what a user can mend.

def refused(words: list[str], capfd) -> str:
    """The one line on stderr of a run that ends with exit code 2."""
    capfd.readouterr()
    try:
        code = train.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    error = capfd.readouterr().err
    assert code == 2, error
    assert error.startswith("error ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(("options", "named"), [
    ({"learning_rate": 1}, "--learning_rate"),
    ({"epoch": 1}, "--epoch"),  # no abbreviation: it might come to mean another option
    ({"batch_pairs": "two"}, "--batch_pairs"),
    ({"epochs": 1.5}, "--epochs"),
    ({"batch_pairs": 0}, "--batch_pairs"),
    ({"lr": -1e-4}, "--lr"),
    ({"sft_lr": 0}, "--sft_lr"),
    ({"max_norm": "nan"}, "--max_norm"),
    ({"sft_lr": "inf"}, "--sft_lr"),
    ({"val_share": 0.6, "test_share": 0.4}, "--val_share"),
    ({"beta": 0}, "beta"),
    ({"beta": -1}, "expected a number above 0"),
    ({"seed": -1}, "expected a number, 0 or more"),
    ({"adapter": "lora"}, "--adapter"),
    ({"loss": "kto"}, "--loss"),
    ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
    ({"max_tokens": 33}, "--max_tokens"),  # the context holds 32
    ({"max_prompt_tokens": 32}, "max_prompt_tokens"),
    ({"model": "nowhere"}, "nowhere"),
    ({"pairs": "nowhere.jsonl"}, "nowhere.jsonl"),
    ({"val_share": 1e-9}, "val"),
    ({"adapter_width": 65}, "--adapter_width"),  # the MLPs have 64 neurons
    ({"adapter_init": "pretrained"}, "--adapter_init"),  # of a replacing MLP alone
    ({"demo": True, "pairs": "mine.jsonl"}, "--pairs"),
    ({"demo": True, "sft_epochs": 0}, "--sft_epochs"),
], ids=str)
def test_a_wrong_option_is_one_line_that_names_it_and_leaves_nothing(options, named, world, capfd):
    """Exit code 2, one line on stderr from the word error on, and no folder for a run."""
    assert named in refused(argv(world, "refused", **options), capfd)
    assert not (world / "refused").exists()


def test_help_explains_every_option_and_ends_with_examples_that_parse(capsys):
    """Among them is the paper's setting, as near as it comes: all weights, 1e-6, 64 pairs."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    options, examples = capsys.readouterr().out.split("examples:")
    unwrapped = re.sub(r"\s", "", options)
    for option in dataclasses.fields(train.Config):
        text = option.metadata["help"]
        assert f"  --{option.name} " in options
        assert len(text.split()) >= 3
        assert text.replace(" ", "") in unwrapped

    commands = re.findall(r"python train\.py(.*?)(?:   |\n)", examples)
    configs = [train.parse(command.split()) for command in commands]
    papers = [config for config in configs if config.adapter == "none"]
    assert len(configs) == 5
    assert len(papers) == 1
    assert (papers[0].lr, papers[0].batch_pairs, papers[0].beta) == (1e-6, 64, 0.1)
    assert (papers[0].loss, papers[0].label_smoothing, papers[0].sft_coef) == ("sigmoid", 0, 0)


def test_a_rate_that_is_left_out_follows_from_the_adapter():
    assert train.parse([]).lr == 1e-3
    assert train.parse(["--adapter", "none"]).lr == 1e-5
    assert train.parse(["--adapter", "replace"]).lr == 1e-5
    assert train.parse(["--adapter", "none", "--lr", "0.5"]).lr == 0.5


def test_a_file_that_is_no_checkpoint_is_one_line_that_names_it(world, tmp_path, capfd):
    """Noise, a pickle's beginning, and the tensors of another model: the file is named."""
    config = (world / "gpt2" / "config.json").read_bytes()
    for name in ("model.safetensors", "pytorch_model.bin"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes(config)
        (folder / name).write_bytes(b"\x80\x04" + random.Random(1).randbytes(500))
        assert name in refused(argv(world, "refused", model=folder), capfd)
    save_file({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "config.json").write_bytes(config)
    found = refused(argv(world, "refused", model=tmp_path / "other.safetensors"), capfd)
    assert "other.safetensors" in found
    assert not (world / "refused").exists()


def test_a_model_of_another_vocabulary_is_refused(world, capfd):
    found = refused(argv(world, "refused", model=world / "bytes"), capfd)
    assert "257" in found
    assert "50257" in found
    assert not (world / "refused").exists()


def test_a_damaged_line_of_data_is_named_by_file_and_number(world, tmp_path, capfd):
    """The second line has no rejected answer."""
    path = write_rows(tmp_path / "own.jsonl", [*rows(1, random.Random(1)), {"chosen": "yes"}])
    found = refused(argv(world, "refused", pairs=path), capfd)
    assert str(path) in found
    assert "line 2" in found
    assert "rejected" in found


def test_where_every_row_is_dropped_the_reasons_are_shown(world, tmp_path, capfd):
    """First the audit, on stdout; then an error that says to look there."""
    path = write_rows(tmp_path / "own.jsonl", odd_rows())
    assert train.main(argv(world, "refused", pairs=path)) == 2
    shown = capfd.readouterr()
    assert (f"pairs  {path}: 5 rows, 0 kept, 3 not one turn, 1 prompts differ, 1 equal answers\n"
            in shown.out)
    assert "no pair is left for train: the lines above say" in shown.err
    assert not (world / "refused").exists()


def test_resuming_in_a_folder_that_is_no_run_is_one_line(world, tmp_path, capfd):
    """A model's folder has a config.json too; it is named, and nothing is written into it."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    found = refused(argv(world, tmp_path, resume=True), capfd)
    assert str(tmp_path) in found
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_the_first_edition_is_refused_and_left_as_it_is(resume, world, tmp_path, capfd):
    """Its config.json had no "format", its lines a "kind", its last.pt other names."""
    out = tmp_path / "first"
    out.mkdir()
    config = {"options": {"beta": 0.1, "adapter_layers": 0}, "audit": {}, "versions": {}}
    (out / "config.json").write_text(json.dumps(config))
    (out / "metrics.jsonl").write_text('{"kind": "val", "stage": "sft", "step": 0}\n')
    torch.save({"stage": "sft", "metrics_bytes": 5}, out / "last.pt")
    before = {path: path.read_bytes() for path in out.iterdir()}
    options = {"resume": True} if resume else {}
    found = refused(argv(world, out, **options), capfd)
    assert str(out) in found
    assert "another edition of this code (format 1), expected 5" in found
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_machine_without_git_trains_too(world, tmp_path, monkeypatch):
    """What git's absence says stands where the commit would."""
    monkeypatch.setenv("PATH", str(tmp_path))
    begin(argv(world, "no_git"))
    versions = json.loads((world / "no_git" / "config.json").read_text())["versions"]
    assert "git" in versions["commit"]
    assert "not found" in versions["commit"]


def test_a_run_that_diverges_ends_with_one_line_that_names_the_last_good_checkpoint(world, capfd):
    """A rate of 1e30: after one update no gradient is finite."""
    out = world / "diverged"
    found = refused(argv(world, "diverged", sft_lr=1e30, warmup_share=0, sft_epochs=3,
                         batch_pairs=4, log_every=10, vals=1), capfd)
    assert "finite" in found
    assert str(out / "sft") in found
    for weight in GPT2.from_pretrained(out / "sft").parameters():
        assert weight.isfinite().all()


# Whole runs.

RUNS = {
    "parallel": {},            # with GPT-2's vocabulary
    "none": BYTES | {"adapter": "none", "lr": 1e-3, "micro_pairs": 3},
    "replace": BYTES | {"adapter": "replace", "adapter_width": 20},
    "pretrained": BYTES | {"adapter": "replace", "adapter_width": 32,
                           "adapter_init": "pretrained", "sft_epochs": 0},
    "overfit": BYTES | {"lr": 0.03, "epochs": 12, "vals": 12, "patience": 3, "log_every": 5,
                        "beta": 1.0},
}


@pytest.fixture(scope="module", params=RUNS)
def a_run(request, world) -> SimpleNamespace:
    """A whole run: its name, its folder, what it began with, its metrics, its screen."""
    options = RUNS[request.param]
    in_bytes = "model" in options
    out = world / request.param
    screen = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        if in_bytes:
            bytes_as_tokens(patch)
        with contextlib.redirect_stdout(screen):
            assert train.main(argv(world, request.param, **options)) == 0
    pairs = {name: tokens_of(world, name, in_bytes) for name in ("train", "val", "test")}
    return SimpleNamespace(
        name=request.param, out=out, model=world / ("bytes" if in_bytes else "gpt2"),
        in_bytes=in_bytes, pairs=pairs, lines=lines_of(out), screen=screen.getvalue())


def test_a_run_leaves_what_it_promises(a_run):
    """The files, whole ones only; and every number of the audit is that of the rows written."""
    expected = {"config.json", "metrics.jsonl", "sft", "best", "last.pt"}
    assert {path.name for path in a_run.out.iterdir()} == expected
    best_files = {path.name for path in (a_run.out / "best").iterdir()}
    assert best_files == {"config.json", "model.safetensors", "tokenizer_config.json"}

    config = json.loads((a_run.out / "config.json").read_text())
    assert config == train.read_run(a_run.out)
    assert config["options"]["out"] == str(a_run.out)
    assert set(config["options"]) == {option.name for option in dataclasses.fields(train.Config)}
    assert config["versions"]["torch"] == torch.__version__
    assert config["versions"]["python"] == sys.version

    audit = config["audit"]
    files = [name for name in audit if name.endswith(".gz")]
    assert len(files) == 4
    for name in files:
        if "test" in Path(name).name:
            assert audit[name] == {"rows": TESTS, "kept": TESTS}
        else:
            assert audit[name] == {"rows": ROWS + 5, "kept": ROWS, "not one turn": 3,
                                   "prompts differ": 1, "equal answers": 1}
    assert audit["test"]["kept"] == 2 * TESTS
    assert audit["train"]["kept"] + audit["val"]["kept"] == 2 * ROWS


DPO_NAMES = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
             "logps/chosen", "logps/rejected", "chosen_below_reference"}


def test_the_metrics_have_the_names_of_the_field(a_run):
    """Each line says event, stage, step; DPO's the means that others log under the same names."""
    where = {"event", "stage", "step"}
    stages = {"sft": {"loss"}, "dpo": DPO_NAMES}
    for stage, means in stages.items():
        updates = of(a_run.lines, stage, "train")
        vals = of(a_run.lines, stage, "val")
        assert vals
        no_sft = a_run.name == "pretrained" and stage == "sft"
        assert bool(updates) != no_sft
        for line in updates:
            assert set(line) == where | means | {"grad_norm", "lr", "skipped", *CLOCK}
        for line in vals:
            assert set(line) == where | means | {"best", "best_step"}
    (test,) = of(a_run.lines, "dpo", "test")
    assert set(test) == where | DPO_NAMES | {"pairs", "accuracy_low", "accuracy_high"}
    assert test["pairs"] == 2 * TESTS
    assert a_run.lines[-1] == test
    assert of(a_run.lines, "dpo", "val")[0]["step"] == 0
    for line in of(a_run.lines, "dpo", "val"):
        difference = line["rewards/chosen"] - line["rewards/rejected"]
        assert line["rewards/margins"] == pytest.approx(difference, abs=1e-6)


def test_before_the_first_update_the_policy_is_the_reference(a_run):
    """The first validation of DPO: ln 2 and no rewards. The screen says it, too."""
    first = of(a_run.lines, "dpo", "val")[0]
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-6)
    assert "start  the policy equals its reference | loss 0.6931" in a_run.screen


def test_a_run_ends_with_its_result_and_the_command_for_its_curves(a_run):
    test = a_run.lines[-1]
    result, curves = a_run.screen.splitlines()[-2:]
    assert result == (f"result {a_run.out / 'best'} | test accuracy "
                      f"{test['rewards/accuracies']:.3f}, 95% interval {test['accuracy_low']:.3f} "
                      f"to {test['accuracy_high']:.3f}, on 8 pairs")
    assert curves.endswith(f"python tests/curves.py {a_run.out}")


def test_a_replaced_mlp_is_what_sft_trains(a_run):
    """The reference has the small MLPs already, and so has the policy."""
    if a_run.name == "replace":
        neurons = []
        for folder in (a_run.model, a_run.out / "sft", a_run.out / "best"):
            neurons.append(GPT2.from_pretrained(folder).config.n_inner)
        assert neurons == [64, 20, 20]


def test_the_folder_best_holds_the_weights_of_the_best_step(a_run):
    """Its validation loss, computed anew from the file, is the least of all that were logged."""
    vals = of(a_run.lines, "dpo", "val")
    best = min(vals, key=lambda line: line["loss"])
    assert (vals[-1]["best"], vals[-1]["best_step"]) == (best["loss"], best["step"])

    pairs = a_run.pairs["val"]
    reference = torch.load(a_run.out / "last.pt")["reference_tables"]["val"]
    batch = data.pack(pairs, range(len(pairs)), reference)
    beta = train.read_run(a_run.out)["options"]["beta"]

    def loss_function(model: GPT2, batch: data.PackedBatch) -> dict[str, torch.Tensor]:
        return dpo.dpo_metrics(dpo.packed_logps(model, batch), batch.reference_logps, beta)
    found = dpo.val_step(GPT2.from_pretrained(a_run.out / "best"), [batch], loss_function)
    assert set(found) == DPO_NAMES
    for name, value in found.items():
        assert best[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    if a_run.name == "overfit":  # training went on after its best, and was stopped
        assert 0 < best["step"] < vals[-1]["step"]
        assert [line["loss"] > best["loss"] for line in vals[-4:]] == [False, True, True, True]


def test_the_reference_is_the_model_after_sft(a_run):
    """Its logps, kept beside the pairs, are those of sft/, or without SFT of the start."""
    if a_run.name == "pretrained":
        start = add_adapters(GPT2.from_pretrained(a_run.model), "replace", 32, "pretrained")
    else:
        start = GPT2.from_pretrained(a_run.out / "sft")
    saved = torch.load(a_run.out / "last.pt")["reference_tables"]
    assert set(saved) == {"train", "val", "test"}
    for split, table in saved.items():
        pairs = a_run.pairs[split]
        with torch.no_grad():
            found = dpo.packed_logps(start, data.pack(pairs, range(len(pairs)))).view(2, -1)
        torch.testing.assert_close(table, found, rtol=1e-6, atol=1e-4)


def test_only_what_is_to_train_has_trained(a_run):
    """Parallel adapters leave all of the model after SFT as it was: best/ holds it bit for bit."""
    parallel = a_run.name in ("parallel", "overfit")
    start = a_run.model if a_run.name == "pretrained" else a_run.out / "sft"
    before = load_file(start / "model.safetensors")
    after = load_file(a_run.out / "best" / "model.safetensors")
    for name in before:
        if ".mlp." not in name:
            assert torch.equal(before[name], after[name]) == parallel, name
    if parallel:               # the old neurons come first, the adapter's 64 after them
        weight = after["h.1.mlp.c_fc.weight"]
        assert torch.equal(before["h.1.mlp.c_fc.weight"], weight[:, :64])
        assert weight.shape == (16, 128)
        assert after["h.1.mlp.c_proj.weight"][64:].any()


@pytest.mark.parametrize(("options", "expected"), [
    ({"loss": "ipo", "beta": 0.2}, (0 - 1 / (2 * 0.2)) ** 2),  # the goal of ipo is 1 / (2 beta)
    ({"loss": "hinge"}, 1.0),                                  # of a margin of 0
    ({"sft_coef": 0.5}, None),                                 # ln 2, and half of the SFT loss
], ids=str)
def test_the_options_of_the_loss_reach_it(options, expected, world, monkeypatch):
    """Told by the first validation of DPO, where the policy is the reference: all margins are 0."""
    bytes_as_tokens(monkeypatch)
    out = world / f"loss{options}"
    assert train.main(argv(world, out, **BYTES, **options)) == 0
    lines = lines_of(out)
    first = of(lines, "dpo", "val")[0]
    if expected is None:
        expected = math.log(2) + 0.5 * of(lines, "sft", "val")[-1]["best"]
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert first["rewards/accuracies"] == 0.5


def test_label_smoothing_reaches_the_loss(world, monkeypatch):
    """With margins of 0 it changes nothing. After the first update no number is the same."""
    bytes_as_tokens(monkeypatch)
    losses = []
    for smoothing in (0, 0.4):
        out = world / f"smoothing{smoothing}"
        assert train.main(argv(world, out, **BYTES, label_smoothing=smoothing)) == 0
        losses.append([line["loss"] for line in of(lines_of(out), "dpo", "val")])
    (first, last), (first_smoothed, last_smoothed) = losses
    assert first_smoothed == pytest.approx(first, abs=1e-6)
    assert abs(last_smoothed - last) > 1e-3


def test_own_pairs_train_too(world, capfd):
    """--pairs FILE: train, val and test are shares of it, and no file of hh-rlhf is opened."""
    assert train.main(argv(world, "own", pairs=world / "pairs.jsonl", hh_dir="nowhere",
                           sft_epochs=0, batch_pairs=16)) == 0
    audit = json.loads((world / "own" / "config.json").read_text())["audit"]
    assert audit[str(world / "pairs.jsonl")] == {"rows": 40, "kept": 40}
    kept = [audit[split]["kept"] for split in ("train", "val", "test")]
    assert sum(kept) == 40
    assert min(kept) >= 2
    shown = capfd.readouterr().out
    assert f"{kept[0]:,} kept" in shown
    assert "test accuracy" in shown


def test_few_pairs_are_seen_several_times_unless_epochs_are_given(world, monkeypatch):
    """31 pairs in 4 updates: at most 10 passes, so 40 updates. The rate falls over all of them."""
    bytes_as_tokens(monkeypatch)
    for epochs, updates in ((0, 40), (2, 8)):
        out = world / f"epochs{epochs}"
        assert train.main(argv(world, out, epochs=epochs, sft_epochs=0, **BYTES)) == 0
        audit = json.loads((out / "config.json").read_text())["audit"]
        assert math.ceil(audit["train"]["kept"] / 8) == 4
        steps = of(lines_of(out), "dpo", "train")
        assert steps[-1]["step"] == updates
        assert steps[-1]["lr"] == pytest.approx(3e-4)      # a tenth of the highest


def test_the_passes_are_those_that_come_nearest_to_250_updates(world, monkeypatch):
    """With 31 pairs in 31 updates: 8 passes, 248 updates."""
    bytes_as_tokens(monkeypatch)
    out = world / "nearest"
    words = argv(world, out, epochs=0, sft_epochs=0, batch_pairs=1, log_every=32, **BYTES)
    assert train.main(words) == 0
    assert of(lines_of(out), "dpo", "train")[-1]["step"] == 248


def test_the_share_of_own_pairs_for_the_test_is_an_option(world, monkeypatch):
    """A fifth if nothing is said. A prompt's place decides: from 0.25 on, behind val's share."""
    pairs, _ = data.read_pairs(world / "pairs.jsonl")
    places = [data.fraction_of(pair.prompt) for pair in pairs]
    bytes_as_tokens(monkeypatch)
    for test_share in (0.2, 0.5):
        out = world / f"share{test_share}"
        words = argv(world, out, pairs=world / "pairs.jsonl", test_share=test_share, sft_epochs=0,
                     **BYTES)
        assert train.main(words) == 0
        audit = json.loads((out / "config.json").read_text())["audit"]
        expected = sum(0.25 <= place < 0.25 + test_share for place in places)
        assert audit["test"]["kept"] == expected
    assert train.parse([]).test_share == 0.2


def test_transformers_loads_what_a_run_leaves(world):
    """And gives our logits: best/ has the adapters in its MLPs, so n_inner is 64 + 64."""
    transformers = pytest.importorskip("transformers")
    assert train.main(argv(world, "loaded", batch_pairs=16)) == 0
    tokens = torch.arange(20).view(2, 10)
    for folder, inner in (("sft", 64), ("best", 128)):
        theirs = transformers.GPT2LMHeadModel.from_pretrained(world / "loaded" / folder).eval()
        with torch.no_grad():
            found = theirs(tokens).logits
            ours = GPT2.from_pretrained(world / "loaded" / folder)(tokens)
            torch.testing.assert_close(ours, found, rtol=1e-5, atol=1e-5)
        assert theirs.config.n_inner == inner


def test_the_smallest_beta_runs_since_the_check_of_the_start_compares_nats(world, monkeypatch):
    """Beta scales the rewards, and not what rounding does to log-probabilities."""
    bytes_as_tokens(monkeypatch)
    assert train.main(argv(world, "beta", beta=1e-4, sft_epochs=0, **BYTES)) == 0


def test_a_reference_that_is_another_model_stops_a_run_before_dpo(world, monkeypatch, capfd):
    """A reference that is off by 0.01 nats of some 90: with a beta of 1e-4 no reward shows it."""
    real = dpo.reference_logps

    def of_another_model(*arguments):
        return real(*arguments) + 0.01
    monkeypatch.setattr(dpo, "reference_logps", of_another_model)
    found = refused(argv(world, "stale", beta=1e-4, sft_epochs=0), capfd)
    assert "differ from the reference's by 0.01 nats on average" in found
    assert not (world / "stale" / "best").exists()


def test_no_pass_holds_more_pairs_than_micro_pairs(world, monkeypatch):
    """Neither updates nor validations, nor the reference's passes, nor the test's."""
    real = dpo.packed_logps
    sizes = []

    def packed_logps(model, batch, piece):
        sizes.append(len(batch.indices))
        return real(model, batch, piece)
    monkeypatch.setattr(dpo, "packed_logps", packed_logps)
    bytes_as_tokens(monkeypatch)
    assert train.main(argv(world, "micro", micro_pairs=3, **BYTES)) == 0
    assert max(sizes) == 3
    train_pairs = len(tokens_of(world, "train", in_bytes=True))
    val_pairs = len(tokens_of(world, "val", in_bytes=True))
    passes = (2 * train_pairs            # updates of SFT and DPO
              + 4 * val_pairs            # validations before and after each of them
              + train_pairs + val_pairs + 2 * TESTS  # the reference
              + 3 + 3                    # the start: the metrics, and the check
              + 2 * TESTS)               # the test
    assert sum(sizes) == passes


def test_the_interval_of_a_perfect_result_on_two_pairs_is_wide(world, tmp_path, monkeypatch, capfd):
    """Two of two: Wilson's interval begins at 2 / (2 + 1.96^2) = 0.342."""
    rng = random.Random(2)
    write_rows(tmp_path / "helpful-base" / "train.jsonl.gz", rows(20, rng))
    write_rows(tmp_path / "helpful-base" / "test.jsonl.gz", rows(2, rng))
    real = dpo.val_step

    def all_right(*arguments):
        return real(*arguments) | {"rewards/accuracies": 1.0}
    monkeypatch.setattr(dpo, "val_step", all_right)
    out = tmp_path / "run"
    assert train.main(argv(world, out, hh_dir=tmp_path, subsets="helpful-base",
                           sft_epochs=0, batch_pairs=16)) == 0
    assert ("test accuracy 1.000, 95% interval 0.342 to 1.000, on 2 pairs"
            in capfd.readouterr().out)
    test = lines_of(out)[-1]
    assert test["accuracy_low"] == pytest.approx(2 / (2 + 1.959964**2), rel=1e-9)
    assert test["accuracy_high"] == 1.0


# A folder belongs to one run.

def test_a_run_is_never_resumed_with_other_options_nor_overwritten(world, capfd):
    """Refused: without --resume, and with it if an option differs, which is named."""
    begin(argv(world, "begun"))
    before = (world / "begun" / "config.json").read_bytes()
    begin([*argv(world, "begun"), "--resume"])
    found = refused(argv(world, "begun", resume=True, beta=0.25, seed=7), capfd)
    for words in ("--beta 0.1, not 0.25", "--seed 0, not 7"):
        assert words in found
    assert "--lr" not in found
    found = refused(argv(world, "begun", resume=True), capfd)  # it began with no pairs at all
    assert "other numbers of pairs" in found
    assert "--beta" not in found
    assert (world / "begun" / "config.json").read_bytes() == before

    with pytest.raises(ValueError, match=r"expected --resume .* or another --out"):
        begin(argv(world, "begun"))


def test_a_finished_run_is_not_overwritten(a_run, world, monkeypatch, capfd):
    """The same command without --resume is one line that names the folder and both ways on."""
    if a_run.in_bytes:
        bytes_as_tokens(monkeypatch)
    before = (a_run.out / "metrics.jsonl").read_bytes()
    found = refused(argv(world, a_run.name, **RUNS[a_run.name]), capfd)
    assert str(a_run.out) in found
    assert "--resume" in found
    assert "--out" in found
    assert (a_run.out / "metrics.jsonl").read_bytes() == before


def test_a_run_keeps_the_dtype_that_auto_was_where_it_began(world, monkeypatch):
    """Elsewhere auto may be another one, and the weights would no longer be those of one run."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    for native, name in ((True, "bfloat16"), (False, "float32")):
        capabilities = {"avx512_bf16": native}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        begin(argv(world, f"auto_{name}", dtype="auto"))
        config = json.loads((world / f"auto_{name}" / "config.json").read_text())
        assert config["options"]["dtype"] == name
    with pytest.raises(ValueError, match="--dtype bfloat16, not float32"):
        begin([*argv(world, "auto_bfloat16", dtype="auto"), "--resume"])


@pytest.mark.parametrize(("capability", "expected"), [
    ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_auto_is_what_a_gpu_computes_natively(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert train.choose_machine(train.parse([])).dtype == expected
    assert train.choose_machine(train.parse(["--dtype", "float32"])).dtype == torch.float32


def test_no_attention_is_cudnns():
    """Which is told without a GPU by the switch. tests/test_gpu.py looks at the operations."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    train.choose_machine(train.parse([]))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# Full disks, and too little memory.

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("file", ["last.pt", "sft/model.safetensors", "best/config.json"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(
        file, world, tmp_path, monkeypatch, capfd):
    """Each file is first written as <name>.part; here that is a device without space."""
    bytes_as_tokens(monkeypatch)
    part = tmp_path / f"{file}.part"
    part.parent.mkdir(exist_ok=True)
    part.symlink_to("/dev/full")
    words = argv(world, tmp_path, **BYTES)
    found = refused(words, capfd)
    assert "No space left on device" in found
    assert "free some space" in found
    assert "--resume" in found
    assert not (tmp_path / file).exists()

    part.unlink()
    assert train.main([*words, "--resume"]) == 0
    assert (tmp_path / file).exists()


def test_a_full_disk_leaves_the_last_save_as_it_was(world, tmp_path, monkeypatch, capfd):
    """The disk fills up at the third save: the second is still there, whole."""
    real = train.write_whole
    saves = []

    def write_whole(path, parts):
        if path.name == "last.pt":
            saves.append(path)
        if len(saves) == 3:
            part = path.with_name(path.name + ".part")
            part.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(path, parts)
    monkeypatch.setattr(train, "write_whole", write_whole)
    bytes_as_tokens(monkeypatch)
    found = refused(argv(world, tmp_path, save_every=1, **BYTES), capfd)
    assert "--resume" in found
    assert torch.load(tmp_path / "last.pt")["state"]["step"] == 1


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 14 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate"
                 " memory: you tried to allocate 9 bytes"),
    MemoryError(),
], ids=["GPU", "CPU", "Python"])
def test_too_little_memory_is_one_line_that_says_what_needs_less(error, world, tmp_path,
                                                                 monkeypatch, capfd):
    def train_step(*arguments):
        raise error
    monkeypatch.setattr(dpo, "train_step", train_step)
    found = refused(argv(world, tmp_path), capfd)
    assert "out of memory" in found
    assert "--micro_pairs" in found
    assert "--out" in found                            # --resume takes no other --micro_pairs


def test_any_other_error_is_a_fault_of_the_code_and_comes_through(world, tmp_path, monkeypatch):
    def train_step(*arguments):
        raise RuntimeError("shapes do not match")
    monkeypatch.setattr(dpo, "train_step", train_step)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train.main(argv(world, tmp_path))


# Stops, and going on.

# Saves, validations and lines come at different updates: each may be the last before a stop.
STOPPED = BYTES | {"adapter_width": 8, "epochs": 6, "vals": 6, "log_every": 3,
                   "batch_pairs": 4, "save_every": 4}


def stop_before(update: int, words: list[str], monkeypatch) -> int:
    """Ctrl-C just before the process makes its so manieth update. Returns main's exit code."""
    real = dpo.train_step
    calls = []

    def train_step(*arguments):
        calls.append(1)
        if len(calls) == update:
            raise KeyboardInterrupt
        return real(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "train_step", train_step)
        return train.main(words)


def assert_same(out: Path, other: Path) -> None:
    """Bit-identical, but for the clock."""
    assert lines_of(out, *CLOCK) == lines_of(other, *CLOCK)
    assert_same_weights(out, other)


def assert_same_weights(out: Path, other: Path) -> None:
    """Bit-identical: of SFT, of the best step, of the last step with its optimizer."""
    assert (out / "sft").exists() == (other / "sft").exists()
    for folder in ("sft", "best"):
        file = Path(folder, "model.safetensors")
        if (out / folder).exists():
            assert (out / file).read_bytes() == (other / file).read_bytes(), file
    one = torch.load(out / "last.pt")
    two = torch.load(other / "last.pt")
    assert one["model"]
    assert one["model"].keys() == two["model"].keys()
    for name in one["model"]:
        assert torch.equal(one["model"][name], two["model"][name]), name
    moments = one["optimizer"]["state"]
    assert moments.keys() == two["optimizer"]["state"].keys()
    for number, state in moments.items():
        for name in state:
            assert torch.equal(state[name], two["optimizer"]["state"][number][name]), name
    for name in ("stage", "state", "scaler"):
        assert one[name] == two[name]


def test_every_kind_of_run_goes_on_after_a_stop_in_dpo(a_run, world, tmp_path, monkeypatch):
    """DPO's start is made anew: of random neurons, of the strongest, or of SFT's weights alone.

    SFT has 4 updates, so the stop is before DPO's third. The last save was after its second. When a
    run saves changes nothing else, so save_every need not be that of the other run.
    """
    if a_run.in_bytes:
        bytes_as_tokens(monkeypatch)
    update = 3 if a_run.name == "pretrained" else 7
    options = RUNS[a_run.name] | {"save_every": 2}
    words = argv(world, tmp_path, resume=True, **options)
    assert stop_before(update, words, monkeypatch) == 130
    saved = torch.load(tmp_path / "last.pt")
    assert (saved["stage"], saved["state"]["step"]) == ("dpo", 2)
    assert train.main(words) == 0
    assert_same(tmp_path, a_run.out)


def test_a_run_goes_on_on_a_machine_that_rounds_otherwise(world, tmp_path, monkeypatch):
    """As if the reference's numbers, which a run has kept, were of a machine with other rounding.
    At the start such numbers are refused. A run that goes on was checked when it began."""
    bytes_as_tokens(monkeypatch)
    words = argv(world, tmp_path, resume=True, **STOPPED)
    assert stop_before(14, words, monkeypatch) == 130
    saved = torch.load(tmp_path / "last.pt")
    assert saved["stage"] == "dpo"
    saved["reference_tables"]["train"] += 0.01
    torch.save(saved, tmp_path / "last.pt")
    assert train.main(words) == 0

    real = dpo.reference_logps
    monkeypatch.setattr(dpo, "reference_logps", lambda *arguments: real(*arguments) + 0.01)
    assert train.main(argv(world, tmp_path / "new", **STOPPED)) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_and_goes_on_bit_for_bit(dtype, world, tmp_path, monkeypatch):
    """float16's gradients are scaled; the scale is in last.pt, and when it grows next."""
    bytes_as_tokens(monkeypatch)
    options = STOPPED | {"dtype": dtype, "beta": 1.0, "lr": 0.01}
    whole = tmp_path / "whole"
    assert train.main(argv(world, whole, **options)) == 0
    updates = of(lines_of(whole), "dpo", "train")
    assert updates[-1]["loss"] < 0.8 * math.log(2)
    assert of(lines_of(whole), "dpo", "val")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    saved = torch.load(whole / "last.pt")
    for weight in saved["model"].values():
        assert weight.dtype == torch.float32
    if dtype == "float16":
        assert saved["scaler"]["scale"] > 1
        assert updates[-1]["skipped"] == updates[2]["skipped"] <= 3    # a few, and only at first
        assert saved["scaler"]["_growth_tracker"] > 0

    words = argv(world, tmp_path / "stopped", resume=True, **options)
    assert stop_before(14, words, monkeypatch) == 130  # before the sixth of DPO
    assert train.main(words) == 0
    assert_same(tmp_path / "stopped", whole)


SERVER = r"""
import gc, json, os, signal, sys
import tiktoken, torch, torch._dynamo, train
from pathlib import Path
encoding = train.data.encoding_of(demo=True)
tiktoken.get_encoding = lambda name: encoding
torch.set_num_threads(1)
torch.accelerator.current_accelerator = lambda **options: None  # on the CPU
with torch.device("meta"):  # what torch imports at its first use, imported once for all
    train.GPT2(train.GPT2Config(1, 1, 4, 4, 4, 4))
weight = torch.nn.Parameter(torch.ones(1))
weight.grad = torch.ones(1)
torch.optim.AdamW([weight], fused=True).step()
gc.freeze()
print(0, flush=True)

def sign_at(owner, name, count, number):
    # Send this process a signal just before call number `count` of owner.name.
    real = getattr(owner, name)
    calls = []
    def call(*args, **options):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return real(*args, **options)
    setattr(owner, name, call)

def child(log, argv, at):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if at:
        sign_at(train.dpo if at[0] == "train_step" else Path, *at)
    code = train.main(argv)
    sys.stdout.flush()
    os._exit(code)  # without the second that Python takes to put everything away

for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        _, status = os.waitpid(job["wait"], 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    process = os.fork()
    if process == 0:
        child(**job)
    print(process, flush=True)
"""


class Jobs:
    """Begins runs in processes of their own, and waits for them."""

    def __init__(self):
        folder = Path(__file__).resolve().parent.parent
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=folder, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # No CUDA: it can't be used in a child of a process that has looked for it.
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
        assert self.server.stdout.readline() == "0\n"  # it is ready

    def ask(self, job: dict) -> int:
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def begin(self, words: list[str], at: tuple = ()) -> int:
        """Its process id. `at`: (function, n, signal), sent to itself before the n-th call."""
        log = words[words.index("--out") + 1] + ".log"
        return self.ask({"log": log, "argv": words, "at": at})

    def wait(self, process: int) -> int:
        """The exit code of the process; minus the signal's number where it was killed."""
        return self.ask({"wait": process})

    def run(self, words: list[str], at: tuple = ()) -> int:
        return self.wait(self.begin(words, at))


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    jobs.server.stdin.close()
    jobs.server.wait()


@pytest.fixture(scope="module")
def undisturbed(world, jobs) -> Path:
    """A run to compare with."""
    assert jobs.run(argv(world, "undisturbed", **STOPPED)) == 0
    return world / "undisturbed"


def log_of(out: Path) -> str:
    log = Path(f"{out}.log")
    return log.read_text() if log.exists() else ""


def progress(out: Path) -> int:
    """Lines that tell of updates or validations."""
    lines = log_of(out).splitlines()
    return len([line for line in lines if line.startswith(("train ", "val "))])


def wait_for_progress(out: Path, lines: int) -> None:
    end = time.monotonic() + 60
    while progress(out) < lines:
        assert time.monotonic() < end, log_of(out)
        time.sleep(0.002)


def test_a_run_that_is_killed_at_the_worst_moments_ends_as_if_it_had_not_been(
        undisturbed, world, jobs):
    """SIGKILL, several times over; --resume each time; the same bits and the same metrics.

    Before the n-th rename of a file to its final name, or before the n-th update: so the kill comes
    before anything is saved, between best weights and last.pt, and between two saves.
    """
    out = world / "killed"
    words = argv(world, "killed", resume=True, **STOPPED)
    steps = []
    for moment in (("replace", 4), ("replace", 7), ("train_step", 14), ("replace", 6),
                   ("train_step", 6)):
        assert jobs.run(words, (*moment, signal.SIGKILL)) == -signal.SIGKILL, log_of(out)
        if (out / "last.pt").exists():
            saved = torch.load(out / "last.pt")
            steps.append((saved["stage"], saved["state"]["step"]))
        else:
            steps.append("nothing")
    assert steps == ["nothing", ("sft", 0), ("dpo", 4), ("dpo", 8), ("dpo", 12)]
    assert jobs.run(words) == 0, log_of(out)
    assert_same(out, undisturbed)


def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(
        undisturbed, world, jobs):
    """SIGKILL up to 0.03 s after 3 or 4 more lines of progress."""
    out = world / "killed_at_random"
    words = argv(world, out, resume=True, **STOPPED)
    dice = random.Random(8)
    for lines in (3, 4, 3):
        before = progress(out)
        process = jobs.begin(words)
        wait_for_progress(out, before + lines)
        time.sleep(dice.uniform(0, 0.03))
        os.kill(process, signal.SIGKILL)
        assert jobs.wait(process) == -signal.SIGKILL, log_of(out)
    assert jobs.run(words) == 0, log_of(out)
    assert_same(out, undisturbed)


def test_ctrl_c_is_a_kill_with_a_word_on_how_to_go_on(undisturbed, world, jobs):
    """Exit code 130; what is on disk is whole at any moment, so the resumed run ends the same."""
    out = world / "stopped"
    words = argv(world, "stopped", resume=True, **STOPPED)
    assert jobs.run(words, ("train_step", 8, signal.SIGINT)) == 130, log_of(out)
    assert jobs.run(words, ("train_step", 7, signal.SIGTERM)) == -signal.SIGTERM, log_of(out)
    assert log_of(out).count("--resume goes on") == 1
    assert jobs.run(words) == 0, log_of(out)
    assert "Traceback" not in log_of(out)
    assert_same(out, undisturbed)


def test_a_folder_in_which_a_run_is_at_work_is_refused_until_it_ends(undisturbed, world, jobs):
    """A second process is refused with one line; when the first was killed, --resume goes on."""
    out = world / "busy"
    words = argv(world, "busy", resume=True, **STOPPED)
    first = jobs.begin(words)
    wait_for_progress(out, 4)
    os.kill(first, signal.SIGSTOP)                     # it holds the folder, and waits
    before = (out / "metrics.jsonl").read_bytes()
    assert jobs.run(words) == 2, log_of(out)
    assert (out / "metrics.jsonl").read_bytes() == before
    last = log_of(out).splitlines()[-1]
    assert last == (f"error  {out}: another run writes there: wait for it, or take another --out")
    assert "Traceback" not in log_of(out)

    os.kill(first, signal.SIGKILL)
    assert jobs.wait(first) == -signal.SIGKILL
    assert jobs.run(words) == 0, log_of(out)
    assert_same(out, undisturbed)


# The demo's world, and the log-probabilities of a real file's pairs.

def test_the_demo_draws_its_pairs_by_the_rule():
    """Preferred answers obey in 1 / (1 + exp(-4)) = 98.2% of the pairs."""
    pairs = data.demo_pairs(20_000, 3)
    assert data.demo_pairs(20_000, 3) == pairs
    assert data.demo_pairs(20_000, 4) != pairs
    obeying = len([pair for pair in pairs if "!" in pair.chosen])
    assert obeying / 20_000 == pytest.approx(0.982, abs=0.004)
    for pair in pairs:
        assert pair.chosen[:2] == pair.rejected[:2]
        assert {pair.chosen[2:], pair.rejected[2:]} == {"!", "."}
        assert pair.prompt.startswith(data.HUMAN)
        assert pair.prompt.endswith(data.ASSISTANT)


def test_the_demos_sft_shows_both_answers_equally_often(world):
    """Pairs 1, 3, 5, ... show the rejected answer; so SFT can't learn which one is preferred."""
    pairs = tokens_of(world, "train")[:4]
    shown = train.half_swapped({"train": pairs})["train"]
    for number in (0, 2):
        assert shown[number] is pairs[number]
    for number in (1, 3):
        assert shown[number].chosen is pairs[number].rejected
        assert shown[number].prompt is pairs[number].prompt


@pytest.mark.parametrize(("answer", "formed"), [
    (" 7!<|endoftext|>", True), (" 0.<|endoftext|>", True), (" 7!", False),
    (" 77!<|endoftext|>", False), ("7!<|endoftext|>", False), (" 7!<|endoftext|>\n", False),
    (" 7!!<|endoftext|>", False), (" 7?<|endoftext|>", False), ("<|endoftext|>", False),
    ("", False)])
def test_a_well_formed_answer_of_the_demo_is_a_digit_and_a_mark(answer, formed):
    assert bool(train.WELL_FORMED.fullmatch(answer)) == formed


@pytest.mark.parametrize("sides", [("chosen", "rejected"), ("chosen",)])
def test_a_packed_batch_equals_plain_rows(world, sides):
    """Each response alone behind its prompt, float64: the same logp, summed over its tokens."""
    model = GPT2.from_pretrained(world / "gpt2").double()
    pairs = tokens_of(world, "train")[:5]
    found = dpo.packed_logps(model, data.pack(pairs, range(5), sides=sides))
    expected = []
    for side in sides:
        for pair in pairs:
            response = getattr(pair, side).tolist()
            row = torch.tensor([pair.prompt.tolist() + response])
            logps = model(row)[0].log_softmax(-1)[len(pair.prompt) - 1:-1]
            expected.append(logps.gather(1, torch.tensor(response)[:, None]).sum())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-9)
