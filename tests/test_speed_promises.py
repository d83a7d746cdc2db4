"""What section 5 of dpo.py and train_step promise about speed and memory, told without a clock.

Each promise is a count: of the operations that an update starts, of the numbers in a tensor, or of
the times that Python waits for the device. A count is the same on every machine, however busy.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
import dpo
from model import GPT2, GPT2Config, add_adapters

VOCABULARY = 50_257


def token_pair(prompt: int, chosen: int, rejected: int) -> data.TokenPair:
    """A pair of so many random tokens."""
    rng = np.random.default_rng([prompt, chosen, rejected])
    return data.TokenPair(rng.integers(0, VOCABULARY, prompt), rng.integers(0, VOCABULARY, chosen),
                          rng.integers(0, VOCABULARY, rejected))


# Few kernels ------------------------------------------------------------------------------------
#
# With short batches a GPU is done with a kernel before Python has started the next one. Then an
# update takes as long as its operations take to start, so what counts is how many there are.

# They make another view of a tensor, or memory without numbers: no kernel runs.
NO_KERNEL = {
    "view", "_unsafe_view", "_reshape_alias", "as_strided", "alias", "detach", "t", "transpose",
    "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "split", "split_with_sizes",
    "unbind", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
}
# For the profiler, and for Python alone.
NO_OPERATION = {"_record_function_enter_new", "_record_function_exit", "promote_types"}


class CountOperations(TorchDispatchMode):
    """How often each operation is started, forward, backward and in the optimizer."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in NO_KERNEL | NO_OPERATION:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapter", ["none", "parallel"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 750), (torch.bfloat16, 1100)])
def test_an_update_of_12_layers_starts_few_operations(adapter, dtype, limit):
    """32 pairs in one piece, as on a GPU; widths are tiny, which changes no count.

    When this was written: 491 and 506 with float32, for "none" and "parallel"; 773 and 798 with
    bfloat16, where weights are cast. The optimizer is fused: one operation for all its weights.
    """
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_layer=12, n_head=2, n_embd=8, n_positions=160, n_inner=16))
    add_adapters(model, adapter, width=4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    pairs = [token_pair(130 + number % 9, 1 + number % 2, 1) for number in range(32)]
    batch = data.pack(pairs, range(32), reference_table=torch.full((2, 32), -20.0))
    assert batch.tokens.shape[1] > 128

    def loss_function(model: GPT2, batch: data.PackedBatch) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logps = dpo.packed_logps(model, batch, piece=8192)
        return dpo.dpo_metrics(logps, batch.reference_logps, beta=0.1)

    dpo.train_step(model, [batch], optimizer, loss_function)       # makes the optimizer's state
    with CountOperations() as operations:
        metrics = dpo.train_step(model, [batch], optimizer, loss_function)
    assert metrics["skipped"] == 0
    assert operations.counts["_fused_adamw_"] == 1
    assert operations.counts["_scaled_dot_product_flash_attention_for_cpu"] == 12
    count = operations.counts.total()
    assert count <= limit, operations.counts.most_common(20)


# Bounded memory ---------------------------------------------------------------------------------


class WatchShapes(TorchDispatchMode):
    """The shapes of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.shapes.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("piece", [300, 512])
def test_logits_exist_for_one_piece_of_the_predictions_at_a_time(piece, bfloat16):
    """Also backward, for 4 pairs with 500 tokens in each response: max_tokens 512 allows no more.

    Only the head and its gradient have the vocabulary on one side and may be larger: (V, 8) here.
    The tensors are fake: they have shapes and no numbers, so this is as fast as a small batch.
    """
    width = 8
    pairs = [token_pair(12, 500, 500) for _ in range(4)]
    batch = data.pack(pairs, range(4))
    assert len(batch.predicted_at) == 4000
    with FakeTensorMode(allow_non_fake_inputs=True), WatchShapes() as seen:
        model = GPT2(GPT2Config(n_layer=1, n_head=2, n_embd=width, n_positions=512, n_inner=16))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logps = dpo.packed_logps(model, batch, piece)
        logps.sum().backward()

    predictions = []
    for shape in seen.shapes:
        if VOCABULARY in shape:
            others = [length for length in shape if length != VOCABULARY]
            assert len(others) <= 1, shape
            predictions.append(sum(others))
    assert width in predictions                        # the head
    assert max(predictions) == piece
    assert 4000 % piece in predictions                 # the last piece is a short one


@pytest.mark.parametrize("head_trains", [True, False])
def test_no_logits_wait_for_the_gradient(head_trains):
    """8 predictions, a vocabulary of 50: the forward pass keeps nothing with 50 columns.

    Not even where all predictions are one piece.
    """
    hidden = torch.randn(8, 3, requires_grad=True)
    head = torch.randn(50, 3, requires_grad=head_trains)
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = dpo.TargetLogps.apply(hidden, head, torch.arange(8), 512)
    assert sorted(kept) == [(8,), (8, 3), (8, 3), (50, 3)]     # targets, hidden, slopes, head
    logps.sum().backward()
    assert hidden.grad.shape == (8, 3)


def test_without_gradients_there_is_one_product_a_piece():
    """8 predictions in pieces of 4: two products with the head in a validation, four to train."""
    hidden = torch.randn(8, 3)
    head = torch.randn(50, 3)
    for trains, products in ((False, 2), (True, 4)):
        with KeepResults() as results:
            dpo.TargetLogps.apply(hidden.clone().requires_grad_(trains), head, torch.arange(8), 4)
        assert results.names.count("mm") == products


class KeepResults(TorchDispatchMode):
    """Keeps the result of each operation, so that no memory is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = []
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        if isinstance(result, Tensor):
            self.tensors.append(result)
        return result


def test_the_logits_of_a_piece_need_memory_once():
    """7 predictions, a vocabulary of 50: all results of 350 numbers share the memory of one."""
    with KeepResults() as results:
        dpo.logps_and_error(torch.randn(7, 3), torch.randn(50, 3), torch.arange(7))
    logits = [tensor for tensor in results.tensors if tensor.numel() == 50 * 7]
    assert len(logits) > 1
    assert len({tensor.untyped_storage().data_ptr() for tensor in logits}) == 1


# One wait ---------------------------------------------------------------------------------------
#
# A GPU computes while Python goes on and starts what comes next. Python waits only where it reads a
# number, and then the GPU has nothing to do until Python has caught up.

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__",
         "__format__", "__array__", "nonzero")


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the calls that read numbers of a tensor, in order."""
    calls = []

    def counted(name: str):
        original = getattr(Tensor, name)

        def call(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)
        return call

    for name in READS:
        monkeypatch.setattr(Tensor, name, counted(name))
    return calls


class WatchReads(TorchDispatchMode):
    """Reads that PyTorch makes by itself, without a call from Python."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero"):
            self.count += 1
        return function(*args, **(kwargs or {}))


