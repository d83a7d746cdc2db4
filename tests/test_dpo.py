"""Claims about dpo.py: the loss against the paper and its theory, then the loop around it.

Two small policies: a GPT-2 in float64 on flat batches, and a table that holds a logp for each
response of each pair, so that a step can be worked by hand.
"""

import copy
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dpo
from data import SIDES, TokenPair, batches, flatten
from dpo import VARIANTS, cosine_lr, dpo_loss, fit, response_logp, train_step, val_step
from model import GPT2, GPT2Config, add_adapters
from train import Policy

TINY = GPT2Config(2, 2, 16, 32, 40, 32)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of a few numbers: on a busy machine a second thread is only waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model():
    """A GPT-2 in float64 whose every weight is at work, biases too."""
    torch.manual_seed(0)
    model = GPT2(TINY).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def token_pairs(*lengths: tuple[int, int, int]) -> list[TokenPair]:
    """Pairs with so many tokens in prompt, chosen, rejected."""
    rng = np.random.default_rng(1)
    return [TokenPair(*(rng.integers(0, 40, n).astype(np.int32) for n in three))
            for three in lengths]


PAIRS = token_pairs((5, 3, 7), (2, 1, 4), (6, 2, 2), (1, 6, 1))
REFERENCE = torch.tensor([[-11.0, -25.0], [-3.5, -17.0], [-9.0, -6.0], [-30.0, -4.0]]).double()


def gradients(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """The loss's gradient in all weights, flat."""
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in found])


def close(a: torch.Tensor, b: torch.Tensor, relative: float = 1e-9) -> bool:
    return bool((a - b).norm() <= relative * b.norm())


# The loss. In WORKED the policy gained 1 nat on chosen, lost 2 on rejected, and beta is 0.25:
# rewards 0.25 and -0.5, margin 0.75; per token, with 2 and 8 of them, 0.125, -0.0625 and 0.1875.

WORKED = [torch.tensor([n]).double() for n in (-1.0, -5.0, -2.0, -3.0)]
LENGTHS = torch.tensor([2]), torch.tensor([8])


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


@pytest.mark.parametrize("variant, smoothing, expected", [
    ("sigmoid", 0.0, softplus(-0.75)),
    ("sigmoid", 0.1, 0.9 * softplus(-0.75) + 0.1 * softplus(0.75)),
    ("robust", 0.0, softplus(-0.75)),
    ("robust", 0.1, (0.9 * softplus(-0.75) - 0.1 * softplus(0.75)) / 0.8),
    ("hinge", 0.0, 0.25),
    ("ipo", 0.0, (1 / 2 + 2 / 8 - 1 / 0.5) ** 2),
    ("sigmoid_norm", 0.0, softplus(-0.1875)),
])
def test_each_variant_of_a_worked_pair(variant, smoothing, expected):
    per_token = variant in ("ipo", "sigmoid_norm")
    loss, chosen, rejected = dpo_loss(*WORKED, 0.25, variant, smoothing,
                                      *(LENGTHS if per_token else ()))
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert (chosen.item(), rejected.item()) == ((0.125, -0.0625) if per_token else (0.25, -0.5))


def test_hinge_asks_no_more_than_a_margin_of_one():
    """Beta 0.5 makes the worked margin 1.5: nothing is lost, and nothing pulls."""
    policy = [p.clone().requires_grad_() for p in WORKED[:2]]
    loss, _, _ = dpo_loss(*policy, *WORKED[2:], 0.5, "hinge")
    loss.sum().backward()
    assert loss.item() == 0 and policy[0].grad.item() == 0


def test_every_variant_agrees_with_the_formulas_of_trl():
    """DPOTrainer.dpo_loss, written out: `logits` there is the margin without beta."""
    logps, beta, e = torch.randn(4, 9).double() * 20, 0.3, 0.2
    lengths = torch.arange(1, 10), torch.arange(10, 1, -1)
    logits = (logps[0] - logps[1]) - (logps[2] - logps[3])
    mean = ((logps[0] - logps[2]) / lengths[0]) - ((logps[1] - logps[3]) / lengths[1])
    expected = {
        "sigmoid": -F.logsigmoid(beta * logits) * (1 - e) - F.logsigmoid(-beta * logits) * e,
        "robust": (-F.logsigmoid(beta * logits) * (1 - e)
                   + F.logsigmoid(-beta * logits) * e) / (1 - 2 * e),
        "hinge": torch.relu(1 - beta * logits),
        "ipo": (mean - 1 / (2 * beta)) ** 2,
        "sigmoid_norm": -F.logsigmoid(beta * mean)}
    assert set(expected) == set(VARIANTS)
    for variant, loss in expected.items():
        options = (e,) if variant in dpo.SMOOTHED else (0.0,)
        options += lengths if variant in dpo.PER_TOKEN else ()
        torch.testing.assert_close(dpo_loss(*logps, beta, variant, *options)[0], loss)


def test_robust_is_unbiased_under_flipped_labels():
    """With a share e of labels flipped, its mean is the plain loss of the true label."""
    swapped = [WORKED[i] for i in (1, 0, 3, 2)]
    right, flipped = (dpo_loss(*w, 0.25, "robust", 0.2)[0].item() for w in (WORKED, swapped))
    assert 0.8 * right + 0.2 * flipped == pytest.approx(softplus(-0.75), rel=1e-12)


