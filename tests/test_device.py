"""Is every tensor on the model's device? Told without a GPU, on torch's "meta" device.

A tensor on "meta" has a shape and no numbers. Like a GPU's, it can't be mixed with the CPU's.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import dpo
from model import (
    ADAPTERS,
    GPT2,
    GPT2Config,
    add_adapters,
    cached_hidden,
    merge_adapters,
    strongest_neurons,
)

SHAPE = GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=16, vocab_size=50, n_inner=32)


class OnMeta(TorchDispatchMode):
    """Refuse an operation that reads or makes a tensor elsewhere. Single numbers may be anywhere:
    a GPU takes those of the CPU along with the call."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves([args, kwargs, result]):
            if isinstance(leaf, Tensor) and leaf.dim() > 0:
                assert leaf.device.type == "meta", (function, leaf.device, leaf.shape)
        self.operations += 1
        return result


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """torch knows no autocast for "meta", and raises where it is asked for it."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)


def on_meta(kind: str) -> GPT2:
    with torch.device("meta"):
        model = GPT2(SHAPE)
    return add_adapters(model, kind, width=4)


def batch_of(sides: tuple[str, ...]) -> data.PackedBatch:
    rng = np.random.default_rng(0)
    lengths = ((3, 2, 4), (5, 1, 2), (2, 7, 3))
    pairs = [data.TokenPair(*(rng.integers(0, 50, n) for n in row)) for row in lengths]
    reference = torch.zeros(2, 3) if len(sides) == 2 else None
    return data.pack(pairs, [0, 1, 2], reference, sides).to("meta")


def test_the_watch_sees_a_tensor_that_was_left_on_the_cpu():
    with pytest.raises(AssertionError, match="cpu"), OnMeta():
        torch.zeros(3, device="meta").index_select(0, torch.tensor([0, 1]))
    with OnMeta():
        torch.zeros(3, device="meta") * torch.tensor(2.0)      # a single number


@pytest.mark.parametrize("kind", ADAPTERS)
def test_dpo_and_its_backward_pass_stay_on_the_device(kind):
    model = on_meta(kind)
    batch = batch_of(data.SIDES)
    with OnMeta() as watch:
        logps = dpo.packed_logps(model, batch)
        dpo.dpo_metrics(logps, batch.reference_logps, beta=0.1)["loss"].sum().backward()
    assert watch.operations > 100
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad.device.type == "meta" for parameter in trained)


@pytest.mark.parametrize("variant", dpo.VARIANTS)
def test_the_variants_stay_on_the_device(variant):
    batch = batch_of(data.SIDES)
    with OnMeta() as watch:
        logps = dpo.packed_logps(on_meta("none"), batch)
        loss = dpo.variant_loss(logps, batch.reference_logps, batch.response_lengths, 0.1, variant)
        loss.sum().backward()
    assert watch.operations > 100


def test_sft_stays_on_the_device():
    batch = batch_of(("chosen",))
    with OnMeta() as watch:
        logps = dpo.packed_logps(on_meta("none"), batch)
        dpo.sft_loss(logps, batch.response_lengths).sum().backward()
    assert watch.operations > 100


def test_padded_rows_stay_on_the_device():
    model = on_meta("none")
    tokens = torch.zeros(4, 9, dtype=torch.int64, device="meta")
    with OnMeta() as watch:
        dpo.sequence_logps(model, tokens, tokens > 0).sum().backward()
    assert watch.operations > 100


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_forward_with_a_kv_cache_stays_on_the_device(kind):
    model = on_meta(kind)
    keys = torch.zeros(2, 3, 12, 2, 4, device="meta")  # layers, rows, places, heads, width
    values = torch.zeros_like(keys)
    for length in (7, 1):                              # the prompts, then a token of each
        tokens = torch.zeros(3, length, dtype=torch.int64, device="meta")
        with torch.no_grad(), OnMeta() as watch:
            hidden = cached_hidden(model, tokens, tokens, keys, values)
            assert model.logits(hidden).shape == (3, length, 50)
        assert watch.operations > 30


def test_strongest_neurons_and_merged_mlps_are_made_on_the_device():
    model = on_meta("parallel")
    small = strongest_neurons(model.h[0].mlp.mlp, width=3)
    merged = merge_adapters(model)
    for made in (small, merged):
        assert {weight.device.type for weight in made.state_dict().values()} == {"meta"}
