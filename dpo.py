"""Direct Preference Optimization: the loss, what goes into it, and one update with it.

Rafailov et al. 2023, "Direct Preference Optimization" (arXiv:2305.18290). Read from top to bottom:

1. the loss            dpo_loss is equation 7
2. what goes into it   log-probabilities of responses, by the policy and by the reference
3. what one watches    rewards, margins, accuracy, and an interval for it
4. training            the learning rate, one update, one validation, the check before the start
5. faster              the same log-probabilities without the arithmetic that padding wastes
6. variants            other losses that have been proposed since

This file needs torch alone. To train a model of your own with it, copy the file. `batches` is a
list of your own batches, each an object with the three tensors that are named below.

    from dpo import cosine_lr, dpo_metrics, reference_logps, sequence_logps, train_step

    def logps_of(model, batch):          # batch.tokens (2B, T) and batch.mask (2B, T), chosen first
        return sequence_logps(lambda tokens: model(tokens).logits, batch.tokens, batch.mask)

    def loss_function(model, batch):     # batch.pairs (B,): the pairs' numbers in the data set
        return dpo_metrics(logps_of(model, batch), reference[:, batch.pairs].flatten(), beta=0.1)

    model.eval()                         # no dropout: see check_start
    reference = reference_logps(logps_of, model, batches, pairs=sum(len(b.pairs) for b in batches))
    optimizer = torch.optim.AdamW(model.parameters())
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = cosine_lr(step, 1e-6, 10, len(batches))
        metrics = train_step(model, [batch], optimizer, loss_function)

The letters in the shapes: B pairs, R rows, T tokens of a row, V words of the vocabulary. Section 5
also has N tokens of a packed batch, M predictions, and C, the width of the model.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# 1. The loss ------------------------------------------------------------------------------------


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor,
             reference_chosen: Tensor, reference_rejected: Tensor,
             beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Equation 7 of Rafailov et al. 2023 (arXiv:2305.18290), for each pair of a batch.

    The first four arguments are (B,): log pi(response | prompt) in nats, summed over the tokens of
    the response. `policy` is the model that trains, `reference` the frozen model that it began as.
    beta is the price of leaving the reference. The larger it is, the closer the policy stays.

    Returns the loss and the two implicit rewards, (B,) each. The rewards are for logging, so they
    carry no gradient.

    >>> logp = torch.tensor([-3.0])
    >>> loss, _, _ = dpo_loss(logp, logp, logp, logp, beta=0.1)
    >>> round(loss.item(), 4)  # the policy still equals its reference: log 2
    0.6931
    """
    chosen_reward = beta * (policy_chosen - reference_chosen)
    rejected_reward = beta * (policy_rejected - reference_rejected)
    loss = -F.logsigmoid(chosen_reward - rejected_reward)
    return loss, chosen_reward.detach(), rejected_reward.detach()


# 2. What goes into it ---------------------------------------------------------------------------


def sequence_logps(model: Callable[[Tensor], Tensor], tokens: Tensor, mask: Tensor) -> Tensor:
    """log pi(response | prompt) of every row, (R,), in nats.

    model: any function from tokens (R, T) to logits (R, T, V).
    tokens (R, T) int64: in each row a prompt, then a response, then padding.
    mask (R, T) bool: True on the tokens of the response.

    The padding stands on the right and needs no attention mask: attention is causal, so no real
    token sees it. What the model predicts on the padding is dropped here, by `mask`.
    """
    logits = model(tokens[:, :-1])                     # (R, T-1, V): position t predicts token t+1
    logits = at_least_float32(logits)
    targets = tokens[:, 1:]                            # (R, T-1): the tokens that came
    is_response = mask[:, 1:]                          # (R, T-1): which of them count

    logps = logits.log_softmax(-1)                                # (R, T-1, V)
    logps = logps.gather(-1, targets[:, :, None]).squeeze(-1)     # (R, T-1): of the targets alone
    logps = logps.masked_fill(~is_response, 0.0)
    return logps.sum(-1)                               # a sum, not a mean: equation 7 has whole answers


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 if it was in bfloat16 or float16. float32 and float64 stay as they are.

    A response has up to hundreds of tokens. Summed in bfloat16, their logps would lose whole nats.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def reference_logps(logps_of: Callable[[nn.Module, object], Tensor], model: nn.Module,
                    batches: Iterable, pairs: int) -> Tensor:
    """The log-probabilities of a whole data set under the reference: (2, pairs) float32, on the CPU.

    Row 0 is of the chosen responses, row 1 of the rejected ones, in nats.

    The reference never changes, so what it says about the data is data. It is asked once, before
    training, and it is the very model that training then starts from. So no second model stands in
    memory, and no update computes the reference again.

    logps_of(model, batch): the logps (2B,) of a batch, chosen first. batches: together they hold
    each pair once; batch.pairs (B,) int64 has the pairs' numbers, from 0 to pairs - 1.
    """
    table = torch.full((2, pairs), math.nan)           # nan: a pair that no batch held is noticed
    for batch in batches:
        logps = logps_of(model, batch)                 # (2B,)
        table[:, batch.pairs.cpu()] = logps.view(2, -1).float().cpu()
    return table