@pytest.mark.parametrize("wrong, word", [
    ({"beta": 0.0}, "beta is 0.0"), ({"beta": -0.1}, "beta"), ({"beta": math.nan}, "beta"),
    ({"beta": math.inf}, "beta"), ({"variant": "simpo"}, "'simpo', expected one of sigmoid"),
    ({"label_smoothing": 0.5}, "0.5"), ({"label_smoothing": -0.1}, "-0.1"),
    ({"label_smoothing": math.nan}, "nan"),
    ({"variant": "hinge", "label_smoothing": 0.1}, "sigmoid and robust"),
    ({"variant": "ipo", "label_smoothing": 0.1}, "sigmoid and robust"),
    ({"variant": "sigmoid_norm", "label_smoothing": 0.1}, "sigmoid and robust"),
    ({"variant": "ipo"}, "lengths"), ({"variant": "sigmoid_norm"}, "lengths"),
    ({"variant": "ipo", "chosen_tokens": LENGTHS[0]}, "lengths"),
    ({"chosen_tokens": LENGTHS[0]}, "lengths"), ({"rejected_tokens": LENGTHS[0]}, "lengths"),
    ({"variant": "hinge", "chosen_tokens": LENGTHS[0], "rejected_tokens": LENGTHS[1]}, "lengths"),
])
def test_an_option_that_the_loss_cannot_use_is_refused(wrong, word):
    with pytest.raises(ValueError, match=word):
        dpo_loss(*WORKED, **{"beta": 0.1} | wrong)


def test_only_the_policy_has_a_gradient():
    logps = [w.clone().requires_grad_() for w in WORKED]
    loss, chosen, rejected = dpo_loss(*logps, beta=0.25)
    loss.sum().backward()
    pull = 0.25 / (1 + math.exp(0.75))  # beta * sigmoid(rejected reward - chosen reward)
    assert [p.grad.item() for p in logps[:2]] == pytest.approx([-pull, pull], rel=1e-12)
    assert logps[2].grad is None and logps[3].grad is None
    assert not chosen.requires_grad and not rejected.requires_grad


# The theory, on a world of 3 prompts and 4 answers; the policy is a table of logits.

def small_world():
    """True rewards (3, 4), the reference's logps (3, 4), and all 36 (prompt, answer, other)."""
    rng = torch.Generator().manual_seed(3)
    reward = torch.randn(3, 4, generator=rng).double()
    reference = (2 * torch.randn(3, 4, generator=rng).double()).log_softmax(-1)
    return reward, reference, [(x, y, z) for x in range(3) for y in range(4) for z in range(4)
                               if y != z]


def test_the_gradient_is_the_papers():
    """-beta * sigmoid(rejected reward - chosen reward) * (grad log pi(chosen) - of rejected)."""
    _, reference, triples = small_world()
    table, beta = torch.randn(3, 4).double().requires_grad_(), 0.7
    for x, y, z in triples:
        logp = table.log_softmax(-1)
        loss, chosen, rejected = dpo_loss(logp[x, y], logp[x, z], reference[x, y], reference[x, z],
                                          beta)
        found, of_chosen, of_rejected = (torch.autograd.grad(v, table, retain_graph=True)[0]
                                         for v in (loss, logp[x, y], logp[x, z]))
        expected = -beta * torch.sigmoid(rejected - chosen) * (of_chosen - of_rejected)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("beta", [0.2, 1.0, 4.0])
def test_the_optimum_is_the_tilted_reference(beta):
    """Preferences by Bradley-Terry, in expectation: pi* is pi_ref exp(r / beta) / Z, and the
    implicit reward beta log(pi / pi_ref) is r up to a function of the prompt."""
    reward, reference, triples = small_world()
    x, y, z = torch.tensor(triples).unbind(1)
    preferred = torch.sigmoid(reward[x, y] - reward[x, z])  # how often y is preferred to z
    table = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([table], max_iter=500, tolerance_grad=1e-12,
                                  tolerance_change=0.0, line_search_fn="strong_wolfe")

    def expected_loss():
        optimizer.zero_grad()
        logp = table.log_softmax(-1)
        loss, _, _ = dpo_loss(logp[x, y], logp[x, z], reference[x, y], reference[x, z], beta)
        loss = (preferred * loss).sum()
        loss.backward()
        return loss
    optimizer.step(expected_loss)
    logp = table.detach().log_softmax(-1)
    torch.testing.assert_close(logp, (reference + reward / beta).log_softmax(-1),
                               rtol=0, atol=1e-5)
    implicit = beta * (logp - reference) - reward
    torch.testing.assert_close(implicit, implicit.mean(1, keepdim=True).expand(3, 4),
                               rtol=0, atol=1e-5)


# From a model to log-probabilities

def one_by_one(model: GPT2, pair: TokenPair, side: str) -> torch.Tensor:
    """A response's logp, a token at a time: the model reads what stands before it, nothing else."""
    prompt, response = pair.prompt.tolist(), getattr(pair, side).tolist()
    return sum(model(torch.tensor([prompt + response[:t]]))[0, -1].log_softmax(-1)[token]
               for t, token in enumerate(response))