def small_loss(model: GPT2, batch: data.PackedBatch) -> dict[str, Tensor]:
    return dpo.dpo_metrics(dpo.packed_logps(model, batch), batch.reference_logps, beta=0.1)


@pytest.fixture
def small() -> tuple[GPT2, list[data.PackedBatch], torch.optim.Optimizer]:
    """A tiny model, two micro-batches, and an optimizer that has made an update."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, n_inner=16))
    reference = torch.full((2, 3), -20.0)
    micro_batches = [data.pack([token_pair(3, 2, 4), token_pair(5, 1, 2)], [0, 1], reference),
                     data.pack([token_pair(2, 2, 2)], [2], reference)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    dpo.train_step(model, micro_batches, optimizer, small_loss)
    return model, micro_batches, optimizer


def test_the_watch_sees_each_kind_of_read(reads):
    """Else it would prove nothing."""
    tensor = torch.tensor([1.0])
    with WatchReads() as by_itself:
        bool(tensor)
        float(tensor)
        tensor.item()
        tensor.tolist()
        tensor.cpu()
        tensor[tensor > 0]
    assert reads[:5] == ["__bool__", "__float__", "item", "tolist", "cpu"]
    assert by_itself.count >= 3


def test_an_update_waits_for_the_device_once(small, reads):
    """However many micro-batches it has: two here."""
    model, micro_batches, optimizer = small
    with WatchReads() as by_itself:
        metrics = dpo.train_step(model, micro_batches, optimizer, small_loss)
    assert reads == ["tolist"]
    assert by_itself.count == 0
    assert len(metrics) == 10


def test_a_validation_waits_for_the_device_once(small, reads):
    model, batches, _ = small
    with WatchReads() as by_itself:
        metrics = dpo.val_step(model, batches, small_loss)
    assert reads == ["tolist"]
    assert by_itself.count == 0
    assert len(metrics) == 8
