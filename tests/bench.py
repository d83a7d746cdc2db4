"""Measure one optimizer step, and generation, against the peers: python tests/bench.py

Contenders take turns, each in a process of its own: it warms up on the shortest pairs, then makes
a step on each of the round's batches. All have the same pairs, weights (GPT-2 124M's shape,
random), AdamW and number format (--dtype; the weights stay in float32, and autocast does the rest).
First the float32 losses of those that train all weights are compared, up to two updates after the
start, on a small model. Needs, beside requirements-dev.txt: pip install trl peft

Read from top to bottom:

1. ours         the naive step, and one idea after the other; our step, as train.py makes it
2. the peers    the paper's step, trl, generation with transformers
3. a turn       one contender, in a process of its own
4. contenders   their names, and who is compared with whom
5. preparation  weights and batches; are the losses equal?; how fast is the machine?
6. more         --scaling, --precision, --epoch
7. main         rounds of turns, and the tables
"""

import argparse
import itertools
import json
import math
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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

BETA = 0.1
RATE = 1e-4
STEP_PAIRS = 16
MICRO_PAIRS = 32               # that go through the model at once, as in train.py
USEFUL = 72e9  # operations of a pair at GPT-2 124M, the reference cached: DPO can't do with fewer

# 1. Ours ----------------------------------------------------------------------------------------
#
# The naive step is the one that every tutorial shows. Each idea then takes one thing away.


def pad(pairs: list[data.TokenPair], numbers: np.ndarray, device: str) -> data.PaddedBatch:
    """Two padded rows a pair, chosen first, on the device."""
    batch = data.pad(pairs, numbers)
    return data.PaddedBatch(*(tensor.to(device) for tensor in batch))


def all_logits(model: GPT2, batch: data.PaddedBatch, piece: int) -> torch.Tensor:
    """The logps (2B,) from the logits of all tokens: the function that dpo.py begins with."""
    return dpo.sequence_logps(model, batch.tokens, batch.mask)


def head_where_it_counts(model: GPT2, batch: data.PaddedBatch, piece: int) -> torch.Tensor:
    """The logps (2B,) from padded rows, with logits of the responses alone."""
    is_response = batch.mask[:, 1:]                    # (2B, T-1)
    tokens = batch.tokens[:, :-1]                      # (2B, T-1)
    hidden = model.wte(tokens) + model.wpe(torch.arange(tokens.shape[1], device=tokens.device))
    for block in model.h:
        hidden = block(hidden)
    hidden = model.ln_f(hidden)[is_response]           # (M, C)
    targets = batch.tokens[:, 1:][is_response]         # (M,)
    owner = is_response.nonzero()[:, 0]                # (M,)

    head = model.wte.weight
    head = head - head.detach().mean(0)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        head = head.to(hidden.dtype)
    logps = dpo.TargetLogps.apply(hidden, head, targets, piece)
    totals = torch.zeros(len(batch.tokens), dtype=logps.dtype, device=logps.device)
    return totals.index_add(0, owner, logps)