def test_an_oracle_agrees_on_logps_loss_metrics_and_gradients(model):
    beta, numbers = 0.5, [2, 0, 3, 1]  # of the pairs in the data set
    batch = flatten(PAIRS, np.array(numbers))
    logp = Policy(model)(batch)
    metrics = dpo.dpo_objective(REFERENCE, beta, sft_coef=0.3)(logp, batch)
    rows = []
    for pair, number in zip(PAIRS, numbers, strict=True):
        chosen, rejected = (one_by_one(model, pair, side) for side in SIDES)
        rewards = beta * (chosen - REFERENCE[number, 0]), beta * (rejected - REFERENCE[number, 1])
        rows.append({
            "loss": torch.log(1 + torch.exp(rewards[1] - rewards[0]))
                    - 0.3 * chosen / len(pair.chosen),
            "rewards/chosen": rewards[0], "rewards/rejected": rewards[1],
            "rewards/margins": rewards[0] - rewards[1],
            "rewards/accuracies": (rewards[0] > rewards[1]).double(),
            "logps/chosen": chosen, "logps/rejected": rejected,
            "chosen_below_reference": (chosen < REFERENCE[number, 0]).double()})
    expected = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    assert metrics.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(metrics[key].double(), values.detach(), rtol=1e-10, atol=1e-10,
                                   msg=key)
    assert close(gradients(model, metrics["loss"].mean()),
                 gradients(model, expected["loss"].mean()))
    sums = val_step(Policy(model), batch, dpo.dpo_objective(REFERENCE, beta, sft_coef=0.3))
    assert sums["loss"] == pytest.approx(expected["loss"].sum().item(), rel=1e-12)


def test_sft_is_nats_a_token_of_the_chosen_response(model):
    batch = flatten(PAIRS, np.arange(4), ("chosen",))
    found = dpo.sft_objective(Policy(model)(batch), batch)["loss"]
    expected = [-one_by_one(model, p, "chosen").item() / len(p.chosen) for p in PAIRS]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_neither_padding_nor_batch_mates_nor_order_matter(model):
    """Attention's rows in one group are padded to the longest, alone they are not at all."""
    objective, policy = dpo.dpo_objective(REFERENCE, 0.5), Policy(model)
    batch = flatten(PAIRS, np.arange(4))
    logp = policy(batch)
    expected = gradients(model, objective(logp, batch)["loss"].mean())
    for order, groups in (([0, 1, 2, 3], 1), ([2, 0, 3, 1], 8)):
        other = flatten([PAIRS[i] for i in order], np.array(order), groups=groups)
        found = policy(other)
        torch.testing.assert_close(found.view(2, 4), logp.view(2, 4)[:, order])
        assert close(gradients(model, objective(found, other)["loss"].mean()), expected)
    alone = [policy(flatten([pair], np.array([0]))) for pair in PAIRS]
    torch.testing.assert_close(torch.stack(alone, 1), logp.view(2, 4))


def test_a_token_after_the_response_changes_nothing(model):
    """Whatever the padding of attention's rows names, logps and gradients are the same bits."""
    objective, found = dpo.dpo_objective(REFERENCE, 0.5), []
    batch = flatten(PAIRS, np.arange(4), groups=1)
    real = batch.positions[batch.rows[0]] == torch.arange(batch.rows[0].shape[1])
    other = torch.where(real, batch.rows[0], len(batch.tokens) - 1)
    assert (other != batch.rows[0]).sum() > 10
    for rows in (batch.rows[0], other):
        changed = batch._replace(rows=(rows,))
        logp = Policy(model)(changed)
        found.append((logp, gradients(model, objective(logp, changed)["loss"].sum())))
    assert torch.equal(found[0][0], found[1][0]) and close(found[0][1], found[1][1], 1e-12)


def test_a_reference_shifted_alike_for_both_answers_changes_no_loss(model):
    batch = flatten(PAIRS, np.arange(4))
    logp = Policy(model)(batch)
    for variant in ("sigmoid", "robust", "hinge"):
        a, b = (dpo.dpo_objective(REFERENCE + shift, 0.5, variant)(logp, batch)["loss"]
                for shift in (0.0, torch.tensor([[7.0], [-3.0], [0.5], [11.0]])))
        torch.testing.assert_close(a, b)
        assert close(gradients(model, a.sum()), gradients(model, b.sum()))


@pytest.mark.parametrize("parts", [[[0, 1, 2], [3]], [[3], [1], [0, 2]]])
def test_micro_batches_make_the_update_of_the_whole_batch(model, parts):
    """Also of uneven parts: the mean is over pairs. Plain SGD shows the gradient itself."""
    weights, objective = [], dpo.dpo_objective(REFERENCE, 0.5)
    for split in ([[0, 1, 2, 3]], parts):
        trained = copy.deepcopy(model)
        micro = [flatten([PAIRS[i] for i in part], np.array(part)) for part in split]
        train_step(Policy(trained), micro, torch.optim.SGD(trained.parameters(), 1.0), objective,
                   max_norm=math.inf)
        weights.append(nn.utils.parameters_to_vector(trained.parameters()).detach())
    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert (weights[0] - start).norm() > 0.1
    assert close(weights[1] - start, weights[0] - start, 1e-6)


