"""Claims about dpo.py: the theory, log-probabilities, metrics, training.

The first section needs no model: a worked pair, then a world of three prompts. The others use a
tiny GPT-2 in float64, or models with one number or a table of logps, whose updates can be worked by
hand. Files of their own: test_variants.py, test_target_logps.py (the derivatives that are written
out, and number formats), test_speed_promises.py (speed and memory), and test_first_edition.py.
"""

import copy
import inspect
import math
import random
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config as TransformersConfig
from transformers import GPT2LMHeadModel

import data
import dpo
from model import GPT2, GPT2Config, add_adapters

# The theory -------------------------------------------------------------------------------------
#
# The worked pair. The policy gives the chosen response -1 nat and the rejected one -5; for the
# reference it was -2 and -3. So the policy gained 1 nat on the chosen response and lost 2 on the
# rejected one. With beta 1/4 the rewards are 0.25 and -0.5, and the margin is 0.75.

POLICY_CHOSEN = torch.tensor([-1.0]).double()
POLICY_REJECTED = torch.tensor([-5.0]).double()
REFERENCE_CHOSEN = torch.tensor([-2.0]).double()
REFERENCE_REJECTED = torch.tensor([-3.0]).double()
WORKED = (POLICY_CHOSEN, POLICY_REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED)


def softplus(x: float) -> float:
    """log(1 + e^x), which is -log sigmoid(-x)."""
    return math.log(1 + math.exp(x))


def test_the_loss_and_the_rewards_of_the_worked_pair():
    loss, chosen_reward, rejected_reward = dpo.dpo_loss(*WORKED, beta=0.25)
    assert chosen_reward.item() == 0.25
    assert rejected_reward.item() == -0.5
    assert loss.item() == pytest.approx(softplus(-0.75), rel=1e-12)


def test_a_margin_far_below_0_has_a_finite_loss():
    """At -300 the loss is 300. sigmoid(-300) itself is 0 in float32, and its log infinite."""
    zero = torch.zeros(1)
    rejected = torch.tensor([300.0], requires_grad=True)
    loss, _, _ = dpo.dpo_loss(zero, rejected, zero, zero, beta=1.0)
    loss.backward()
    assert loss.item() == 300.0
    assert rejected.grad.item() == 1.0


def test_the_gradient_of_the_worked_pair_raises_chosen_and_lowers_rejected():
    """By beta * sigmoid(-0.75) each. The rewards are for logging, so they carry no gradient."""
    chosen = POLICY_CHOSEN.clone().requires_grad_()
    rejected = POLICY_REJECTED.clone().requires_grad_()
    loss, chosen_reward, rejected_reward = dpo.dpo_loss(
        chosen, rejected, REFERENCE_CHOSEN, REFERENCE_REJECTED, beta=0.25)
    loss.sum().backward()
    pull = 0.25 / (1 + math.exp(0.75))
    assert chosen.grad.item() == pytest.approx(-pull, rel=1e-12)
    assert rejected.grad.item() == pytest.approx(pull, rel=1e-12)
    assert not chosen_reward.requires_grad
    assert not rejected_reward.requires_grad


