"""train.fit, the loop: when it validates, logs, saves and stops, and how it goes on after a kill.

A GPT-2 of 40 words learns 23 pairs, two in an update, so 12 updates are an epoch and the last of
them has one pair. Folders are real: train.open_run makes them. Where a claim is about given losses,
skips or clocks, these are given.
"""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import data
import dpo
import train
from model import GPT2, GPT2Config, add_adapters

TINY = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=40, n_inner=16)
MACHINE = train.Machine(torch.device("cpu"), torch.float32, piece=8)
UPDATES = 12
LR = 0.01
TOKENS_PER_PAIR = 6            # that the model reads: a prompt of 3, then 1 of 2, then 2 of 3
CLOCK = ("tokens_per_second", "seconds_left")

# Validations at 0, 4, 8 and 12; lines at 3, 6, 9 and 12; saves at 5 and 10, and at validations.
OPTIONS = {"epochs": 1, "batch_pairs": 2, "micro_pairs": 1, "vals": 3, "patience": 99,
           "log_every": 3, "save_every": 5, "warmup_share": 0.25}


def token_pairs(count: int, seed: int) -> list[data.TokenPair]:
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        words = rng.integers(0, 40, 8).astype(np.int32)
        pairs.append(data.TokenPair(words[:3], words[3:5], words[5:]))
    return pairs


SPLITS = {"train": token_pairs(23, seed=1), "val": token_pairs(5, seed=2)}


def loss_function(model: GPT2, batch: data.PackedBatch) -> dict[str, Tensor]:
    return dpo.dpo_metrics(dpo.packed_logps(model, batch), batch.reference_logps, beta=0.5)


def reference_with_nan(*updates: int) -> dict[str, Tensor]:
    """What some reference says; it says nan of the pairs of these updates, counted from 1.

    An update with nan in its loss is skipped, whether the run was resumed before it or not.
    """
    reference = {"train": torch.full((2, 23), -9.0), "val": torch.full((2, 5), -9.0)}
    order = data.shuffled(23, seed=0, epoch=0)
    for update in updates:
        reference["train"][:, order[2 * (update - 1)]] = math.nan
    return reference


def fit(folder: Path, nan_updates: tuple[int, ...] = (), stage: str = "dpo",
        splits: dict[str, list] = SPLITS, **options) -> SimpleNamespace:
    """A whole loop in a folder, or what is left of it: its state, its model, its start."""
    config = train.Config(out=str(folder), **(OPTIONS | options))
    run = train.open_run(config, MACHINE, audit={})
    torch.manual_seed(0)
    model = GPT2(TINY)
    nn.init.normal_(model.wte.weight, std=0.5)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    try:
        state = train.fit(config, MACHINE, run, stage, model, loss_function, splits,
                          reference_with_nan(*nan_updates), peak_lr=LR, epochs=config.epochs)
    finally:
        run.metrics.close()    # and with it the lock, as at the end of a process
    return SimpleNamespace(state=state, model=model, start=start)


