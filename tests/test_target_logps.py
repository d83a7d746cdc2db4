"""dpo.TargetLogps and the end of dpo.packed_logps: derivatives by hand, and number formats.

In float64 it is held against the three lines that one may read in its place. With bfloat16, numbers
are chosen so that a product, a sum or a logit in the wrong format would be plainly wrong.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import dpo

TARGETS = torch.tensor([3, 8, 0, 3, 5, 5, 1])          # among 9 words


def close(found: Tensor, expected: Tensor, relative: float) -> bool:
    return bool((found - expected).norm() <= relative * expected.norm())


def plain_target_logps(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The three lines that one may read in place of TargetLogps."""
    log_softmax = (hidden @ head.T).log_softmax(-1)
    return log_softmax.gather(-1, targets[:, None]).squeeze(-1)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 512])
@pytest.mark.parametrize("head_trains", [True, False])
def test_target_logps_are_plain_ones_with_their_gradients(piece, head_trains):
    """In pieces that divide 7 predictions unevenly, and with a frozen head."""
    torch.manual_seed(2)
    hidden = torch.randn(7, 4).double().requires_grad_()
    head = torch.randn(9, 4).double().requires_grad_(head_trains)
    weights = torch.tensor([1.0, 50.0, -3.0, 0.5, 0.0, 2.0, 1.0]).double()
    leaves = [leaf for leaf in (hidden, head) if leaf.requires_grad]

    expected = plain_target_logps(hidden, head, TARGETS)
    logps = dpo.TargetLogps.apply(hidden, head, TARGETS, piece)
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(torch.autograd.grad((logps * weights).sum(), leaves),
                               torch.autograd.grad((expected * weights).sum(), leaves))


class Given(nn.Module):
    """A model whose hidden states are given, as is its head: packed_logps reads no more of it."""

    def __init__(self, hidden: Tensor, head: Tensor):
        super().__init__()
        self.states = nn.Parameter(hidden)
        self.wte = nn.Embedding.from_pretrained(head, freeze=False)

    def hidden(self, tokens: Tensor, positions: Tensor, attn_mask: Tensor) -> Tensor:
        return self.states[None]                       # one row


def given_batch(targets: Tensor, owner: Tensor) -> SimpleNamespace:
    """A batch whose predictions are all the hidden states of Given, in order."""
    return SimpleNamespace(tokens=None, positions=None, attn_mask=None,
                           predicted_at=torch.arange(len(targets)), targets=targets, owner=owner,
                           response_lengths=owner.bincount())


@pytest.mark.parametrize("head_trains", [True, False])
def test_bfloat16_gradients_are_float32_and_near_those_of_float64(head_trains):
    torch.manual_seed(2)
    hidden = torch.randn(7, 6)
    head = torch.randn(9, 6)
    weights = torch.tensor([3.0, 3.0, 3.0, -1.0, -1.0, -1.0, -1.0])
    exact_hidden = hidden.double().requires_grad_()
    exact_head = head.double().requires_grad_()
    (plain_target_logps(exact_hidden, exact_head, TARGETS) * weights).sum().backward()

    model = Given(hidden, head)
    model.wte.weight.requires_grad_(head_trains)
    batch = given_batch(TARGETS, torch.tensor([0, 0, 0, 1, 1, 1, 1]))
    with torch.autocast("cpu", torch.bfloat16):
        logps = dpo.packed_logps(model, batch, piece=3)
    (logps * torch.tensor([3.0, -1.0])).sum().backward()
    for leaf, exact, trains in ((model.states, exact_hidden, True),
                                (model.wte.weight, exact_head, head_trains)):
        assert (leaf.grad is not None) == trains
        if trains:
            assert leaf.grad.dtype == torch.float32
            assert close(leaf.grad.double(), exact.grad, 0.02)


def test_under_bfloat16_the_products_are_bfloat16():
    """128.5 is 128 in bfloat16. The likeliest word's logit is so much above the target's.

    The mean word is 0 here, so nothing is taken from the logits.
    """
    model = Given(torch.ones(1, 1), torch.tensor([[128.5], [-128.5], [0.0]]))
    batch = given_batch(torch.tensor([2]), torch.tensor([0]))
    logp = dpo.packed_logps(model, batch)
    assert logp.item() == -128.5
    with torch.autocast("cpu", torch.bfloat16):
        logp = dpo.packed_logps(model, batch)
    assert logp.item() == -128.0


def test_under_bfloat16_the_heads_gradient_is_a_sum_in_float32():
    """600 predictions add -1/2 each to the other word: a sum in bfloat16 would stop at -128."""
    model = Given(torch.ones(600, 1), torch.zeros(2, 1))
    none = torch.zeros(600, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        logps = dpo.packed_logps(model, given_batch(none, none), piece=1)
    logps.sum().backward()
    assert model.wte.weight.grad.flatten().tolist() == [300.0, -300.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_bfloat16_logps_are_float32_and_sum_in_float32(dtype):
    """300 tokens of log(1/5) each, -482.8 nats, with autocast or with weights that are bfloat16."""
    model = Given(torch.zeros(300, 2, dtype=dtype), torch.zeros(5, 2, dtype=dtype))
    none = torch.zeros(300, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        logps = dpo.packed_logps(model, given_batch(none, none))
    assert logps.dtype == torch.float32
    assert logps.item() == pytest.approx(-300 * math.log(5), rel=1e-5)


def test_logits_far_from_0_are_taken_about_their_mean():
    """GPT-2's lie near -100, where bfloat16 has steps of 0.5: no logp could be sure to 0.1 nats.

    Here logits lie from -115 to -82. Each of 40 predictions is of another word, against float64.
    """
    torch.manual_seed(4)
    hidden = torch.randn(40, 16).bfloat16().float()
    head = torch.randn(99, 16).bfloat16().float()
    hidden[:, 0] = 25.0
    head[:, 0] = -4.0
    each = torch.arange(40)
    exact = plain_target_logps(hidden.double(), head.double(), each)
    with torch.autocast("cpu", torch.bfloat16):
        found = dpo.packed_logps(Given(hidden, head), given_batch(each, each))
        uncentered = plain_target_logps(hidden, head, each)
    assert (found - exact).abs().max() < 0.1
    assert (uncentered - exact).abs().max() > 0.3      # what would happen without


def test_a_word_that_is_all_but_certain_has_a_logp_near_0_under_bfloat16():
    """Its logit is -82.8125, which bfloat16 would make -83; those of other words lie near -100."""
    torch.manual_seed(4)
    hidden = torch.randn(40, 16).bfloat16().float()
    head = torch.randn(99, 16).bfloat16().float()
    hidden[:, 0] = 25.0
    head[:, 0] = -4.0
    head[7] = 0.0
    head[7, 0] = -3.3125
    word = torch.full((40,), 7)
    exact = plain_target_logps(hidden.double(), head.double(), word)
    with torch.autocast("cpu", torch.bfloat16):
        found = dpo.packed_logps(Given(hidden, head), given_batch(word, torch.arange(40)))
    sure = exact > -0.01
    assert sure.sum() > 10
    assert (found - exact)[sure].abs().max() < 0.1