class World:
    """3 prompts with 4 answers each, their true rewards, and what a reference says of them."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.reward = torch.randn(3, 4, generator=generator).double()
        self.reference = (2 * torch.randn(3, 4, generator=generator).double()).log_softmax(-1)
        triples = []
        for prompt in range(3):
            for answer in range(4):
                for other in range(4):
                    if answer != other:
                        triples.append((prompt, answer, other))
        self.prompts, self.answers, self.others = torch.tensor(triples).unbind(1)    # (36,) each

    def loss(self, table: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        """dpo_loss of all 36 pairs, for the policy whose logits are `table` (3, 4)."""
        policy = table.log_softmax(-1)
        return dpo.dpo_loss(policy[self.prompts, self.answers], policy[self.prompts, self.others],
                            self.reference[self.prompts, self.answers],
                            self.reference[self.prompts, self.others], beta)


def test_the_gradient_is_the_papers():
    """-beta * sigmoid(rejected reward - chosen reward) * (grad log pi(chosen) - of rejected)."""
    world = World()
    beta = 0.7
    table = torch.randn(3, 4).double().requires_grad_()
    losses, chosen_rewards, rejected_rewards = world.loss(table, beta)
    policy = table.log_softmax(-1)
    for i in range(36):
        prompt = world.prompts[i]
        of_chosen, = torch.autograd.grad(policy[prompt, world.answers[i]], table, retain_graph=True)
        of_rejected, = torch.autograd.grad(policy[prompt, world.others[i]], table,
                                           retain_graph=True)
        found, = torch.autograd.grad(losses[i], table, retain_graph=True)
        weight = torch.sigmoid(rejected_rewards[i] - chosen_rewards[i])
        expected = -beta * weight * (of_chosen - of_rejected)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("beta", [0.2, 1.0, 4.0])
def test_the_optimum_is_the_tilted_reference(beta):
    """With preferences by Bradley and Terry the best policy is pi_ref exp(reward / beta) / Z.

    Its implicit reward, beta log(pi / pi_ref), is the true one up to a function of the prompt.
    """
    world = World()
    true_margin = (world.reward[world.prompts, world.answers]
                   - world.reward[world.prompts, world.others])
    preferred = torch.sigmoid(true_margin)         # how often the answer is preferred to the other
    table = world.reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([table], max_iter=500, tolerance_grad=1e-12,
                                  tolerance_change=0.0, line_search_fn="strong_wolfe")

    def expected_loss() -> Tensor:
        optimizer.zero_grad()
        losses, _, _ = world.loss(table, beta)
        loss = (preferred * losses).sum()
        loss.backward()
        return loss

    optimizer.step(expected_loss)
    policy = table.detach().log_softmax(-1)
    tilted = (world.reference + world.reward / beta).log_softmax(-1)
    torch.testing.assert_close(policy, tilted, rtol=0, atol=1e-5)

    difference = beta * (policy - world.reference) - world.reward
    of_prompt = difference.mean(1, keepdim=True).expand(3, 4)
    torch.testing.assert_close(difference, of_prompt, rtol=0, atol=1e-5)


def test_the_sft_loss_is_nats_a_token():
    """-6 nats over 3 tokens, -5 over 10."""
    loss = dpo.sft_loss(torch.tensor([-6.0, -5.0]), torch.tensor([3, 10]))
    assert loss.tolist() == [2.0, 0.5]


# Log-probabilities ------------------------------------------------------------------------------
#
# The oracle reads one response, one token at a time. It knows no padding, no batch and no packing.

TINY = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=40, n_inner=32)


@pytest.fixture
def model() -> GPT2:
    """A GPT-2 in float64 whose every weight is at work, biases too."""
    torch.manual_seed(0)
    model = GPT2(TINY).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def token_pair(prompt: int, chosen: int, rejected: int) -> data.TokenPair:
    """A pair of so many random tokens; the same numbers give the same tokens."""
    rng = np.random.default_rng([prompt, chosen, rejected])
    return data.TokenPair(rng.integers(0, 40, prompt), rng.integers(0, 40, chosen),
                          rng.integers(0, 40, rejected))


PAIRS = [token_pair(5, 3, 7), token_pair(2, 1, 4), token_pair(6, 2, 2), token_pair(1, 6, 1)]
NUMBERS = [0, 1, 2, 3]             # of the pairs in the data set

# Chosen, then rejected. With the model above, some rewards are positive and some are negative.
REFERENCE = torch.tensor([[-11.0, -3.5, -9.0, -30.0], [-25.0, -17.0, -6.0, -4.0]]).double()


def one_token_at_a_time(logits_of, prompt: np.ndarray, response: np.ndarray) -> Tensor:
    """A response's logp: for each token the model reads what stands before it, and nothing else."""
    logp = torch.zeros(())
    read = prompt.tolist()
    for token in response.tolist():
        logits = logits_of(torch.tensor([read]))       # (1, T, V)
        logp = logp + logits[0, -1].log_softmax(-1)[token]
        read = [*read, token]
    return logp


def oracle(model: GPT2, pairs: list[data.TokenPair] = PAIRS) -> Tensor:
    """The logps of the pairs, (2B,), chosen first."""
    chosen = [one_token_at_a_time(model, pair.prompt, pair.chosen) for pair in pairs]
    rejected = [one_token_at_a_time(model, pair.prompt, pair.rejected) for pair in pairs]
    return torch.stack(chosen + rejected)


def padded_rows(pairs: list[data.TokenPair], width: int, padding: int = 0) -> tuple[Tensor, Tensor]:
    """What sequence_logps takes: tokens (2B, width) and the mask of the responses, chosen first."""
    tokens = torch.full((2 * len(pairs), width), padding)
    mask = torch.zeros(2 * len(pairs), width, dtype=torch.bool)
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    for i, response in enumerate(responses):
        prompt = pairs[i % len(pairs)].prompt
        end = len(prompt) + len(response)
        tokens[i, :end] = torch.from_numpy(np.concatenate([prompt, response]))
        mask[i, len(prompt):end] = True
    return tokens, mask


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """The loss's gradient in all weights, flat."""
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in found])


def close(found: Tensor, expected: Tensor, relative: float = 1e-9) -> bool:
    return bool((found - expected).norm() <= relative * expected.norm())


def test_sequence_logps_are_the_oracles_with_their_gradients(model):
    tokens, mask = padded_rows(PAIRS, width=15)
    logps = dpo.sequence_logps(model, tokens, mask)
    expected = oracle(model)
    weights = torch.arange(1.0, 9.0)                   # another one for each response
    torch.testing.assert_close(logps, expected, rtol=1e-10, atol=0)
    assert close(gradients(model, (weights * logps).sum()),
                 gradients(model, (weights * expected).sum()), 1e-10)


