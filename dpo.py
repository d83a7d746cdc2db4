"""Direct Preference Optimization: the loss, what goes into it, and one update with it.

Rafailov et al. 2023, "Direct Preference Optimization" (arXiv:2305.18290). Read from top to bottom:

1. the loss            dpo_loss is equation 7
2. what goes into it   log-probabilities of responses, by the policy and by the reference
3. what one watches    rewards, margins, accuracy
4. training            the learning rate; the check before the start; train_dpo, the whole of it in
                       its plainest form; then train_step and val_step, which train.py uses

Sections 1 to 4 are DPO, whole. The rest is not needed to understand it:

5. faster              the same log-probabilities without the arithmetic that padded rows waste
6. less memory         for the logits of section 5
7. other losses        of supervised fine-tuning; and those that were proposed after DPO's
8. an interval         for an accuracy, or any other share

The letters in the shapes: B pairs, R rows (2B where each response has its own), T tokens of a
row, V tokens of the vocabulary.

This file needs torch alone, so it can be copied; packed_logps, in section 5, is for the batches of
data.py and the GPT2 of model.py.
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
    """Equation 7 of Rafailov et al. 2023 (arXiv:2305.18290), for each pair of a batch, before the
    mean over the pairs:

        loss = -log sigmoid(  beta * log(pi(chosen | prompt) / pi_ref(chosen | prompt))
                            - beta * log(pi(rejected | prompt) / pi_ref(rejected | prompt)))

    The log of a ratio is a difference of two logs, and the logs are what this function takes. The
    first four arguments are (B,): log pi(response | prompt) in nats, summed over the tokens of the
    response. `policy` is the model that trains, `reference` the same model before DPO began.
    beta is the price of leaving the reference: the larger it is, the closer the policy stays.

    Why this loss? RLHF looks for the policy with the highest mean reward - beta * KL(pi || pi_ref).
    The best one is (equation 4)

        pi = pi_ref * exp(reward / beta) / Z(prompt)

    where Z makes the probabilities add up to 1. So a given policy is the best one for

        reward = beta * log(pi / pi_ref) + beta * log Z(prompt)

    whose first term is called its implicit reward. By Bradley and Terry's model people prefer the
    chosen response with the probability sigmoid(reward of chosen - reward of rejected). log Z
    cancels in this difference. The loss is the negative log of the probability.

    Returns the loss and the implicit rewards of both responses, (B,) each. The rewards are for
    logging, so they carry no gradient.

    >>> logp = torch.tensor([-3.0])
    >>> loss, _, _ = dpo_loss(logp, logp, logp, logp, beta=0.1)
    >>> round(loss.item(), 4)  # the policy still equals its reference: log 2
    0.6931
    >>> policy_chosen, policy_rejected = torch.tensor([-3.0]), torch.tensor([-5.0])
    >>> reference_chosen, reference_rejected = torch.tensor([-3.5]), torch.tensor([-4.0])
    >>> dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.5)
    (tensor([0.3869]), tensor([0.2500]), tensor([-0.5000]))
    """
    chosen_reward = beta * (policy_chosen - reference_chosen)
    rejected_reward = beta * (policy_rejected - reference_rejected)
    loss = -F.logsigmoid(chosen_reward - rejected_reward)
    return loss, chosen_reward.detach(), rejected_reward.detach()


# 2. What goes into it ---------------------------------------------------------------------------


def sequence_logps(model: Callable[[Tensor], Tensor], tokens: Tensor, mask: Tensor) -> Tensor:
    """log pi(response | prompt) of every row, (R,), in nats.

    model: any causal language model, as a function from tokens (R, T) to logits (R, T, V).
    tokens (R, T) int64: in each row a prompt (of one token at least), a response, then padding.
    mask (R, T) bool: True on the tokens of the response.

    A token is predicted at the position before it: the first token of a response at the prompt's
    last token. The padding stands on the right and needs no attention mask: attention is causal, so
    no real token sees it. What is predicted of the prompt and of the padding is dropped, by `mask`.
    """
    logits = model(tokens[:, :-1])                     # (R, T-1, V): position t predicts token t+1
    logits = at_least_float32(logits)                  # softmax and sum in float32
    targets = tokens[:, 1:]                            # (R, T-1): what position t must predict
    is_response = mask[:, 1:]                          # (R, T-1): which of them count

    all_logps = logits.log_softmax(-1)                                     # (R, T-1, V)
    # gather picks, at each position, the log-probability of the target.
    token_logps = all_logps.gather(-1, targets[:, :, None]).squeeze(-1)    # (R, T-1)
    token_logps = token_logps.masked_fill(~is_response, 0.0)       # not * 0, as -inf * 0 is nan
    return token_logps.sum(-1)                         # a sum, not a mean: of a whole response


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 if it was in bfloat16 or float16. float32 and float64 stay as they are."""
    if x.dtype in (torch.bfloat16, torch.float16):
        return x.float()
    return x


