"""Measure one optimizer step, and generation, against the peers: python tests/bench.py

Contenders take turns, each in a process of its own: it warms up on the shortest pairs, then makes
a step on each of the round's batches. All have the same pairs, weights (GPT-2 124M's shape,
random), AdamW and bf16 autocast. First the float32 losses of those that train all weights are
compared, up to two updates after the start, on a small model. Needs, beside
requirements-dev.txt: pip install trl peft
"""

import argparse
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import conftest

import data
import dpo
import train
from model import GPT2, GPT2Config, add_adapters, generate, save_pretrained
from train import Policy

BETA, RATE = 0.1, 1e-4
USEFUL = 72e9  # operations of a pair at GPT-2 124M, the reference cached: DPO can't do with fewer


def autocast(dtype: torch.dtype, device: str):
    return torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext()


# Ours. The naive step is the one that every tutorial shows; each idea then takes one thing away.

def padded(pairs: list[data.TokenPair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two right-padded rows a pair, chosen first: tokens and response mask, (2B, T)."""
    rows = [(p.prompt, getattr(p, side)) for side in data.SIDES for p in pairs]
    width = max(len(x) + len(y) for x, y in rows)
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width)
    for i, (x, y) in enumerate(rows):
        tokens[i, :len(x) + len(y)] = torch.from_numpy(np.concatenate([x, y]))
        mask[i, len(x):len(x) + len(y)] = 1
    return tokens, mask.bool()


class Naive(torch.nn.Module):
    """logp from padded rows: the logits of all tokens, or of those that count."""
    def __init__(self, model: GPT2, head_everywhere: bool):
        super().__init__()
        self.model, self.everywhere = model, head_everywhere

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.everywhere:
            logp = self.model(tokens)[:, :-1].float().log_softmax(-1)
            logp = logp.gather(-1, tokens[:, 1:, None])[..., 0]
            return logp.masked_fill(~mask[:, 1:], 0.0).sum(-1)
        rows, at = mask[:, 1:].nonzero(as_tuple=True)
        hidden = self.model.hidden(tokens, at=rows * tokens.shape[1] + at)
        return dpo.response_logp(hidden, self.model.wte.weight, tokens[rows, at + 1], rows,
                                 len(tokens))


def ours(job: dict, batches: list[list[data.TokenPair]], device: str) -> list:
    """Seconds and loss of each batch's update, by train_step or as naively as the job says."""
    model = GPT2.from_pretrained(job["folder"]).to(device)
    dtype, ideas = getattr(torch, job["dtype"]), job["ideas"]
    everything = [pair for batch in batches for pair in batch]
    cast = partial(autocast, dtype, device)
    naive = Naive(model, "head" not in ideas)
    first = [0, *np.cumsum([len(batch) for batch in batches])]
    frozen = None
    def passes(batch: list[data.TokenPair], n: int) -> list[data.Batch]:  # of 32, as train.py's
        return [data.flatten(some := batch[i:i + 32], np.arange(n + i, n + i + len(some)),
                             groups=groups).to(device) for i in range(0, len(batch), 32)]
    if "flat" in ideas:
        policy, groups = Policy(model), 8 if "groups" in ideas else 1
        reference = dpo.reference_logp(policy, (
            part for n, batch in zip(first, batches, strict=False) for part in passes(batch, n)),
            len(everything), cast)
    elif "reference" in ideas:
        with torch.no_grad(), cast():
            reference = torch.cat([naive(*(x.to(device) for x in padded(batch))).float().view(
                2, -1).T for batch in batches])
    else:
        frozen = Naive(GPT2.from_pretrained(job["folder"]).to(device).requires_grad_(False), True)
    if job["adapters"]:
        add_adapters(model, layers=job["layers"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, results = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True), []
    for n, batch in zip(first, batches, strict=False):
        clock = begin(device)
        if "flat" in ideas:
            parts = passes(batch, n)
            objective = dpo.dpo_objective(reference.to(device), BETA)
            sums = dpo.train_step(policy, parts, optimizer, objective, autocast=cast)
            results.append([clock(), sums["loss"] / len(batch)])
            continue
        tokens, mask = (x.to(device) for x in padded(batch))
        with cast():
            logp = naive(tokens, mask)
            if frozen is not None:
                with torch.no_grad():
                    before = frozen(tokens, mask)
            else:
                before = reference[n:n + len(batch)].T.flatten().to(device)
        loss = dpo.dpo_loss(*logp.float().chunk(2), *before.float().chunk(2), BETA)[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        results.append([clock(), loss.item()])
    return results


# The peers.

def paper(job: dict, batches: list[list[data.TokenPair]], device: str) -> list:
    """The step of the paper's code, anew: padded rows, all logits, a second model as reference."""
    from transformers import GPT2LMHeadModel
    models = [GPT2LMHeadModel.from_pretrained(job["folder"], dtype=torch.float32).eval().to(device)
              for _ in range(2)]  # eval: no dropout
    optimizer = torch.optim.AdamW(models[0].parameters(), lr=RATE, weight_decay=0.0, fused=True)
    results = []
    for batch in batches:
        clock = begin(device)
        tokens, mask = (x.to(device) for x in padded(batch))
        both = []
        for i, model in enumerate(models):
            with torch.set_grad_enabled(i == 0), autocast(getattr(torch, job["dtype"]), device):
                logits = model(tokens, attention_mask=None).logits[:, :-1].float()
                logp = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
                both.append((logp * mask[:, 1:]).sum(-1))
        (chosen, rejected), (ref_chosen, ref_rejected) = (x.chunk(2) for x in both)
        loss = -F.logsigmoid(BETA * (chosen - ref_chosen - rejected + ref_rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models[0].parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        results.append([clock(), loss.item()])
    return results


def trl(job: dict, batches: list[list[data.TokenPair]], device: str) -> list:
    """trl's DPOTrainer as it comes, at its best here, or with peft's LoRA."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer, GPT2LMHeadModel, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    end = tokenizer.eos_token
    rows = [{"prompt": tokenizer.decode(p.prompt), **{
        side: tokenizer.decode(getattr(p, side)).removesuffix(end) for side in data.SIDES}}
        for batch in batches for p in batch]
    best, lora = job["kind"] == "best", None
    if job["kind"] == "lora":
        from peft import LoraConfig
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=["c_attn", "c_proj", "c_fc"],
                          fan_in_fan_out=True, task_type="CAUSAL_LM")
    options = {"gradient_checkpointing": False, "precompute_ref_log_probs": True} if best else {}
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(batches[-1]), beta=BETA,
        learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0, num_train_epochs=1,
        train_sampling_strategy="sequential", bf16=job["dtype"] == "bfloat16", logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=device == "cpu", **options)
    clocks, seconds = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clocks.append(begin(device))

        def on_step_end(self, *_, **__):
            seconds.append(clocks[-1]())
    model = GPT2LMHeadModel.from_pretrained(job["folder"], dtype=torch.float32)
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), peft_config=lora,
                         processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return [list(x) for x in zip(seconds, losses, strict=True)]


def generation(job: dict, batches: list, device: str) -> list:
    """32 prompts of mixed lengths, 128 new tokens, weights in bfloat16."""
    prompts = [torch.arange(5 + 3 * i).tolist() for i in range(32)]
    if job["kind"] == "ours":
        model = GPT2.from_pretrained(job["folder"], torch.bfloat16).to(device)
        def work():
            assert all(len(a) == 128 for a in generate(model, prompts, 128, end_token=-1))
    else:
        from transformers import GPT2LMHeadModel
        model = GPT2LMHeadModel.from_pretrained(job["folder"], dtype=torch.bfloat16).eval()
        model.to(device)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        def work():
            new = model.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=128,
                                 top_k=0, eos_token_id=None, pad_token_id=0)
            assert new.shape[1] == width + 128
    results = []
    for _ in range(2):
        clock = begin(device)
        work()
        results.append([clock(), 0.0])
    return results


# One process a turn.

def begin(device: str):
    """A clock that is read by a call: seconds since now, when the device is done."""
    def wait():
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
    start = wait()
    return lambda: wait() - start


def peak(device: str) -> float:
    """GB: of the process, or of the device's tensors."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def turn(job: dict) -> None:
    """Do the job, print its results as JSON."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = [[data.TokenPair(*(np.array(ids, np.int32) for ids in pair)) for pair in batch]
               for batch in json.loads(Path(job["batches"]).read_text())]
    batches = [batches[i] for i in job["numbers"]]
    work = {"ours": ours, "paper": paper, "trl": trl, "generate": generation}[job["who"]]
    results = work(job, batches, device)
    print("RESULT", json.dumps({"steps": results, "peak": peak(device)}))


ALL = ["reference", "head", "flat", "groups"]
KEPT = {"MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_MMAP_THRESHOLD_": "100000000000",
        "THP_MEM_ALLOC_ENABLE": "1"}  # glibc: keep freed memory; torch: ask for huge pages
STEPS = {  # name: what its turn is told
    "ours, full": {"who": "ours", "ideas": ALL},
    "ours, adapters of 64": {"who": "ours", "ideas": ALL, "adapters": True},
    "ours, adapters, upper half": {"who": "ours", "ideas": ALL, "adapters": True, "layers": 6},
    "trl, defaults": {"who": "trl", "kind": "defaults"},
    "trl, at its best": {"who": "trl", "kind": "best", "batches": "grouped"},
    "trl, peft LoRA r=16": {"who": "trl", "kind": "lora"},
    "the paper's step": {"who": "paper"},
    "ours, full, buffers kept": {"who": "ours", "ideas": ALL, "env": KEPT},
    "trl, at its best, buffers kept": {"who": "trl", "kind": "best", "batches": "grouped",
                                       "env": KEPT},
    "naive": {"who": "ours", "ideas": []},
    "+ reference cached": {"who": "ours", "ideas": ALL[:1]},
    "+ head where it counts": {"who": "ours", "ideas": ALL[:2]},
    "+ flat batch, one group": {"who": "ours", "ideas": ALL[:3]},
}
WRITERS = {"generate, ours": {"who": "generate", "kind": "ours"},
           "generate, transformers": {"who": "generate", "kind": "transformers"}}
BARS = [("ours, full", "trl, defaults"), ("ours, full", "trl, at its best"),
        ("ours, full", "the paper's step"),
        ("ours, full, buffers kept", "trl, at its best, buffers kept"),
        ("ours, adapters of 64", "trl, peft LoRA r=16"),
        ("ours, adapters of 64", "ours, full"), ("ours, adapters, upper half", "ours, full"),
        ("generate, ours", "generate, transformers")]


def take_turn(job: dict, folder: Path, numbers: list[int], dtype: str) -> dict:
    """The results of a job in a new process; its last words if it fails."""
    job = {"folder": str(folder), "numbers": numbers, "dtype": dtype, "adapters": False,
           "layers": 0} | job
    job["batches"] = str(folder / f"{job.get('batches', 'random')}.json")
    done = subprocess.run([sys.executable, __file__, "--turn", json.dumps(job)], text=True,
                          capture_output=True, env=os.environ | job.get("env", {}))
    results = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not results:
        raise SystemExit(f"{job} failed:\n{done.stderr[-3000:]}")
    return json.loads(results[0])


def prepare(folder: Path, config: GPT2Config, pairs: list[data.TokenPair], count: int,
            size: int) -> None:
    """Weights, a tokenizer, and batches: the shortest pairs first, to warm up, then random ones."""
    torch.manual_seed(0)
    save_pretrained(GPT2(config), folder)
    for source, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copy(conftest.vocabulary() / source, folder / name)
    by_length = sorted(pairs, key=lambda pair: sum(map(len, pair)))
    order = np.random.default_rng(0).permutation(len(pairs))[:count * size]
    some = [pairs[i] for i in order]
    grouped = sorted(some, key=lambda pair: sum(map(len, pair)))
    for name, rows in (("random", some), ("grouped", grouped)):
        batches = [by_length[:size], *(rows[i:i + size] for i in range(0, len(rows), size))]
        (folder / f"{name}.json").write_text(json.dumps(
            [[[ids.tolist() for ids in pair] for pair in batch] for batch in batches]))
    print(f"{len(some)} pairs in batches of {size}; tokens of a pair in two rows: "
          f"{np.mean([2 * len(p[0]) + len(p[1]) + len(p[2]) for p in some]):.0f} on average")


def check_losses(pairs: list[data.TokenPair], jobs: dict[str, dict]) -> None:
    """The losses in float32 of those that train all weights, before and after two updates."""
    short = [p for p in pairs if max(map(len, p)) < 60]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, GPT2Config(2, 4, 64, 128, 50257, 256), short, 2, 4)
        found = {}
        for who, job in jobs.items():
            if not job.get("adapters") and job.get("kind") != "lora" and who in STEPS:
                steps = take_turn(job | {"batches": "random"}, folder, [0, 1, 2], "float32")
                found[who] = [loss for _, loss in steps["steps"]]
    for who, losses in found.items():
        print(f"float32 losses {[f'{x:.6f}' for x in losses]} {who}")
    spread = max(max(x) - min(x) for x in zip(*found.values(), strict=True))
    print(f"largest difference {spread:.1e}; from ln 2: {abs(losses[-1] - math.log(2)):.1e}")
    if not spread < 1e-4:
        raise SystemExit("the contenders don't compute the same loss")


def matrix_rate(tokens: int, predictions: int) -> float:
    """bf16 operations a second of this machine at the shapes of GPT-2 124M, forward and back."""
    device, c, seconds, operations = "cuda" if torch.cuda.is_available() else "cpu", 768, 0.0, 0.0
    for n, k, m, count in ((tokens, c, 3 * c, 12), (tokens, c, c, 12), (tokens, c, 4 * c, 12),
                           (tokens, 4 * c, c, 12), (predictions, c, 50257, 1)):
        a, b, d = (torch.randn(shape, device=device, dtype=torch.bfloat16)
                   for shape in ((n, k), (k, m), (n, m)))
        for left, right in ((a, b), (d, b.T), (a.T, d)):
            left @ right
            times = []
            for _ in range(3):
                clock = begin(device)
                left @ right
                times.append(clock())
            seconds, operations = seconds + count * min(times), operations + count * 2 * n * k * m
    return operations / seconds


def scaling(pairs: list[data.TokenPair], sizes: list[int]) -> None:
    """Time a token and peak memory of our step, full fine-tuning, in passes of up to 32 pairs."""
    print("| pairs a step | tokens | s | us a token | peak GB |\n|---|---|---|---|---|")
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            prepare(Path(name), GPT2Config(), pairs, 2, size)
            result = take_turn(STEPS["ours, full"], Path(name), [0, 1, 2], "bfloat16")
            batches = json.loads(Path(name, "random.json").read_text())[1:]
        tokens = sum(len(x) + len(y) + len(z) - 2 for batch in batches for x, y, z in batch) / 2
        seconds = sum(s for s, _ in result["steps"][1:]) / 2
        print(f"| {size} | {tokens:,.0f} | {seconds:.2f} | {seconds / tokens * 1e6:,.0f} | "
              f"{result['peak']:.2f} |", flush=True)


def precision(pairs: list[data.TokenPair], path: str) -> None:
    """How far bf16 autocast is from float32: logps, loss and gradient of 32 random pairs.

    The reference is the model itself, its logps moved by up to a nat each so that losses differ.
    """
    rng, found = np.random.default_rng(0), []
    some = [pairs[i] for i in rng.permutation(len(pairs))[:32]]
    batch, moved = data.flatten(some, np.arange(32)), torch.from_numpy(rng.uniform(-1, 1, (32, 2)))
    for dtype in (torch.float32, torch.bfloat16):
        policy = Policy(GPT2.from_pretrained(path))
        with autocast(dtype, "cpu"):
            logp = policy(batch)
        if not found:
            reference = logp.detach().view(2, -1).T + moved
        loss = dpo.dpo_objective(reference, BETA)(logp, batch)["loss"].mean()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters()]).double()
        found.append((logp.detach(), loss.item(), gradient))
    (logp, loss, gradient), (low_logp, low_loss, low_gradient) = found
    off = (low_logp - logp).abs()
    print(f"bf16 against float32: a response's logp off by {off.mean():.3f} nats on average, "
          f"{off.max():.3f} at most (they are {logp.mean():.0f} on average); loss {low_loss:.6f} "
          f"against {loss:.6f}; gradient off by {(low_gradient - gradient).norm():.2e} of "
          f"{gradient.norm():.2e}, cosine {F.cosine_similarity(low_gradient, gradient, dim=0):.5f}")


def epoch(path: str, hh_dir: str) -> None:
    """Where the time of an epoch of DPO of all weights goes; train.py's defaults, but no SFT."""
    seconds: dict[str, float] = {}
    def timed(module: object, name: str) -> None:
        function = getattr(module, name)
        def measured(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return result
        setattr(module, name, measured)
    for module, name in ((train, "train_stage"), (dpo, "train_step"), (dpo, "evaluate"),
                         (train.Run, "save")):
        timed(module, name)
    with tempfile.TemporaryDirectory() as out:
        train.main(["--model", path, "--hh_dir", hh_dir, "--sft_epochs", "0", "--adapter", "none",
                    "--out", f"{out}/run"])
    whole = seconds.pop("train_stage")  # the test's pass, after it, counts in evaluate
    print(f"an epoch: {whole:.1f} s;", ", ".join(
        f"{name} {x:.1f} s, {x / whole:.1%}" for name, x in seconds.items()))


def show(jobs: dict[str, dict], seconds: dict[str, list], memory: dict[str, float],
         rate: float) -> None:
    """Both tables, as Markdown. Speeds and ratios are of all pairs and all seconds, not medians."""
    speed = {who: len(times) / sum(times) for who, times in seconds.items()}
    print("\n| a step on 16 pairs | median s | pairs/s | peak GB | useful arithmetic |\n"
          "|---|---|---|---|---|")
    for who, times in seconds.items():
        work, share = (16, f"{16 * speed[who] * USEFUL / rate:.0%}") if who in STEPS else (32, "")
        print(f"| {who} | {statistics.median(times):.2f} | {work * speed[who]:.2f} | "
              f"{memory[who]:.2f} | {share} |")
    print("\n| | against | times as fast | of its memory |\n|---|---|---|---|")
    for who, other in BARS:
        if who in jobs and other in jobs:
            print(f"| {who} | {other} | {speed[who] / speed[other]:.1f} | "
                  f"{memory[who] / memory[other]:.2f} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hh_dir", default="hh-rlhf", help="as for train.py")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each contender")
    parser.add_argument("--batches", type=int, default=2, help="of 16 pairs, in a turn")
    parser.add_argument("--scaling", action="store_true", help="only our step, at several sizes")
    parser.add_argument("--precision", default="", help="only bf16 against float32, this model's")
    parser.add_argument("--epoch", default="", help="only where an epoch's time goes, this model's")
    parser.add_argument("--only", default="", help="contenders whose names hold this")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        return turn(json.loads(args.turn))
    conftest.offline_vocabulary()
    import tiktoken
    found = [pair for path in data.fetch_hh(args.hh_dir, data.SUBSETS, "train")
             for pair in data.read_pairs(path)[0]]
    pairs = data.tokenize(found, tiktoken.get_encoding("gpt2"), 512, 256)[0]
    jobs = {who: job for who, job in (STEPS | WRITERS).items() if args.only in who}
    for package in ("torch", "transformers", "trl", "peft"):
        print(package, __import__(package).__version__, end=", ")
    print(platform.machine(), torch.get_num_threads(), "threads")
    if args.scaling:
        return scaling(pairs, [8, 16, 32, 64, 128])
    if args.precision:
        return precision(pairs, args.precision)
    if args.epoch:
        return epoch(args.epoch, args.hh_dir)
    check_losses(pairs, jobs)
    with tempfile.TemporaryDirectory() as name:
        folder, seconds, memory = Path(name), {who: [] for who in jobs}, dict.fromkeys(jobs, 0.0)
        count = args.rounds * args.batches
        prepare(folder, GPT2Config(), pairs, count, 16)
        rate = matrix_rate(16 * 140, 16 * 117)
        print(f"bf16 matrix products at these shapes: {rate / 1e9:,.0f} GFLOP/s", flush=True)
        for turns in range(args.rounds):
            for who, job in jobs.items():
                numbers = [0, *range(1 + turns, count + 1, args.rounds)]
                result = take_turn(job, folder, numbers, "bfloat16")
                seconds[who] += [s for s, _ in result["steps"][1:]]
                memory[who] = max(memory[who], result["peak"])
                print(f"{who}: {[round(s, 2) for s in seconds[who]]} s, {memory[who]:.2f} GB",
                      flush=True)
            show(jobs, seconds, memory, rate)


if __name__ == "__main__":
    main()