def test_it_does_not_matter_what_stands_in_the_padding(model):
    """Logps are the same bits; gradients to 1e-12."""
    zeros = dpo.sequence_logps(model, *padded_rows(PAIRS, width=15, padding=0))
    others = dpo.sequence_logps(model, *padded_rows(PAIRS, width=15, padding=39))
    assert torch.equal(zeros, others)
    assert close(gradients(model, zeros.sum()), gradients(model, others.sum()), 1e-12)


def test_sequence_logps_sum_in_float32_when_logits_are_bfloat16():
    """300 tokens of log(1/5) each, -482.8 nats: a sum in bfloat16 would stop moving at -256."""
    tokens = torch.zeros(1, 301, dtype=torch.int64)
    mask = torch.ones(1, 301, dtype=torch.bool)

    def all_alike(tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 5, dtype=torch.bfloat16)

    logps = dpo.sequence_logps(all_alike, tokens, mask)
    assert logps.dtype == torch.float32
    assert logps.item() == pytest.approx(-300 * math.log(5), rel=1e-5)


def test_reference_logps_are_a_table_by_pair_number(model):
    """Row 0 has the chosen responses, row 1 the rejected ones, in whatever batches they came.

    No batch held pair 1, so its column is nan.
    """
    batches = [data.pack([PAIRS[2], PAIRS[0]], [4, 0]), data.pack([PAIRS[3], PAIRS[1]], [2, 3])]
    table = dpo.reference_logps(dpo.packed_logps, model, batches, pair_count=5)
    assert table.shape == (2, 5)
    assert table.dtype == torch.float32
    assert table.device.type == "cpu"
    assert not table.requires_grad
    assert table.isnan().tolist() == 2 * [[False, True, False, False, False]]

    chosen, rejected = oracle(model).detach().float().chunk(2)
    torch.testing.assert_close(table[0, [0, 3, 4, 2]], chosen, rtol=1e-6, atol=0)
    torch.testing.assert_close(table[1, [0, 3, 4, 2]], rejected, rtol=1e-6, atol=0)


# train_dpo, with a model of `transformers`. All prompts are random; each chosen response is the
# words 18 and 7, each rejected one 19 and 7, so there is much to learn.


def plain_batch(number: int) -> SimpleNamespace:
    """8 pairs, padded to 9 tokens: prompts of 4 tokens, responses of 2."""
    prompts = torch.randint(0, 18, (8, 4))
    tokens = torch.zeros(16, 9, dtype=torch.int64)
    tokens[:, :4] = torch.cat([prompts, prompts])
    tokens[:8, 4] = 18
    tokens[8:, 4] = 19
    tokens[:, 5] = 7
    mask = torch.zeros(16, 9, dtype=torch.bool)
    mask[:, 4:6] = True
    return SimpleNamespace(tokens=tokens, mask=mask, indices=torch.arange(8) + 8 * number)