@torch.no_grad()
def reference_logps(logps_of: Callable[[nn.Module, object], Tensor], model: nn.Module,
                    batches: Iterable, pair_count: int) -> Tensor:
    """The reference's log-probabilities of a whole data set: (2, pair_count) float32, on the CPU.

    Row 0 is of the chosen responses, row 1 of the rejected ones, in nats.

    The reference is the model that training starts from. It never changes, so what it says about
    the data is data: it is asked once, before training. No second model stands in memory, and no
    update computes the reference again.

    logps_of(model, batch): the logps (2B,) of a batch, first those of its B chosen responses, then
    those of the rejected ones. For batches of padded rows:

        def logps_of(model, batch):
            return sequence_logps(model, batch.tokens, batch.mask)

    batches: objects of any kind with `indices` (B,) int64: the numbers of their pairs in the data
    set, from 0 to pair_count - 1. A pair that is in no batch gets nan.
    """
    table = torch.full((2, pair_count), math.nan)
    for batch in batches:
        logps = logps_of(model, batch).float().cpu()   # (2B,)
        chosen, rejected = logps.chunk(2)              # (B,) each
        indices = batch.indices.cpu()
        table[0, indices] = chosen
        table[1, indices] = rejected
    return table


# 3. What one watches ----------------------------------------------------------------------------


def dpo_metrics(policy: Tensor, reference: Tensor, beta: float) -> dict[str, Tensor]:
    """The DPO loss, and what tells whether training goes well: a dict of (B,) tensors.

    policy, reference (2B,): log-probabilities of the responses in nats, chosen first, as a model
    computes them in one batch. The metrics have the names of Hugging Face's library trl, so that
    runs can be compared. (chosen_below_reference is ours.) Only "loss" carries a gradient.
    """
    policy_chosen, policy_rejected = policy.chunk(2)                 # (B,) each
    reference_chosen, reference_rejected = reference.chunk(2)        # (B,) each
    loss, chosen_reward, rejected_reward = dpo_loss(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)

    margin = chosen_reward - rejected_reward
    wins = (margin > 0).to(margin.dtype)
    ties = (margin == 0).to(margin.dtype)
    return {
        "loss": loss,
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/margins": margin,
        "rewards/accuracies": wins + ties / 2,                       # so 0.5 where all are 0
        "logps/chosen": policy_chosen.detach(),
        "logps/rejected": policy_rejected.detach(),
        # The loss sees only the margin, so it can fall although both rewards fall. This is 1 where
        # the chosen response is less likely than under the reference, else 0.
        "chosen_below_reference": (chosen_reward < 0).to(margin.dtype),
    }


# 4. Training ------------------------------------------------------------------------------------