# 3. What one watches ----------------------------------------------------------------------------


def dpo_metrics(policy: Tensor, reference: Tensor, beta: float) -> dict[str, Tensor]:
    """The DPO loss of a batch, and what tells whether training goes well: (B,) each.

    policy, reference (2B,): logps in nats, chosen first. The names are those of trl, so that runs
    can be compared. Only "loss" carries a gradient.
    """
    policy_chosen, policy_rejected = policy.chunk(2)
    reference_chosen, reference_rejected = reference.chunk(2)
    loss, chosen_reward, rejected_reward = dpo_loss(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)

    margin = chosen_reward - rejected_reward
    return {
        "loss": loss,
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/margins": margin,
        "rewards/accuracies": (margin.sign() + 1) / 2,            # 1, or 0, or 1/2 for a tie
        "logps/chosen": policy_chosen.detach(),
        "logps/rejected": policy_rejected.detach(),
        # The loss sees the margin alone, so chosen responses may lose probability while it falls.
        "chosen_below_reference": (chosen_reward < 0).to(margin.dtype),
    }


def sft_loss(chosen: Tensor, chosen_tokens: Tensor) -> Tensor:
    """Supervised fine-tuning, the stage before DPO: nats a token of the chosen responses, (B,).

    chosen (B,): logps in nats. chosen_tokens (B,) int64: how many tokens each response has.
    """
    return -chosen / chosen_tokens


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share: what it may be, given that `count` samples had this mean.

    Wilson 1927. Unlike mean +- 1.96 standard errors it is never empty, not even where all samples
    agree. A sample may also be a score between 0 and 1, such as 1/2 for a tie: then the interval
    is wider than it need be. Raises ValueError unless count is above 0 and mean lies in [0, 1].

    >>> low, high = wilson_interval(1.0, 2)  # two of two
    >>> f"{low:.2f} to {high:.2f}"
    '0.34 to 1.00'
    """
    if count < 1 or not 0 <= mean <= 1:
        raise ValueError(f"a mean of {mean} over {count} samples: expected a mean from 0 to 1, "
                         f"over at least one sample")
    z = 1.959964                                       # 95% of a normal distribution lie within z
    center = (mean + z**2 / (2 * count)) / (1 + z**2 / count)
    variance = mean * (1 - mean) / count + z**2 / (4 * count**2)
    half_width = z * math.sqrt(variance) / (1 + z**2 / count)
    return max(0.0, center - half_width), min(1.0, center + half_width)


# 4. Training ------------------------------------------------------------------------------------


def cosine_lr(step: int, peak: float, warmup_steps: int, total_steps: int,
              final: float = 0.1) -> float:
    """The learning rate of update number `step`, which counts from 0 to total_steps - 1.

    It grows linearly to `peak` over the first warmup_steps updates. Then it falls along half a
    cosine, to final * peak at the last update. The first update has peak / warmup_steps, not 0:
    an update with a rate of 0 would be wasted.

    >>> [round(cosine_lr(step, 1.0, 2, 7), 3) for step in range(7)]
    [0.5, 1.0, 1.0, 0.868, 0.55, 0.232, 0.1]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps

    cosine_steps = max(1, total_steps - 1 - warmup_steps)
    done = min(1.0, (step - warmup_steps) / cosine_steps)         # from 0 to 1
    height = (1 + math.cos(math.pi * done)) / 2                   # from 1 to 0
    return peak * (final + (1 - final) * height)


LossFunction = Callable[[nn.Module, object], dict[str, Tensor]]   # (model, batch) -> metrics (B,)