def small_model_of_transformers() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = TransformersConfig(n_layer=1, n_head=2, n_embd=16, n_positions=16, vocab_size=20,
                                bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    assert model.training and config.resid_pdrop > 0    # so train_dpo must turn dropout off
    return model


def docstring_lines() -> str:
    """The lines for a model of `transformers` in the docstring of train_dpo."""
    text = textwrap.dedent(dpo.train_dpo.__doc__.split("\n", 1)[1])
    block = text[text.index("    class Logits"):text.index("\nbatches:")]
    return textwrap.dedent(block).replace("train_dpo(", "history = dpo.train_dpo(")


def test_the_docstrings_lines_train_a_model_of_transformers():
    model = small_model_of_transformers()
    names = {"nn": nn, "dpo": dpo, "model": model,
             "batches": [plain_batch(number) for number in range(20)]}
    before = copy.deepcopy(model.state_dict())
    exec(docstring_lines(), names)
    history = names["history"]
    assert not model.training
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    losses = [metrics["loss"] for metrics in history]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - 1e-5                # the rate is only 1e-5
    assert len(losses) == 20


class Unsteady(nn.Module):
    """A model whose answers vary, in eval mode, too: dropout that eval() doesn't switch off."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(20, 20)

    def forward(self, tokens):
        return nn.functional.dropout(self.wte(tokens), 0.5, training=True)


def test_train_dpo_refuses_a_model_whose_answers_vary():
    model = Unsteady()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="dropout"):
        dpo.train_dpo(model, [plain_batch(0)])
    assert torch.equal(model.wte.weight, before["wte.weight"])


def test_train_dpo_stops_at_a_gradient_that_is_not_finite():
    """The error comes before a weight has changed."""
    model = nn.Embedding(20, 20)
    before = model.weight.detach().clone()
    model.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(RuntimeError, match="non-finite"):
        dpo.train_dpo(model, [plain_batch(0)])
    assert torch.equal(model.weight, before)


def test_train_dpo_is_its_lines_by_hand():
    """Three batches, one of them short, twice, with AdamW's own loop: equal weights at the end."""
    model = small_model_of_transformers()
    by_hand = copy.deepcopy(model).eval()
    reference = copy.deepcopy(by_hand)
    batches = [plain_batch(number) for number in range(3)]
    rows = [*range(5), *range(8, 13)]                   # the last batch has 5 pairs
    batches[2] = SimpleNamespace(tokens=batches[2].tokens[rows], mask=batches[2].mask[rows],
                                 indices=batches[2].indices[:5])
    names = {"nn": nn, "dpo": dpo, "model": model, "batches": batches}
    exec(docstring_lines().replace("batches)", "batches, 2, beta=0.3, peak_lr=1e-2)"), names)
    history = names["history"]

    optimizer = torch.optim.AdamW(by_hand.parameters(), weight_decay=0.0)
    # No warm-up; half a cosine to a tenth: 0.1 + 0.9 * (1 + cos(step * 36 degrees)) / 2.
    rates = [1e-2, 9.14058e-3, 6.89058e-3, 4.10942e-3, 1.85942e-3, 1e-3]
    for batch, rate, metrics in zip(batches * 2, rates, history, strict=True):
        logps = dpo.sequence_logps(lambda tokens: by_hand(tokens).logits, batch.tokens, batch.mask)
        with torch.no_grad():
            before = dpo.sequence_logps(lambda tokens: reference(tokens).logits, batch.tokens,
                                        batch.mask)
        loss = dpo.dpo_loss(*logps.chunk(2), *before.chunk(2), 0.3)[0].mean()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    for weight, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


# The same numbers, faster -----------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_packed_logps_are_sequence_logps_with_their_gradients(model, piece):
    """In float64 to 1e-10. A gradient of another weight for each response shows mixed-up rows."""
    weights = torch.tensor([3.0, -1.0, 0.5, 2.0, 7.0, -2.0, 1.0, 4.0])
    plain = dpo.sequence_logps(model, *padded_rows(PAIRS, width=14))
    packed = dpo.packed_logps(model, data.pack(PAIRS, NUMBERS), piece)
    torch.testing.assert_close(packed, plain, rtol=1e-10, atol=0)
    assert close(gradients(model, (weights * packed).sum()),
                 gradients(model, (weights * plain).sum()), 1e-10)


def test_the_end_of_text_token_counts(model):
    """Whatever its id: a response with one more token, the last of the vocabulary, is less likely.
    Code that uses the token for padding, too, and leaves all of it out, would not notice."""
    words = data.TokenPair([1, 2], [5, 6], [5, 6, TINY.vocab_size - 1])
    chosen, rejected = dpo.packed_logps(model, data.pack([words], [0])).tolist()
    logits = model(torch.tensor([[1, 2, 5, 6]]))[0, -1]
    end = logits.log_softmax(-1)[TINY.vocab_size - 1].item()
    assert rejected == pytest.approx(chosen + end, rel=1e-10)
    assert end < -1


def test_an_oracle_agrees_on_logps_loss_metrics_and_gradients(model):
    """Also where pairs are numbered in another order, and with the SFT loss added to DPO's."""
    beta = 0.5
    numbers = [2, 0, 3, 1]
    batch = data.pack(PAIRS, numbers, REFERENCE)
    assert torch.equal(batch.reference_logps, REFERENCE[:, numbers].flatten())
    logps = dpo.packed_logps(model, batch)
    metrics = dpo.dpo_metrics(logps, batch.reference_logps, beta)
    loss = metrics["loss"] + 0.3 * dpo.sft_loss(logps[:4], batch.response_lengths[:4])

    rows = []
    expected_logps = oracle(model)
    torch.testing.assert_close(logps, expected_logps, rtol=1e-10, atol=0)
    for i, number in enumerate(numbers):
        chosen = expected_logps[i]
        rejected = expected_logps[4 + i]
        chosen_reward = beta * (chosen - REFERENCE[0, number])
        rejected_reward = beta * (rejected - REFERENCE[1, number])
        rows.append({
            "loss": torch.log(1 + torch.exp(rejected_reward - chosen_reward)),
            "rewards/chosen": chosen_reward,
            "rewards/rejected": rejected_reward,
            "rewards/margins": chosen_reward - rejected_reward,
            "rewards/accuracies": (chosen_reward > rejected_reward).double(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "chosen_below_reference": (chosen < REFERENCE[0, number]).double(),
        })
    assert metrics.keys() == rows[0].keys()
    for name, values in metrics.items():
        expected = torch.stack([row[name] for row in rows])
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10, msg=name)

    expected_losses = []
    for row, pair in zip(rows, PAIRS, strict=True):
        nats_per_token = -row["logps/chosen"] / len(pair.chosen)
        expected_losses.append(row["loss"] + 0.3 * nats_per_token)
    expected_loss = torch.stack(expected_losses).mean()
    assert close(gradients(model, loss.mean()), gradients(model, expected_loss))


def test_sft_reads_the_chosen_responses_alone(model):
    batch = data.pack(PAIRS, NUMBERS, sides=("chosen",))
    found = dpo.sft_loss(dpo.packed_logps(model, batch), batch.response_lengths)
    chosen, _ = oracle(model).chunk(2)
    lengths = torch.tensor([len(pair.chosen) for pair in PAIRS])
    torch.testing.assert_close(found, -chosen / lengths, rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [1, 3, 2, 0]])