def cosine_lr(step: int, peak: float, warmup_steps: int, total_steps: int,
              final: float = 0.1) -> float:
    """The learning rate of update number `step`, which counts from 0 to total_steps - 1.

    It grows linearly to `peak` over the first warmup_steps updates. Then it falls along half a
    cosine, from `peak` to final * peak at the last update. The warm-up begins with
    peak / warmup_steps, not 0: an update with a rate of 0 would be wasted. It ends with `peak`, and
    the cosine begins with it. (A cosine of a single update has `peak`.)

    >>> [cosine_lr(step, 1.0, 2, 5, final=0.0) for step in range(2)]  # the warm-up
    [0.5, 1.0]
    >>> [cosine_lr(step, 1.0, 2, 5, final=0.0) for step in range(2, 5)]  # the cosine
    [1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps

    last = total_steps - 1
    length = max(1, last - warmup_steps)               # of the cosine; 1 for a single update
    done = (step - warmup_steps) / length              # from 0 to 1
    height = (1 + math.cos(math.pi * done)) / 2        # from 1 to 0
    return peak * (final + (1 - final) * height)


def check_start(policy: Tensor, reference: Tensor) -> None:
    """Before the first update the policy must equal its reference. Raises ValueError if it doesn't.

    policy, reference (2B,): log-probabilities in nats, of one and the same batch.

    At this moment all rewards are 0, and dpo_loss is log 2. Otherwise training would still run,
    towards a wrong goal. The check catches dropout that was left on, a reference that another
    checkpoint gave, an adapter that changes the model before it has learnt anything, and a
    reference of other pairs. It can't catch what is wrong in both alike, such as a wrong mask.

    "Equal" allows for rounding: the mean of |policy - reference| may be 4 eps times the mean of
    |reference|, where eps is float32's, 1.2e-7. (The 4 is our choice.) For responses of -100 nats
    that is 5e-5.
    """
    difference = (policy - reference).abs().mean().item()
    rounding = torch.finfo(torch.float32).eps * reference.abs().mean().item()
    if not difference <= 4 * rounding:                 # written so that nan is refused, too
        raise ValueError(
            f"before the first update the policy's log-probabilities differ from the reference's "
            f"by {difference:.3g} nats on average, expected at most {4 * rounding:.3g}: look for "
            f"dropout, for a reference of another model, of other data or from another machine, or "
            f"for an adapter that changes the model at once")


def train_dpo(model: nn.Module, batches: list, epochs: int = 1, beta: float = 0.1,
              peak_lr: float = 1e-5) -> list[dict[str, float]]:
    """DPO in its plainest form, of a model of your own: an update for each batch of each epoch.

    model: from tokens (R, T) to logits (R, T, V), as the GPT2 of model.py is. A model of
    `transformers` returns more than logits, so it needs a wrapper:

        class Logits(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, tokens):
                return self.model(tokens).logits

        train_dpo(Logits(model), batches)

    batches: as data.pad makes them, moved to the model's device. Each has tokens and mask (2B, T),
    first the B rows of the chosen responses, then those of the rejected ones.
    peak_lr: the highest learning rate. A tenth of the updates, rounded down, warms up to it.

    The reference is the model as it comes. So a second call would have another reference.

    Returns the metrics of each update, means over its pairs. The model stays in eval mode. Raises
    RuntimeError for a gradient that is not finite, before it changes a weight.
    """
    model.eval()                       # without dropout, which would be noise in the rewards

    # What the reference says about each batch, asked once. (train.py shuffles the pairs in each
    # epoch, so it makes a table of all pairs: reference_logps.)
    references = []
    with torch.no_grad():
        for batch in batches:
            references.append(sequence_logps(model, batch.tokens, batch.mask))     # (2B,)

    # The model was asked the same a moment ago. So here this can only find a model whose answers
    # vary, as with dropout that eval() doesn't switch off.
    with torch.no_grad():
        policy = sequence_logps(model, batches[0].tokens, batches[0].mask)
        check_start(policy, references[0])

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)    # its lr is set below
    total_steps = epochs * len(batches)
    warmup_steps = total_steps // 10
    history = []
    for step in range(total_steps):
        number = step % len(batches)                   # each epoch has them in the same order
        batch = batches[number]
        policy = sequence_logps(model, batch.tokens, batch.mask)           # (2B,)
        metrics = dpo_metrics(policy, references[number], beta)            # (B,) each

        metrics["loss"].mean().backward()
        # A longer gradient is shortened to 1.
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.param_groups[0]["lr"] = cosine_lr(step, peak_lr, warmup_steps, total_steps)
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: values.mean().item() for name, values in metrics.items()})
    return history


def mean_over_pairs(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each metric over the pairs of all parts: tensors ()."""
    means = {}
    for name in parts[0]:
        values = torch.cat([part[name] for part in parts])        # (pairs of all parts,)
        means[name] = values.mean()
    return means


