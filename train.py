"""Fine-tune GPT-2 on hh-rlhf: SFT on the chosen answers, then DPO. `python train.py --help`.

Read from top to bottom:

1. options           every option of the program, with its default and its help
2. the recipe        train: load, split, SFT, reference, check, DPO, test
3. the loop          fit: validation, best weights, early stopping, rate, update, log line, resume
4. loading           the machine, the model, the pairs
5. the run's folder  what a run writes, and what --resume needs
6. the demo          answers before and after DPO
7. the command line  from words to options, and from errors to one line
"""

import argparse
import errno
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import BinaryIO, NamedTuple

import tiktoken
import torch
from torch import Tensor, nn

import data
import dpo
from model import (
    ADAPTER_INITS,
    ADAPTERS,
    GPT2,
    GPT2Config,
    add_adapters,
    generate,
    save_pretrained,
    write_whole,
)

# 1. Options -------------------------------------------------------------------------------------


def option(default: object, help: str, choices: tuple[str, ...] | None = None) -> object:
    """A field of Config: its default, and what --help says about it."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every option of train.py.

    Raises ValueError for a number out of range, and for options that don't go together.
    """
    # What it reads and writes
    model: str = option("gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder or a file")
    hh_dir: str = option("hh-rlhf", "folder of hh-rlhf's files; missing ones are downloaded to it")
    subsets: str = option(",".join(data.SUBSETS), "the subsets of hh-rlhf, separated by commas")
    pairs: str = option("", "a JSONL file of your own pairs, to use in place of hh-rlhf")
    out: str = option("out", "the folder that the run writes")
    resume: bool = option(False, "go on from the last save of the run in the folder, if any")
    demo: bool = option(False, "train a tiny model on made-up pairs; nothing is downloaded")

    # Numbers, and the lengths of texts
    seed: int = option(0, "decides the order of the pairs, random weights, and the demo's pairs "
                             "and answers")
    dtype: str = option("auto", "number format of matrix products; auto: what suits the machine",
                        ("auto", "float32", "bfloat16", "float16"))
    max_tokens: int = option(512, "longest prompt with one answer; a longer answer is cut")
    max_prompt_tokens: int = option(256, "longest prompt; a longer one loses its beginning")
    val_share: float = option(0.05, "share of the prompts for validation")
    test_share: float = option(0.2, "share of the prompts for the test, of your own pairs and of "
                                    "the demo's; hh-rlhf has files of its own for that")

    # What trains
    adapter: str = option("parallel", "parallel: a small MLP beside each MLP; only the small ones "
                                      "train in DPO; replace: a small one in the place of each; "
                                      "none: no adapters, all weights train", ADAPTERS)
    adapter_width: int = option(64, "neurons of an adapter")
    adapter_init: str = option("scratch", "what a replacing adapter starts from: random weights, "
                                          "or the old MLP's strongest neurons", ADAPTER_INITS)

    # The loss
    beta: float = option(0.1, "the price of leaving the reference: a larger one keeps the model "
                               "closer to it")
    loss: str = option("sigmoid", "the loss; sigmoid is the paper's, for the others see dpo.py",
                       dpo.VARIANTS)
    label_smoothing: float = option(0.0, "share of labels believed to be wrong (sigmoid, robust)")
    sft_coef: float = option(0.0, "how much of the SFT loss is added to DPO's, against chosen "
                                   "answers that lose probability")

    # The updates
    sft_epochs: int = option(1, "passes over the pairs in SFT; 0: no SFT")
    sft_lr: float = option(5e-5, "highest learning rate of SFT")
    epochs: int = option(0, "passes over the pairs in DPO, at most; 0: as many as make about 250 "
                            "updates, but 1 at least and 10 at most")
    lr: float = option(0.0, "highest learning rate of DPO; 0: 1e-3 for parallel adapters, whose "
                            "last layers start at 0 and have far to go, else 1e-5 (the paper: "
                            "1e-6, for larger models)")
    warmup_share: float = option(0.1, "share of the updates in which the rate grows to its highest")
    batch_pairs: int = option(32, "pairs in an update")
    micro_pairs: int = option(32, "pairs that go through the model at once; fewer need less memory")
    max_norm: float = option(1.0, "a longer gradient is shortened to this length")

    # Validations, log lines, saves
    vals: int = option(8, "validations in a stage, SFT or DPO, at most, beside the one before the "
                          "first update: evenly spaced, and one at the end")
    patience: int = option(4, "training ends early after so many validations in a row without a "
                              "loss below the lowest so far")
    log_every: int = option(10, "updates between two lines of the log")
    save_every: int = option(100, "updates between two saves; there is one after each validation")

    def __post_init__(self) -> None:
        if self.lr == 0:           # first: the checks below want a rate above 0
            self.lr = 1e-3 if self.adapter == "parallel" else 1e-5

        may_be_0 = ("seed", "sft_epochs", "epochs", "sft_coef", "label_smoothing", "warmup_share")
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.type not in (int, float):
                continue
            if setting.name in may_be_0 and not 0 <= value < math.inf:
                raise ValueError(f"--{setting.name} is {value}, expected a number, 0 or more")
            if setting.name not in may_be_0 and not 0 < value < math.inf:
                raise ValueError(f"--{setting.name} is {value}, expected a number above 0")
        if self.val_share + self.test_share >= 1:
            raise ValueError(f"--val_share is {self.val_share}, --test_share {self.test_share}: "
                             f"expected less than 1 together, so that some are left for training")
        if self.seed >= 2**63:
            raise ValueError(f"--seed is {self.seed}, expected a number below 2**63")
        if self.warmup_share >= 1:
            raise ValueError(f"--warmup_share is {self.warmup_share}, expected a share below 1")

        dpo.check_variant(self.loss, self.label_smoothing)
        if self.adapter_init != "scratch" and self.adapter != "replace":
            raise ValueError(f"--adapter_init is {self.adapter_init}, but --adapter {self.adapter} "
                             f"has no use for it: expected --adapter replace")
        if self.demo and self.pairs:
            raise ValueError("--demo has pairs of its own: expected no --pairs")
        if self.demo and self.sft_epochs == 0:
            raise ValueError("--demo begins with random weights: expected some --sft_epochs")