def test_neither_padding_nor_batch_mates_nor_order_matter(model, order):
    """A pair alone fills its row: no mate, no padding. With others it has other rows and mates."""
    batch = data.pack(PAIRS, NUMBERS, REFERENCE)
    other = data.pack([PAIRS[i] for i in order], order, REFERENCE)
    logps = dpo.packed_logps(model, batch)
    found = dpo.packed_logps(model, other)
    torch.testing.assert_close(found.view(2, 4), logps.view(2, 4)[:, order])
    loss = dpo.dpo_metrics(logps, batch.reference_logps, 0.5)["loss"].mean()
    other_loss = dpo.dpo_metrics(found, other.reference_logps, 0.5)["loss"].mean()
    assert close(gradients(model, other_loss), gradients(model, loss))

    for mates in ([0], [1], [2], [3], [0, 1], [1, 2], [0, 2, 3]):
        some = data.pack([PAIRS[i] for i in mates], mates)
        found = dpo.packed_logps(model, some)
        torch.testing.assert_close(found.view(2, -1), logps.view(2, 4)[:, mates])


def test_other_padding_changes_nothing(model):
    """Whatever token stands there, at whatever position: the same bits, and gradients too."""
    batch = data.pack(PAIRS, NUMBERS)
    padding = (batch.tokens == 0) & (batch.positions == 0)
    read = sum(len(pair.prompt) + len(pair.chosen) - 1 + len(pair.rejected) - 1 for pair in PAIRS)
    assert padding.sum() == batch.tokens.numel() - read > 1
    other = batch._replace(tokens=batch.tokens.masked_fill(padding, 7),
                           positions=batch.positions.masked_fill(padding, 3))
    logps = dpo.packed_logps(model, batch)
    found = dpo.packed_logps(model, other)
    assert torch.equal(found, logps)
    assert close(gradients(model, found.sum()), gradients(model, logps.sum()), 1e-12)


def test_autocast_is_for_the_model_and_the_loss_is_float32():
    torch.manual_seed(0)
    model = GPT2(TINY)
    batch = data.pack(PAIRS, NUMBERS, REFERENCE.float())
    with torch.autocast("cpu", torch.bfloat16):
        logps = dpo.packed_logps(model, batch)
    for name, values in dpo.dpo_metrics(logps, batch.reference_logps, 0.5).items():
        assert values.dtype == torch.float32, name
    exact = oracle(model).detach()
    assert 1e-6 < ((logps - exact) / exact).abs().max() < 0.01     # bfloat16 was used, and is near


def test_under_autocast_the_heads_products_are_bfloat16_too(monkeypatch):
    """Autocast leaves the function alone that makes them, so its arguments must be bfloat16."""
    seen = []
    real = dpo.TargetLogps.apply

    def apply(hidden, head, targets, piece):
        seen.append((hidden.dtype, head.dtype))
        return real(hidden, head, targets, piece)
    monkeypatch.setattr(dpo.TargetLogps, "apply", apply)
    batch = data.pack(PAIRS, NUMBERS)
    dpo.packed_logps(GPT2(TINY), batch)
    with torch.autocast("cpu", torch.bfloat16):
        dpo.packed_logps(GPT2(TINY), batch)
    assert seen == [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]


# What one watches -------------------------------------------------------------------------------
#
# A policy that is a table of logps. With beta 1/2, of these four pairs the chosen rewards are
# 0.5, 0, -0.5 and -1, the rejected ones -0.5, 0, 0 and -1.5, and the margins 1, 0, -0.5 and 0.5.

POLICY_TABLE = torch.tensor([[-3.0, -5.0, -2.0, -4.0], [-6.0, -5.0, -9.0, -4.0]])
REFERENCE_TABLE = torch.tensor([[-4.0, -5.0, -1.0, -2.0], [-5.0, -5.0, -9.0, -1.0]])


class Table(nn.Module):
    """A policy that knows the logp of each response of each pair: (2, pairs), chosen first."""

    def __init__(self):
        super().__init__()
        self.logps = nn.Parameter(POLICY_TABLE.clone())


def table_batch(*numbers: int) -> SimpleNamespace:
    return SimpleNamespace(indices=torch.tensor(numbers))


def table_loss(model: Table, batch: SimpleNamespace) -> dict[str, Tensor]:
    policy = model.logps[:, batch.indices].flatten()
    reference = REFERENCE_TABLE[:, batch.indices].flatten()
    return dpo.dpo_metrics(policy, reference, beta=0.5)


