"""The DPO loss, and the loop that trains a model with it.

Read in this order: VARIANTS, dpo_loss (equation 7), response_logp (what goes into it), the two
objectives, cosine_lr, sums and means, train_step, val_step, evaluate, reference_logp, check_start,
fit. Needs torch alone.

A batch is any object with tokens (any shape), pairs (B,) int64: which pairs of the data set it
holds, and lengths (2B,) int64: of its responses in tokens. A policy is a callable, in torch's
DistributedDataParallel if it trains on several GPUs: policy(batch) gives the log-probabilities of
the responses in nats, (2B,), chosen first (an SFT policy's (B,): chosen alone).
"""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Objective = Callable[[Tensor, object], dict[str, Tensor]]  # (logp, batch) to metrics (B,) by name
Context = Callable[[], AbstractContextManager]  # opens a context: of autocast, or of nothing

# Each variant's loss of h, the margin (chosen reward - rejected reward), with b, beta, and e, label
# smoothing. Those in SMOOTHED use e; for those in PER_TOKEN a logp is a mean over its tokens.
VARIANTS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    # Rafailov et al. 2023, equation 7; with e Mitchell's conservative DPO: a share e of labels lies
    "sigmoid": lambda h, b, e: -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h),
    # Chowdhury et al. 2024 (arXiv:2403.00409): its mean over such labels is the loss of true ones
    "robust": lambda h, b, e: (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e),
    # Azar et al. 2023 (arXiv:2310.12036), equation 17; per token, as its authors advise
    "ipo": lambda h, b, e: (h / b - 1 / (2 * b)) ** 2,
    # Liu et al. 2023 (arXiv:2309.06657): the hinge of SLiC (Zhao et al. 2023) on DPO's rewards
    "hinge": lambda h, b, e: F.relu(1 - h),
    # Lambert et al. 2024 (arXiv:2411.15124): equation 7 per token, against a bias to long responses
    "sigmoid_norm": lambda h, b, e: -F.logsigmoid(h),
}
SMOOTHED, PER_TOKEN = ("sigmoid", "robust"), ("ipo", "sigmoid_norm")

def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor,
             reference_chosen: Tensor, reference_rejected: Tensor, beta: float,
             variant: str = "sigmoid", label_smoothing: float = 0.0,
             chosen_tokens: Tensor | None = None, rejected_tokens: Tensor | None = None,
             ) -> tuple[Tensor, Tensor, Tensor]:
    """Each pair's DPO loss, and the two rewards it compares.

    Equation 7 of Rafailov et al. 2023 (arXiv:2305.18290), before its mean over pairs:
        loss = -log sigmoid(reward of chosen - reward of rejected)
        reward = beta * (policy's logp - reference's logp)

    Takes four (B,) logps: log p(response | prompt), in nats, summed over the response; and, for the
    variants in PER_TOKEN, the responses' tokens, (B,) int64, to divide by. Returns loss, chosen
    reward, rejected reward, (B,) each; no gradient through the rewards, none to the reference.
    Raises ValueError unless beta is above 0, for an unknown variant, for an option that it does not
    use, and for lengths that it lacks.

    >>> logp = torch.tensor([-3.0])
    >>> loss, _, _ = dpo_loss(logp, logp, logp, logp, beta=0.1)
    >>> round(loss.item(), 4)  # the policy still is the reference: log 2
    0.6931
    """
    check_options(beta, variant, label_smoothing)
    if {chosen_tokens is None, rejected_tokens is None} != {variant not in PER_TOKEN}:
        raise ValueError(f"{variant}: {' and '.join(PER_TOKEN)} need lengths, others none")
    chosen_reward = beta * (policy_chosen - reference_chosen.detach())
    rejected_reward = beta * (policy_rejected - reference_rejected.detach())
    if variant in PER_TOKEN:
        chosen_reward = chosen_reward / chosen_tokens
        rejected_reward = rejected_reward / rejected_tokens
    margin = chosen_reward - rejected_reward
    loss = VARIANTS[variant](margin, beta, label_smoothing)  # "sigmoid": -log sigmoid(margin)
    return loss, chosen_reward.detach(), rejected_reward.detach()

def check_options(beta: float, variant: str, label_smoothing: float) -> None:
    """ValueError unless these make a loss."""
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta}, expected a number above 0")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and variant not in SMOOTHED):
        raise ValueError(f"label_smoothing is {label_smoothing}, expected 0 to below 0.5, and 0 "
                         f"for variants other than {' and '.join(SMOOTHED)}")