def ours(job: dict, batches: list[list[data.TokenPair]], device: str) -> list:
    """Seconds and loss of each batch's update, with the ideas that the job names."""
    ideas = job["ideas"]
    machine = train.choose_machine(train.Config(dtype=job["dtype"]))
    logps_function = all_logits
    if "packed" in ideas:
        logps_function = dpo.packed_logps
    elif "head" in ideas:
        logps_function = head_where_it_counts

    def logps_of(model: GPT2, batch: data.PackedBatch | data.PaddedBatch) -> torch.Tensor:
        with autocast(machine.dtype, device):
            return logps_function(model, batch, machine.piece)

    everything = list(itertools.chain.from_iterable(batches))

    def micro_batches(number: int) -> list:
        """A batch on the device: in passes of up to MICRO_PAIRS, or in one where it is padded."""
        first = sum(len(batch) for batch in batches[:number])
        numbers = first + np.arange(len(batches[number]))
        if "packed" not in ideas:
            return [pad(batches[number], numbers, device)]
        passes = data.micro_batches(everything, numbers, MICRO_PAIRS, None, data.SIDES)
        return [batch.to(device) for batch in passes]

    model = GPT2.from_pretrained(job["folder"]).to(device)
    if "reference" in ideas:
        passes = itertools.chain.from_iterable(map(micro_batches, range(len(batches))))
        reference = dpo.reference_logps(logps_of, model, passes, len(everything)).to(device)
    else:
        frozen = GPT2.from_pretrained(job["folder"]).to(device).requires_grad_(False)

    def loss_function(model: GPT2,
                      batch: data.PackedBatch | data.PaddedBatch) -> dict[str, torch.Tensor]:
        policy = logps_of(model, batch)
        if "reference" in ideas:
            before = reference[:, batch.indices].flatten()
        else:
            before = logps_of(frozen, batch)
        return dpo.dpo_metrics(policy, before, BETA)

    if job["adapters"]:
        add_adapters(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    results = []
    for number in range(len(batches)):
        clock = begin(device)
        metrics = dpo.train_step(model, micro_batches(number), optimizer, loss_function)
        results.append([clock(), metrics["loss"]])
    return results


def autocast(dtype: torch.dtype, device: str) -> torch.autocast:
    """What train.py does: matrix products in dtype, unless that is float32."""
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


# 2. The peers -----------------------------------------------------------------------------------


def paper(job: dict, batches: list[list[data.TokenPair]], device: str) -> list:
    """The step of the paper's code, anew: padded rows, all logits, a second model as reference."""
    from transformers import GPT2LMHeadModel
    dtype = getattr(torch, job["dtype"])
    policy = GPT2LMHeadModel.from_pretrained(job["folder"], dtype=torch.float32)
    policy = policy.eval().to(device)                  # eval: no dropout
    reference = GPT2LMHeadModel.from_pretrained(job["folder"], dtype=torch.float32)
    reference = reference.eval().to(device)

    def logps_of(model: GPT2LMHeadModel, batch: data.PaddedBatch) -> torch.Tensor:
        with autocast(dtype, device):
            logits = model(batch.tokens, attention_mask=None).logits[:, :-1].float()
            logps = logits.log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[..., 0]
            return (logps * batch.mask[:, 1:]).sum(-1)

    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    results = []
    for pairs in batches:
        clock = begin(device)
        batch = pad(pairs, np.arange(len(pairs)), device)
        chosen, rejected = logps_of(policy, batch).chunk(2)
        with torch.no_grad():
            reference_chosen, reference_rejected = logps_of(reference, batch).chunk(2)
        margin = chosen - reference_chosen - rejected + reference_rejected
        loss = -F.logsigmoid(BETA * margin).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
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
    rows = []
    for batch in batches:
        for pair in batch:
            row = {"prompt": tokenizer.decode(pair.prompt)}
            for side in data.SIDES:
                text = tokenizer.decode(getattr(pair, side))
                row[side] = text.removesuffix(tokenizer.eos_token)
            rows.append(row)

    lora = None
    options = {}
    if job["setting"] == "lora":
        from peft import LoraConfig
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=["c_attn", "c_proj", "c_fc"],
                          fan_in_fan_out=True, task_type="CAUSAL_LM")
    if job["setting"] == "best":
        options = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(batches[-1]), beta=BETA,
        learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0, num_train_epochs=1,
        train_sampling_strategy="sequential", bf16=job["dtype"] == "bfloat16",
        fp16=job["dtype"] == "float16", logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=device == "cpu", **options)
    clocks = []
    seconds = []

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
    return [list(result) for result in zip(seconds, losses, strict=True)]


def generation(job: dict, batches: list, device: str) -> list:
    """32 prompts of mixed lengths, 128 new tokens, weights in the job's number format."""
    dtype = getattr(torch, job["dtype"])
    prompts = [torch.arange(5 + 3 * i).tolist() for i in range(32)]
    if job["setting"] == "ours":
        model = GPT2.from_pretrained(job["folder"], dtype).to(device)

        def work() -> None:
            answers = generate(model, prompts, 128, end_token=-1)
            assert all(len(answer) == 128 for answer in answers)
    else:
        from transformers import GPT2LMHeadModel
        model = GPT2LMHeadModel.from_pretrained(job["folder"], dtype=dtype).eval().to(device)
        width = max(map(len, prompts))
        rows = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        masks = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ids = torch.tensor(rows, device=device)
        mask = torch.tensor(masks, device=device)

        def work() -> None:
            new = model.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=128,
                                 top_k=0, eos_token_id=None, pad_token_id=0)
            assert new.shape[1] == width + 128
    results = []
    for _ in range(2):
        clock = begin(device)
        work()
        results.append([clock(), 0.0])
    return results