def test_metrics_of_the_four_pairs():
    """The tie counts one half. Only the loss carries a gradient."""
    metrics = table_loss(Table(), table_batch(0, 1, 2, 3))
    assert metrics["loss"].requires_grad
    found = {name: values.tolist() for name, values in metrics.items()}
    assert found.pop("loss") == pytest.approx(
        [softplus(-1), softplus(0), softplus(0.5), softplus(-0.5)], rel=1e-6)
    assert found == {
        "rewards/chosen": [0.5, 0.0, -0.5, -1.0],
        "rewards/rejected": [-0.5, 0.0, 0.0, -1.5],
        "rewards/margins": [1.0, 0.0, -0.5, 0.5],
        "rewards/accuracies": [1.0, 0.5, 0.0, 1.0],
        "logps/chosen": [-3.0, -5.0, -2.0, -4.0],
        "logps/rejected": [-6.0, -5.0, -9.0, -4.0],
        "chosen_below_reference": [0.0, 0.0, 1.0, 1.0],
    }
    assert [name for name, values in metrics.items() if values.requires_grad] == ["loss"]


def test_val_step_returns_means_over_the_pairs_of_uneven_batches():
    found = dpo.val_step(Table(), [table_batch(0), table_batch(3, 1, 2)], table_loss)
    losses = [softplus(-1), softplus(0), softplus(0.5), softplus(-0.5)]
    assert found == pytest.approx({
        "loss": sum(losses) / 4, "rewards/chosen": -0.25, "rewards/rejected": -0.5,
        "rewards/margins": 0.25, "rewards/accuracies": 0.625, "logps/chosen": -3.5,
        "logps/rejected": -6.0, "chosen_below_reference": 0.5}, rel=1e-6)


@pytest.mark.parametrize("mean, count, expected", [
    (0.8, 10, (0.490, 0.943)),
    (1.0, 10, (0.722, 1.0)),
    (1.0, 1, (0.207, 1.0)),
    (0.0, 5, (0.0, 0.434)),
    (0.5, 100, (0.404, 0.596)),
])
def test_wilsons_interval_as_in_tables(mean, count, expected):
    assert dpo.wilson_interval(mean, count) == pytest.approx(expected, abs=0.0006)


def test_wilsons_interval_holds_the_true_share_in_95_of_100_samples():
    rng = random.Random(0)
    covered = 0
    for _ in range(4000):
        right = sum(rng.random() < 0.7 for _ in range(60))
        low, high = dpo.wilson_interval(right / 60, 60)
        if low <= 0.7 <= high:
            covered += 1
    assert covered / 4000 == pytest.approx(0.95, abs=0.015)


def test_wilsons_interval_is_one_of_shares_also_where_rounding_leaves_it():
    for count in (*range(1, 400), 10**9, 10**12):
        assert dpo.wilson_interval(1.0, count)[1] <= 1.0
        assert dpo.wilson_interval(0.0, count)[0] >= 0.0


@pytest.mark.parametrize("mean, count", [
    (0.5, 0), (0.5, -1), (-0.01, 9), (1.01, 9), (math.nan, 9), (math.inf, 9)])
def test_wilsons_interval_refuses_what_is_no_share(mean, count):
    with pytest.raises(ValueError, match=f"a mean of {mean} over {count} samples: expected"):
        dpo.wilson_interval(mean, count)


# Training ---------------------------------------------------------------------------------------


def test_the_rate_is_exact_where_it_can_be_worked():
    """Warm-up 4, 15 updates: the cosine's 11 updates go from number 4 to 14, half way at 9."""
    def rate(step: int, final: float = 0.1) -> float:
        return dpo.cosine_lr(step, peak=8.0, warmup_steps=4, total_steps=15, final=final)

    assert [rate(step) for step in range(5)] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert rate(9) == pytest.approx((8.0 + 0.8) / 2, rel=1e-15)
    assert rate(14) == pytest.approx(0.8, rel=1e-15)
    assert rate(6) == pytest.approx(0.8 + 7.2 * (1 + math.cos(math.pi / 5)) / 2, rel=1e-15)
    assert rate(14, final=0.0) == 0.0
    assert dpo.cosine_lr(0, 8.0, 0, 5) == 8.0
    assert dpo.cosine_lr(0, 8.0, 1, 1) == 8.0
    # Two updates on the cosine: its top, and its end.
    assert [dpo.cosine_lr(step, 8.0, 1, 3) for step in range(3)] == [8.0, 8.0, 0.8]


class Slope(nn.Module):
    """One weight w. A pair with the number x has the loss w * x + 5, so its gradient is x."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=dtype))


def slope_batch(*x: float) -> SimpleNamespace:
    return SimpleNamespace(x=torch.tensor(x), indices=torch.arange(len(x)))


def slope_loss(model: Slope, batch: SimpleNamespace) -> dict[str, Tensor]:
    return {"loss": model.w * batch.x + 5, "x": batch.x.to(model.w)}


def test_micro_batches_weigh_by_their_pairs():
    """Gradients 1, and 2, 3, 10: their mean is 4; the mean of the two batches' means is 3."""
    model = Slope()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    found = dpo.train_step(model, [slope_batch(1.0), slope_batch(2.0, 3.0, 10.0)], optimizer,
                           slope_loss, max_norm=100.0)
    assert model.w.item() == -4.0
    assert model.w.grad is None
    assert found == {"loss": 5.0, "x": 4.0, "grad_norm": 4.0, "skipped": 0.0}