class LogPartition(torch.autograd.Function):
    """The log of the sum of exp(hidden @ (weight - center).T) over the vocabulary: (M,).

    hidden (M, C), weight (V, C), center (C,); float32 at least. Logits exist for `chunk` words at a
    time. The gradient of hidden is the softmax's mean of weight - center: made in the forward pass,
    by sums that are rescaled when a larger logit comes (Milakov and Gimelshein 2018,
    arXiv:1805.02867). That of weight makes the softmax anew; center gets none.
    """
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, center: Tensor, chunk: int) -> Tensor:
        kind, ctx.chunk, ctx.dtype = hidden.device.type, chunk, hidden.dtype
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        precise = torch.promote_types(hidden.dtype, torch.float32)
        mean = torch.zeros_like(hidden, dtype=precise)  # a sum, until it is divided by `z`
        z, top = mean.new_zeros(len(mean), 1), mean.new_full((len(mean), 1), -math.inf)
        for words in weight.split(chunk):
            words = (words - center).to(hidden.dtype)
            logits, old = (hidden @ words.T).to(precise), top  # (M, chunk)
            top = torch.maximum(old, logits.amax(-1, keepdim=True))
            exp, scale = logits.sub_(top).exp_(), (old - top).exp_()
            z = z * scale + exp.sum(-1, keepdim=True)
            if ctx.needs_input_grad[0]:
                mean = mean * scale + exp.to(hidden.dtype) @ words
        log_z = top + z.log()  # (M, 1)
        ctx.save_for_backward(hidden, weight, center, log_z, mean.div_(z))
        return log_z[:, 0]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden, weight, center, log_z, mean), grad = ctx.saved_tensors, grad[:, None]
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(weight) if d_weight is not None else 0, ctx.chunk):
            words = slice(start, start + ctx.chunk)
            logits = hidden @ (weight[words] - center).to(hidden.dtype).T
            softmax = logits.to(log_z.dtype).sub_(log_z).exp_()
            d_weight[words] = softmax.mul_(grad).to(hidden.dtype).T @ hidden
        return (mean * grad).to(ctx.dtype), d_weight, None, None

def response_logp(hidden: Tensor, weight: Tensor, targets: Tensor, response: Tensor,
                  responses: int, chunk: int = 2048) -> Tensor:
    """Log-probability of each response, given what stands before it: (responses,), in nats.

    hidden (M, C): what the head reads at the M tokens before a response's tokens; weight (V, C):
    the head's. targets (M,) int64: the tokens that came; response (M,) int64: whose they are. No
    other token's logits are computed, and never more than M x chunk of them at once.

    Sums, and the logits of the targets, are float32 at least, also under autocast. Logits
    are taken about the mean word's: bf16 numbers near -100, where GPT-2's lie, are 0.5 apart.

    >>> weight = torch.tensor([[0.0], [math.log(3)]])  # the logits are 0 and hidden * log 3
    >>> logp = response_logp(torch.tensor([[0.0], [1.0], [1.0]]), weight,
    ...                      torch.tensor([1, 1, 0]), torch.tensor([0, 0, 1]), 2)
    >>> logp.exp()  # 1/2 * 3/4, and 1/4
    tensor([0.3750, 0.2500])
    """
    precise = torch.promote_types(hidden.dtype, torch.float32)
    center = weight.detach().mean(0)  # no gradient: it would cancel
    target = (hidden.to(precise) * (F.embedding(targets, weight) - center).to(precise)).sum(-1)
    logp = target - LogPartition.apply(hidden, weight, center, chunk)
    return logp.new_zeros(responses).index_add(0, response, logp)

def sft_objective(logp: Tensor, batch: object) -> dict[str, Tensor]:
    """Supervised fine-tuning on the chosen responses: nats a token, a mean over each response."""
    return {"loss": -logp / batch.lengths}

def dpo_objective(reference: Tensor, beta: float, variant: str = "sigmoid",
                  label_smoothing: float = 0.0, sft_coef: float = 0.0) -> Objective:
    """The objective of DPO, with the metrics' names of the field.

    reference (pairs, 2) float32: its logps of every pair's chosen and rejected response, in nats.
    sft_coef adds that times sft_objective of the chosen response (Pang et al. 2024,
    arXiv:2404.19733, equation 1): the common cure for chosen responses that become less likely.
    """
    check_options(beta, variant, label_smoothing)

    def objective(logp: Tensor, batch: object) -> dict[str, Tensor]:
        (chosen, rejected), lengths = logp.chunk(2), batch.lengths.chunk(2)
        ref = reference[batch.pairs.to(reference.device)].to(logp)  # it may stay on the CPU
        loss, chosen_reward, rejected_reward = dpo_loss(
            chosen, rejected, *ref.unbind(1), beta, variant, label_smoothing,
            *(lengths if variant in PER_TOKEN else ()))
        margin = chosen_reward - rejected_reward
        return {"loss": loss + sft_coef * -chosen / lengths[0],
                "rewards/chosen": chosen_reward, "rewards/rejected": rejected_reward,
                "rewards/margins": margin,
                "rewards/accuracies": (margin.sign() + 1) / 2,  # a tie counts one half
                "logps/chosen": chosen, "logps/rejected": rejected,
                "chosen_below_reference": (chosen_reward < 0).float()}
    return objective