# 3. A turn --------------------------------------------------------------------------------------


def begin(device: str) -> Callable[[], float]:
    """A clock that is read by a call: seconds since now, when the device is done."""
    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
    start = now()
    return lambda: now() - start


def peak(device: str) -> float:
    """GB: of the process, or of the device's tensors."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def read_batches(path: str | Path) -> list[list[data.TokenPair]]:
    """The batches that `prepare` wrote."""
    batches = []
    for rows in json.loads(Path(path).read_text()):
        batches.append([data.TokenPair(*(np.array(ids, np.int32) for ids in row)) for row in rows])
    return batches


def turn(job: dict) -> None:
    """Do the job, print its results as JSON."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = read_batches(job["batches"])
    batches = [batches[i] for i in job["numbers"]]
    work = {"ours": ours, "paper": paper, "trl": trl, "generate": generation}[job["who"]]
    results = work(job, batches, device)
    print("RESULT", json.dumps({"steps": results, "peak": peak(device)}))


def take_turn(job: dict, folder: Path, numbers: list[int], dtype: str) -> dict:
    """The results of a job in a new process; its last words if it fails.

    job["program"] is this file, or the first edition's, which knows jobs of the same form.
    """
    name = job.get("batches", "random")
    job = {"adapters": False, "layers": 0, "program": __file__} | job
    job |= {"folder": str(folder), "numbers": numbers, "dtype": dtype,
            "batches": str(folder / f"{name}.json")}
    done = subprocess.run([sys.executable, job["program"], "--turn", json.dumps(job)], text=True,
                          capture_output=True, env=os.environ | job.get("env", {}))
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(f"{job} failed:\n{done.stderr[-3000:]}")


# 4. Contenders ----------------------------------------------------------------------------------

OURS = ["reference", "head", "packed"]
KEPT = {"MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_MMAP_THRESHOLD_": "100000000000",
        "THP_MEM_ALLOC_ENABLE": "1"}  # glibc: keep freed memory; torch: ask for huge pages
BEST = {"who": "trl", "setting": "best", "batches": "grouped"}
STEPS = {  # name: what its turn is told
    "ours, full": {"who": "ours", "ideas": OURS},
    "ours, adapters of 64": {"who": "ours", "ideas": OURS, "adapters": True},
    "trl, defaults": {"who": "trl", "setting": "defaults"},
    "trl, at its best": BEST,
    "trl, peft LoRA r=16": {"who": "trl", "setting": "lora"},
    "the paper's step": {"who": "paper"},
    "ours, full, buffers kept": {"who": "ours", "ideas": OURS, "env": KEPT},
    "trl, at its best, buffers kept": BEST | {"env": KEPT},
    # From the naive step to ours, idea by idea. The last is "ours, full" again.
    "naive": {"who": "ours", "ideas": []},
    "+ reference cached": {"who": "ours", "ideas": ["reference"]},
    "+ head where it counts": {"who": "ours", "ideas": ["reference", "head"]},
    "+ packed batch": {"who": "ours", "ideas": OURS},
}
WRITERS = {
    "generate, ours": {"who": "generate", "setting": "ours"},
    "generate, transformers": {"who": "generate", "setting": "transformers"},
}
COMPARED = [
    ("ours, full", "trl, defaults"),
    ("ours, full", "trl, at its best"),
    ("ours, full", "the paper's step"),
    ("ours, full, buffers kept", "trl, at its best, buffers kept"),
    ("ours, adapters of 64", "trl, peft LoRA r=16"),
    ("ours, adapters of 64", "ours, full"),
    ("ours, full", "first edition, full"),
    ("ours, adapters of 64", "first edition, adapters"),
    ("generate, ours", "generate, transformers"),
]
LEAST_SPEED = 0.85             # against the first edition: the second is written for readers, and
MOST_MEMORY = 1.25             # may cost so much