def as_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Tensors () as numbers. All are read at once: for each read, Python waits for the GPU."""
    values = torch.stack(list(metrics.values())).tolist()
    return dict(zip(metrics.keys(), values, strict=True))


# loss_function(model, batch) returns a dict of tensors (B,), as dpo_metrics does. "loss" is trained
# on, the others are watched.
LossFunction = Callable[[nn.Module, object], dict[str, Tensor]]


def train_step(model: nn.Module, micro_batches: list, optimizer: torch.optim.Optimizer,
               loss_function: LossFunction, max_norm: float = 1.0,
               scaler: torch.amp.GradScaler | None = None) -> dict[str, float]:
    """One iteration of training: an update, from the mean loss over all pairs. In short:

        loss = loss_function(model, batch)["loss"].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()

    What it adds to these lines: a batch may come in parts, float16 may be used, and a loss that is
    not finite does no harm. train.py calls it for SFT and for DPO.

    micro_batches: the parts of one batch, small enough to go through the model one at a time.
    Each is any object with `indices` (B,), the numbers of its pairs, so that the pairs can be
    counted. The gradients of the parts add up, so the update is that of one pass, but for rounding.
    loss_function: see LossFunction.
    max_norm: a longer gradient is shortened to this length.
    scaler: for float16 alone, whose small gradients would become 0: it multiplies the loss by a
    large factor, and divides the gradients by it. None, or one that is not enabled: no factor.

    Returns the mean of every metric over all pairs, "grad_norm" before the gradient was shortened,
    and "skipped", 0 or 1. A loss or gradient that is not finite makes no update: weights and
    optimizer stay as they were, and "skipped" is 1.
    """
    if scaler is None:
        scaler = torch.amp.GradScaler(enabled=False)
    pair_count = sum(len(batch.indices) for batch in micro_batches)
    parts = []
    for batch in micro_batches:
        metrics = loss_function(model, batch)
        # The mean over the pairs of the whole update. (The mean over those of the micro-batch would
        # let a short one weigh like a full one.)
        loss = metrics["loss"].sum() / pair_count
        scaler.scale(loss).backward()                  # adds to the gradients that are there
        # Detached: the numbers are kept, the graph that led to them is freed.
        parts.append({name: value.detach() for name, value in metrics.items()})

    scaler.unscale_(optimizer)                         # gradients back to their true size
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    means = mean_over_pairs(parts)
    means["grad_norm"] = grad_norm
    result = as_floats(means)                          # the only wait for the GPU
    finite = math.isfinite(result["loss"]) and math.isfinite(result["grad_norm"])
    if finite:
        scaler.step(optimizer)                         # optimizer.step()
    scaler.update()                    # its factor falls if unscale_ has met inf or nan
    optimizer.zero_grad()
    result["skipped"] = 0.0 if finite else 1.0
    return result


@torch.no_grad()
def val_step(model: nn.Module, batches: Iterable, loss_function: LossFunction) -> dict[str, float]:
    """One validation: the mean of every metric over all pairs of the batches.

    A model with dropout must be in eval mode.
    """
    parts = [loss_function(model, batch) for batch in batches]
    return as_floats(mean_over_pairs(parts))


# 5. The same numbers, faster --------------------------------------------------------------------
#
# sequence_logps is all that one needs. But on a batch of padded rows a model computes three things
# that nobody asks for:
#
# - Each prompt twice. A pair's two rows begin with the same prompt.
# - Padding. Texts differ much in length, and all rows of a batch are as long as the longest.
# - Logits of prompts and padding. The loss needs only those that predict a token of a response, and
#   GPT-2's head, with its 50,257 tokens, is a large part of the model.
#
# A packed batch lays several pairs in one row, each with its prompt once. Say a prompt has 3 tokens
# (p), its chosen response 4 (c), and the rejected one 3 (r). The last token of a response is left
# out of the row: it is predicted, but nothing is predicted from it. The rest of the row has room
# for other pairs (the dots). x is padding.
#
#     padded rows    p p p c c c c
#                    p p p r r r x
#
#     packed row     p p p c c c r r . . . . . .
#
# A mask keeps them apart in attention, the only place where tokens meet: a token sees only tokens
# of its own pair, and r does not see c. So every token gets the same result as in its padded row,
# but for rounding. train.py trains with packed batches.
#
# What it brings, in seconds an update of 16 pairs of hh-rlhf, with GPT-2 124M's shape on two cores
# (command and machine: "Speed" in results/README.md):
#
#     52.0    padded rows, by sequence_logps
#     35.5    padded rows, with the logits of responses alone
#     15.7    packed: each prompt once, and hardly any padding
#
# Further letters: M predictions, C width of the model.


def packed_logps(model: nn.Module, batch: object, piece: int = 512) -> Tensor:
    """The logps (2B,) of a packed batch, in nats, chosen first: those of sequence_logps, rounded
    in another way. (B,) for the batches of SFT, which hold chosen responses alone.

    model: the GPT2 of model.py. batch: a data.PackedBatch, which data.pack makes from B pairs.
    piece: how many predictions have logits at a time, also in the backward pass. The logits of all
    predictions, each of 50,257 numbers, would need gigabytes.

    Here are two pairs, which fit into one row. 99 is the end-of-text token. (The responses of pair
    1 are without it, as if they had been cut.)

        pair 0: prompt 10 11    chosen 20 21 99    rejected 30 31 99
        pair 1: prompt 12       chosen 40          rejected 41

    >>> import data
    >>> from model import GPT2, GPT2Config
    >>> pairs = [data.TokenPair([10, 11], [20, 21, 99], [30, 31, 99]),
    ...          data.TokenPair([12], [40], [41])]
    >>> batch = data.pack(pairs, indices=[0, 1])

    The row holds pair 0, then of pair 1 only the prompt: the last token of a response is left out.
    (data.arrange has made the row a little longer than pair 0, so that pair 1 fits in.)

    >>> batch.tokens
    tensor([[10, 11, 20, 21, 30, 31, 12]])

    A position counts from the start of the token's own text. 30 follows the prompt, as 20 does.

    >>> batch.positions
    tensor([[0, 1, 2, 3, 2, 3, 0]])

    Which tokens (across) does each token (down) see? 30 and 31 see the prompt, but not 20 and 21.
    12, of the other pair, sees itself alone.

    >>> batch.attn_mask.int()
    tensor([[[1, 0, 0, 0, 0, 0, 0],
             [1, 1, 0, 0, 0, 0, 0],
             [1, 1, 1, 0, 0, 0, 0],
             [1, 1, 1, 1, 0, 0, 0],
             [1, 1, 0, 0, 1, 0, 0],
             [1, 1, 0, 0, 1, 1, 0],
             [0, 0, 0, 0, 0, 0, 1]]], dtype=torch.int32)

    The responses are numbered 0 to 3: chosen of pair 0, chosen of pair 1, rejected of pair 0,
    rejected of pair 1. In this order, here are the tokens of the responses; below each of them the
    response that it belongs to; and below that the place in the row where it is predicted. 20 and
    30 are both predicted at place 1, where 11 stands, the last token of their prompt.

    >>> torch.stack([batch.targets, batch.owner, batch.predicted_at])
    tensor([[20, 21, 99, 40, 30, 31, 99, 41],
            [ 0,  0,  0,  1,  2,  2,  2,  3],
            [ 1,  2,  3,  6,  1,  4,  5,  6]])

    The same four numbers as from padded rows:

    >>> model = GPT2(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=100))
    >>> padded = data.pad(pairs, indices=[0, 1])
    >>> plain = sequence_logps(model, padded.tokens, padded.mask)
    >>> torch.allclose(packed_logps(model, batch), plain)
    True
    """
    hidden = model.hidden(batch.tokens, batch.positions, batch.attn_mask)  # (R, T, C)
    hidden = hidden.flatten(0, 1)                      # (R * T, C): one for each place
    hidden = hidden.index_select(0, batch.predicted_at)    # (M, C): those that predict a response
    head = model.wte.weight                            # (V, C): GPT-2's head is its embedding

    # Cast here: TargetLogps has a backward pass of its own, in which autocast would cast nothing.
    # Its products would be in float32, and slow.
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden = hidden.to(dtype)
        head = about_their_mean(head).to(dtype)        # the same probabilities, rounded less

    # The log p of each target, (M,). TargetLogps is these three lines, with less memory:
    #
    #     logits = at_least_float32(head @ hidden.T)                           # (V, M)
    #     log_softmax = logits.log_softmax(0)                                  # (V, M)
    #     logps = log_softmax.gather(0, batch.targets[None, :]).squeeze(0)     # (M,)
    #
    # (A column for each prediction, not a row: this product is faster on CPUs.)
    logps = TargetLogps.apply(hidden, head, batch.targets, piece)

    # Each response's sum over its own tokens. (Not by index_add: a GPU adds there in any order. A
    # model asked twice would give two results, and at the start the rewards would not be 0.)
    response_count = len(batch.response_lengths)       # 2B (B for SFT)
    responses = torch.arange(response_count, device=logps.device)
    is_own = responses[:, None] == batch.owner         # (2B, M): is m a token of response r?
    own_logps = torch.where(is_own, logps, 0.0)        # (2B, M): 0 for those of others
    return own_logps.sum(1)                            # (2B,)


def about_their_mean(rows: Tensor) -> Tensor:
    """rows (V, C), of GPT-2's head, without their mean row: for products in bfloat16.

    The logit of a token is h . row. GPT-2's logits lie near -100, where bfloat16's steps are 0.5.
    Without the mean row m they are h . row - h . m, and lie near 0, where the steps are fine. h . m
    is the same for all tokens, so no probability changes, and no derivative of one.
    """
    return rows - rows.mean(0)


# 6. Less memory for packed_logps ----------------------------------------------------------------


class TargetLogps(torch.autograd.Function):
    """log p of each target token, (M,): the three lines in packed_logps, with less memory.

    hidden (M, C), head (V, C), targets (M,) int64. Logits exist for `piece` predictions at a time.

    Autograd would keep all V x M numbers of log_softmax for the backward pass. So here the backward
    pass is written by hand. From cross-entropy the derivative of log p(target) by the logits is
    known: one_hot(target) - softmax. Call it error, (V, M), and let grad (M,) be the derivative of
    the loss by each log p. Then the derivatives of the loss are

        by hidden    grad[:, None] * (error.T @ head)                          (M, C)
        by head      error @ (grad[:, None] * hidden)                          (V, C)

    In the first, error.T @ head is made in the forward pass, while the error is there: it doesn't
    need grad, which only the backward pass is told. For the second, the backward pass makes the
    error once more; but only if the head trains. (Then hidden has a gradient, too, as the head is
    the embedding. So forward may look at hidden alone.)
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, piece: int) -> Tensor:
        logps = []
        slopes = []                # the derivative of each log p by its own hidden state
        for h, target in zip(hidden.split(piece), targets.split(piece), strict=True):
            piece_logps, error = logps_and_error(h, head, target)
            logps.append(piece_logps)                                        # (piece,)
            if hidden.requires_grad:                   # not in a validation
                slopes.append(error.T @ head)                                # (piece, C)
        if hidden.requires_grad:
            ctx.save_for_backward(hidden, head, targets, torch.cat(slopes))
            ctx.piece = piece
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad (M,): the derivative of the loss by each log p."""
        hidden, head, targets, slopes = ctx.saved_tensors
        d_hidden = (grad[:, None] * slopes).to(hidden.dtype)                 # (M, C)
        if not head.requires_grad:                     # where adapters train, say
            return d_hidden, None, None, None

        d_head = torch.zeros_like(head, dtype=grad.dtype)                    # (V, C)
        pieces = zip(hidden.split(ctx.piece), targets.split(ctx.piece), grad.split(ctx.piece),
                     strict=True)
        for h, target, g in pieces:
            _, error = logps_and_error(h, head, target)                      # (V, piece)
            weighted = g[:, None] * h                                        # (piece, C)
            d_head += error @ weighted.to(h.dtype)
        return d_hidden, d_head.to(head.dtype), None, None


def logps_and_error(h: Tensor, head: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log p of the targets, (piece,); and its derivative by the logits, the error one_hot -
    softmax, (V, piece), in the number format of h.

    h (piece, C), head (V, C), target (piece,).
    """
    logits = at_least_float32(head @ h.T)                                    # (V, piece)
    log_z = logits.logsumexp(0)                                              # (piece,)
    logps = logits.gather(0, target[None, :]).squeeze(0) - log_z             # (piece,)

    # In place, as each of these arrays is large: the logits become softmax, then the error.
    softmax = logits.sub_(log_z).exp_()
    error = softmax.neg_()
    error[target, torch.arange(len(target), device=target.device)] += 1
    return logps, error.to(h.dtype)


