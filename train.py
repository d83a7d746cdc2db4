"""Fine-tune GPT-2 on hh-rlhf: SFT on the chosen answers, then DPO. `python train.py --help`.

Read in this order: Config (the options), Policy (from a batch to log-probabilities), Run (what a
run writes and prints), train_stage, show_demo, load, load_parts, job (all of it).
"""

import argparse
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import dpo
from model import GPT2, INITS, KINDS, GPT2Config, add_adapters, generate, in_rows, save_pretrained

SHOWN = {"loss": ("loss", ".4f"), "rewards/margins": ("margin", "+.3f"), "lr": ("lr", ".1e"),
         "rewards/accuracies": ("accuracy", ".3f"), "tokens_per_second": ("tok/s", ",.0f"),
         "best": ("best", ".4f"), "best_step": ("at", ""), "seconds_left": ("seconds left", ".0f")}
WELL_FORMED = re.compile(r" [0-9][!.]<\|endoftext\|>")  # an answer in the demo's world

def option(default, help: str, *choices: str):
    return field(default=default, metadata={"help": help, "choices": choices or None})

@dataclass(frozen=True)
class Config:
    """Every option: type, default and help, once. Raises ValueError for a number out of range."""
    model: str = option("gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder or file")
    hh_dir: str = option("hh-rlhf", "where SUBSET/SPLIT.jsonl.gz are, or are downloaded to")
    subsets: str = option(",".join(data.SUBSETS), "which of hh-rlhf, separated by commas")
    pairs: str = option("", "a JSONL file of your own pairs, to use instead of hh-rlhf")
    out: str = option("out", "the run's folder")
    resume: bool = option(False, "go on where the run in the folder stopped, if there is one")
    demo: bool = option(False, "a tiny model on made-up pairs; needs no download")
    seed: int = option(0, "of the order of the pairs and of new weights")
    dtype: str = option("auto", "of matrix products", "auto", "float32", "bfloat16", "float16")
    max_tokens: int = option(512, "of a prompt and one answer; a longer answer is cut")
    max_prompt_tokens: int = option(256, "of a prompt; a longer one is cut from the left")
    val_share: float = option(0.05, "of the prompts, for validation; of your own as much for test")
    adapter: str = option("parallel", "small MLPs beside the old, in their place, or none", *KINDS)
    adapter_width: int = option(64, "neurons of an adapter")
    adapter_init: str = option("scratch", "of replace: random, or the strongest neurons", *INITS)
    adapter_layers: int = option(0, "how many of the upper layers have adapters; 0: all")
    beta: float = option(0.1, "pull towards the reference; the paper: 0.1, on TL;DR 0.5")
    loss: str = option("sigmoid", "the variant of the DPO loss, see dpo.py", *dpo.VARIANTS)
    label_smoothing: float = option(0.0, "share of labels taken to be wrong (sigmoid, robust)")
    sft_coef: float = option(0.0, "weight in DPO's loss of the chosen answers' nats a token")
    sft_epochs: int = option(1, "of SFT; 0: the reference is the model as it comes")
    sft_lr: float = option(5e-5, "peak learning rate of SFT")
    epochs: int = option(1, "of DPO, at most")
    lr: float = option(0.0, "peak learning rate of DPO; 0: 1e-4 for parallel, or the paper's 1e-6")
    warmup_share: float = option(0.1, "of the updates: the rate grows linearly, then a cosine")
    batch_pairs: int = option(32, "pairs in an update, all processes together")
    micro_pairs: int = option(32, "pairs in a pass of one process; fewer need less memory")
    max_norm: float = option(1.0, "the norm to which a gradient is clipped")
    vals_per_epoch: int = option(4, "validations in an epoch, at least; one comes before them")
    patience: int = option(4, "validations in a row without a lower loss that end training")
    log_every: int = option(10, "updates between two lines")
    save_every: int = option(100, "updates between two saves; each validation saves too")

    def __post_init__(self):
        may_be_0 = "seed sft_epochs lr sft_coef label_smoothing adapter_layers warmup_share".split()
        for f in fields(self):
            value, least = getattr(self, f.name), "0 or more" if f.name in may_be_0 else "above 0"
            most = {"val_share": 0.5, "warmup_share": 1.0, "seed": 2**63}.get(f.name, math.inf)
            if f.type in (int, float) and not (0 <= value < most and (value or f.name in may_be_0)):
                raise ValueError(f"--{f.name} is {value}, expected {least} and below {most}")
        dpo.check_options(self.beta, self.loss, self.label_smoothing)
        if self.adapter_init != "scratch" and self.adapter != "replace":
            raise ValueError("--adapter_init pretrained: expected with --adapter replace alone")
        if self.demo and (self.pairs or not self.sft_epochs):
            raise ValueError("--demo: expected its own pairs, and some --sft_epochs")