def first_edition(checkout: str) -> dict[str, dict]:
    """Its contenders: its own benchmark (commit a24f547) takes the turns, with its own code."""
    program = Path(checkout, "tests", "bench.py").resolve()
    job = {"who": "ours", "ideas": ["reference", "head", "flat", "groups"], "program": str(program)}
    return {"first edition, full": job, "first edition, adapters": job | {"adapters": True}}


# 5. Preparation ---------------------------------------------------------------------------------


def tokens_of(pair: data.TokenPair) -> int:
    """How many tokens prompt and responses have together."""
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def prepare(folder: Path, config: GPT2Config, pairs: list[data.TokenPair], count: int,
            size: int) -> None:
    """Weights, a tokenizer, and batches: the shortest pairs first, to warm up, then random ones."""
    torch.manual_seed(0)
    save_pretrained(GPT2(config), folder)
    for source, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copy(conftest.vocabulary() / source, folder / name)

    shortest = sorted(pairs, key=tokens_of)[:size]
    order = np.random.default_rng(0).permutation(len(pairs))[:count * size]
    some = [pairs[i] for i in order]
    grouped = sorted(some, key=tokens_of)
    for name, rows in (("random", some), ("grouped", grouped)):
        batches = [shortest]
        for start in range(0, len(rows), size):
            batches.append(rows[start:start + size])
        ids = [[[part.tolist() for part in pair] for pair in batch] for batch in batches]
        (folder / f"{name}.json").write_text(json.dumps(ids))
    tokens = np.mean([tokens_of(pair) + len(pair.prompt) for pair in some])
    print(f"{len(some)} pairs in batches of {size}; tokens of a pair in two rows: {tokens:.0f} on "
          f"average")


def check_losses(pairs: list[data.TokenPair], jobs: dict[str, dict]) -> None:
    """The losses in float32 of those that train all weights, before and after two updates."""
    short = [pair for pair in pairs if max(map(len, pair)) < 60]
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, GPT2Config(2, 4, 64, 128, 50257, 256), short, 2, 4)
        for who, job in jobs.items():
            if job["who"] == "generate" or job.get("adapters") or job.get("setting") == "lora":
                continue
            job = job | {"batches": "random"}          # the same batches for all
            steps = take_turn(job, folder, [0, 1, 2], "float32")["steps"]
            losses = [loss for _, loss in steps]
            found[who] = losses
            print(f"float32 losses {[f'{loss:.6f}' for loss in losses]} {who}", flush=True)
    if not found:
        return

    spread = max(max(step) - min(step) for step in zip(*found.values(), strict=True))
    print(f"largest difference {spread:.1e}; from ln 2: {abs(losses[-1] - math.log(2)):.1e}")
    if not spread < 1e-4:
        raise SystemExit("the contenders don't compute the same loss")