# 7. Other losses --------------------------------------------------------------------------------


def sft_loss(chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """The loss of the stage before DPO, supervised fine-tuning (SFT): nats a token, (B,).

    It is a mean over the tokens of each response. So, unlike in a mean over all tokens of a batch,
    a long response counts no more than a short one.

    chosen_logps (B,): log pi(response | prompt) of the chosen responses. chosen_lengths (B,) int64:
    their lengths in tokens.
    """
    return -chosen_logps / chosen_lengths


VARIANTS = ("sigmoid", "robust", "ipo", "hinge", "sigmoid_norm")
USES_SMOOTHING = ("sigmoid", "robust")                 # those that have a use for label_smoothing


def variant_loss(policy: Tensor, reference: Tensor, response_lengths: Tensor, beta: float,
                 variant: str, label_smoothing: float = 0.0) -> Tensor:
    """The loss of each pair, (B,), in the form that others have proposed, under trl's names.

    policy, reference (2B,): log-probabilities in nats, chosen first. response_lengths (2B,) int64:
    of each response in tokens, for the variants that take means over tokens. label_smoothing: the
    share of labels that are believed to be wrong. Raises ValueError for options that check_variant
    refuses.
    """
    check_variant(variant, label_smoothing)
    log_ratio = policy - reference                                # (2B,)
    chosen, rejected = log_ratio.chunk(2)                         # (B,) each
    margin = beta * (chosen - rejected)                           # the difference of the rewards
    right = -F.logsigmoid(margin)                                 # the loss if the label is right
    wrong = -F.logsigmoid(-margin)                                # and if it is wrong
    # The same with means over the tokens of a response, in nats a token.
    chosen_mean, rejected_mean = (log_ratio / response_lengths).chunk(2)               # (B,) each

    if variant == "sigmoid":
        # Without label_smoothing this is dpo_loss, equation 7. With it, it is the conservative DPO
        # of Mitchell 2023: the loss is lowest where sigmoid(margin) is 1 - label_smoothing, so a
        # margin doesn't grow without end.
        return (1 - label_smoothing) * right + label_smoothing * wrong

    if variant == "robust":
        # Chowdhury et al. 2024 (arXiv:2403.00409): where a share label_smoothing of the labels is
        # wrong, the mean of this loss is what the mean of equation 7 would be with right labels.
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)

    if variant == "ipo":
        # Azar et al. 2023 (arXiv:2310.12036), equation 17: the difference of the log-ratios has a
        # goal, 1 / (2 beta), in place of growing without end. The paper has sums over tokens. Like
        # trl, we take means, so the goal is in nats a token here.
        return (chosen_mean - rejected_mean - 1 / (2 * beta)) ** 2

    if variant == "hinge":
        # Liu et al. 2023 (arXiv:2309.06657): the hinge loss of SLiC on DPO's rewards.
        return F.relu(1 - margin)

    assert variant == "sigmoid_norm", variant
    # Lambert et al. 2024 (arXiv:2411.15124): equation 7 with means over tokens in place of sums,
    # against the bias to long responses.
    return -F.logsigmoid(beta * (chosen_mean - rejected_mean))