def train_step(model: nn.Module, micro_batches: list, optimizer: torch.optim.Optimizer,
               loss_function: LossFunction, max_norm: float = 1.0,
               scaler: torch.amp.GradScaler | None = None) -> dict[str, float]:
    """One iteration of training: one update, from the mean loss over all pairs of the micro-batches.

    micro_batches: the parts of one batch, small enough to go through the model one at a time.
    Each is any object with `pairs` (B,). Their gradients add up, so the update is that of one pass.
    loss_function(model, batch): a dict of (B,) tensors, "loss" among them, as dpo_metrics returns.
    max_norm: a longer gradient is shortened to this length.
    scaler: for float16, whose small gradients would otherwise become 0.

    Returns the mean of every metric over all pairs, "grad_norm" before the gradient was shortened,
    and "skipped", 0 or 1. A loss or gradient that is not finite makes no update: weights and
    optimizer stay as they were, and "skipped" is 1.
    """
    if scaler is None:
        scaler = torch.amp.GradScaler(enabled=False)   # hands everything through unchanged

    pairs = sum(len(batch.pairs) for batch in micro_batches)
    sums = 0.0
    for batch in micro_batches:
        metrics = loss_function(model, batch)
        # Divide by the pairs of the whole update: a short micro-batch must not weigh like a full one.
        loss = metrics["loss"].sum() / pairs
        scaler.scale(loss).backward()                  # adds to the gradients that are there
        sums = sums + sum_over_pairs(metrics)

    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    # A GPU computes while Python goes on. To read its numbers is to wait for it, so read all at once.
    numbers = torch.cat([sums / pairs, grad_norm[None]]).tolist()
    result = dict(zip([*metrics, "grad_norm"], numbers, strict=True))

    finite = math.isfinite(result["loss"]) and math.isfinite(result["grad_norm"])
    if finite:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    result["skipped"] = 0.0 if finite else 1.0
    return result


@torch.no_grad()
def val_step(model: nn.Module, batches: Iterable, loss_function: LossFunction) -> dict[str, float]:
    """One iteration of validation: the mean of every metric over all pairs of the batches."""
    pairs = 0
    sums = 0.0
    for batch in batches:
        metrics = loss_function(model, batch)
        sums = sums + sum_over_pairs(metrics)
        pairs = pairs + len(batch.pairs)
    means = (sums / pairs).tolist()
    return dict(zip(metrics, means, strict=True))


def sum_over_pairs(metrics: dict[str, Tensor]) -> Tensor:
    """Each metric (B,) summed over the pairs: one tensor (number of metrics,), on their device."""
    return torch.stack(list(metrics.values())).detach().sum(1)


def check_start(policy: Tensor, reference: Tensor) -> None:
    """Before the first update the policy must equal its reference. Raises ValueError if it doesn't.

    policy, reference (2B,): logps in nats of one batch, computed from the batch in the same form.

    At this moment all rewards are 0 and the loss is log 2. If they are not, training would still
    run, towards a wrong goal. This check catches dropout that was left on, a reference that another
    checkpoint or other data gave, and an adapter that changes the model before it has learnt
    anything. Only rounding is allowed: some devices add up float32 numbers in a changing order.
    """
    difference = (policy - reference).abs().mean().item()
    rounding = torch.finfo(torch.float32).eps * reference.abs().mean().item()
    if not difference <= 4 * rounding:                 # written so that nan is refused, too
        raise ValueError(
            f"before the first update the policy's log-probabilities differ from the reference's by "
            f"{difference:.3g} nats on average, expected at most {4 * rounding:.3g}: look for "
            f"dropout, for a reference of another model or other data, or for an adapter that is "
            f"not the identity at first")


# 5. The same numbers, faster --------------------------------------------------------------------
#
# sequence_logps is all that one needs. But a batch of padded rows makes a model compute three
# things that nobody asks for:
#
# - Each prompt twice. A pair's two rows begin with the same prompt.
# - Padding. Rows of a batch are of very different lengths, and all are as long as the longest.
# - Logits of prompts and padding. GPT-2's head has 50,257 words and takes a third of the time, but
#   the loss needs only the logits that predict a response.
#
# A packed batch has none of this: its tokens stand in one line, each prompt once, then its two
# responses. Nearly all that a Transformer does, it does to each token alone, so it never needs
# rows. Only attention does: it gathers rows, and takes the results back to the line.


