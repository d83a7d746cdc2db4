"""Fine-tune GPT-2 on hh-rlhf: SFT on the chosen answers, then DPO. `python train.py --help`.

Read in this order: Config (the options), Policy (model and batch to log-probabilities), machine,
Run (what a run writes), train_stage, the demo's world, run. Imports model, data and dpo.
"""

import argparse
import json
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import data
import dpo
from model import GPT2, NAMES, GPT2Config, Rows, add_adapters, generate, save_pretrained


def option(default, help: str, choices: tuple = ()):
    return field(default=default, metadata={"help": help, "choices": choices or None})


@dataclass(frozen=True)
class Config:
    """Every option, its type and default, once."""
    model: str = option("gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder or file of weights")
    hh_dir: str = option("hh-rlhf", "where <subset>/<split>.jsonl.gz are, or are downloaded to")
    subsets: str = option(",".join(data.SUBSETS), "which of hh-rlhf, separated by commas")
    pairs: str = option("", "a JSONL file of your own pairs, to use instead of hh-rlhf")
    out: str = option("out", "the run's folder")
    resume: bool = option(False, "go on where the run in the folder stopped; begin if there is none")
    demo: bool = option(False, "a tiny model on made-up pairs, offline: see README")
    seed: int = option(0, "of the order of the pairs and of new weights")
    dtype: str = option("auto", "of matrix products; auto: bfloat16 where native, float16 on older "
                        "GPUs, else float32", ("auto", "float32", "bfloat16", "float16"))
    compile: bool = option(False, "torch.compile the model: for long runs on a GPU")
    max_tokens: int = option(512, "of a prompt and one answer; longer answers are cut")
    max_prompt_tokens: int = option(256, "of a prompt; longer ones are cut from the left")
    val_share: float = option(0.1, "of the training prompts, kept for validation")
    adapter: str = option("parallel", "parallel: beside each frozen MLP; replace: instead of it; none",
                          ("parallel", "replace", "none"))
    adapter_width: int = option(64, "neurons of an adapter")
    adapter_init: str = option("scratch", "of replacing adapters: random, or the MLP's strongest neurons",
                               ("scratch", "pretrained"))
    adapter_layers: int = option(0, "how many of the upper layers get adapters; 0: all")
    beta: float = option(0.1, "pull towards the reference; the paper: 0.1, on TL;DR 0.5")
    loss: str = option("sigmoid", "a variant of the DPO loss: see dpo.VARIANTS", tuple(dpo.VARIANTS))
    label_smoothing: float = option(0.0, "the share of labels taken to be wrong (sigmoid, robust)")
    sft_coef: float = option(0.0, "weight of the chosen answers' nats a token in the DPO loss")
    sft_epochs: int = option(1, "of SFT, over the chosen answers; 0: the reference is --model itself")
    sft_lr: float = option(5e-5, "peak learning rate of SFT")
    epochs: int = option(3, "of DPO, at most")
    lr: float = option(0.0, "peak learning rate of DPO; 0: 1e-4 for adapters, 1e-6 (the paper's) for none")
    warmup_share: float = option(0.1, "of all updates, with a linearly growing rate; then a cosine")
    batch_pairs: int = option(32, "pairs in an update, over all processes")
    micro_pairs: int = option(32, "pairs in one forward and backward pass: fewer need less memory")
    max_norm: float = option(1.0, "the gradient's norm is clipped to it")
    vals_per_epoch: int = option(4, "validations, evenly spread, one more before the first update")
    patience: int = option(4, "validations without a lower loss, in a row, until training stops")
    log_every: int = option(10, "updates between two lines")
    save_every: int = option(100, "updates after which last.pt is written, beside each validation")

    def __post_init__(self):
        for name in ("max_tokens", "max_prompt_tokens", "adapter_width", "sft_lr", "epochs", "batch_pairs",
                     "micro_pairs", "max_norm", "vals_per_epoch", "patience", "log_every", "save_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected a number above 0")
        for name in ("seed", "sft_epochs", "lr", "sft_coef", "adapter_layers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected 0 or more")
        if not (0 < self.val_share < 0.5 and 0 <= self.warmup_share < 1):
            raise ValueError(f"--val_share {self.val_share}, --warmup_share {self.warmup_share}: expected "
                             f"above 0 and below 0.5, and 0 to below 1")
        dpo.check_options(self.beta, self.loss, self.label_smoothing)

    @property
    def dpo_lr(self) -> float:
        return self.lr or (1e-6 if self.adapter == "none" else 1e-4)


DEMO = {"dtype": "float32", "out": "out/demo", "sft_epochs": 8}  # what --demo sets, unless you do


def parse(argv: list[str] | None = None) -> Config:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description="SFT and DPO of GPT-2 on hh-rlhf", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error  {message}; see python train.py --help\n")
    for f in fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "choices": f.metadata["choices"]}
        parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"].replace("%", "%%"), **kind)
    parser.set_defaults(**DEMO if "--demo" in argv else {})
    return Config(**vars(parser.parse_args(argv)))


class Policy(nn.Module):
    """From a flat batch to the log-probabilities of its responses, (2B,) float32, chosen first."""
    def __init__(self, model: GPT2):
        super().__init__()
        self.model = model

    def forward(self, batch: data.Batch) -> Tensor:
        attend = Rows(batch.rows, batch.back)
        hidden = self.model.hidden(batch.tokens, batch.positions, attend, batch.predicts)
        return dpo.response_logp(hidden, self.model.wte.weight, batch.targets, batch.response,
                                 len(batch.lengths))