def matrix_rate(tokens: int, predictions: int, dtype: torch.dtype) -> float:
    """Operations a second of this machine at the shapes of GPT-2 124M, forward and back."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    c = 768
    shapes = [                 # (rows, in, out, how many of these a step has)
        (tokens, c, 3 * c, 12),
        (tokens, c, c, 12),
        (tokens, c, 4 * c, 12),
        (tokens, 4 * c, c, 12),
        (predictions, c, 50257, 1),
    ]
    seconds = 0.0
    operations = 0.0
    for n, k, m, count in shapes:
        x = torch.randn(n, k, device=device, dtype=dtype)
        weight = torch.randn(k, m, device=device, dtype=dtype)
        grad = torch.randn(n, m, device=device, dtype=dtype)
        for left, right in ((x, weight), (grad, weight.T), (x.T, grad)):
            left @ right
            times = []
            for _ in range(3):
                clock = begin(device)
                left @ right
                times.append(clock())
            seconds += count * min(times)
            operations += count * 2 * n * k * m
    return operations / seconds


def print_machine() -> None:
    """What these numbers are measured on, and with."""
    for package in ("torch", "transformers", "trl", "peft"):
        print(package, __import__(package).__version__, end=", ")
    print(platform.machine(), torch.get_num_threads(), "threads")
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
    if shutil.which("lscpu"):
        text = subprocess.run(["lscpu"], capture_output=True, text=True).stdout
        model_name = re.search(r"^Model name:\s*(.*)$", text, re.M)
        found = re.findall(r"\b(avx2|avx512f|avx512_bf16|amx_\w+)\b", text)
        print(model_name[1] if model_name else "unknown CPU", "|", *found)


# 6. More ----------------------------------------------------------------------------------------


def scaling(pairs: list[data.TokenPair], sizes: list[int], dtype: str) -> None:
    """Time a token and peak memory of our step, full fine-tuning, in passes of up to 32 pairs."""
    print("| pairs a step | tokens | s | us a token | peak GB |\n|---|---|---|---|---|")
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            prepare(Path(name), GPT2Config(), pairs, 2, size)
            result = take_turn(STEPS["ours, full"], Path(name), [0, 1, 2], dtype)
            batches = read_batches(Path(name, "random.json"))[1:]
        tokens = sum(tokens_of(pair) - 2 for batch in batches for pair in batch) / len(batches)
        seconds = statistics.mean(seconds for seconds, _ in result["steps"][1:])
        print(f"| {size} | {tokens:,.0f} | {seconds:.2f} | {seconds / tokens * 1e6:,.0f} | "
              f"{result['peak']:.2f} |", flush=True)


def precision(pairs: list[data.TokenPair], path: str) -> None:
    """How far bf16 autocast is from float32: logps, loss and gradient of 32 random pairs.

    The reference is the model itself, its logps moved by up to a nat each so that losses differ.
    """
    generator = np.random.default_rng(0)
    some = [pairs[i] for i in generator.permutation(len(pairs))[:32]]
    batch = data.pack(some, np.arange(32))
    moved = torch.from_numpy(generator.uniform(-1, 1, 64))

    def measure(dtype: torch.dtype, reference: torch.Tensor | None) -> tuple:
        model = GPT2.from_pretrained(path)
        with autocast(dtype, "cpu"):
            logps = dpo.packed_logps(model, batch)
        if reference is None:
            reference = logps.detach() + moved
        loss = dpo.dpo_metrics(logps, reference, BETA)["loss"].mean()
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        return logps.detach(), loss.item(), gradient.double(), reference

    logps, loss, gradient, reference = measure(torch.float32, None)
    low_logps, low_loss, low_gradient, _ = measure(torch.bfloat16, reference)
    off = (low_logps - logps).abs()
    print(f"bf16 against float32: a response's logp off by {off.mean():.3f} nats on average, "
          f"{off.max():.3f} at most (they are {logps.mean():.0f} on average); loss {low_loss:.6f} "
          f"against {loss:.6f}; gradient off by {(low_gradient - gradient).norm():.2e} of "
          f"{gradient.norm():.2e}, cosine {F.cosine_similarity(low_gradient, gradient, dim=0):.5f}")


def epoch(path: str, hh_dir: str, dtype: str) -> None:
    """Where the time of an epoch of DPO of all weights goes; train.py's defaults, but no SFT."""
    seconds = {}
    fit = train.fit

    def timed(module: object, name: str) -> None:
        function = getattr(module, name)

        def measured(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return result
        setattr(module, name, measured)

    def timed_fit(*args, **kwargs):
        seconds.clear()                                # what came before fit doesn't count
        start = time.perf_counter()
        result = fit(*args, **kwargs)
        whole = time.perf_counter() - start
        shares = [f"{name} {s:.1f} s, {s / whole:.1%}" for name, s in seconds.items()]
        print(f"an epoch: {whole:.1f} s;", "; ".join(shares), flush=True)
        return result

    timed(dpo, "train_step")
    timed(dpo, "val_step")
    timed(train, "save_last")
    timed(train, "save_pretrained")
    train.fit = timed_fit
    with tempfile.TemporaryDirectory() as out:
        code = train.main(["--model", path, "--hh_dir", hh_dir, "--sft_epochs", "0", "--adapter",
                           "none", "--dtype", dtype, "--out", f"{out}/run"])
    if code != 0:
        raise SystemExit("train.py failed")


# 7. Main ----------------------------------------------------------------------------------------


def show(jobs: dict[str, dict], seconds: dict[str, list], memory: dict[str, float],
         rate: float) -> None:
    """Both tables, as Markdown. Speeds and ratios are of all pairs and all seconds, not medians."""
    speed = {who: len(times) / sum(times) for who, times in seconds.items()}
    print(f"\n| a step on {STEP_PAIRS} pairs | median s | pairs/s | peak GB | useful arithmetic |\n"
          "|---|---|---|---|---|")
    for who, times in seconds.items():
        if jobs[who]["who"] == "generate":
            work = 32                                  # prompts
            share = ""
        else:
            work = STEP_PAIRS
            share = f"{work * speed[who] * USEFUL / rate:.0%}"
        print(f"| {who} | {statistics.median(times):.2f} | {work * speed[who]:.2f} | "
              f"{memory[who]:.2f} | {share} |")

    print("\n| | against | times as fast | of its memory | |\n|---|---|---|---|---|")
    for who, other in COMPARED:
        if who in jobs and other in jobs:
            faster = speed[who] / speed[other]
            of_memory = memory[who] / memory[other]
            verdict = ""
            if other.startswith("first edition"):
                good = faster >= LEAST_SPEED and of_memory <= MOST_MEMORY
                verdict = "as it should be" if good else "NOT as it should be"
                verdict += f": at least {LEAST_SPEED}, at most {MOST_MEMORY}"
            print(f"| {who} | {other} | {faster:.2f} | {of_memory:.2f} | {verdict} |")
    print(flush=True)


def compare(jobs: dict[str, dict], pairs: list[data.TokenPair], rounds: int, batches: int,
            dtype: str) -> None:
    """Rounds in which each contender takes its turn."""
    check_losses(pairs, jobs)
    count = rounds * batches
    seconds = {who: [] for who in jobs}
    memory = dict.fromkeys(jobs, 0.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, GPT2Config(), pairs, count, STEP_PAIRS)
        rate = matrix_rate(STEP_PAIRS * 140, STEP_PAIRS * 117, getattr(torch, dtype))
        print(f"{dtype} matrix products at these shapes: {rate / 1e9:,.0f} GFLOP/s", flush=True)
        for number in range(rounds):
            for who, job in jobs.items():
                numbers = [0, *range(1 + number, count + 1, rounds)]
                result = take_turn(job, folder, numbers, dtype)
                seconds[who] += [s for s, _ in result["steps"][1:]]  # the first one warmed up
                memory[who] = max(memory[who], result["peak"])
                print(f"{who}: {[round(s, 2) for s in seconds[who]]} s, {memory[who]:.2f} GB",
                      flush=True)
            show(jobs, seconds, memory, rate)


def main() -> None:
    chosen = train.choose_machine(train.Config()).dtype
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hh_dir", default="hh-rlhf", help="as for train.py")
    parser.add_argument("--dtype", default=train.name_of(chosen),
                        choices=("float32", "bfloat16", "float16"),
                        help="of all contenders; if left out, what train.py takes on this machine")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each contender")
    parser.add_argument("--batches", type=int, default=2, help="of 16 pairs, in a turn")
    parser.add_argument("--against", default="", help="a checkout of the first edition (commit "
                                                      "a24f547), whose steps take turns with ours")
    parser.add_argument("--scaling", action="store_true", help="only our step, at several sizes")
    parser.add_argument("--precision", default="", help="only bf16 against float32, this model's")
    parser.add_argument("--epoch", default="", help="only where an epoch's time goes, this model's")
    parser.add_argument("--only", default="",
                        help="contenders whose names match this regular expression")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        return turn(json.loads(args.turn))

    conftest.offline_vocabulary()
    print_machine()
    if args.epoch:
        return epoch(args.epoch, args.hh_dir, args.dtype)
    texts = []
    for path in data.fetch_hh(args.hh_dir, data.SUBSETS, "train"):
        texts += data.read_pairs(path)[0]
    pairs, _ = data.tokenize(texts, data.encoding_of(demo=False), 512, 256)
    if args.scaling:
        return scaling(pairs, [8, 16, 32, 64, 128], args.dtype)
    if args.precision:
        return precision(pairs, args.precision)

    contenders = STEPS | WRITERS
    if args.against:
        contenders |= first_edition(args.against)
    jobs = {who: job for who, job in contenders.items() if re.search(args.only, who)}
    compare(jobs, pairs, args.rounds, args.batches, args.dtype)


if __name__ == "__main__":
    main()