def lines_of(folder: Path, event: str = "") -> list[dict]:
    """The lines of metrics.jsonl of an event, or all."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if event in ("", line["event"])]


def steps_of(folder: Path, event: str) -> list[int]:
    return [line["step"] for line in lines_of(folder, event)]


def without_clock(lines: list[dict]) -> list[dict]:
    found = []
    for line in lines:
        found.append({name: line[name] for name in line if name not in CLOCK})
    return found


@pytest.fixture
def given(monkeypatch):
    """A function that gives the losses of the next validations, in place of real ones."""
    def give(losses: list[float]) -> None:
        coming = iter(losses)

        def val_step(model, batches, loss_function):
            return {"loss": next(coming)}
        monkeypatch.setattr(dpo, "val_step", val_step)
    return give


@pytest.fixture
def saves(monkeypatch, tmp_path) -> list[SimpleNamespace]:
    """Of each save of last.pt the step, and a copy of the folder as it was then."""
    real = train.save_last
    made = []

    def save_last(run, stage, model, optimizer, scaler, reference, state):
        real(run, stage, model, optimizer, scaler, reference, state)
        copy = tmp_path / "copies" / str(len(made))
        shutil.copytree(run.folder, copy)
        made.append(SimpleNamespace(step=state.step, folder=copy))
    monkeypatch.setattr(train, "save_last", save_last)
    return made


@pytest.fixture
def best_saves(monkeypatch) -> list[Path]:
    """The folder of each save of the best weights."""
    real = train.save_pretrained
    folders = []

    def save_pretrained(model, folder):
        real(model, folder)
        folders.append(folder)
    monkeypatch.setattr(train, "save_pretrained", save_pretrained)
    return folders


# When

@pytest.mark.parametrize(("pairs", "epochs", "vals", "expected"), [
    (12, 1, 2, [0, 3, 6]),
    (13, 1, 2, [0, 4, 7]),         # 7 updates, the last of one pair
    (13, 1, 4, [0, 2, 4, 6, 7]),
    (13, 1, 3, [0, 3, 6, 7]),
    (6, 2, 2, [0, 3, 6]),          # of the whole run, not of an epoch
    (4, 1, 1, [0, 2]),
    (4, 1, 9, [0, 1, 2]),          # not more often than after each update
])
def test_validation_comes_at_0_every_n_steps_and_at_the_end(
        tmp_path, pairs, epochs, vals, expected):
    splits = SPLITS | {"train": SPLITS["train"][:pairs]}
    found = fit(tmp_path, splits=splits, epochs=epochs, vals=vals)
    assert steps_of(tmp_path, "val") == expected
    assert found.state.step == expected[-1]


def test_lines_and_saves_come_when_asked_for(tmp_path, saves):
    """A save comes every 5 updates and before each validation, so no validation is lost."""
    fit(tmp_path / "run")
    assert steps_of(tmp_path / "run", "train") == [3, 6, 9, 12]
    assert steps_of(tmp_path / "run", "val") == [0, 4, 8, 12]
    assert [save.step for save in saves] == [0, 4, 5, 8, 10, 12]


def test_the_last_update_has_a_line_also_in_the_middle_of_a_window(tmp_path):
    fit(tmp_path, log_every=5)
    assert steps_of(tmp_path, "train") == [5, 10, 12]


# What a line says

def test_a_line_holds_the_means_since_the_last(tmp_path):
    """Against a run that logs each update: the means of 3 of its lines are the line."""
    fit(tmp_path / "run")
    fit(tmp_path / "each", log_every=1)
    each = lines_of(tmp_path / "each", "train")
    expected_lr = [dpo.cosine_lr(step, LR, 3, UPDATES) for step in range(UPDATES)]
    assert [line["lr"] for line in each] == expected_lr

    for number, line in enumerate(without_clock(lines_of(tmp_path / "run", "train"))):
        window = each[3 * number:3 * number + 3]
        means = set(line) - {"event", "stage", "step", "skipped"}
        assert {"loss", "rewards/margins", "grad_norm", "lr"} < means
        for name in means:
            expected = sum(update[name] for update in window) / 3
            assert line[name] == pytest.approx(expected, rel=1e-12), name


def test_speed_is_of_updates_alone_and_of_this_process(tmp_path, monkeypatch, saves):
    """A clock that goes on by 1 s when it is read: each update takes 1, and 1 passes between two.

    4 updates of 2 pairs, so 12 tokens each. After 2 of them 5 s are gone, so 5 are left. A run that
    goes on in the middle of a window counts no token of before: after its first update, when 3 s
    are gone, 6 are left for 2 updates.
    """
    splits = SPLITS | {"train": SPLITS["train"][:8]}

    def start_clock() -> None:
        seconds = iter(range(999))
        clock = SimpleNamespace(perf_counter=lambda: next(seconds))
        monkeypatch.setattr(train, "time", clock)

    def speeds(folder: Path) -> list[tuple[float, float]]:
        lines = lines_of(folder, "train")
        return [(line["tokens_per_second"], line["seconds_left"]) for line in lines]

    update_tokens = 2.0 * TOKENS_PER_PAIR
    options = {"log_every": 2, "save_every": 1, "vals": 1}
    start_clock()
    fit(tmp_path / "run", splits=splits, **options)
    assert speeds(tmp_path / "run") == [(update_tokens, 5.0), (update_tokens, 0.0)]

    (after_one,) = [save.folder for save in saves if save.step == 1]
    start_clock()
    fit(after_one, splits=splits, resume=True, **options)
    assert speeds(after_one) == [(update_tokens, 6.0), (update_tokens, 0.0)]


def test_validation_does_not_count_as_time_of_updates(tmp_path, monkeypatch):
    """An update takes 2 s, a validation 1,000: 12 tokens in 2 s are 6 a second."""
    clock = SimpleNamespace(now=0.0)
    real_val_step = dpo.val_step
    real_train_step = dpo.train_step

    def val_step(*arguments):
        clock.now += 1000.0
        return real_val_step(*arguments)

    def train_step(*arguments):
        clock.now += 2.0
        return real_train_step(*arguments)
    monkeypatch.setattr(dpo, "val_step", val_step)
    monkeypatch.setattr(dpo, "train_step", train_step)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    fit(tmp_path, splits=SPLITS | {"train": SPLITS["train"][:22]}, vals=11)
    assert {line["tokens_per_second"] for line in lines_of(tmp_path, "train")} == {6.0}


def test_the_rate_is_what_the_optimizer_uses(tmp_path, saves):
    """Adam's first update moves each weight by the rate: with a warm-up of 3 updates, by LR / 3.

    A bias shows it, for it began at 0. All that is near 0 in the gradient would move less.
    """
    found = fit(tmp_path / "run", save_every=1)
    before = found.start["h.0.mlp.c_proj.bias"]
    (at_1,) = [save.folder for save in saves if save.step == 1]
    after = torch.load(at_1 / "last.pt")["model"]["h.0.mlp.c_proj.bias"]
    assert (after - before).abs().tolist() == pytest.approx([LR / 3] * 8, rel=1e-3)


def test_the_loop_is_for_the_named_stage_and_its_folder(tmp_path, best_saves):
    """SFT's best weights go to sft, DPO's to best; what is saved of SFT is not gone on with."""
    fit(tmp_path, stage="sft")
    found = fit(tmp_path, stage="dpo", resume=True)
    assert {folder.name for folder in best_saves} == {"sft", "best"}
    assert found.state.step == UPDATES
    stages = [(line["stage"], line["step"]) for line in lines_of(tmp_path, "val")]
    assert stages[-4:] == [("dpo", 0), ("dpo", 4), ("dpo", 8), ("dpo", 12)]


# The best weights, and patience

def test_the_best_is_kept_when_later_ones_are_worse(tmp_path, given, best_saves):
    """An equal loss is not better; a nan neither."""
    given([5.0, 3.0, 4.0, 1.0, 1.0, math.nan, 2.0])
    found = fit(tmp_path, splits=SPLITS | {"train": SPLITS["train"][:12]}, vals=6)
    assert len(best_saves) == 3
    assert (found.state.best_loss, found.state.best_step) == (1.0, 3)
    lines = lines_of(tmp_path, "val")
    assert [line["best"] for line in lines] == [5.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0]
    assert [line["best_step"] for line in lines] == [0, 1, 1, 3, 3, 3, 3]


def test_the_best_folder_holds_the_weights_of_the_best_step(tmp_path, given, saves):
    """Validation at step 8 is the best of 0, 4, 8 and 12: best/ holds what last.pt held at 8."""
    given([5.0, 4.0, 1.0, 2.0])
    fit(tmp_path / "run")
    best = GPT2.from_pretrained(tmp_path / "run" / "best").state_dict()
    (at_8,) = [save.folder for save in saves if save.step == 8]
    expected = torch.load(at_8 / "last.pt")["model"]
    assert best.keys() == expected.keys()
    for name, weight in best.items():
        assert torch.equal(weight, expected[name]), name


LOSSES = [5.0, 3.0, 4.0, 4.0, 2.0, 4.0, 2.0, 4.0, 1.0]


def test_training_ends_when_patience_does(tmp_path, given, saves, capsys):
    """A lower loss at 4 starts the count anew: 3 validations without one are 5, 6 and 7."""
    options = {"vals": UPDATES, "patience": 3}
    given(LOSSES)
    whole = fit(tmp_path / "run", **options)
    assert (whole.state.step, whole.state.best_step) == (7, 4)
    assert "3 validations in a row brought no lower loss" in capsys.readouterr().out

    (at_6,) = [save.folder for save in saves if save.step == 6]
    given(LOSSES[7:])                                  # that of step 6 was made before the save
    again = fit(at_6, resume=True, **options)
    assert again.state == whole.state


def test_a_loop_that_has_ended_ends_again_at_once(tmp_path, given, monkeypatch):
    """Its last validation is made once more, since last.pt was written before it."""
    options = {"vals": UPDATES, "patience": 3}
    given(LOSSES)
    whole = fit(tmp_path, **options)
    lines = lines_of(tmp_path)
    monkeypatch.setattr(dpo, "train_step", None)       # no update is made
    given(LOSSES[7:])
    again = fit(tmp_path, resume=True, **options)
    assert again.state == whole.state
    assert lines_of(tmp_path) == lines


# Updates that are skipped

def test_skipped_updates_are_counted_and_stay_out_of_the_means(tmp_path):
    bad = (2, 3, 6, 7, 8, 9)
    found = fit(tmp_path / "run", bad, log_every=2)
    lines = without_clock(lines_of(tmp_path / "run", "train"))
    assert (found.state.skipped, found.state.skipped_in_a_row) == (6, 0)
    assert [line["skipped"] for line in lines] == [1, 2, 3, 5, 6, 6]
    assert lines[3] == {"event": "train", "stage": "dpo", "step": 8, "skipped": 5}  # no mean
    for number in (0, 1, 2, 4, 5):
        assert math.isfinite(lines[number]["loss"])
    for weight in found.model.parameters():
        assert weight.isfinite().all()

    fit(tmp_path / "each", bad, log_every=1)
    first = lines_of(tmp_path / "each", "train")[0]
    for name in ("loss", "grad_norm", "lr"):           # of the updates 1 and 2 the first counts
        assert lines[0][name] == first[name]


def test_too_many_skips_in_a_row_end_the_run_and_name_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MAX_SKIPPED", 3)
    with pytest.raises(FloatingPointError) as caught:
        fit(tmp_path / "run", (2, 3, 6, 7, 8))
    message = str(caught.value)
    assert "3 updates in a row, up to number 8," in message
    assert str(tmp_path / "run" / "best") in message
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()

    found = fit(tmp_path / "two", (2, 3, 5, 6))
    assert found.state.skipped == 4


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_stage_that_ends_without_a_finite_validation_is_an_error(tmp_path, given, loss):
    """Not a line that calls the weights best which nobody has kept."""
    given([loss] * 9)
    with pytest.raises(FloatingPointError, match="after update 8, but no validation had a finite"):
        fit(tmp_path, patience=3)
    assert not (tmp_path / "best").exists()


def test_without_a_finite_validation_the_error_names_no_weights(tmp_path, monkeypatch, given):
    monkeypatch.setattr(train, "MAX_SKIPPED", 3)
    given([math.nan] * 9)
    with pytest.raises(FloatingPointError, match="no validation had a finite loss, so no weights"):
        fit(tmp_path, (1, 2, 3))
    assert not (tmp_path / "best").exists()


def test_skips_are_counted_across_a_stop(tmp_path, monkeypatch):
    """Two skips before it, one after: last.pt is of update 7, and update 8 is the third."""
    monkeypatch.setattr(train, "MAX_SKIPPED", 3)
    for resume in (False, True):
        with pytest.raises(FloatingPointError, match="up to number 8"):
            fit(tmp_path, (6, 7, 8), save_every=1, resume=resume)
        saved = torch.load(tmp_path / "last.pt")["state"]
        assert (saved["step"], saved["skipped_in_a_row"]) == (7, 2)


# Killed, and gone on with

def assert_same_end(folder: Path, other: Path) -> None:
    """Bit for bit: lines but for the clock, weights, moments, state, and the best weights."""
    assert without_clock(lines_of(folder)) == without_clock(lines_of(other))
    one = torch.load(folder / "last.pt")
    two = torch.load(other / "last.pt")
    assert one["state"] == two["state"]
    assert one["model"].keys() == two["model"].keys()
    for name, weight in one["model"].items():
        assert torch.equal(weight, two["model"][name]), name
    moments = one["optimizer"]["state"]
    assert moments.keys() == two["optimizer"]["state"].keys()
    for number, values in moments.items():
        assert {"step", "exp_avg", "exp_avg_sq"} <= values.keys()
        for name, value in values.items():
            assert torch.equal(value, two["optimizer"]["state"][number][name]), name
    best = Path("best", "model.safetensors")
    assert (folder / best).read_bytes() == (other / best).read_bytes()


def test_a_killed_run_goes_on_from_any_save(tmp_path, saves):
    """From each step: in the middle of a window, before and after a validation, and between.

    A kill may come at any time before the next save. So what the process wrote after the save is
    there: more lines, of which none may come twice, half a line, and later best weights.
    """
    fit(tmp_path / "run", (4, 9), save_every=1)
    # One after each validation, at 0, 4, 8, 12, and one after each update: before the validation.
    assert [save.step for save in saves] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]

    for save in list(saves):
        whole = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        (save.folder / "metrics.jsonl").write_bytes(whole + b'{"event": "tra')
        shutil.copytree(tmp_path / "run" / "best", save.folder / "best", dirs_exist_ok=True)
        fit(save.folder, (4, 9), save_every=1, resume=True)
        assert_same_end(save.folder, tmp_path / "run")


@pytest.mark.parametrize(("moment", "saved_step"), [
    ("in the validation", 0), ("before its best weights", 0), ("before its save", 0),
    ("after its save", 4)])
def test_a_run_that_dies_at_a_validation_goes_on_from_its_last_save(
        tmp_path, monkeypatch, given, moment, saved_step):
    """The second validation, at step 4, which is the best one. The save before it is of step 0."""
    losses = [5.0, 1.0, 2.0, 3.0]                      # at the steps 0, 4, 8 and 12
    given(losses)
    fit(tmp_path / "whole")
    given(losses)
    real_val_step = dpo.val_step
    real_save_pretrained = train.save_pretrained
    real_save_last = train.save_last
    vals = []

    def val_step(*arguments):
        vals.append(1)
        if moment == "in the validation" and len(vals) == 2:
            raise KeyboardInterrupt
        return real_val_step(*arguments)

    def save_pretrained(*arguments):
        if moment == "before its best weights" and len(vals) == 2:
            raise KeyboardInterrupt
        real_save_pretrained(*arguments)

    def save_last(*arguments):
        if moment == "before its save" and len(vals) == 2:
            raise KeyboardInterrupt
        real_save_last(*arguments)
        if moment == "after its save" and len(vals) == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "val_step", val_step)
        patch.setattr(train, "save_pretrained", save_pretrained)
        patch.setattr(train, "save_last", save_last)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "run")
    assert torch.load(tmp_path / "run" / "last.pt")["state"]["step"] == saved_step

    given(losses[1:] if saved_step == 0 else losses[2:])       # none is made twice, none left out
    fit(tmp_path / "run", resume=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


# What an update waits for

def test_all_micro_batches_of_an_update_are_on_the_device_before_it_begins(tmp_path, monkeypatch):
    """None is moved while the update computes: its micro-batches are the last that were moved."""
    real_to = data.PackedBatch.to
    real_train_step = dpo.train_step
    moved = []
    sizes = []

    def to(batch, device):
        moved.append(real_to(batch, device))
        return moved[-1]

    def train_step(model, micro_batches, *rest):
        count = len(micro_batches)
        assert [id(batch) for batch in micro_batches] == [id(batch) for batch in moved[-count:]]
        sizes.append(count)
        moved.clear()
        result = real_train_step(model, micro_batches, *rest)
        assert moved == []
        return result
    monkeypatch.setattr(data.PackedBatch, "to", to)
    monkeypatch.setattr(dpo, "train_step", train_step)
    fit(tmp_path)
    assert sizes == [2] * 11 + [1]                     # of one pair each


def test_a_batch_is_moved_by_plain_to_tensor_by_tensor(monkeypatch):
    """No pinned memory, no other stream: each tensor's .to has the device and nothing else."""
    batch = data.pack(SPLITS["val"], range(5))
    real = Tensor.to
    moved = []

    def to(tensor, *arguments, **options):
        moved.append((arguments, options))
        return real(tensor, *arguments, **options)
    monkeypatch.setattr(Tensor, "to", to)
    batch.to("meta")
    assert moved == [(("meta",), {})] * len(batch)


