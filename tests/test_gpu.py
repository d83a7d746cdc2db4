"""One GPU: the numbers are the CPU's, memory stays, and a run learns and goes on after a stop.

    python -m pytest tests/test_gpu.py

Each test runs on the CPU, so that the tests themselves are known to work; and on the GPU, if there
is one.
"""

import gc
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import data
import dpo
import train
from model import GPT2, GPT2Config, add_adapters, generate

GPU = torch.accelerator.current_accelerator(check_available=True)


@pytest.fixture(params=["cpu", "gpu"])
def device(request, monkeypatch) -> torch.device:
    """Where a test computes. train.py finds the same device."""
    if request.param == "cpu":
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: None)
        return torch.device("cpu")
    if GPU is None:
        pytest.skip("no GPU here")
    return GPU


def small_model() -> GPT2:
    torch.manual_seed(0)
    return GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=300,
                           n_inner=128))


def some_pairs(count: int) -> list[data.TokenPair]:
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        lengths = rng.integers(1, 20, 3)
        pairs.append(data.TokenPair(*(rng.integers(0, 300, length) for length in lengths)))
    return pairs


def one_batch() -> data.PackedBatch:
    """Twelve pairs, and a reference that is not the policy: no loss is log 2, none the same."""
    reference = -torch.arange(24.0).view(2, 12) * 6
    return data.pack(some_pairs(12), range(12), reference)


def loss_and_gradients(device: torch.device, dtype: torch.dtype, adapter: str) -> tuple:
    """The mean loss of the batch on a device, and the gradients of what trains, on the CPU."""
    model = add_adapters(small_model(), adapter, width=8).to(device)
    batch = one_batch().to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logps = dpo.packed_logps(model, batch)
    loss = dpo.dpo_metrics(logps, batch.reference_logps, beta=0.1)["loss"].mean()
    loss.backward()
    gradients = [weight.grad.cpu() for weight in model.parameters() if weight.requires_grad]
    return loss.item(), gradients