DEMO = {"out": "out/demo", "dtype": "float32", "max_tokens": 100, "max_prompt_tokens": 60, "beta":
        1.0, "val_share": 0.1, "sft_epochs": 2, "sft_lr": 2e-3, "lr": 5e-4}  # --demo's defaults

def parse(argv: list[str] | None = None) -> Config:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description="SFT, then DPO, of GPT-2 on hh-rlhf", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error  {message}; see python train.py --help\n")
    for f in fields(Config):
        kind = {"type": f.type, "choices": f.metadata["choices"]}
        parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"],
                            **{"action": "store_true"} if f.type is bool else kind)
    parser.set_defaults(**DEMO if "--demo" in argv else {})
    return Config(**vars(parser.parse_args(argv)))

class Policy(nn.Module):
    """From a flat batch to the log-probabilities of its responses, (2B,) float32, chosen first."""
    def __init__(self, model: GPT2):
        super().__init__()
        self.model = model

    def forward(self, batch: data.Batch) -> Tensor:
        attend = partial(in_rows, rows=batch.rows, back=batch.back)
        hidden = self.model.hidden(batch.tokens, batch.positions, attend, batch.predicts)
        return dpo.response_logp(hidden, self.model.wte.weight, batch.targets, batch.response,
                                 len(batch.lengths))