# The demo's own defaults.
DEMO = {"out": "out/demo", "dtype": "float32", "max_tokens": 100, "max_prompt_tokens": 60,
        "beta": 1.0, "val_share": 0.1, "test_share": 0.1, "sft_epochs": 2, "sft_lr": 2e-3,
        "epochs": 1, "lr": 5e-4}

# 2. The recipe ----------------------------------------------------------------------------------


class Machine(NamedTuple):
    """What a run computes on."""
    device: torch.device
    dtype: torch.dtype         # of matrix products; weights, sums and optimizer are float32
    piece: int                 # predictions that have logits at a time: see dpo.packed_logps


class Run(NamedTuple):
    """A run's folder, locked for this process, where the system has locks."""
    folder: Path
    metrics: BinaryIO          # metrics.jsonl, a JSON object a line
    saved: dict                # what save_last wrote, if the run is resumed; else empty


def train(config: Config) -> int:
    """The whole job. Returns the exit code: 0, or 1 for a demo that misses its goal.

    Adapters come in at one of two moments. One that replaces an MLP comes before SFT, which has to
    make up for the MLP that is gone. A parallel one comes after SFT, which does not train it.
    """
    # Load and split.
    torch.manual_seed(config.seed)
    machine = choose_machine(config)
    model, encoding = load_model(config, machine)
    splits, audit = load_pairs(config, encoding)
    run = open_run(config, machine, audit)

    # The log-probabilities of a batch; and the two losses, each a dict of tensors (B,).
    def logps_of(model: GPT2, batch: data.PackedBatch) -> Tensor:
        with torch.autocast(machine.device.type, machine.dtype,
                            enabled=machine.dtype != torch.float32):
            return dpo.packed_logps(model, batch, machine.piece)

    def sft_loss_function(model: GPT2, batch: data.PackedBatch) -> dict[str, Tensor]:
        return {"loss": dpo.sft_loss(logps_of(model, batch), batch.response_lengths)}

    def dpo_loss_function(model: GPT2, batch: data.PackedBatch) -> dict[str, Tensor]:
        logps = logps_of(model, batch)
        metrics = dpo.dpo_metrics(logps, batch.reference_logps, config.beta)
        # By default that is all: metrics["loss"] is equation 7. Now what other options ask for.
        if config.loss != "sigmoid" or config.label_smoothing > 0:
            metrics["loss"] = dpo.variant_loss(
                logps, batch.reference_logps, batch.response_lengths, config.beta, config.loss,
                config.label_smoothing)
        if config.sft_coef > 0:
            chosen, _ = logps.chunk(2)
            chosen_lengths, _ = batch.response_lengths.chunk(2)
            sft_loss = dpo.sft_loss(chosen, chosen_lengths)
            metrics["loss"] = metrics["loss"] + config.sft_coef * sft_loss
        return metrics

    # SFT: all weights learn to write like the chosen answers.
    if config.adapter == "replace":
        add_adapters(model, "replace", config.adapter_width, config.adapter_init)
    sft_splits = splits
    if config.demo:            # as many rejected answers as chosen ones: the choice is left to DPO
        sft_splits = half_swapped(splits)
    sft_is_done = run.saved.get("stage") == "dpo"      # the run goes on in DPO
    if not sft_is_done:
        fit(config, machine, run, "sft", model, sft_loss_function, sft_splits,
            peak_lr=config.sft_lr, epochs=config.sft_epochs, sides=("chosen",))
    save_tokenizer(config, run.folder / "sft")
    model = GPT2.from_pretrained(run.folder / "sft").to(machine.device)      # the best weights

    # The reference is this model. It is asked once about every pair. data.pack puts what it said
    # into each batch, as batch.reference_logps. (The batches of training are others than those of
    # this pass, and round differently. So the first rewards are 0 but for rounding.) A run that
    # goes on in DPO has kept it, in last.pt.
    reference_tables = {}
    if sft_is_done:
        reference_tables = run.saved["reference_tables"]
    else:
        for name, pairs in splits.items():
            batches = eval_batches(pairs, config, machine)
            batch_count = math.ceil(len(pairs) / config.micro_pairs)
            tracked = data.track(batches, f"reference of {name}", batch_count, "batches")
            reference_tables[name] = dpo.reference_logps(logps_of, model, tracked, len(pairs))

    # From here on the model is the policy. No update was made, so it still is its reference. Check
    # that on the very batch that the reference had first, of the shortest pairs: eval_batches gives
    # the same ones at each call.
    # (Not where a run goes on, perhaps on another machine, which rounds differently.)
    if config.adapter != "replace":
        add_adapters(model, config.adapter, config.adapter_width)
    if not sft_is_done:
        first = next(eval_batches(splits["train"], config, machine, reference_tables["train"]))
        with torch.no_grad():
            dpo.check_start(logps_of(model, first), first.reference_logps)
        start = dpo.val_step(model, [first], dpo_loss_function)      # to be shown
        print(f"start  the policy equals its reference | loss {start['loss']:.4f} | "
              f"rewards {start['rewards/chosen']:.4f} and {start['rewards/rejected']:.4f}")
    print_model(model, machine)

    # DPO.
    epochs = config.epochs or epochs_for(len(splits["train"]), config.batch_pairs)
    state = fit(config, machine, run, "dpo", model, dpo_loss_function, splits,
                reference_tables, peak_lr=config.lr, epochs=epochs)
    save_tokenizer(config, run.folder / "best")

    # Test, with the best weights.
    model = GPT2.from_pretrained(run.folder / "best").to(machine.device)
    tests = eval_batches(splits["test"], config, machine, reference_tables["test"])
    test = dpo.val_step(model, tests, dpo_loss_function)
    count = len(splits["test"])
    accuracy = test["rewards/accuracies"]
    low, high = dpo.wilson_interval(accuracy, count)
    test |= {"pairs": count, "accuracy_low": low, "accuracy_high": high}
    # The tested weights are those after best_step updates, of all that were made.
    log(run, "test", "dpo", state.best_step, state.step, test)
    print(f"result {run.folder / 'best'} | test accuracy {accuracy:.3f}, 95% interval {low:.3f} to "
          f"{high:.3f}, on {count} pairs")
    print(f"curves python tests/curves.py {run.folder}")
    if not config.demo:
        return 0
    return show_demo(config, machine, run, encoding, splits["test"])