def packed_logps(model: nn.Module, batch: object, piece: int = 512) -> Tensor:
    """The logps (2B,) of a packed batch, in nats, chosen first: the numbers of sequence_logps.

    model: the GPT2 of model.py. batch: data.pack makes it from B pairs, see data.Batch. `piece`:
    logits exist for so many predictions at a time, also in the backward pass. 4,500 predictions, as
    32 pairs of hh-rlhf have, times 50,257 words would fill 0.9 GB, several times over.
    tests/test_dpo.py holds this function equal to sequence_logps, with its gradients.

    Here are two pairs. 99 is the end-of-text token; the second pair was cut, so it has none.

        pair 0: prompt 10 11    chosen 20 21 99    rejected 30 99
        pair 1: prompt 12       chosen 40          rejected 41 42

    >>> import data
    >>> from model import GPT2, GPT2Config
    >>> batch = data.pack([data.TokenPair([10, 11], [20, 21, 99], [30, 99]),
    ...                    data.TokenPair([12], [40], [41, 42])], numbers=[0, 1])

    In one line stand the 7 tokens that are read. The last token of a response is predicted, but
    nothing is predicted from it, so it is not among them. A position counts from the start of the
    token's own row: 30 follows the prompt, as 20 does.

    >>> batch.tokens
    tensor([10, 11, 20, 21, 30, 12, 41])
    >>> batch.positions
    tensor([0, 1, 2, 3, 2, 0, 1])

    Attention sees a grid of rows, one for each response, sorted by length. Its cells hold places in
    the line: the last row is 10 11 20 21, the one above it 10 11 30. The 0s on the right of a row
    are padding. Each token then takes its result from one cell. Cells are counted row by row, from
    0 to 15; a prompt stands in two rows, and either will do.

    >>> batch.grids[0]
    tensor([[5, 0, 0, 0],
            [5, 6, 0, 0],
            [0, 1, 4, 0],
            [0, 1, 2, 3]])
    >>> batch.cells
    tensor([12, 13, 14, 15, 10,  4,  5])

    These places predict a token of a response: first the prompt's last token, then the response's
    own. `owner` says whose token it is: responses 0 and 1 are chosen, 2 and 3 rejected.

    >>> batch.predicts
    tensor([1, 2, 3, 5, 1, 4, 5, 6])
    >>> batch.targets
    tensor([20, 21, 99, 40, 30, 99, 41, 42])
    >>> batch.owner
    tensor([0, 0, 0, 1, 2, 2, 3, 3])

    The same four numbers as from padded rows:

    >>> model = GPT2(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=100))
    >>> rows = torch.tensor([[10, 11, 20, 21, 99], [12, 40, 0, 0, 0],
    ...                      [10, 11, 30, 99, 0], [12, 41, 42, 0, 0]])
    >>> mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 1, 1, 0, 0]])
    >>> torch.allclose(packed_logps(model, batch), sequence_logps(model, rows, mask.bool()))
    True
    """
    hidden = model.packed_hidden(batch.tokens, batch.positions, batch.grids, batch.cells)  # (N, C)
    hidden = hidden.index_select(0, batch.predicts)    # (M, C): only what predicts a response

    # The same number taken from all logits of a token changes no softmax. GPT-2's logits lie near
    # -100, where bfloat16's steps are 0.5. About the mean word's logit they lie near 0.
    head = model.wte.weight                            # (V, C): GPT-2's head is its embedding
    head = head - head.detach().mean(0)

    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        hidden = hidden.to(torch.get_autocast_dtype(device_type))
        head = head.to(hidden.dtype)

    logps = TargetLogps.apply(hidden, head, batch.targets, piece)            # (M,)
    totals = torch.zeros_like(batch.response_tokens, dtype=logps.dtype)      # (2B,)
    return totals.index_add(0, batch.owner, logps)     # each response's sum over its tokens