@pytest.mark.parametrize("parts", [[[0, 1, 2], [3]], [[3], [1], [0, 2]]])
def test_micro_batches_make_the_update_of_the_whole_batch(model, parts):
    """Plain SGD shows the gradient itself."""
    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    moves = []
    for split in ([NUMBERS], parts):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
        micro_batches = [data.pack([PAIRS[i] for i in part], part, REFERENCE) for part in split]
        dpo.train_step(trained, micro_batches, optimizer, packed_loss, max_norm=math.inf)
        moves.append(nn.utils.parameters_to_vector(trained.parameters()).detach() - start)
    assert moves[0].norm() > 0.1
    assert close(moves[1], moves[0], 1e-6)


def packed_loss(model: GPT2, batch: data.PackedBatch) -> dict[str, Tensor]:
    return dpo.dpo_metrics(dpo.packed_logps(model, batch), batch.reference_logps, beta=0.5)


def test_a_long_gradient_is_clipped_and_its_own_norm_told():
    model = Slope()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    found = dpo.train_step(model, [slope_batch(3.0, 5.0)], optimizer, slope_loss, max_norm=0.5)
    assert model.w.item() == pytest.approx(-0.5, rel=1e-5)
    assert found["grad_norm"] == 4.0

    model = Slope()                                    # to 1, where nothing else is asked for
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    dpo.train_step(model, [slope_batch(3.0, 5.0)], optimizer, slope_loss)
    assert model.w.item() == pytest.approx(-1.0, rel=1e-5)


def test_one_update_is_the_five_lines_of_its_docstring():
    """Bit for bit, with one micro-batch, and a gradient that is shortened."""
    start = dpo.train_step.__doc__.index("        loss = ")
    block = textwrap.dedent(dpo.train_step.__doc__[start:].split("\n\n")[0])
    assert len(block.strip().splitlines()) == 5
    batch = slope_batch(3.0, 5.0)
    model = Slope()
    plain = Slope()
    for trained in (model, plain):
        optimizer = torch.optim.SGD(trained.parameters(), lr=1.0, momentum=0.5)
        for _ in range(3):
            if trained is plain:
                exec(block, {"loss_function": slope_loss, "model": plain, "batch": batch,
                             "optimizer": optimizer, "max_norm": 0.5, "nn": torch.nn})
            else:
                dpo.train_step(model, [batch], optimizer, slope_loss, max_norm=0.5)
    assert model.w.item() == plain.w.item() == pytest.approx(-0.5 - 0.75 - 0.875, rel=1e-5)
    assert model.w.grad is None and plain.w.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    """Neither weights nor moments; the next update is that of a run that never saw it."""
    found = []
    for sees_it in (False, True):
        model = Slope()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        dpo.train_step(model, [slope_batch(1.0)], optimizer, slope_loss)
        if sees_it:
            result = dpo.train_step(model, [slope_batch(1.0, bad), slope_batch(1.0)], optimizer,
                                    slope_loss)
            assert result["skipped"] == 1.0
            assert not math.isfinite(result["grad_norm"])
        dpo.train_step(model, [slope_batch(-3.0)], optimizer, slope_loss, max_norm=9.0)
        found.append((model.w.item(), optimizer.state_dict()["state"]))
    assert found[0] == found[1]
    assert found[0][0] != 0


def test_a_finite_loss_does_not_hide_its_gradient():
    """The root of 0 is 0, and its slope is infinite."""
    model = Slope()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    found = dpo.train_step(model, [slope_batch(1.0)], optimizer,
                           lambda model, batch: {"loss": (model.w * batch.x).sqrt()})
    assert found == {"loss": 0.0, "grad_norm": math.inf, "skipped": 1.0}
    assert model.w.item() == 0


def test_a_loss_that_is_not_finite_makes_no_update():
    """The hinge of nan has a finite gradient: the loss itself must be looked at."""
    model = Table()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)

    def hinge_of_nan(model: Table, batch: SimpleNamespace) -> dict[str, Tensor]:
        policy = model.logps[:, batch.indices].flatten()
        reference = torch.full((4,), math.nan)
        lengths = torch.ones(4, dtype=torch.int64)
        return {"loss": dpo.variant_loss(policy, reference, lengths, 0.5, "hinge")}

    found = dpo.train_step(model, [table_batch(0, 1)], optimizer, hinge_of_nan)
    assert math.isnan(found["loss"])
    assert math.isfinite(found["grad_norm"])
    assert found["skipped"] == 1.0
    assert torch.equal(model.logps, POLICY_TABLE)