def test_response_logp_is_the_same_in_chunks():
    """Values and gradients, for chunks that divide 9 words unevenly, against plain log_softmax."""
    hidden, weight = torch.randn(7, 4).double(), torch.randn(9, 4).double()
    targets, response = torch.tensor([3, 8, 0, 3, 5, 5, 1]), torch.tensor([2, 0, 0, 0, 2, 0, 3])
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    each = (hidden @ weight.T).log_softmax(-1)[torch.arange(7), targets]
    expected = torch.stack([each[response == r].sum() for r in range(4)])  # the second has none
    outside = torch.tensor([1.0, 50.0, -3.0, 0.5]).double()
    expected_grads = torch.autograd.grad((expected * outside).sum(), leaves)
    for chunk in (1, 2, 4, 9, 512):
        logp = response_logp(hidden, weight, targets, response, 4, chunk)
        torch.testing.assert_close(logp, expected)
        torch.testing.assert_close(torch.autograd.grad((logp * outside).sum(), leaves),
                                   expected_grads)


@pytest.mark.parametrize("trained", [(True, False), (False, True), (True, True)])
def test_either_side_may_be_frozen_and_bf16_gradients_are_near(trained):
    """Gradients have their leaf's float32, and are within bf16's rounding of float64's."""
    torch.manual_seed(2)
    leaves = [torch.randn(n, 6).requires_grad_(on) for n, on in zip((7, 9), trained, strict=True)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    targets, outside = torch.tensor([3, 8, 0, 3, 5, 5, 1]), torch.tensor([3.0, -1.0])
    each = (exact[0] @ exact[1].T).log_softmax(-1)[torch.arange(7), targets]
    (each[:3].sum() * 3 - each[3:].sum()).backward()
    with torch.autocast("cpu", torch.bfloat16):
        logp = response_logp(*leaves, targets, torch.tensor([0, 0, 0, 1, 1, 1, 1]), 2, chunk=3)
    (logp * outside).sum().backward()
    for leaf, expected, on in zip(leaves, exact, trained, strict=True):
        assert (leaf.grad is not None) == on
        assert not on or (leaf.grad.dtype == torch.float32
                          and close(leaf.grad.double(), expected.grad, 0.02))


def test_under_bf16_the_products_are_bf16_and_the_heads_gradient_is_a_float32_sum():
    """300.7 is 300 in bf16. 600 tokens add -1/2 each: a bf16 sum would stay at -128."""
    with torch.autocast("cpu", torch.bfloat16):
        log_z = dpo.LogPartition.apply(torch.ones(1, 1), torch.tensor([[300.7]]), torch.zeros(1), 1)
        weight, none = torch.zeros(2, 1, requires_grad=True), torch.zeros(600, dtype=torch.int64)
        logp = response_logp(torch.ones(600, 1), weight, none, none, 1, chunk=1)
    logp.sum().backward()
    assert log_z.dtype == torch.float32 and log_z.item() == 300.0
    assert weight.grad.flatten().tolist() == [300.0, -300.0]


def test_logits_far_from_0_are_taken_about_their_mean():
    """GPT-2's lie near -100, where bf16 has steps of 0.5: -82.8125 would become -83.

    Tokens that are all but certain, against float64: within 0.1 nats each.
    """
    torch.manual_seed(4)
    hidden, weight = torch.randn(40, 16).bfloat16().float(), torch.randn(99, 16).bfloat16().float()
    hidden[:, 0], weight[:, 0], weight[7] = 25.0, -4.0, 0.0
    weight[7, 0] = -3.3125
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)[:, 7]
    with torch.autocast("cpu", torch.bfloat16):
        found = response_logp(hidden, weight, torch.full((40,), 7), torch.arange(40), 40)
    sure = exact > -0.01
    assert sure.sum() > 10 and (found - exact)[sure].abs().max() < 0.1


def test_a_share_of_no_pairs_is_a_batch_too():
    """A process whose share of a short batch is empty: no logp, and a gradient of zeros."""
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    logp = response_logp(hidden, weight, none, none, 0)
    assert logp.shape == (0,)
    logp.sum().backward()
    assert hidden.grad.shape == (0, 4) and weight.grad.shape == (9, 4) and not weight.grad.any()


def test_no_logits_wait_for_the_gradient():
    """8 tokens, a vocabulary of 50: the forward pass keeps nothing with 50 columns."""
    hidden, weight = (torch.randn(n, 3, requires_grad=True) for n in (8, 50))
    kept, widest = [], []

    def forward(chunk):
        logp = response_logp(hidden, weight, torch.arange(8), torch.zeros(8).long(), 1, chunk)
        return logp.sum()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        forward(2)
    assert len(kept) > 5 and not [s for s in kept if 50 in s[1:]]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            shape = getattr(result, "shape", ())
            widest.extend(shape[1:] if len(shape) == 2 and shape[0] == 8 else ())
            return result
    with Watch():
        forward(7).backward()
    assert max(widest) == 7  # words of the vocabulary at a time, also backwards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_target_logits_are_float32_under_bf16(dtype):
    """60 tokens of log 1/5 each, and a logit of -100.25, which bf16 would make -100 or -100.5."""
    hidden, weight = torch.ones(61, 2, dtype=dtype), torch.zeros(5, 2, dtype=dtype)
    hidden[:60] = 0
    weight[4] = torch.tensor([-100.0, -0.25])
    targets, response = torch.tensor([1] * 60 + [4]), torch.tensor([0] * 60 + [1])
    with torch.autocast("cpu", torch.bfloat16):
        logp = response_logp(hidden, weight, targets, response, 2)
    assert logp.dtype == torch.float32
    assert logp[0].item() == pytest.approx(-60 * math.log(5), rel=1e-6)
    assert logp[1].item() == pytest.approx(-100.25 - math.log(4), abs=0.1)