@pytest.mark.parametrize("adapter", ["none", "parallel"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_loss_and_gradients_are_those_of_float32_on_the_cpu(device, dtype, tolerance, adapter):
    """Each gradient's distance from the CPU's, as a share of all gradients' length."""
    loss, gradients = loss_and_gradients(device, dtype, adapter)
    expected_loss, expected = loss_and_gradients(torch.device("cpu"), torch.float32, adapter)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    length = torch.cat([gradient.flatten() for gradient in expected]).norm()
    for found, right in zip(gradients, expected, strict=True):
        assert (found - right).norm() <= tolerance * length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_is_asked_twice_says_the_same(device, dtype):
    """To the bit. A GPU adds up in any order, where it is let."""
    model = small_model().to(device)
    pairs = some_pairs(500)
    batch = data.pack(pairs, range(len(pairs))).to(device)
    answers = []
    for _ in range(5):
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            answers.append(dpo.packed_logps(model, batch))
    for answer in answers[1:]:
        assert torch.equal(answer, answers[0])


def test_greedy_answers_are_those_of_the_cpu(device):
    model = small_model()
    prompts = [[1, 2, 3], [250, 7, 7, 7, 19, 4]]
    expected = generate(model, prompts, 20, temperature=0, end_token=299)
    assert generate(model.to(device), prompts, 20, temperature=0, end_token=299) == expected


def test_sampled_answers_follow_the_seed(device):
    model = small_model().to(device)
    prompts = [[1, 2, 3]] * 4
    first = generate(model, prompts, 20, end_token=299, seed=1)
    assert generate(model, prompts, 20, end_token=299, seed=1) == first
    assert generate(model, prompts, 20, end_token=299, seed=2) != first


def loss_function(model: GPT2, batch: data.PackedBatch) -> dict[str, Tensor]:
    return dpo.dpo_metrics(dpo.packed_logps(model, batch), batch.reference_logps, beta=0.1)


def test_memory_does_not_grow_from_step_to_step(device):
    """On a GPU: what is allocated after the third update is allocated after the tenth. On the CPU,
    which counts no bytes: as many tensors are alive."""
    model = small_model().to(device)
    batch = one_batch().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    used = []
    for _ in range(10):
        dpo.train_step(model, [batch], optimizer, loss_function)
        gc.collect()
        if device.type == "cpu":
            used.append(sum(isinstance(item, Tensor) for item in gc.get_objects()))
        else:
            used.append(torch.accelerator.memory_allocated())
    assert used[9] == used[2] > 0


def test_an_update_waits_for_the_device_once(device):
    """train_step reads one list of numbers. CUDA tells when it is waited for; the CPU's reads are
    counted in tests/test_speed_promises.py."""
    model = small_model().to(device)
    batch = one_batch().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    dpo.train_step(model, [batch], optimizer, loss_function)      # makes the optimizer's state
    before = model.wte.weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        dpo.train_step(model, [batch], optimizer, loss_function)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    assert len(waits) == (1 if device.type == "cuda" else 0)
    assert not torch.equal(model.wte.weight, before)


class Names(TorchDispatchMode):
    """Keeps the names of the operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_no_attention_is_cudnns(device):
    """On an H200 an update took 0.2 s with it in place of 0.05, where the batch's shape was new."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    machine = train.choose_machine(train.Config(dtype="bfloat16"))
    model = small_model().to(machine.device)
    batch = one_batch().to(machine.device)
    with Names() as found, torch.autocast(machine.device.type, machine.dtype):
        dpo.packed_logps(model, batch).sum().backward()
    attention = [name for name in found.names if "attention" in name]
    assert len(attention) == 2 * 2                     # two layers, forward and back
    assert not any("cudnn" in name for name in attention)


def fewer_pairs(monkeypatch, count: int) -> None:
    """A demo of `count` pairs: half precision takes a CPU minutes that knows float32 alone."""
    real_pairs = data.demo_pairs
    monkeypatch.setattr(data, "demo_pairs", lambda _, seed: real_pairs(count, seed))


def lines_of(out: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event and line["stage"] == "dpo"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_demo_learns(device, dtype, tmp_path, monkeypatch):
    """On a GPU it reaches its goal; on the CPU it gets less time. float16 is for a card without
    bfloat16, such as Colab's T4. There the scale of the gradients begins too large, so a few first
    updates are skipped. Before the first update all rewards are 0, so each pair is a tie."""
    words = ["--demo", "--out", str(tmp_path), "--log_every", "1", "--dtype", dtype]
    if device.type == "cpu":
        fewer_pairs(monkeypatch, 150)
        train.main(words)
    else:
        assert train.main(words) == 0
    vals = lines_of(tmp_path, "val")
    assert vals[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert vals[0]["rewards/accuracies"] == 0.5
    assert min(line["loss"] for line in vals) < 0.6
    skipped = [line["skipped"] for line in lines_of(tmp_path, "train")]
    assert skipped[-1] == skipped[min(3, len(skipped) - 1)] <= 3


def test_a_stopped_run_goes_on(device, tmp_path, monkeypatch):
    """And ends with the same weights: on the CPU to the bit."""
    fewer_pairs(monkeypatch, 150)
    dtype = "float32" if device.type == "cpu" else "auto"
    words = ["--demo", "--dtype", dtype, "--save_every", "2", "--out"]
    train.main([*words, str(tmp_path / "whole")])

    real_step = dpo.train_step
    updates = []

    def stop_in_dpo(model, micro_batches, *rest):
        updates.append(1)
        if len(updates) == 11:                         # SFT has 8 updates
            raise KeyboardInterrupt
        return real_step(model, micro_batches, *rest)

    monkeypatch.setattr(dpo, "train_step", stop_in_dpo)
    assert train.main([*words, str(tmp_path / "stopped")]) == 130
    saved = torch.load(tmp_path / "stopped" / "last.pt")
    assert (saved["stage"], saved["state"]["step"]) == ("dpo", 2)
    monkeypatch.setattr(dpo, "train_step", real_step)
    train.main([*words, str(tmp_path / "stopped"), "--resume"])

    whole = GPT2.from_pretrained(tmp_path / "whole" / "best").state_dict()
    resumed = GPT2.from_pretrained(tmp_path / "stopped" / "best").state_dict()
    for name, weight in whole.items():
        tolerance = 0.0 if device.type == "cpu" else 1e-3
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=tolerance)