def check_variant(variant: str, label_smoothing: float) -> None:
    """Raises ValueError for an unknown variant, and for a label_smoothing that it can't use."""
    if variant not in VARIANTS:
        raise ValueError(f"the variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected 0 or more, below 0.5")
    if label_smoothing > 0 and variant not in USES_SMOOTHING:
        raise ValueError(f"label_smoothing is {label_smoothing}, but the variant {variant} has no "
                         f"use for it: expected {' or '.join(USES_SMOOTHING)}")


# 8. An interval for shares ----------------------------------------------------------------------


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share: what it may be, given that `count` samples had this mean.

    Wilson 1927 (JASA 22, p. 209); the formula stands under "Binomial proportion confidence
    interval" in Wikipedia. DPO does without it, but whoever reports an accuracy should not.
    The usual mean +- 1.96 standard errors has no width where all samples agree; this interval still
    has some, as two of two is no proof.

    A sample may also be a score between 0 and 1, such as 1/2 for a tie. Such scores vary less than
    zeros and ones with the same mean, so the interval is then wider than it need be. Raises
    ValueError unless count is above 0 and mean lies in [0, 1].

    >>> low, high = wilson_interval(1.0, 2)  # two of two
    >>> f"{low:.2f} to {high:.2f}"
    '0.34 to 1.00'
    """
    if count < 1 or not 0 <= mean <= 1:
        raise ValueError(f"a mean of {mean} over {count} samples: expected a mean from 0 to 1, "
                         f"over at least one sample")
    z = 1.959964                                       # 95% of a normal distribution lie within z
    denominator = 1 + z**2 / count
    center = (mean + z**2 / (2 * count)) / denominator
    root = math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    half_width = z * root / denominator
    low = center - half_width
    high = center + half_width
    return max(0.0, low), min(1.0, high)               # rounding may push them out of [0, 1]