class TargetLogps(torch.autograd.Function):
    """log p of each target token, (M,), without keeping logits for the backward pass.

    hidden (M, C), head (V, C), targets (M,) int64. Logits (piece, V) exist for `piece` predictions
    at a time. Plainly, this is (hidden @ head.T).log_softmax(-1), gathered at the targets; autograd
    would keep all M x V numbers of it. The derivatives, for one prediction:

        d log p(target) / d hidden = head[target] - softmax @ head
        d log p(target) / d head   = hidden at the row of the target, minus softmax times hidden

    The first needs nothing that comes later, so it is made at once, while the logits are there. The
    second is made in the backward pass, if the head trains: the logits are computed once more.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, piece: int) -> Tensor:
        logps = []
        slopes = []                                    # d log p / d hidden
        for h, target in zip(hidden.split(piece), targets.split(piece), strict=True):
            log_softmax = at_least_float32(h @ head.T).log_softmax(-1)       # (piece, V)
            logps.append(log_softmax.gather(-1, target[:, None]).squeeze(-1))
            if ctx.needs_input_grad[0]:
                softmax = log_softmax.exp_().to(h.dtype)
                slopes.append(head[target] - softmax @ head)
        if slopes:
            ctx.save_for_backward(hidden, head, targets, torch.cat(slopes))
            ctx.piece = piece
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, slopes = ctx.saved_tensors
        weighted = (grad[:, None] * hidden).to(hidden.dtype)                 # (M, C)
        d_head = None
        if ctx.needs_input_grad[1]:
            d_head = torch.zeros_like(head, dtype=grad.dtype)                # sums in float32
            d_head.index_add_(0, targets, weighted.to(grad.dtype))
            for h, w in zip(hidden.split(ctx.piece), weighted.split(ctx.piece), strict=True):
                softmax = at_least_float32(h @ head.T).softmax(-1)
                d_head -= softmax.to(h.dtype).T @ w
            d_head = d_head.to(head.dtype)
        d_hidden = (grad[:, None] * slopes).to(hidden.dtype)
        return d_hidden, d_head, None, None            # targets and piece have no gradient


# 6. Variants of the loss ------------------------------------------------------------------------

VARIANTS = ("sigmoid", "robust", "ipo", "hinge", "sigmoid_norm")
SMOOTHED = ("sigmoid", "robust")                       # those that have a use for label_smoothing


def variant_loss(policy: Tensor, reference: Tensor, response_tokens: Tensor, beta: float,
                 variant: str, label_smoothing: float = 0.0) -> Tensor:
    """The loss of each pair, (B,), in the form that others have proposed, under trl's names.

    policy, reference (2B,): logps in nats, chosen first. response_tokens (2B,) int64: the length of
    each response, for the variants that take means over tokens. label_smoothing: the share of
    labels that are believed to be wrong. Raises ValueError for options that check_variant refuses.
    """
    check_variant(variant, label_smoothing)
    chosen_ratio, rejected_ratio = (policy - reference).chunk(2)  # log(pi / pi_ref), (B,) each
    chosen_tokens, rejected_tokens = response_tokens.chunk(2)
    margin = beta * (chosen_ratio - rejected_ratio)
    mean_difference = chosen_ratio / chosen_tokens - rejected_ratio / rejected_tokens

    if variant == "sigmoid":
        # Equation 7; with label_smoothing the conservative DPO of Mitchell 2023, which stops to
        # widen a margin where it would be surer than the labels are.
        right = -F.logsigmoid(margin)
        wrong = -F.logsigmoid(-margin)
        return (1 - label_smoothing) * right + label_smoothing * wrong

    if variant == "robust":
        # Chowdhury et al. 2024 (arXiv:2403.00409): its mean over labels of which a share is wrong
        # is the mean of equation 7 over right labels.
        right = -F.logsigmoid(margin)
        wrong = -F.logsigmoid(-margin)
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)

    if variant == "ipo":
        # Azar et al. 2023 (arXiv:2310.12036), equation 17: the margin shall be 1 / (2 beta), not
        # ever wider. Per token, as its authors advise.
        return (mean_difference - 1 / (2 * beta)) ** 2

    if variant == "hinge":
        # Liu et al. 2023 (arXiv:2309.06657): the hinge loss of SLiC on DPO's rewards.
        return F.relu(1 - margin)

    # "sigmoid_norm", Lambert et al. 2024 (arXiv:2411.15124): equation 7 with means over tokens in
    # place of sums, against the bias to long responses.
    return -F.logsigmoid(beta * mean_difference)


def check_variant(variant: str, label_smoothing: float) -> None:
    """Raises ValueError for an unknown variant, and for a label_smoothing that it can't use."""
    if variant not in VARIANTS:
        raise ValueError(f"the variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected 0 or more, below 0.5")
    if label_smoothing > 0 and variant not in SMOOTHED:
        raise ValueError(f"label_smoothing is {label_smoothing}, but the variant {variant} has no "
                         f"use for it: expected {' or '.join(SMOOTHED)}")