def cosine_lr(step: int, peak: float, warmup_steps: int, total_steps: int,
              final: float = 0.1) -> float:
    """The learning rate of update number `step`, from 0 to total_steps - 1.

    Linear from peak / warmup_steps (no update is wasted on 0) to peak, at the last of the warm-up;
    then half a cosine from peak to final * peak, at the last of all.

    >>> [round(cosine_lr(step, 1.0, 2, 7), 3) for step in range(7)]
    [0.5, 1.0, 1.0, 0.868, 0.55, 0.232, 0.1]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)  # 0 to 1
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)

def total(sums: dict[str, float]) -> dict[str, float]:
    """These, summed over all processes; all have the same keys in the same order."""
    if not dist.is_initialized():
        return sums
    device = torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return dict(zip(sums, tensor.tolist(), strict=True))

def add(sums: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    """Both, key by key; what one lacks is 0 there."""
    return {key: sums.get(key, 0.0) + more.get(key, 0.0) for key in sums | more}

def means(sums: dict[str, float]) -> dict[str, float]:
    """Of sums: means over pairs; "grad_norm" and "lr" over updates; {} of skipped updates alone."""
    pairs, updates = max(1, sums.get("pairs", 0)), max(1, sums.get("updates", 0))
    return {key: value / (updates if key in ("grad_norm", "lr") else pairs)
            for key, value in sums.items() if key not in ("pairs", "tokens", "updates", "skipped")}

def train_step(policy: Callable, micro_batches: list, optimizer: torch.optim.Optimizer,
               objective: Objective, max_norm: float = 1.0, autocast: Context = nullcontext,
               scaler: torch.amp.GradScaler | None = None) -> dict[str, float]:
    """One update from the mean gradient over the pairs of all micro-batches, of all processes.

    Returns sums over these pairs: each metric, "pairs", "tokens"; and of the update: "updates" 1,
    "lr", and "grad_norm", before it was clipped to max_norm. A gradient or loss that is not finite
    makes no update: then {"skipped": 1} is returned.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    pairs = total({"pairs": sum(len(batch.pairs) for batch in micro_batches)})["pairs"]
    sums, world = {}, dist.get_world_size() if dist.is_initialized() else 1
    for i, batch in enumerate(micro_batches):
        more = hasattr(policy, "no_sync") and i < len(micro_batches) - 1
        with policy.no_sync() if more else nullcontext():  # DDP: reduce once, at the end
            with autocast():
                logp = policy(batch)
            metrics = objective(logp, batch)
            loss = metrics["loss"].sum() * (world / pairs)  # DDP takes the mean over processes
            scaler.scale(loss).backward()
        sums = add(sums, _sums(metrics, batch))
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, max_norm).item()
    sums = total(sums)
    if math.isfinite(norm) and math.isfinite(sums["loss"]):  # the same in all processes
        scaler.step(optimizer)
        sums |= {"updates": 1, "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
    else:
        sums = {"skipped": 1}
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return sums

def _sums(metrics: dict[str, Tensor], batch: object) -> dict[str, float]:
    """Each metric summed over the batch's pairs, and their number; one wait for the device."""
    sums = torch.stack([*metrics.values()]).detach().cpu().double().sum(1).tolist()
    return dict(zip(metrics, sums, strict=True)) | {
        "pairs": len(batch.pairs), "tokens": batch.tokens.numel()}

@torch.no_grad()
def val_step(policy: Callable, batch: object, objective: Objective,
             autocast: Context = nullcontext) -> dict[str, float]:
    """Sums over the batch's pairs: each metric of the objective, "pairs", "tokens"."""
    with autocast():
        logp = policy(batch)
    return _sums(objective(logp, batch), batch)

def evaluate(policy: Callable, batches: Iterable, objective: Objective,
             autocast: Context = nullcontext) -> dict[str, float]:
    """Means of the objective's metrics over the pairs of all batches, of all processes."""
    sums: dict[str, float] = {}
    for batch in batches:
        sums = add(sums, val_step(policy, batch, objective, autocast))
    return means(total(sums))

@torch.no_grad()
def reference_logp(policy: Callable, batches: Iterable, pairs: int,
                   autocast: Context = nullcontext) -> Tensor:
    """The logp of a data set's `pairs` under the policy before it trains: (pairs, 2) float32, CPU.

    The reference never changes, so what it says of the data is data, computed once.
    """
    table = torch.zeros(pairs, 2)
    for batch in batches:
        with autocast():
            table[batch.pairs.cpu()] = policy(batch).float().view(2, -1).T.cpu()
    return torch.tensor([*total(dict(enumerate(table.flatten().tolist()))).values()]).view(pairs, 2)

def check_start(policy: Callable, batch: object, reference: Tensor, beta: float,
                autocast: Context, tolerance: float) -> None:
    """Before DPO's first update the policy is the reference: rewards are 0 and the loss is ln 2.

    What may be left is rounding, if `batch` is none of the batches that reference_logp had.
    Raises ValueError where the mean loss or a mean reward is off by `tolerance` or more.
    """
    start = means(val_step(policy, batch, dpo_objective(reference, beta), autocast))
    off = start["loss"] - math.log(2), start["rewards/chosen"], start["rewards/rejected"]
    found = (f"loss {start['loss']:.7f}, mean rewards {off[1]:+.1e} and {off[2]:+.1e}; expected "
             f"{math.log(2):.7f} and 0 within {tolerance:.0e}")
    if not all(abs(x) < tolerance for x in off):
        raise ValueError(f"before DPO: {found}: the policy is not its reference; look for dropout, "
                         f"a stale reference, an adapter that changes the model, a wrong mask")
    print(f"start  {found}", flush=True)

START = {"step": 0, "best": math.inf, "best_step": 0, "best_at": "", "not_better": 0, "skipped": 0,
         "skipped_in_row": 0, "window": {}}  # fit's state; window: sums since the last line

def fit(update: Callable[[int], dict[str, float]], validate: Callable[[], dict[str, float]],
        log: Callable[[str, int, dict], None], save: Callable[[str, dict], str], *, steps: int,
        val_every: int, patience: int, log_every: int, save_every: int, state: dict | None = None,
        max_skipped: int = 20) -> dict:
    """Make `steps` updates, or until `patience` validations in a row brought no lower loss.

    update(step) makes one and gives train_step's sums; validate() gives means, "loss" among them.
    log takes "train" (means since the last such call) and "val". save(kind, state) stores and says
    where: "best", at step 0 and where the validation loss is the lowest so far; "last", at each
    validation and every save_every steps. From the state of a "last", with all that update uses as
    it was, the run goes on as if it had not stopped. Returns the state. FloatingPointError after
    max_skipped skips in a row.
    """
    fresh, state = not state, dict(state or START)

    def validation() -> None:
        values, step = validate(), state["step"]
        if values["loss"] < state["best"]:
            state.update(best=values["loss"], best_step=step, not_better=0)
            state["best_at"] = save("best", state)
        else:
            state["not_better"] += 1
        log("val", step, values | {k: state[k] for k in ("best", "best_step")})
        save("last", state)

    if fresh:
        validation()
    first, start, tokens, seconds = state["step"], time.perf_counter(), 0.0, 0.0
    while state["step"] < steps and state["not_better"] < patience:
        begun, sums = time.perf_counter(), update(state["step"])
        seconds += time.perf_counter() - begun  # in updates alone, as are the tokens
        tokens, step = tokens + sums.get("tokens", 0.0), state["step"] + 1
        state |= {"step": step, "window": add(state["window"], sums),
                  "skipped": state["skipped"] + sums.get("skipped", 0),
                  "skipped_in_row": state["skipped_in_row"] + 1 if "skipped" in sums else 0}
        if state["skipped_in_row"] == max_skipped:
            raise FloatingPointError(f"{max_skipped} updates in a row, up to {step}, had no finite "
                                     f"gradient; the last good checkpoint: "
                                     f"{state['best_at'] or 'none'}; try a lower rate")
        if step % log_every == 0 or step == steps:
            left = (time.perf_counter() - start) / (step - first) * (steps - step)
            log("train", step, means(state["window"]) | {
                "skipped": state["skipped"], "seconds_left": left,
                "tokens_per_second": tokens / seconds})
            state["window"], tokens, seconds = {}, 0.0, 0.0
        if step % val_every == 0 or step == steps:
            validation()
        elif step % save_every == 0:
            save("last", state)
    return state