def test_a_gradient_scaler_changes_no_update_and_backs_off_when_one_is_skipped():
    results = []
    for enabled in (False, True):
        model = Slope(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        found = dpo.train_step(model, [slope_batch(3.0, 5.0)], optimizer, slope_loss, max_norm=2.0,
                               scaler=scaler)
        weight = model.w.item()
        results.append((weight, found))
        dpo.train_step(model, [slope_batch(math.inf)], optimizer, slope_loss, scaler=scaler)
        assert model.w.item() == weight
    assert results[0] == results[1]
    assert scaler.get_scale() == 512.0                 # of the one that is enabled: the last


@pytest.mark.parametrize("training", [True, False])
def test_a_step_leaves_mode_frozen_weights_and_arguments_as_they_were(model, training):
    add_adapters(model, "parallel", width=4)
    model.double().train(training)
    modes = [module.training for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(trained, lr=1.0)
    batch = data.pack(PAIRS, NUMBERS, REFERENCE)
    before = copy.deepcopy(batch)
    micro_batches = [batch]

    # Without an update nothing changes.
    dpo.val_step(model, micro_batches, packed_loss)
    dpo.reference_logps(dpo.packed_logps, model, micro_batches, pair_count=4)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, start[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()

    # With one, adapters change, and nothing else.
    dpo.train_step(model, micro_batches, optimizer, packed_loss)
    changed = [name for name, weight in model.state_dict().items()
               if not torch.equal(weight, start[name])]
    assert changed
    assert all(".adapter." in name for name in changed)
    assert [module.training for module in model.modules()] == modes
    assert len(micro_batches) == 1 and micro_batches[0] is batch
    for name, value in batch._asdict().items():
        assert torch.equal(value, getattr(before, name)), name


def test_a_graph_is_built_for_training_alone():
    enabled = []

    def loss_function(model: Slope, batch: SimpleNamespace) -> dict[str, Tensor]:
        enabled.append(torch.is_grad_enabled())
        return slope_loss(model, batch)

    def logps_of(model: Slope, batch: SimpleNamespace) -> Tensor:
        enabled.append(torch.is_grad_enabled())
        return torch.zeros(2)

    model = Slope()
    dpo.val_step(model, [slope_batch(1.0)], loss_function)
    dpo.reference_logps(logps_of, model, [slope_batch(1.0)], pair_count=1)
    assert enabled == [False, False]
    dpo.train_step(model, [slope_batch(1.0)], torch.optim.SGD(model.parameters(), lr=1.0),
                   loss_function)
    assert enabled == [False, False, True]


# The check before the first update

START = torch.tensor([-150.0, -20.0, -90.0, -140.0]).double()      # 100 nats on average


def test_the_start_may_differ_by_rounding():
    dpo.check_start(START, START.clone())
    dpo.check_start(START * (1 + 1e-7), START)
    dpo.check_start(START * (1 - 1e-7), START)


def test_the_start_may_differ_by_4_times_the_relative_precision():
    """Of float32, which is 2**-23: at -128 these are 4 * 2**-16 nats."""
    start = torch.full((4,), -128.0)
    dpo.check_start(start + 4 * 2**-16, start)
    with pytest.raises(ValueError, match="before the first update"):
        dpo.check_start(start + 4.5 * 2**-16, start)


@pytest.mark.parametrize("policy", [
    START * (1 + 1e-5),
    START * (1 - 1e-5),
    START.flip(0),                                     # a reference of pairs in another order
    START + torch.tensor([0.0, 0.0, 0.0, -1e-3]),      # one response alone
    START + torch.tensor([1e-3, -1e-3, 1e-3, -1e-3]),  # differences whose mean is 0
    START + torch.tensor([math.nan, 0.0, 0.0, 0.0]),
    START * math.nan,
    START * math.inf,
])
def test_a_start_that_differs_is_refused(policy):
    with pytest.raises(ValueError, match="before the first update"):
        dpo.check_start(policy, START)


def test_a_reference_that_no_batch_held_is_refused():
    with pytest.raises(ValueError, match="differ from the reference's by nan nats"):
        dpo.check_start(START, START * math.nan)


def test_a_start_that_is_refused_is_told_with_what_was_expected():
    """Half a nat, where 4 times 1.19e-7 of 100 nats were expected at most."""
    with pytest.raises(ValueError, match=r"0\.5 nats on average, expected at most 4\.77e-05: look"):
        dpo.check_start(START + 0.5, START)


def test_the_check_of_the_start_does_not_depend_on_beta():
    """Its tolerance is one of logps. Of rewards, beta 0.01 would hide what beta 1 shows."""
    assert list(inspect.signature(dpo.check_start).parameters) == ["policy", "reference"]


@torch.no_grad()
def test_adapters_that_change_nothing_at_first_pass_and_others_do_not(model):
    model.float()
    batch = data.pack(PAIRS, NUMBERS)
    reference = dpo.packed_logps(model, batch)
    other = copy.deepcopy(model)
    add_adapters(model, "parallel", width=4)
    dpo.check_start(dpo.packed_logps(model, batch), reference)
    model = add_adapters(other, "replace", width=4)
    with pytest.raises(ValueError, match="an adapter that changes the model at once"):
        dpo.check_start(dpo.packed_logps(model, batch), reference)
