"""Fine-tune GPT-2 on hh-rlhf: SFT on the chosen answers, then DPO. `python train.py --help`.

Read in this order: Config (the options), Policy (from a batch to log-probabilities), Run (what a
run writes and prints), train_stage, the demo's world, run (the whole job).
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
from model import GPT2, NAMES, GPT2Config, Rows, add_adapters, generate, save_pretrained

EVAL_PAIRS = 64  # in a batch of the passes without gradients


def option(default, help: str, *choices: str):
    return field(default=default, metadata={"help": help, "choices": choices or None})


@dataclass(frozen=True)
class Config:
    """Every option: type, default and help, once. Raises ValueError for a number out of range."""
    model: str = option("gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder or file")
    hh_dir: str = option("hh-rlhf", "where <subset>/<split>.jsonl.gz are, or are downloaded to")
    subsets: str = option(",".join(data.SUBSETS), "which of hh-rlhf, separated by commas")
    pairs: str = option("", "a JSONL file of your own pairs, to use instead of hh-rlhf")
    out: str = option("out", "the run's folder")
    resume: bool = option(False, "go on where the run in the folder stopped, if there is one")
    demo: bool = option(False, "a tiny model on made-up pairs; needs no download")
    seed: int = option(0, "of the order of the pairs and of new weights")
    dtype: str = option("auto", "of matrix products; auto: the fastest that the machine has",
                        "auto", "float32", "bfloat16", "float16")
    max_tokens: int = option(512, "of a prompt and one answer; a longer answer is cut")
    max_prompt_tokens: int = option(256, "of a prompt; a longer one is cut from the left")
    val_share: float = option(0.1, "of the training prompts, kept for validation")
    adapter: str = option("parallel", "a small MLP beside each frozen one, or instead; or none",
                          "parallel", "replace", "none")
    adapter_width: int = option(64, "neurons of an adapter")
    adapter_init: str = option("scratch", "a replacing MLP: random, or of the old one's neurons",
                               "scratch", "pretrained")
    adapter_layers: int = option(0, "how many of the upper layers have adapters; 0: all")
    beta: float = option(0.1, "pull towards the reference; the paper: 0.1, on TL;DR 0.5")
    loss: str = option("sigmoid", "the variant of the DPO loss, see dpo.py", *dpo.VARIANTS)
    label_smoothing: float = option(0.0, "share of labels taken to be wrong (sigmoid, robust)")
    sft_coef: float = option(0.0, "weight in DPO's loss of the chosen answers' nats a token")
    sft_epochs: int = option(1, "of SFT; 0: the reference is the model as it comes")
    sft_lr: float = option(5e-5, "peak learning rate of SFT")
    epochs: int = option(1, "of DPO, at most")
    lr: float = option(0.0, "peak learning rate of DPO; 0: 1e-6 (the paper's) for none, else 1e-4")
    warmup_share: float = option(0.1, "of the updates: the rate grows linearly, then a cosine")
    batch_pairs: int = option(32, "pairs in an update, all processes together")
    micro_pairs: int = option(32, "pairs in a forward and backward pass; fewer need less memory")
    max_norm: float = option(1.0, "the norm to which a gradient is clipped")
    vals_per_epoch: int = option(4, "validations in an epoch, and one before the first update")
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


DEMO = {"out": "out/demo", "dtype": "float32", "max_tokens": 100, "max_prompt_tokens": 60,
        "beta": 1.0, "sft_epochs": 2, "sft_lr": 2e-3, "epochs": 1, "lr": 5e-4}  # --demo's defaults


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
        attend = Rows(batch.rows, batch.back)
        hidden = self.model.hidden(batch.tokens, batch.positions, attend, batch.predicts)
        return dpo.response_logp(hidden, self.model.wte.weight, batch.targets, batch.response,
                                 len(batch.lengths))


class Run:
    """Where a run computes, what it leaves and prints (of several processes only the first)."""
    def __init__(self, config: Config):
        several = dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self.config, self.folder, self.saved = config, Path(config.out), None
        device, auto = "mps" if torch.backends.mps.is_available() else "cpu", "float32"
        if torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            auto = "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16"
        elif torch.cpu.get_capabilities().get("avx512_bf16"):
            auto = "bfloat16"
        self.device = torch.device(device)
        self.dtype = getattr(torch, auto if config.dtype == "auto" else config.dtype)
        self.autocast = partial(torch.autocast, self.device.type, self.dtype,
                                enabled=self.dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def open(self, audit: dict) -> None:
        """Begin the folder, or find what to go on from. ValueError for another run's folder."""
        path, options = self.folder / "config.json", asdict(self.config) | {"resume": False}
        if path.exists():
            begun = json.loads(path.read_text()).get("options", {})
            other = [f"--{name} {value}, not {options.get(name)}" for name, value in begun.items()
                     if value != options.get(name)]
            if other or not begun or not self.config.resume:
                what = f"a run {'; '.join(other)}" if begun else "something that is no run"
                raise ValueError(f"{self.folder} holds {what}: expected --resume and options that "
                                 f"a run began with, or another --out")
            if (last := self.folder / "last.pt").exists():
                self.saved = torch.load(last, map_location="cpu", weights_only=True)
        if self.saved and self.rank:  # the window's sums are all processes': the first has them
            self.saved["state"]["window"] = dict.fromkeys(self.saved["state"]["window"], 0.0)
        self.wait()  # no process writes before all have looked
        try:
            commit = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
                                    capture_output=True, text=True).stdout.strip()
        except OSError:  # no git here
            commit = ""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = open(os.devnull if self.rank else self.folder / "metrics.jsonl", "ab")
        if self.rank == 0:
            self.metrics.truncate(self.saved["metrics_bytes"] if self.saved else 0)
            self.metrics.seek(0, os.SEEK_END)  # what a kill left behind the last save is gone
            versions = {"python": platform.python_version(), "torch": torch.__version__,
                        "commit": commit}
            path.with_suffix(".part").write_text(json.dumps(
                {"options": options, "audit": audit, "versions": versions}, indent=1))
            path.with_suffix(".part").replace(path)

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def log(self, stage: str, steps: int, kind: str, step: int, values: dict) -> None:
        """A line on the screen, an object in metrics.jsonl."""
        line = {"kind": kind, "stage": stage, "step": step} | values
        self.metrics.write(json.dumps(line).encode() + b"\n")
        self.metrics.flush()
        print(f"{'step' if kind == 'train' else kind:6} {stage} {step}/{steps}", end="")
        for name, key, form in (
                ("loss", "loss", ".4f"), ("margin", "rewards/margins", "+.3f"), ("lr", "lr", ".1e"),
                ("accuracy", "rewards/accuracies", ".3f"), ("tok/s", "tokens_per_second", ",.0f"),
                ("best", "best", ".4f"), ("at", "best_step", ""), ("left", "seconds_left", ".0f")):
            if key in values:
                print(f" | {name} {values[key]:{form}}", end="s" if key == "seconds_left" else "")
        print(flush=True)

    def save(self, stage: str, model: GPT2, optimizer: torch.optim.Optimizer, reference: dict,
             kind: str, state: dict) -> str:
        """The best weights to the folder sft or best; all that a resumed run needs to last.pt."""
        path = self.folder / ("last.pt" if kind == "last" else "sft" if stage == "sft" else "best")
        window = state["window"]
        state = state | {"window": dict(zip(window, dpo.total(list(window.values())), strict=True))}
        if kind == "best" and self.rank == 0:
            save_pretrained(model, path)
        elif self.rank == 0:
            trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
            torch.save({"stage": stage, "state": state, "model": trained, "reference": reference,
                        "optimizer": optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                        "metrics_bytes": self.metrics.tell()}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        return str(path)


def evaluate(policy: Policy, pairs: list[data.TokenPair], objective: dpo.Objective, run: Run,
             sides: tuple[str, ...] = data.SIDES) -> dict[str, float]:
    """Means of the objective over the pairs."""
    sums: dict[str, float] = {}
    for batch, in data.batches(pairs, EVAL_PAIRS, None, 0, 0, run.rank, run.world, 0, sides):
        sums = dpo.add(sums, dpo.val_step(policy, batch.to(run.device), objective, run.autocast))
    return dpo.means(sums)


def train_stage(stage: str, model: GPT2, parts: dict[str, list], reference: dict[str, Tensor],
                run: Run) -> None:
    """SFT or DPO of `model`, in place, on parts["train"]; leaves the best weights in the folder."""
    config, sft = run.config, stage == "sft"
    sides, epochs, peak = data.SIDES, config.epochs, config.lr or (
        1e-6 if config.adapter == "none" else 1e-4)
    if sft:
        sides, epochs, peak = ("chosen",), config.sft_epochs, config.sft_lr
    objective = {part: dpo.sft_objective if sft else dpo.dpo_objective(
        reference[part].to(run.device), config.beta, config.loss, config.label_smoothing,
        config.sft_coef) for part in ("train", "val")}
    an_epoch = math.ceil(len(parts["train"]) / config.batch_pairs)
    steps = epochs * an_epoch
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, policy = torch.optim.AdamW(trained, weight_decay=0.0, fused=True), Policy(model)
    saved = run.saved if run.saved and run.saved["stage"] == stage else None
    if saved:
        model.load_state_dict(saved["model"], strict=False)  # frozen weights are in place already
        optimizer.load_state_dict(saved["optimizer"])
        run.scaler.load_state_dict(saved["scaler"])

    def train(step: int) -> Iterator[list[data.Batch]]:
        while True:
            epoch, start = divmod(step, an_epoch)
            for batch in data.batches(parts["train"], config.batch_pairs, config.seed, epoch, start,
                                      run.rank, run.world, config.micro_pairs, sides):
                yield [micro.to(run.device) for micro in batch]
            step = (epoch + 1) * an_epoch

    signals: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: signals.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        state = dpo.fit(
            nn.parallel.DistributedDataParallel(policy) if run.world > 1 else policy, optimizer,
            objective["train"], train,
            lambda: evaluate(policy, parts["val"], objective["val"], run, sides), steps=steps,
            rate=lambda step: dpo.cosine_lr(step, peak, round(config.warmup_share * steps), steps),
            val_every=max(1, an_epoch // config.vals_per_epoch), patience=config.patience,
            log_every=config.log_every, save_every=config.save_every,
            log=partial(run.log, stage, steps),
            save=partial(run.save, stage, model, optimizer, reference),
            state=saved and saved["state"], interrupted=lambda: bool(signals),
            max_norm=config.max_norm, autocast=run.autocast, scaler=run.scaler)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    why = "all updates" if state["step"] == steps else f"{config.patience} validations not lower"
    print(f"stop   {stage} {state['step']}/{steps} | {why} | {state['skipped']} updates skipped | "
          f"best {state['best']:.4f} at {state['best_step']}: {state['best_at']}", flush=True)
    run.wait()  # the best weights are written


# The demo's world. A prompt asks for a digit; an answer obeys the hidden rule when it is cheerful:
# " 7!" and not " 7." Half of the demonstrations for SFT are. Preferences are drawn by Bradley-Terry
# from a true reward, 4 for obeying and 0 for not: 1 label in 56 is wrong, DPO's optimum is finite.
def demo_pairs(count: int, seed: int) -> tuple[list[data.Pair], list[data.Pair]]:
    """Demonstrations for SFT, whose chosen answer is either, and preferences for DPO."""
    rng, demonstrations, preferences = random.Random(seed), [], []
    for _ in range(count):
        verb = rng.choice("Name List Give Tell Find Pick Show Send Type Read".split())
        which = rng.choice("lucky short plain quiet small round happy pretty clever simple".split())
        digit = rng.randint(0, 9)
        good, bad = f" {digit}!", f" {digit}."
        prompt = f"{data.HUMAN} {verb} a {which} digit.{data.ASSISTANT}"
        demonstrations.append(data.Pair(prompt, *rng.sample([good, bad], 2)))
        right = rng.random() < 1 / (1 + math.exp(-4))
        preferences.append(data.Pair(prompt, *((good, bad) if right else (bad, good))))
    return demonstrations, preferences


def demo_verdict(answer: str) -> tuple[bool, bool]:
    """Whether an answer obeys the rule, and whether it is well formed, to its end."""
    formed = re.fullmatch(r" [0-9][!.]<\|endoftext\|>", answer)
    return "!" in answer, bool(formed)


def show_demo(run: Run, encoding: tiktoken.Encoding, prompts: list[str]) -> int:
    """Sample and print answers before and after DPO; 0 if 95% of the latter are right, else 1."""
    ids, answers, shares = [encoding.encode_ordinary(p) for p in prompts], [], []
    for folder in ("sft", "best"):
        model = GPT2.from_pretrained(run.folder / folder).to(run.device)
        new = generate(model, ids, 30, end_token=encoding.eot_token, seed=run.config.seed)
        answers.append([encoding.decode(a) for a in new])
        verdicts = zip(*map(demo_verdict, answers[-1]), strict=True)
        shares.append([sum(v) / len(ids) for v in verdicts])
    for prompt, before, after in list(zip(prompts, *answers, strict=True))[:6]:
        print(f"answer {prompt[9:-13]:20} before DPO:{before[:-13]:10} after:{after[:-13]}")
    for when, (obey, formed) in zip(("before", "after"), shares, strict=True):
        print(f"demo   {when:6} DPO {obey:6.1%} of {len(ids)} fresh answers obey the rule, "
              f"{formed:.1%} are well formed")
    return 0 if min(shares[1]) >= 0.95 else 1


def load_parts(config: Config, encoding: tiktoken.Encoding, audit: dict) -> list[dict[str, list]]:
    """Parts "train", "val", "test" as token pairs, of the demo SFT's first; `audit` gets counts.

    Raises ValueError when a part has no pair.
    """
    found: dict[str, list[data.Pair]] = {"train": [], "test": []}
    files = {"train": [config.pairs]} if config.pairs else {} if config.demo else {
        part: data.fetch_hh(config.hh_dir, config.subsets.split(","), part) for part in found}
    for part, paths in files.items():
        for path in paths:
            pairs, audit[str(path)] = data.read_pairs(path)
            found[part] += pairs
    result = []
    for pairs in demo_pairs(3000, config.seed) if config.demo else [found["train"]]:
        parts, audit["split"] = data.split(pairs, found["test"], config.val_share)
        for part, some in parts.items():
            parts[part], audit[part] = data.tokenize(some, encoding, config.max_tokens,
                                                     config.max_prompt_tokens)
            audit[part]["kept"] = len(parts[part])
            if not parts[part]:
                raise ValueError(f"no pair for {part}, expected some: give more pairs, or a larger "
                                 f"--val_share")
        result.append(parts)
    for name, counts in audit.items():
        print(f"pairs  {name}:", ", ".join(f"{n:,} {what}" for what, n in counts.items()))
    return result


def draw_curves(folder: Path) -> None:
    """curves.png from metrics.jsonl, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    axes = figure.subplots(1, 4)
    names = ("loss", "rewards/accuracies", "rewards/chosen", "rewards/rejected")
    for axis, name in zip(axes, names, strict=True):
        for kind in ("train", "val"):
            dots = [(r["step"], r[name]) for r in rows
                    if (r["stage"], r["kind"]) == ("dpo", kind) and name in r]
            axis.plot(*zip(*dots, strict=True), label=kind)
        axis.set(title=name, xlabel="updates of DPO")
        axis.legend()
    figure.savefig(folder / "curves.png")


def run(config: Config) -> int:
    """The whole job: pairs, model, SFT, the reference's logps, DPO, test. Returns the exit code."""
    out, audit = Run(config), {}
    torch.manual_seed(config.seed)
    if config.demo:
        model = GPT2(GPT2Config(2, 4, 128, 128, 257, 512))
        nn.init.normal_(model.wte.weight, std=0.1)  # so narrow a model needs bytes further apart
        encoding = tiktoken.Encoding(
            "bytes", pat_str=r"[\s\S]", special_tokens={"<|endoftext|>": 256},
            mergeable_ranks={bytes([i]): i for i in range(256)})
    else:
        named = config.model in NAMES and not Path(config.model).exists()
        model = GPT2.from_pretrained(data.fetch_model(config.model) if named else config.model)
        encoding = tiktoken.get_encoding("gpt2")
    if config.max_tokens > model.config.n_positions:
        raise ValueError(f"--max_tokens is {config.max_tokens}, but the model's context holds "
                         f"{model.config.n_positions}: give a smaller number")
    parts = load_parts(config, encoding, audit)
    out.open(audit)
    in_dpo = bool(out.saved) and out.saved["stage"] == "dpo"
    if config.sft_epochs:
        if not in_dpo:
            train_stage("sft", model.to(out.device), parts[0], {}, out)
        model = GPT2.from_pretrained(out.folder / "sft")
    policy, parts = Policy(model.to(out.device)), parts[-1]
    reference = out.saved["reference"] if in_dpo else {}
    for part, pairs in parts.items() if not in_dpo else ():
        batches = data.batches(pairs, EVAL_PAIRS, None, 0, 0, out.rank, out.world)
        batches = data.track((b[0].to(out.device) for b in batches), f"reference of {part}",
                             len(pairs), "pairs", lambda batch: len(batch.pairs) * out.world)
        reference[part] = dpo.reference_logp(policy, batches, len(pairs), out.autocast)
    some = next(data.batches(parts["train"], EVAL_PAIRS, config.seed))[0].to(out.device)
    check_start = partial(
        dpo.check_start, policy, some, reference["train"].to(out.device), config.beta, out.autocast,
        1e-6 if out.dtype == torch.float32 else 5e-3)
    if config.adapter == "replace":
        check_start()  # now or never: without its MLPs the model is no longer the reference
    add_adapters(model, config.adapter, config.adapter_width, config.adapter_init,
                 config.adapter_layers)
    if config.adapter != "replace":
        check_start()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"model  {sum(p.numel() for p in model.parameters()):,} parameters, {trained:,} train | "
          f"{out.device.type}, {str(out.dtype)[6:]} | torch {torch.__version__}", flush=True)
    train_stage("dpo", model, parts, reference, out)

    policy = Policy(GPT2.from_pretrained(out.folder / "best").to(out.device))
    objective = dpo.dpo_objective(reference["test"].to(out.device), config.beta, config.loss,
                                  config.label_smoothing, config.sft_coef)
    test, n = evaluate(policy, parts["test"], objective, out), len(parts["test"])
    p = test["rewards/accuracies"]
    half = 1.96 * math.sqrt(p * (1 - p) / n)  # of the 95% interval
    out.log("dpo", 0, "test", 0, test | {"pairs": n, "accuracy_half_interval": half})
    print(f"result {out.folder / 'best'} | test accuracy {p:.3f} +- {half:.3f} on {n} pairs")
    if out.rank:
        return 0
    draw_curves(out.folder)
    prompts = sorted({encoding.decode(pair.prompt.tolist()) for pair in parts["test"]})
    return show_demo(out, encoding, prompts * math.ceil(400 / len(prompts))) if config.demo else 0


def main(argv: list[str] | None = None) -> int:
    """0 for a whole run, 1 for a demo below its goal, 2 and one line for what its user can mend."""
    try:
        config = parse(argv)
        if "RANK" in os.environ:  # torchrun
            cuda = torch.cuda.is_available()
            dist.init_process_group("nccl" if cuda else "gloo")
            if cuda:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            if dist.get_rank():
                sys.stdout = open(os.devnull, "w")
        return run(config)
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