def epochs_for(pairs: int, batch_pairs: int) -> int:
    """How many passes over so many pairs come nearest to 250 updates: at least 1, at most 10.

    A small data set is repeated: with few updates, the default rates would not take the policy
    far from its reference. A large one makes more updates in a single pass: 45,000 pairs make
    1,407.

    >>> [epochs_for(pairs, batch_pairs=32) for pairs in (45_000, 2_700, 750, 100)]
    [1, 3, 10, 10]
    """
    updates = math.ceil(pairs / batch_pairs)
    return min(10, max(1, round(250 / updates)))


# 3. The loop ------------------------------------------------------------------------------------
#
# With 12 updates (u) and validations (V) after every fourth, a stage is V uuuu V uuuu V uuuu V. The
# best weights may be those of the first V, before any update.
#
# How a run that was killed goes on, with --resume:
#
# - After each validation, and every config.save_every updates, save_last has written last.pt: the
#   weights that train, the optimizer, float16's scaler, the State, what the reference said, and how
#   long the log was.
# - open_run reads it, and cuts off what the log says of later updates.
# - train goes straight to DPO, with the weights in sft/, if the last save was made in DPO.
# - fit puts the weights, the optimizer, the scaler and the State back. data.batches goes on with
#   update number state.step, as the pairs of an update follow from the seed and its number alone.
#
# So the updates after the last save are made once more. On the same CPU they give the same numbers,
# to the bit. (Killed after SFT's last save, a run goes on in SFT, which ends at once. Without a
# last.pt it begins anew.)