class Run:
    """Where a run computes, what it leaves and prints (of several processes only the first)."""
    def __init__(self, config: Config):
        self.config, self.folder = config, Path(config.out)
        self.saved = {"stage": "", "metrics_bytes": 0}  # what last.pt holds, once it is opened
        env = os.environ.get  # as torchrun sets it
        self.rank, self.world = int(env("RANK", 0)), int(env("WORLD_SIZE", 1))
        self.device = torch.accelerator.current_accelerator(True) or torch.device("cpu")
        kind, auto = self.device.type, "float32"
        if kind == "cuda":
            torch.cuda.set_device(int(env("LOCAL_RANK", 0)))
            auto = "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16"
        elif kind == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"):
            auto = "bfloat16"
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        sys.stdout = open(os.devnull, "w") if self.rank else sys.stdout
        self.dtype = getattr(torch, auto if config.dtype == "auto" else config.dtype)
        self.autocast = partial(torch.autocast, kind, self.dtype, self.dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(kind, enabled=self.dtype == torch.float16)
        self.objective = partial(
            dpo.dpo_objective, beta=config.beta, variant=config.loss,
            label_smoothing=config.label_smoothing, sft_coef=config.sft_coef)

    def open(self, audit: dict) -> None:
        """Begin the folder, or find what to go on from. ValueError for another run's folder."""
        path, options = self.folder / "config.json", asdict(self.config)
        options |= {"resume": False, "dtype": str(self.dtype)[6:]}  # auto is another one elsewhere
        if path.exists():
            old = json.loads(path.read_text())
            begun = old.get("options", {})
            other = [f"--{name} {value}, not {options.get(name)}" for name, value in begun.items()
                     if value != options.get(name) and name != "out"]  # it may have been moved
            other += ["other pairs"] if old.get("audit") != audit else []
            if other or not begun or not self.config.resume:
                found = "; ".join(other) or "a run is there" if begun else "not of a run"
                raise ValueError(f"{path}: {found}: expected --resume and all that the run began "
                                 f"with, or another --out")
            if (last := self.folder / "last.pt").exists():
                self.saved = torch.load(last, map_location="cpu", weights_only=True)
        if self.world > 1:
            dist.barrier()  # no process writes before all have looked
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = open(os.devnull if self.rank else self.folder / "metrics.jsonl", "ab")
        if self.rank == 0:
            self.metrics.truncate(self.saved["metrics_bytes"])
            self.metrics.seek(0, os.SEEK_END)  # what a kill left behind the last save is gone
            commit = subprocess.getoutput(f'git -C "{Path(__file__).parent}" rev-parse HEAD')
            versions = {"python": sys.version, "torch": torch.__version__, "commit": commit}
            text = json.dumps({"options": options, "audit": audit, "versions": versions}, indent=1)
            path.with_suffix(".part").write_text(text)
            path.with_suffix(".part").replace(path)

    def log(self, stage: str, steps: int, kind: str, step: int, values: dict) -> None:
        """A line on the screen, an object in metrics.jsonl."""
        line = {"kind": kind, "stage": stage, "step": step} | values
        self.metrics.write(json.dumps(line).encode() + b"\n")
        self.metrics.flush()
        shown = [f"{name} {values[key]:{form}}" for key, (name, form) in SHOWN.items()
                 if key in values]
        print(f"{'step' if kind == 'train' else kind:6} {stage} {step}/{steps}", *shown, sep=" | ",
              flush=True)

    def save(self, stage: str, model: GPT2, optimizer: torch.optim.Optimizer, reference: dict,
             kind: str, state: dict) -> str:
        """The best weights to the folder sft or best; all that a resumed run needs to last.pt."""
        path = self.folder / ("last.pt" if kind == "last" else "sft" if stage == "sft" else "best")
        if kind == "best" and self.rank == 0:
            save_pretrained(model, path)
        elif self.rank == 0:
            trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
            torch.save({"stage": stage, "state": state, "model": trained, "reference": reference,
                        "optimizer": optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                        "metrics_bytes": self.metrics.tell()}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        return str(path)

    def batches(self, pairs: list, sides: tuple[str, ...] = data.SIDES) -> Iterator[data.Batch]:
        """This process's share of the token pairs, by length, for passes without gradients."""
        for batch, in data.batches(pairs, 64, None, 0, 0, self.rank, self.world, 0, sides):
            yield batch.to(self.device)

def train_stage(stage: str, model: GPT2, parts: dict[str, list], reference: dict[str, Tensor],
                run: Run) -> dict:
    """SFT or DPO of `model`, in place, on parts["train"]; the best weights go to run's folder.

    reference: each part's (pairs, 2), see dpo.reference_logp; none for SFT. Returns fit's state.
    """
    c, sft = run.config, stage == "sft"
    sides, epochs, peak = (("chosen",), c.sft_epochs, c.sft_lr) if sft else (
        data.SIDES, c.epochs, c.lr or (1e-4 if c.adapter == "parallel" else 1e-6))
    objective = {x: dpo.sft_objective if sft else run.objective(reference[x]) for x in parts}
    an_epoch = math.ceil(len(parts["train"]) / c.batch_pairs)
    steps, policy = epochs * an_epoch, Policy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    saved = run.saved if run.saved["stage"] == stage else {}
    if saved:
        model.load_state_dict(saved["model"], strict=False)  # frozen weights are in place already
        optimizer.load_state_dict(saved["optimizer"])
        run.scaler.load_state_dict(saved["scaler"])
    done, skip = divmod(saved["state"]["step"] if saved else 0, an_epoch)
    micro_batches = (batch for epoch in itertools.count(done) for batch in data.batches(
        parts["train"], c.batch_pairs, c.seed, epoch, skip if epoch == done else 0, run.rank,
        run.world, c.micro_pairs, sides))
    learner = nn.parallel.DistributedDataParallel(policy) if run.world > 1 else policy

    def update(step: int) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = dpo.cosine_lr(step, peak, round(c.warmup_share * steps), steps)
        return dpo.train_step(learner, [batch.to(run.device) for batch in next(micro_batches)],
                              optimizer, objective["train"], c.max_norm, run.autocast, run.scaler)

    state = dpo.fit(
        update, lambda: dpo.evaluate(policy, run.batches(parts["val"], sides), objective["val"],
                                     run.autocast),
        partial(run.log, stage, steps), partial(run.save, stage, model, optimizer, reference),
        steps=steps, val_every=max(1, an_epoch // c.vals_per_epoch), patience=c.patience,
        log_every=c.log_every, save_every=c.save_every, state=saved.get("state"))
    why = "all updates" if state["step"] == steps else f"{c.patience} validations not lower"
    print(f"stop   {stage} {state['step']}/{steps} | {why} | {state['skipped']} updates skipped | "
          f"best {state['best']:.4f} at {state['best_step']}: {state['best_at']}", flush=True)
    if run.world > 1:
        dist.barrier()  # the best weights are written
    return state

def show_demo(run: Run, encoding: tiktoken.Encoding, prompts: list[str]) -> int:
    """Sample and print answers before and after DPO; 0 if 95% of the latter are right, else 1."""
    ids = [encoding.encode_ordinary(p) for p in prompts]
    for when, folder in (("before", "sft"), ("after", "best")):
        model = GPT2.from_pretrained(run.folder / folder).to(run.device)
        answers = [encoding.decode(answer) for answer in generate(
            model, ids, 30, end_token=encoding.eot_token, seed=run.config.seed)]
        print(f"answer {when:6} DPO:", *(answer[:3] for answer in answers[:12]))
        obey = sum("!" in answer for answer in answers) / len(ids)
        formed = [answer for answer in answers if WELL_FORMED.fullmatch(answer)]
        print(f"demo   {when:6} DPO {obey:6.1%} of {len(ids)} fresh answers obey the rule, "
              f"{len(formed) / len(ids):.1%} are well formed")
    return 0 if min(obey, len(formed) / len(ids)) >= 0.95 else 1

def load(config: Config) -> tuple[GPT2, tiktoken.Encoding]:
    """The model to begin with and its encoding: the demo's is random, and reads bytes."""
    if not config.demo:
        return GPT2.from_pretrained(data.fetch_model(config.model)), tiktoken.get_encoding("gpt2")
    model = GPT2(GPT2Config(2, 4, 128, 128, 257, 512))
    nn.init.normal_(model.wte.weight, std=0.1)  # the demo's cure, see README
    return model, tiktoken.Encoding(
        "bytes", pat_str=r"[\s\S]", special_tokens={"<|endoftext|>": 256},
        mergeable_ranks={bytes([i]): i for i in range(256)})

def load_parts(config: Config, encoding: tiktoken.Encoding) -> tuple[dict[str, list], dict]:
    """Token pairs "train", "val", "test", and what became of each row; ValueError for no pairs."""
    found = {"train": data.demo_pairs(3000, config.seed) if config.demo else [], "test": []}
    audit = {}
    files = {"train": [config.pairs]} if config.pairs else {} if config.demo else {
        part: data.fetch_hh(config.hh_dir, config.subsets.split(","), part) for part in found}
    for part, paths in files.items():
        for path in paths:
            pairs, audit[str(path)] = data.read_pairs(path)
            found[part] += pairs
    parts, audit["split"] = data.split(found["train"], found["test"], config.val_share)
    for part, pairs in parts.items():
        parts[part], audit[part] = data.tokenize(pairs, encoding, config.max_tokens,
                                                 config.max_prompt_tokens)
        audit[part]["kept"] = len(parts[part])
        if not parts[part]:
            raise ValueError(f"no pair for {part}: give more pairs, or a larger --val_share")
    for name, counts in audit.items():
        print(f"pairs  {name}:", ", ".join(f"{n:,} {what}" for what, n in counts.items()))
    return parts, audit

def job(config: Config) -> int:
    """Pairs, model, SFT, the reference's logps, DPO, test. Returns the exit code."""
    out = Run(config)
    torch.manual_seed(config.seed)
    model, encoding = load(config)
    shape = model.config
    for name, most in (("max_tokens", shape.n_positions), ("adapter_width", shape.n_inner),
                       ("adapter_layers", shape.n_layer)):
        if (value := getattr(config, name)) > most:
            raise ValueError(f"--{name} is {value}, expected at most this model's {most}")
    if encoding.n_vocab != shape.vocab_size:
        raise ValueError(f"--model: {shape.vocab_size} words, expected GPT-2's {encoding.n_vocab}")
    parts, audit = load_parts(config, encoding)
    out.open(audit)
    in_dpo = out.saved["stage"] == "dpo"
    adapters = (config.adapter, config.adapter_width, config.adapter_init, config.adapter_layers)
    if config.adapter == "replace" and not (in_dpo and config.sft_epochs):
        add_adapters(model.to(out.device), *adapters)  # SFT mends it, then it is DPO's reference
    if config.sft_epochs:
        if not in_dpo:
            shown = {part: [p._replace(chosen=p[1 + i % 2]) for i, p in enumerate(pairs)]
                     for part, pairs in parts.items()}  # the demo's SFT leaves the choice to DPO
            train_stage("sft", model.to(out.device), shown if config.demo else parts, {}, out)
        model = GPT2.from_pretrained(out.folder / "sft")
    policy = Policy(model.to(out.device))
    reference = out.saved["reference"] if in_dpo else {
        part: dpo.reference_logp(policy, data.track(
            out.batches(pairs), f"reference of {part}", len(pairs), "pairs",
            lambda batch: len(batch.pairs) * out.world), len(pairs), out.autocast)
        for part, pairs in parts.items()}
    if config.adapter != "replace":
        add_adapters(model, *adapters)
    dpo.check_start(policy, next(out.batches(parts["train"])), reference["train"], config.beta,
                    out.autocast, config.beta * (1e-5 if out.dtype == torch.float32 else 5e-2))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"model  {sum(p.numel() for p in model.parameters()):,} parameters, {trained:,} train | "
          f"{out.device.type}, {str(out.dtype)[6:]} | torch {torch.__version__}", flush=True)
    state = train_stage("dpo", model, parts, reference, out)

    policy = Policy(GPT2.from_pretrained(out.folder / "best").to(out.device))
    test = dpo.evaluate(policy, out.batches(parts["test"]), out.objective(reference["test"]),
                        out.autocast)
    accuracy, n = test["rewards/accuracies"], len(parts["test"])
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / n)  # of the 95% interval
    out.log("dpo", state["step"], "test", state["best_step"], test | {
        "pairs": n, "accuracy_half_interval": half})
    print(f"result {out.folder / 'best'} | test accuracy {accuracy:.3f} +- {half:.3f} on {n} pairs")
    prompts = sorted({encoding.decode(pair.prompt.tolist()) for pair in parts["test"]})
    return show_demo(out, encoding, prompts * math.ceil(400 / len(prompts))) if config.demo else 0

def main(argv: list[str] | None = None) -> int:
    """0: a whole run, 1: a demo below its goal, 2 and one line: what its user can mend, 130: ^C."""
    try:
        return job(parse(argv))
    except (ValueError, OSError, FloatingPointError) as error:
        print("error ", *str(error).split(), file=sys.stderr)  # torch's have several lines
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    sys.exit(main())