# A table as the policy: logp (pairs, 2), chosen and rejected

class Table(nn.Module):
    def __init__(self, logp):
        super().__init__()
        self.logp = nn.Parameter(torch.tensor(logp))

    def forward(self, batch):
        return self.logp[batch.pairs].T.flatten() * batch.factor


def table_batch(*pairs: int, factor: float = 1.0) -> SimpleNamespace:
    """Pairs of a table, as a batch of 3 tokens each; a factor of nan spoils it."""
    return SimpleNamespace(pairs=torch.tensor(pairs), tokens=torch.zeros(3 * len(pairs)),
                           lengths=torch.full((2 * len(pairs),), 4), factor=factor)


POLICY = [[-3.0, -6.0], [-5.0, -5.0], [-2.0, -9.0], [-4.0, -4.0]]
BEFORE = [[-4.0, -5.0], [-5.0, -5.0], [-1.0, -9.0], [-2.0, -1.0]]
# beta 0.5: chosen rewards 0.5, 0, -0.5, -1; rejected -0.5, 0, 0, -1.5; margins 1, 0, -0.5, 0.5


def test_metrics_are_means_over_the_pairs_of_uneven_batches():
    """The tie counts one half; two of four chosen responses are less likely than before."""
    objective, sums = dpo.dpo_objective(torch.tensor(BEFORE), 0.5), {}
    for batch in (table_batch(0), table_batch(3, 1, 2)):
        sums = dpo.add(sums, val_step(Table(POLICY), batch, objective))
    assert (sums["pairs"], sums["tokens"]) == (4, 12)
    losses = [softplus(-1), softplus(0), softplus(0.5), softplus(-0.5)]
    assert dpo.means(sums) == pytest.approx({
        "loss": sum(losses) / 4, "rewards/chosen": -0.25, "rewards/rejected": -0.5,
        "rewards/margins": 0.25, "rewards/accuracies": 0.625, "logps/chosen": -3.5,
        "logps/rejected": -6.0, "chosen_below_reference": 0.5}, rel=1e-6)


@pytest.mark.parametrize("options, expected", [
    ({"sft_coef": 0.2}, softplus(-0.5) + 0.2),
    ({"variant": "ipo", "sft_coef": 0.2}, ((-2 / 4 - -3 / 6) - 1) ** 2 + 0.2),
    ({"variant": "hinge"}, 0.5),
    ({"label_smoothing": 0.25}, 0.75 * softplus(-0.5) + 0.25 * softplus(0.5)),
])
def test_an_objective_passes_its_options_on(options, expected):
    """Pair 3, by its number: rewards -1 and -1.5, 4 and 6 tokens; 0.2 * 4 nats / 4 tokens more."""
    batch = SimpleNamespace(pairs=torch.tensor([3]), lengths=torch.tensor([4, 6]))
    objective = dpo.dpo_objective(torch.tensor(BEFORE), 0.5, **options)
    loss = objective(torch.tensor([-4.0, -4.0]), batch)["loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_an_objective_refuses_at_once_what_the_loss_would():
    with pytest.raises(ValueError, match="label_smoothing"):
        dpo.dpo_objective(torch.tensor(BEFORE), 0.5, "ipo", 0.1)


def test_sums_add_up_key_by_key_and_nothing_but_skips_has_no_means():
    a, b = {"loss": 1.0, "skipped": 1}, {"loss": 2.0, "pairs": 4}
    assert dpo.add(a, b) == {"loss": 3.0, "skipped": 1, "pairs": 4}
    assert (a, b) == ({"loss": 1.0, "skipped": 1}, {"loss": 2.0, "pairs": 4})
    assert dpo.means({"skipped": 3}) == {}
    assert dpo.means({"loss": 6.0, "pairs": 4, "updates": 2, "grad_norm": 5.0, "tokens": 9}) == {
        "loss": 1.5, "grad_norm": 2.5}


def test_the_rate_is_exact_where_it_can_be_worked():
    """Warm-up 4, 15 updates: the cosine's 11 updates go from number 4 to 14, half way at 9."""
    rate = partial(cosine_lr, peak=8.0, warmup_steps=4, total_steps=15)
    assert [rate(step) for step in range(5)] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert rate(9) == pytest.approx((8.0 + 0.8) / 2, rel=1e-15)
    assert rate(14) == pytest.approx(0.8, rel=1e-15)
    assert rate(6) == pytest.approx(0.8 + 7.2 * (1 + math.cos(math.pi / 5)) / 2, rel=1e-15)
    assert rate(99) == rate(14)
    assert rate(14, final=0.0) == 0.0
    assert cosine_lr(0, 8.0, 0, 5) == 8.0 == cosine_lr(0, 8.0, 1, 1)


# One step

class Slope(nn.Module):
    """One weight, whose products with a batch's numbers are logp: its gradient is their mean."""
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self, batch):
        return self.w * batch.x