MAX_SKIPPED = 20               # so many skipped updates in a row end a run


@dataclass
class State:
    """Where a loop is. save_last has what else a resumed run needs."""
    step: int = 0              # updates so far, skipped ones too
    validated_step: int = -1   # of the last validation: a run that goes on doesn't repeat it
    best_loss: float = math.inf
    best_step: int = 0
    worse_in_a_row: int = 0    # validations since the best one
    skipped: int = 0
    skipped_in_a_row: int = 0
    # Metrics of the updates since the last log line: so the next line has their means after a
    # resume, too.
    window: list = field(default_factory=list)


def fit(config: Config, machine: Machine, run: Run, stage: str, model: GPT2,
        loss_function: dpo.LossFunction, splits: dict[str, list[data.TokenPair]],
        reference_tables: dict[str, Tensor] | None = None, *, peak_lr: float, epochs: int,
        sides: tuple[str, ...] = data.SIDES) -> State:
    """Train the model on splits["train"], and keep the weights that are best on splits["val"].

    stage: "sft" or "dpo". The best weights go to the folder sft or best. Training ends after
    `epochs` epochs, or when config.patience validations in a row have brought no lower loss.
    If run.saved is of this stage, the loop goes on from there, as if it had not been stopped: on a
    CPU bit for bit.

    reference_tables: of each split, what dpo.reference_logps returned. Raises FloatingPointError
    when MAX_SKIPPED updates in a row had no finite loss and gradient, and at the end if no
    validation had a finite loss.
    """
    reference_tables = reference_tables or {}          # SFT has none
    best_folder = run.folder / ("sft" if stage == "sft" else "best")
    updates_per_epoch = math.ceil(len(splits["train"]) / config.batch_pairs)
    total_steps = epochs * updates_per_epoch
    warmup_steps = round(config.warmup_share * total_steps)
    # At least 1, as it divides: with --sft_epochs 0 there are no updates at all.
    val_every = max(1, math.ceil(total_steps / config.vals))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)   # its lr is set below
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    state = State()
    if run.saved.get("stage") == stage:                # go on
        # strict=False: only what trains was saved. The frozen weights are there already.
        model.load_state_dict(run.saved["model"], strict=False)
        optimizer.load_state_dict(run.saved["optimizer"])
        scaler.load_state_dict(run.saved["scaler"])
        state = State(**run.saved["state"])

    # An iterator over updates: of each, the list of its micro-batches.
    updates = data.batches(splits["train"], config.batch_pairs, config.micro_pairs, config.seed,
                           start=state.step, reference_table=reference_tables.get("train"),
                           sides=sides)
    first_step = state.step                            # of this process
    started = time.perf_counter()
    speeds = []                                        # tokens a second, since the last log line

    while True:
        # Validate, and keep the weights if they are the best so far.
        val_is_due = state.step % val_every == 0 or state.step == total_steps
        if val_is_due and state.validated_step != state.step:
            val_batches = eval_batches(splits["val"], config, machine, reference_tables.get("val"),
                                       sides)
            metrics = dpo.val_step(model, val_batches, loss_function)
            if metrics["loss"] < state.best_loss:      # at first it is infinite
                state.best_loss = metrics["loss"]
                state.best_step = state.step
                state.worse_in_a_row = 0
                save_pretrained(model, best_folder)
            else:
                state.worse_in_a_row += 1
            state.validated_step = state.step
            metrics |= {"best": state.best_loss, "best_step": state.best_step}
            log(run, "val", stage, state.step, total_steps, metrics)
            save_last(run, stage, model, optimizer, scaler, reference_tables, state)

        if state.step == total_steps or state.worse_in_a_row == config.patience:
            break

        # One update.
        micro_batches = [batch.to(machine.device) for batch in next(updates)]
        lr = dpo.cosine_lr(state.step, peak_lr, warmup_steps, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        begun = time.perf_counter()
        metrics = dpo.train_step(model, micro_batches, optimizer, loss_function, config.max_norm,
                                 scaler)
        # The metrics were read, so the device has done all but the optimizer's step.
        seconds = time.perf_counter() - begun
        tokens = sum(batch.tokens.numel() for batch in micro_batches)      # and some padding
        speeds.append(tokens / seconds)
        state.step += 1

        # An update without a finite loss and gradient changed nothing. Keep it out of the means.
        if metrics["skipped"] == 1:
            state.skipped += 1
            state.skipped_in_a_row += 1
        else:
            state.skipped_in_a_row = 0
            metrics["lr"] = lr
            state.window.append(metrics)
        if state.skipped_in_a_row == MAX_SKIPPED:
            raise FloatingPointError(
                f"{MAX_SKIPPED} updates in a row, up to number {state.step}, had no finite loss "
                f"and gradient; {what_is_kept(state, best_folder)}; try a lower rate")

        # A line of the log: means over the updates since the last line. The time that is left
        # counts validations and saves, too.
        if state.step % config.log_every == 0 or state.step == total_steps:
            seconds_per_step = (time.perf_counter() - started) / (state.step - first_step)
            line = mean_metrics(state.window)
            line["skipped"] = state.skipped            # of the stage, not of the window
            line["tokens_per_second"] = sum(speeds) / len(speeds)
            line["seconds_left"] = seconds_per_step * (total_steps - state.step)
            log(run, "train", stage, state.step, total_steps, line)
            state.window = []
            speeds = []

        if state.step % config.save_every == 0:
            save_last(run, stage, model, optimizer, scaler, reference_tables, state)

    if math.isinf(state.best_loss):
        raise FloatingPointError(f"{stage} ended after update {state.step}, but "
                                 f"{what_is_kept(state, best_folder)}; try a lower rate")
    why = "all updates were made"
    if state.step < total_steps:
        why = f"{config.patience} validations in a row brought no lower loss"
    print(f"stop   {stage} {state.step}/{total_steps} | {why} | {state.skipped} updates skipped | "
          f"best loss {state.best_loss:.4f} at {state.best_step}: {best_folder}", flush=True)
    return state


def what_is_kept(state: State, best_folder: Path) -> str:
    """For a message: where the best weights are, if there are any."""
    if math.isinf(state.best_loss):
        return "no validation had a finite loss, so no weights were kept"
    return f"the best weights so far are in {best_folder}"


def mean_metrics(window: list[dict[str, float]]) -> dict[str, float]:
    """The mean of every metric over the updates in the window; nothing if there was none."""
    if not window:
        return {}
    return {name: sum(metrics[name] for metrics in window) / len(window) for name in window[0]}


# 4. Loading -------------------------------------------------------------------------------------


def choose_machine(config: Config) -> Machine:
    """The accelerator if there is one, and what is known to be fast on it."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    elif device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        dtype = torch.bfloat16
    elif device.type == "cuda":
        dtype = torch.float16                          # a T4, as in Colab, has no bfloat16
    elif device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"):
        dtype = torch.bfloat16
    else:
        dtype = torch.float32

    # On recent cards PyTorch prefers cuDNN's attention. It makes a plan for each new shape, which
    # takes a sixth of a second, and hardly two of our batches have the same shape.
    torch.backends.cuda.enable_cudnn_sdp(False)

    # Each piece is some more calls. A GPU, on which a small model is bound by the calls, gets few
    # large ones: 8,192 predictions, whose logits fill 1.6 GB, are most batches in one piece. A CPU
    # gets many small ones, with less memory.
    if device.type == "cpu":
        return Machine(device, dtype, piece=512)
    return Machine(device, dtype, piece=8192)


def load_model(config: Config, machine: Machine) -> tuple[GPT2, tiktoken.Encoding]:
    """The model to begin with, and the encoding of its tokens. The demo's model is random."""
    encoding = data.encoding_of(config.demo)
    if config.demo:
        model = GPT2(GPT2Config(n_layer=2, n_head=4, n_embd=128, n_positions=128, vocab_size=257,
                                n_inner=512))
        # With GPT-2's own 0.02, DPO ended in malformed answers in most trials. We don't know why.
        nn.init.normal_(model.wte.weight, std=0.1)
    else:
        model = GPT2.from_pretrained(data.fetch_model(config.model))

    shape = model.config
    if encoding.n_vocab != shape.vocab_size:
        raise ValueError(f"--model {config.model} has a vocabulary of {shape.vocab_size} tokens, "
                         f"expected GPT-2's {encoding.n_vocab}")
    if config.max_tokens > shape.n_positions:
        raise ValueError(f"--max_tokens is {config.max_tokens}, expected at most "
                         f"{shape.n_positions}, the context of this model")
    if config.adapter_width > shape.n_inner:
        raise ValueError(f"--adapter_width is {config.adapter_width}, expected at most "
                         f"{shape.n_inner}, as this model's own MLPs have")
    return model.to(machine.device), encoding


def load_pairs(config: Config, encoding: tiktoken.Encoding
               ) -> tuple[dict[str, list[data.TokenPair]], dict[str, dict]]:
    """The ids of the splits "train", "val" and "test", and what became of each row of the files."""
    pairs = []
    test = []
    audit = {}
    if config.demo:
        pairs = data.demo_pairs(3000, config.seed)
    elif config.pairs:
        pairs, audit[config.pairs] = data.read_pairs(config.pairs)
    else:
        subsets = config.subsets.split(",")
        for path in data.fetch_hh(config.hh_dir, subsets, "train"):
            found, audit[str(path)] = data.read_pairs(path)
            pairs += found
        for path in data.fetch_hh(config.hh_dir, subsets, "test"):
            found, audit[str(path)] = data.read_pairs(path)
            test += found

    splits, audit["split"] = data.split(pairs, test, config.val_share, config.test_share)
    token_splits = {}
    for name, texts in splits.items():
        token_splits[name], counts = data.tokenize(texts, encoding, config.max_tokens,
                                                   config.max_prompt_tokens)
        audit[name] = {**counts, "kept": len(token_splits[name])}

    for name, counts in audit.items():
        print(f"pairs  {name}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))
    for name, kept in token_splits.items():
        if not kept:
            raise ValueError(f"no pair is left for {name}: the lines above say what became of the "
                             f"rows; give more pairs, or other shares (--val_share, --test_share)")
    return token_splits, audit


def half_swapped(splits: dict[str, list[data.TokenPair]]) -> dict[str, list[data.TokenPair]]:
    """The demo's pairs for SFT: every other one shows the rejected answer in place of the chosen.

    So SFT teaches the form of answers alone, and leaves the choice between them to DPO.
    """
    result = {}
    for name, pairs in splits.items():
        result[name] = []
        for number, pair in enumerate(pairs):
            if number % 2 == 1:
                pair = pair._replace(chosen=pair.rejected)
            result[name].append(pair)
    return result


def eval_batches(pairs: list[data.TokenPair], config: Config, machine: Machine,
                 reference_table: Tensor | None = None,
                 sides: tuple[str, ...] = data.SIDES) -> Iterator[data.PackedBatch]:
    """Each pair once, in batches on the device, the same ones at each call.

    For validation, the reference, and the test.
    """
    for batch in data.by_length(pairs, config.micro_pairs, reference_table, sides):
        yield batch.to(machine.device)


def print_model(model: GPT2, machine: Machine) -> None:
    """How much of the model trains, and on what."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"model  {parameters:,} parameters, {trained:,} train | {machine.device.type}, "
          f"{name_of(machine.dtype)} | torch {torch.__version__}", flush=True)


def name_of(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


# 5. The run's folder ----------------------------------------------------------------------------

RUN_FORMAT = 5                     # of a run's folder, in case a later edition changes it


def open_run(config: Config, machine: Machine, audit: dict) -> Run:
    """Begin a run's folder, or find what to go on from.

    Raises ValueError for the folder of another run, and while another process writes there.
    """
    folder = Path(config.out)
    # As the run began: without --resume, and with what "auto" is on this machine.
    options = asdict(config) | {"resume": False, "dtype": name_of(machine.dtype)}
    begun = (folder / "config.json").exists()
    if begun:
        check_same_run(folder, config, options, audit)

    folder.mkdir(parents=True, exist_ok=True)
    metrics = open(folder / "metrics.jsonl", "ab")
    if not data.lock(metrics, wait=False):
        raise ValueError(f"{folder}: another run writes there: wait for it, or take another --out")
    saved = {}
    if begun and (folder / "last.pt").exists():
        saved = read_last(folder / "last.pt")
    # The log's lines from after the last save will be written again. save_last noted how long the
    # file was. Where nothing was saved, it is emptied.
    metrics.truncate(saved.get("metrics_bytes", 0))
    metrics.seek(0, os.SEEK_END)

    # Where there is no git, or no repository, what the shell says about it.
    commit = subprocess.getoutput(f'git -C "{Path(__file__).parent}" rev-parse HEAD')
    versions = {"python": sys.version, "torch": torch.__version__, "commit": commit}
    text = json.dumps({"format": RUN_FORMAT, "options": options, "audit": audit,
                       "versions": versions}, indent=1)
    write_whole(folder / "config.json", [text.encode()])
    return Run(folder, metrics, saved)


def read_last(path: Path) -> dict:
    """What save_last wrote. ValueError for a damaged file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:         # a damaged file raises whatever it likes
        raise ValueError(f"{path}: can't be read: {error!s:.200}; if the file is damaged, delete "
                         f"it to begin the run anew, or take another --out") from error


def check_same_run(folder: Path, config: Config, options: dict, audit: dict) -> None:
    """ValueError unless the run in the folder may go on: it began with these options and numbers of
    pairs, and config.resume is set.
    """
    old = read_run(folder)
    differences = []
    for name, value in old["options"].items():
        if name != "out" and value != options.get(name):     # the folder may have been moved
            differences.append(f"--{name} {value}, not {options.get(name)}")
    if old["audit"] != audit:
        differences.append("other numbers of pairs")
    if differences:
        raise ValueError(f"{folder}: the run there began with {'; '.join(differences)}: "
                         f"expected the same, or another --out")
    if not config.resume:
        raise ValueError(f"{folder}: a run is there: expected --resume to go on with it, or "
                         f"another --out")


def read_run(folder: str | Path) -> dict:
    """What config.json of a run's folder holds: "format", "options", "audit", "versions".

    Raises FileNotFoundError where there is no such file, ValueError where it is of no run.
    """
    path = Path(folder, "config.json")
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found, expected the folder of a run of train.py")
    run = json.loads(path.read_bytes())
    if not isinstance(run, dict) or "options" not in run:
        raise ValueError(f"{path}: not of a run of train.py: expected a run's folder")
    if run.get("format") != RUN_FORMAT:
        raise ValueError(f"{path}: the run was made by another edition of this code (format "
                         f"{run.get('format', 1)}), expected {RUN_FORMAT}: train again in another "
                         f"folder, or use that edition")
    return run


def save_last(run: Run, stage: str, model: GPT2, optimizer: torch.optim.Optimizer,
              scaler: torch.amp.GradScaler, reference_tables: dict[str, Tensor],
              state: State) -> None:
    """Write last.pt, which gets its name only when it is whole.

    No state of a random generator is among it, as nothing in fit depends on random numbers. (A
    resumed run draws its adapters anew, and fit then loads the saved ones over them.)
    """
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained[name] = parameter.detach()
    # First to memory: on a full disk torch.save would raise RuntimeError, which doesn't tell why. A
    # plain write raises OSError, and main then says what to do.
    buffer = io.BytesIO()
    torch.save({"stage": stage, "state": asdict(state), "model": trained,
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "reference_tables": reference_tables, "metrics_bytes": run.metrics.tell()}, buffer)
    write_whole(run.folder / "last.pt", [buffer.getbuffer()])


# A Jinja template, by which other programs turn a chat into a prompt of hh-rlhf's form.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '\\n\\nHuman: ' + message['content'] | trim }}
    {%- elif message['role'] == 'assistant' %}
        {{- '\\n\\nAssistant: ' + message['content'] | trim }}
    {%- else %}
        {{- raise_exception('expected the roles user and assistant, not ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n\\nAssistant:' }}
{%- endif %}
"""


def save_tokenizer(config: Config, folder: Path) -> None:
    """Put GPT-2's tokenizer beside a model, for `transformers`, vLLM and the like, which then chat.

    Its vocabulary is copied from where the run's model came from, if it is there. The settings are
    always written. Not for the demo, whose tokens are bytes.
    """
    if config.demo:
        return
    source = data.fetch_model(config.model)
    if source.is_file():
        source = source.parent
    for name in data.TOKENIZER_FILES:
        if (source / name).exists():
            write_whole(folder / name, [(source / name).read_bytes()])

    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>",
                "eos_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE}
    write_whole(folder / "tokenizer_config.json", [json.dumps(settings, indent=2).encode()])


# What a line on the screen shows of the metrics: the label, and the format of the number.
SHOWN = {
    "loss": ("loss", ".4f"),
    "rewards/margins": ("margin", "+.3f"),
    "rewards/accuracies": ("accuracy", ".3f"),
    "lr": ("lr", ".1e"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "seconds_left": ("seconds left", ".0f"),
    "best": ("best", ".4f"),
    "best_step": ("at", ""),
}


def log(run: Run, event: str, stage: str, step: int, last_step: int,
        metrics: dict[str, float]) -> None:
    """A line on the screen, and all metrics as a line of metrics.jsonl. event: train, val, test.

    last_step is only shown: "step/last_step".
    """
    line = {"event": event, "stage": stage, "step": step} | metrics
    run.metrics.write(json.dumps(line).encode() + b"\n")
    run.metrics.flush()
    shown = [f"{event:6} {stage} {step}/{last_step}"]
    for name, (label, form) in SHOWN.items():
        if name in metrics:
            shown.append(f"{label} {metrics[name]:{form}}")
    print(" | ".join(shown), flush=True)


# 6. The demo ------------------------------------------------------------------------------------

WELL_FORMED = re.compile(r" [0-9][!.]<\|endoftext\|>")  # " 7!", then the end


def show_demo(config: Config, machine: Machine, run: Run, encoding: tiktoken.Encoding,
              test: list[data.TokenPair]) -> int:
    """Sample answers before and after DPO.

    Returns 0 if of those after DPO at least 95% are cheerful and 95% are well formed, else 1.
    """
    prompts = sorted({tuple(pair.prompt.tolist()) for pair in test})
    copies = math.ceil(400 / len(prompts))
    prompts = [list(prompt) for prompt in prompts * copies]

    before = sampled(config, machine, run.folder / "sft", encoding, prompts)
    show_answers("before", before)
    after = sampled(config, machine, run.folder / "best", encoding, prompts)
    cheerful, well_formed = show_answers("after", after)
    if cheerful >= 0.95 and well_formed >= 0.95:
        return 0
    return 1


def sampled(config: Config, machine: Machine, folder: Path, encoding: tiktoken.Encoding,
            prompts: list[list[int]]) -> list[str]:
    """An answer to each prompt, by the model in the folder."""
    model = GPT2.from_pretrained(folder).to(machine.device)
    answers = generate(model, prompts, 30, end_token=encoding.eot_token, seed=config.seed)
    return [encoding.decode(answer) for answer in answers]


def show_answers(when: str, answers: list[str]) -> tuple[float, float]:
    """Print some answers, and return the shares of all that are cheerful and well formed."""
    count = len(answers)
    cheerful = sum("!" in answer for answer in answers) / count
    well_formed = sum(bool(WELL_FORMED.fullmatch(answer)) for answer in answers) / count
    print(f"answer {when:6} DPO:", *(answer[:3] for answer in answers[:12]))
    print(f"demo   {when:6} DPO {cheerful:6.1%} of {count} fresh answers obey the rule, "
          f"{well_formed:.1%} are well formed")
    return cheerful, well_formed


# 7. The command line ----------------------------------------------------------------------------

EXAMPLES = """
examples:
  python train.py                        GPT-2 124M on all four subsets, downloaded first
  python train.py --demo                 a tiny model in a made-up world, in a minute or two
  python train.py --pairs mine.jsonl     your own pairs
  python train.py --resume               go on after a stop or a kill
  python train.py --adapter none --lr 1e-6 --batch_pairs 64
                                         the nearest to the paper's own settings; the paper
                                         had RMSprop, and no cosine after the warm-up
"""


def parse(argv: list[str] | None = None) -> Config:
    """The options in these words, or in those of the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description="SFT, then DPO, of GPT-2 on hh-rlhf.", epilog=EXAMPLES,
                    allow_abbrev=False, formatter_class=HelpFormatter)
    for setting in fields(Config):
        name = f"--{setting.name}"
        text = setting.metadata["help"]
        if setting.type is bool:
            parser.add_argument(name, action="store_true", help=text)
        else:
            parser.add_argument(name, type=setting.type, default=setting.default, help=text,
                                choices=setting.metadata["choices"])
    if "--demo" in argv:
        parser.set_defaults(**DEMO)                    # other defaults; options that are given win
    return Config(**vars(parser.parse_args(argv)))


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"error  {message}; see python train.py --help\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with defaults, and examples as they are."""


OUT_OF_MEMORY = ("out of memory: a lower --micro_pairs or --max_tokens needs less; --resume takes "
                 "the options that the run began with, so take another --out")


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 a whole run, 1 a demo below its goal, 130 stopped by Ctrl-C; and 2 for the
    errors below, one line on stderr, as they are mostly for the user to mend.
    """
    try:
        return train(parse(argv))
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        return 130
    except (torch.OutOfMemoryError, MemoryError):
        message = OUT_OF_MEMORY
    except OSError as error:
        message = str(error)
        if error.errno == errno.ENOSPC:
            message += ": free some space; the same command with --resume then goes on"
    except RuntimeError as error:      # on a CPU, torch has no class of its own for out of memory
        if "can't allocate memory" not in str(error):
            raise
        message = OUT_OF_MEMORY
    except (ValueError, FloatingPointError) as error:
        message = str(error)
    print("error ", " ".join(message.split()), file=sys.stderr)   # some have several lines
    return 2


if __name__ == "__main__":
    sys.exit(main())
