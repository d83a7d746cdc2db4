"""dpo.variant_loss: numbers worked by hand, trl's formulas, and options that no loss can use.

The worked pair, with beta 1/4. The policy gained 1 nat on the chosen response and lost 2 on the
rejected one, so the rewards are 0.25 and -0.5, and the margin is 0.75. The chosen response has 2
tokens and the rejected one 8: +0.5 and -0.25 nats a token, which are 0.75 apart.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import dpo

POLICY = torch.tensor([-1.0, -5.0]).double()           # chosen, then rejected
REFERENCE = torch.tensor([-2.0, -3.0]).double()
LENGTHS = torch.tensor([2, 8])


def softplus(x: float) -> float:
    """log(1 + e^x), which is -log sigmoid(-x)."""
    return math.log(1 + math.exp(x))


@pytest.mark.parametrize("variant, label_smoothing, expected", [
    ("sigmoid", 0.0, softplus(-0.75)),
    ("sigmoid", 0.1, 0.9 * softplus(-0.75) + 0.1 * softplus(0.75)),
    ("robust", 0.0, softplus(-0.75)),
    ("robust", 0.1, (0.9 * softplus(-0.75) - 0.1 * softplus(0.75)) / 0.8),
    ("hinge", 0.0, 0.25),
    ("ipo", 0.0, (0.75 - 2.0) ** 2),
    ("sigmoid_norm", 0.0, softplus(-0.1875)),
])
def test_each_variant_of_the_worked_pair(variant, label_smoothing, expected):
    loss = dpo.variant_loss(POLICY, REFERENCE, LENGTHS, 0.25, variant, label_smoothing)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_hinge_asks_no_more_than_a_margin_of_one():
    """Beta 1/2 makes the worked margin 1.5: nothing is lost, and nothing pulls."""
    policy = POLICY.clone().requires_grad_()
    loss = dpo.variant_loss(policy, REFERENCE, LENGTHS, 0.5, "hinge")
    loss.sum().backward()
    assert loss.item() == 0
    assert policy.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("variant", dpo.VARIANTS)
def test_every_variant_agrees_with_the_formulas_of_trl(variant):
    """DPOTrainer.dpo_loss, written out: `logits` there is the margin without beta."""
    torch.manual_seed(5)
    policy = 20 * torch.randn(18).double()
    reference = 20 * torch.randn(18).double()
    chosen_lengths = torch.arange(1, 10)
    rejected_lengths = torch.arange(10, 1, -1)
    beta = 0.3
    smoothing = 0.2 if variant in dpo.USES_SMOOTHING else 0.0

    logits = (policy[:9] - policy[9:]) - (reference[:9] - reference[9:])
    mean_logits = ((policy[:9] - reference[:9]) / chosen_lengths
                   - (policy[9:] - reference[9:]) / rejected_lengths)
    expected = {
        "sigmoid": (-F.logsigmoid(beta * logits) * (1 - smoothing)
                    - F.logsigmoid(-beta * logits) * smoothing),
        "robust": (-F.logsigmoid(beta * logits) * (1 - smoothing)
                   + F.logsigmoid(-beta * logits) * smoothing) / (1 - 2 * smoothing),
        "hinge": torch.relu(1 - beta * logits),
        "ipo": (mean_logits - 1 / (2 * beta)) ** 2,
        "sigmoid_norm": -F.logsigmoid(beta * mean_logits),
    }
    loss = dpo.variant_loss(policy, reference, torch.cat([chosen_lengths, rejected_lengths]), beta,
                            variant, smoothing)
    torch.testing.assert_close(loss, expected[variant])


def test_the_variant_sigmoid_is_equation_7():
    """So `sigmoid` and dpo_metrics are one loss, bit for bit."""
    loss = dpo.variant_loss(POLICY, REFERENCE, LENGTHS, 0.25, "sigmoid")
    assert torch.equal(loss, dpo.dpo_metrics(POLICY, REFERENCE, 0.25)["loss"])


def test_robust_is_unbiased_under_flipped_labels():
    """With a share of 1/5 of the labels flipped, its mean is equation 7 of the true label."""
    right = dpo.variant_loss(POLICY, REFERENCE, LENGTHS, 0.25, "robust", 0.2)
    flipped = dpo.variant_loss(POLICY.flip(0), REFERENCE.flip(0), LENGTHS.flip(0), 0.25,
                               "robust", 0.2)
    mean = 0.8 * right + 0.2 * flipped
    assert mean.item() == pytest.approx(softplus(-0.75), rel=1e-12)


@pytest.mark.parametrize("variant", ["sigmoid", "robust", "hinge"])
def test_a_reference_shifted_alike_for_both_answers_changes_no_loss(variant):
    """Nor any gradient: what a function of the prompt adds to the rewards cancels."""
    policy = torch.tensor([-11.0, -3.5, -9.0, -30.0, -12.0, -3.0, -6.0, -31.0]).double()
    policy.requires_grad_()
    reference = torch.tensor([-12.0, -2.5, -9.5, -30.0, -11.0, -4.0, -6.0, -30.0]).double()
    shift = torch.tensor([7.0, -3.0, 0.5, 11.0]).repeat(2)         # another one for each pair
    lengths = torch.arange(1, 9)
    loss = dpo.variant_loss(policy, reference, lengths, 0.5, variant)
    shifted = dpo.variant_loss(policy, reference + shift, lengths, 0.5, variant)
    gradient, = torch.autograd.grad(loss.sum(), policy)
    shifted_gradient, = torch.autograd.grad(shifted.sum(), policy)
    torch.testing.assert_close(shifted, loss)
    torch.testing.assert_close(shifted_gradient, gradient)
    assert gradient.abs().max() > 0.1


@pytest.mark.parametrize("variant, label_smoothing, message", [
    ("simpo", 0.0, "'simpo', expected one of sigmoid, robust"),
    ("sigmoid", 0.5, r"label_smoothing is 0\.5, expected 0 or more, below 0\.5"),
    ("robust", 0.5, r"label_smoothing is 0\.5"),
    ("sigmoid", -0.1, r"label_smoothing is -0\.1"),
    ("sigmoid", math.nan, "label_smoothing is nan"),
    ("hinge", 0.1, "hinge has no use for it: expected sigmoid or robust"),
    ("ipo", 0.1, "ipo has no use for it: expected sigmoid or robust"),
    ("sigmoid_norm", 0.1, "sigmoid_norm has no use for it: expected sigmoid or robust"),
])
def test_an_option_that_no_loss_can_use_is_refused(variant, label_smoothing, message):
    """By the check that train.py makes at once, and by the loss itself."""
    with pytest.raises(ValueError, match=message):
        dpo.check_variant(variant, label_smoothing)
    with pytest.raises(ValueError, match=message):
        dpo.variant_loss(POLICY, REFERENCE, LENGTHS, 0.25, variant, label_smoothing)