def slope_batch(*x: float) -> SimpleNamespace:
    return SimpleNamespace(x=torch.tensor(x), pairs=torch.arange(len(x)), tokens=torch.zeros(7))


def as_it_is(logp, batch):
    return {"loss": logp + 5}


def test_micro_batches_weigh_by_their_pairs():
    """Gradients 1, and 2, 3, 10: their mean is 4; the mean of the two batches' means is 3."""
    policy = Slope()
    sums = train_step(policy, [slope_batch(1.0), slope_batch(2.0, 3.0, 10.0)],
                      torch.optim.SGD(policy.parameters(), 1.0), as_it_is, max_norm=100.0)
    assert policy.w.item() == -4.0 and policy.w.grad is None
    assert sums == {"loss": 20.0, "pairs": 4, "tokens": 14, "updates": 1, "grad_norm": 4.0,
                    "lr": 1.0}


def test_a_long_gradient_is_clipped_and_its_own_norm_told():
    policy = Slope()
    sums = train_step(policy, [slope_batch(3.0, 5.0)], torch.optim.SGD(policy.parameters(), 1.0),
                      as_it_is, max_norm=0.5)
    assert policy.w.item() == pytest.approx(-0.5, rel=1e-5) and sums["grad_norm"] == 4.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    """Neither weights nor moments; the next update is that of a run that never saw it."""
    found = []
    for micro_batches in ([], [slope_batch(1.0, bad), slope_batch(1.0)]):
        policy = Slope()
        optimizer = torch.optim.Adam(policy.parameters(), 0.1)
        train_step(policy, [slope_batch(1.0)], optimizer, as_it_is)
        if micro_batches:
            assert train_step(policy, micro_batches, optimizer, as_it_is) == {"skipped": 1}
        train_step(policy, [slope_batch(-3.0)], optimizer, as_it_is, max_norm=9.0)
        found.append((policy.w.item(), optimizer.state_dict()["state"]))
    assert found[0] == found[1] and found[0][0] != 0


def test_a_finite_loss_does_not_hide_its_gradient():
    """The root of 0 is 0, and its slope is infinite."""
    policy = Slope()
    sums = train_step(policy, [slope_batch(1.0)], torch.optim.SGD(policy.parameters(), 1.0),
                      lambda logp, batch: {"loss": logp.sqrt()})
    assert sums == {"skipped": 1} and policy.w.item() == 0


def test_a_loss_that_is_not_finite_makes_no_update():
    """The hinge of nan has a gradient of 0: the loss itself must be looked at."""
    policy, objective = Table(POLICY), dpo.dpo_objective(torch.full((4, 2), math.nan), 0.5, "hinge")
    optimizer = torch.optim.AdamW(policy.parameters(), 0.1, weight_decay=0.5)
    assert train_step(policy, [table_batch(0, 1)], optimizer, objective) == {"skipped": 1}
    assert policy.logp.tolist() == POLICY


def test_a_gradient_scaler_changes_no_update_and_backs_off_when_one_is_skipped():
    results = []
    for enabled in (False, True):
        policy = Slope(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        optimizer = torch.optim.SGD(policy.parameters(), 1.0)
        sums = train_step(policy, [slope_batch(3.0, 5.0)], optimizer, as_it_is, 2.0, scaler=scaler)
        results.append((policy.w.item(), sums))
        train_step(policy, [slope_batch(math.inf)], optimizer, as_it_is, scaler=scaler)
        assert policy.w.item() == results[-1][0]
    assert results[0] == results[1] and scaler.get_scale() == 512.0


def test_a_step_leaves_mode_frozen_weights_and_arguments_as_they_were(model):
    add_adapters(model, "parallel", 4, "scratch")
    model.double()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    batch, reference = flatten(PAIRS, np.arange(4)), REFERENCE.clone()
    before, micro_batches = copy.deepcopy(batch), [batch]
    for training in (True, False):
        policy = Policy(model).train(training)
        modes = [module.training for module in policy.modules()]
        objective = dpo.dpo_objective(reference, 0.5)
        weights = nn.utils.parameters_to_vector(model.parameters()).detach()
        val_step(policy, batch, objective)
        dpo.reference_logp(policy, [batch], 4)
        assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), weights)
        assert all(p.grad is None for p in model.parameters())
        train_step(policy, micro_batches, optimizer, objective)
        assert not torch.equal(nn.utils.parameters_to_vector(model.parameters()), weights)
        assert [module.training for module in policy.modules()] == modes
    assert torch.equal(reference, REFERENCE) and len(micro_batches) == 1
    assert torch.is_grad_enabled() and micro_batches[0] is batch
    assert all(torch.equal(a, b) for a, b in zip(
        (*batch.rows, *(v for k, v in batch._asdict().items() if k != "rows")),
        (*before.rows, *(v for k, v in before._asdict().items() if k != "rows")), strict=True))
    assert frozen and all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())