def test_python_waits_for_the_device_once_in_an_update(tmp_path, monkeypatch):
    """From train_step's start to the end of its log line one number is read: a list of all."""
    reads = []
    counted = []

    def watch(name: str) -> None:
        real = getattr(Tensor, name)

        def read(tensor, *arguments, **options):
            reads.append(name)
            return real(tensor, *arguments, **options)
        monkeypatch.setattr(Tensor, name, read)

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        watch(name)
    real_train_step = dpo.train_step
    real_log = train.log

    def train_step(*arguments):
        reads.clear()
        return real_train_step(*arguments)

    def log(run, event, *rest):
        real_log(run, event, *rest)
        if event == "train":
            counted.append(list(reads))
    monkeypatch.setattr(dpo, "train_step", train_step)
    monkeypatch.setattr(train, "log", log)
    fit(tmp_path, log_every=1, save_every=99)
    assert counted == [["tolist"]] * UPDATES


def test_frozen_weights_are_neither_trained_nor_saved(tmp_path):
    """With parallel adapters, last.pt holds the adapters alone, with their moments."""
    config = train.Config(out=str(tmp_path), **OPTIONS)
    run = train.open_run(config, MACHINE, audit={})
    torch.manual_seed(0)
    model = add_adapters(GPT2(TINY), "parallel", 4)
    train.fit(config, MACHINE, run, "dpo", model, loss_function, SPLITS, reference_with_nan(),
              peak_lr=LR, epochs=1)
    run.metrics.close()
    saved = torch.load(tmp_path / "last.pt")
    assert len(saved["model"]) == 4                    # two matrices, two biases
    assert all(".adapter." in name for name in saved["model"])
    assert len(saved["optimizer"]["state"]) == 4