def test_autocast_is_for_the_policy_alone_and_gradients_for_training_alone():
    """The objective computes in float32; no pass without an update builds a graph."""
    seen = []

    class Watched(Table):
        def forward(self, batch):
            seen.append(("policy", torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
            return super().forward(batch)

    def objective(logp, batch):
        seen.append(("objective", torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return {"loss": logp.view(2, -1).sum(0)}
    policy, autocast = Watched(POLICY), partial(torch.autocast, "cpu", torch.bfloat16)
    val_step(policy, table_batch(0), objective, autocast)
    dpo.reference_logp(policy, [table_batch(0)], 4, autocast)
    assert seen == [("policy", True, False), ("objective", False, False), ("policy", True, False)]
    seen.clear()
    train_step(policy, [table_batch(0)], torch.optim.SGD(policy.parameters(), 1.0), objective,
               autocast=autocast)
    assert seen == [("policy", True, True), ("objective", False, True)]


# The reference, and the start

def test_the_reference_is_a_table_by_pair_number(model):
    """Whatever the batches; no gradient hangs on it."""
    policy = Policy(model)
    table = dpo.reference_logp(policy, (b for b, in batches(PAIRS, 3, seed=5)), 4)
    expected = [[one_by_one(model, p, side).item() for side in SIDES] for p in PAIRS]
    assert table.dtype == torch.float32 and not table.requires_grad
    torch.testing.assert_close(table, torch.tensor(expected), rtol=1e-6, atol=0)


def test_the_start_is_checked(model, capsys):
    policy, batch = Policy(model.float()), flatten(PAIRS, np.arange(4))
    table = dpo.reference_logp(policy, [batch], 4)
    check = partial(dpo.check_start, policy, batch, beta=0.1, autocast=torch.enable_grad,
                    tolerance=1e-6)
    check(table)
    assert capsys.readouterr().out.startswith("start  loss 0.693147")
    one = torch.tensor([[0.0, 1.0]])
    mixed = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])  # means of 0
    for stale in (table + 1e-3, table + one, table + mixed, table.flip(1), table * math.nan):
        with pytest.raises(ValueError, match=r"expected 0\.6931472 and 0 within 1e-06"):
            check(stale)


# The loop. A lab: Table learns four pairs by Adam; every line and save is kept.

def lab(losses=None, saved=None, bad=(), **options):
    """fit, perhaps from a save; validation's losses may be given; updates in `bad` are nan."""
    policy = Table([[-3.0, -6.0], [-5.0, -4.5], [-2.0, -9.0], [-4.0, -3.0]])
    optimizer = torch.optim.Adam(policy.parameters(), 123.0)
    made = SimpleNamespace(policy=policy, optimizer=optimizer, logs=[], saves=[], state=None,
                           updates=0, speeds=[])
    objective, given = dpo.dpo_objective(torch.tensor(BEFORE), 0.5), iter(losses or [])
    if saved:
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))

    def update(step):
        factor = math.nan if step in bad else 1.0 + 0.1 * step
        made.updates += 1
        first, second, third = ((step + i) % 4 for i in range(3))
        optimizer.param_groups[0]["lr"] = cosine_lr(step, 0.1, 3, 11)
        return train_step(policy, [table_batch(first, factor=factor), table_batch(second, third)],
                          optimizer, objective)

    def validate():
        sums = val_step(policy, table_batch(0, 1, 2, 3), objective)
        return {"loss": next(given)} if losses else dpo.means(sums)

    def save(kind, state):
        made.saves.append((kind, state["step"], copy.deepcopy({
            "state": state, "policy": policy.state_dict(), "optimizer": optimizer.state_dict()})))
        return f"{kind} of {state['step']}"

    def log(kind, step, values):
        timed = {"tokens_per_second", "seconds_left"}
        assert (kind == "train") == (timed <= values.keys())
        made.speeds += [[values[key] for key in sorted(timed)]] if kind == "train" else []
        made.logs.append((kind, step, {k: v for k, v in values.items() if k not in timed}))
    settings = {"steps": 11, "val_every": 4, "patience": 99, "log_every": 3, "save_every": 5}
    made.state = fit(update, validate, log, save, state=saved and saved["state"],
                     **settings | options)
    return made


def lines(made, kind: str) -> list[int]:
    """The steps of the lines of a kind."""
    return [step for k, step, _ in made.logs if k == kind]


def saves(made, kind: str) -> list[int]:
    return [step for k, step, _ in made.saves if k == kind]


def saved_at(step: int, made) -> dict:
    """What the "last" of that step holds."""
    return next(saved for kind, s, saved in made.saves if (kind, s) == ("last", step))


@pytest.mark.parametrize("steps, expected", [(6, [0, 3, 6]), (7, [0, 3, 6, 7]), (2, [0, 2])])
def test_validation_comes_at_0_every_n_steps_and_at_the_end(steps, expected):
    made = lab(steps=steps, val_every=3)
    assert lines(made, "val") == expected and made.state["step"] == steps == made.updates


def test_lines_and_saves_come_when_asked_for():
    made = lab()
    assert lines(made, "train") == [3, 6, 9, 11] and lines(made, "val") == [0, 4, 8, 11]
    assert saves(made, "last") == [0, 4, 5, 8, 10, 11]


def test_a_line_holds_the_means_since_the_last():
    """Against runs that log each update: 3 pairs in each, so means of 3 lines are the line."""
    made, each = lab(), lab(log_every=1)
    rows = [values for kind, _, values in each.logs if kind == "train"]
    assert [row["lr"] for row in rows] == [cosine_lr(step, 0.1, 3, 11) for step in range(11)]
    for (_, step, values), first in zip([x for x in made.logs if x[0] == "train"], (0, 3, 6, 9),
                                        strict=True):
        for key, value in values.items():
            expected = [row[key] for row in rows[first:step]]
            assert value == pytest.approx(sum(expected) / len(expected), rel=1e-12), key


def test_speed_and_time_left_are_of_this_process(monkeypatch):
    """A clock that goes on by 1 s when read: each update takes 1, and 1 passes between two.

    9 tokens an update; after 2 of 4 updates 5 s are gone, so 5 are left. A run that goes on in the
    middle of a window counts no token of before: after its first update, 2 of 3 are left.
    """
    def clock():
        times = iter(range(999))
        monkeypatch.setattr(dpo, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    clock()
    assert lab(steps=4, log_every=2).speeds == [[5.0, 9.0], [0.0, 9.0]]
    saved = saved_at(1, lab(steps=4, log_every=2, save_every=1))
    clock()
    assert lab(steps=4, log_every=2, saved=saved).speeds == [[6.0, 9.0], [0.0, 9.0]]


def test_the_rate_is_what_the_optimizer_uses():
    """Adam's first update moves each weight by the rate: 0.1 / 3; none by the optimizer's 123."""
    made = lab(steps=1)
    moved = (made.policy.logp - torch.tensor(made.saves[0][2]["policy"]["logp"].tolist())).abs()
    assert moved[:3].flatten().tolist() == pytest.approx([0.1 / 3] * 6, rel=1e-3)


def test_the_best_is_kept_when_later_ones_are_worse():
    """An equal loss is not better; a nan neither."""
    made = lab([5.0, 3.0, 4.0, 1.0, 1.0, math.nan, 2.0], steps=6, val_every=1)
    assert saves(made, "best") == [0, 1, 3]
    assert (made.state["best"], made.state["best_step"], made.state["best_at"]) == (
        1.0, 3, "best of 3")
    told = [values for kind, _, values in made.logs if kind == "val"]
    assert [values["best"] for values in told] == [5.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0]
    assert [values["best_step"] for values in told] == [0, 1, 1, 3, 3, 3, 3]


def test_training_ends_when_patience_does():
    """A lower loss at 4 starts the count anew: 3 validations without one are 5, 6 and 7."""
    losses = [5.0, 3.0, 4.0, 4.0, 2.0, 4.0, 2.0, 4.0, 1.0]
    made = lab(losses, val_every=1, patience=3)
    assert made.state["step"] == 7 == made.updates and made.state["best_step"] == 4
    again = lab(losses[7:], saved_at(6, made), val_every=1, patience=3)
    assert again.state == made.state and again.updates == 1
    ended = lab(losses, made.saves[-1][2], val_every=1, patience=3)
    assert ended.updates == 0 and ended.logs == [] and ended.state == made.state


def test_skipped_updates_are_counted_and_stay_out_of_the_means():
    made = lab(bad={1, 2, 5, 6, 7, 8}, log_every=2)
    values = {step: v for kind, step, v in made.logs if kind == "train"}
    assert made.state["skipped"] == 6 and made.state["skipped_in_row"] == 0
    assert [values[step]["skipped"] for step in values] == [1, 2, 3, 5, 6, 6]
    assert values[8] == {"skipped": 5}  # no pair, so no mean
    assert all(math.isfinite(values[step]["loss"]) for step in (2, 4, 6, 10, 11))
    assert torch.isfinite(made.policy.logp).all()


def test_too_many_skips_in_a_row_stop_the_run_and_name_the_best():
    with pytest.raises(FloatingPointError, match=r"3 updates in a row, up to 8,.*: best of 4;"):
        lab([2.0, 1.0, 3.0], bad={1, 2, 5, 6, 7}, max_skipped=3)
    assert lab(bad={1, 2, 4, 5}, max_skipped=3).state["skipped"] == 4
    saved = saved_at(6, lab(bad={5, 6}, save_every=1))  # one skip before, two after
    with pytest.raises(FloatingPointError, match="up to 8"):
        lab(saved=saved, bad={5, 6, 7}, max_skipped=3)


def same(a, b) -> None:
    """Bit for bit: weights, moments and state."""
    assert torch.equal(a.policy.logp, b.policy.logp) and a.state == b.state
    a, b = (x.optimizer.state_dict() for x in (a, b))
    assert a["param_groups"] == b["param_groups"] and all(
        torch.equal(a["state"][0][k], b["state"][0][k]) for k in ("step", "exp_avg", "exp_avg_sq"))


def test_a_killed_run_goes_on_from_any_save():
    """At every step, in the middle of a log window and just after a validation, and from step 0.

    No line comes twice; patience and the best are as they were; what was saved is left as it is.
    """
    whole = lab(bad={4, 9}, save_every=1)
    for step in range(12):
        saved = saved_at(step, whole)
        untouched = copy.deepcopy(saved["state"])
        resumed = lab(bad={4, 9}, saved=saved, save_every=1)
        assert saved["state"] == untouched and resumed.updates == 11 - step
        assert resumed.logs == [line for line in whole.logs if line[1] > step]
        same(resumed, whole)
