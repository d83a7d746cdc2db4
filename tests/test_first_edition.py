"""Three updates of the demo have the same numbers as in the first edition, commit a24f547.

dpo.py, data.py and model.py were written anew after that commit. The numbers below are those of its
own code, in float32 on a CPU with torch 2.13.0. To make them, its code did these steps, with its
train.load, train.load_parts, data.batches, dpo.dpo_objective, dpo.train_step and dpo.means:

- torch.manual_seed(0), then the model and the training pairs of `train.py --demo`;
- the first three batches of its order with seed 0, 32 pairs each;
- for each of their pairs a reference: the start's logps, and a shift by the pair's number, so that
  the policy differs from it and no loss is near 0;
- torch.manual_seed(1), then adapters of width 64, of the kind "none" or "parallel";
- an update for each batch: AdamW without weight decay, fused, at the demo's rate 5e-4 throughout,
  with its beta, 1.0, and gradients clipped to 1.0.

The test repeats these steps with the new code.
"""

import pytest
import torch
from torch import Tensor, nn

import data
import dpo
from model import GPT2, GPT2Config, add_adapters

FIRST_EDITION = {                  # for each update: loss, grad_norm, logps/chosen, logps/rejected
    "none": [
        (3.5482886761073202, 26.010229110717773, -45.45567560195923, -44.88403356075287),
        (3.3482654990864296, 22.64533233642578, -38.54824137687683, -49.75048589706421),
        (0.932027680342104, 6.618805408477783, -31.30237126350403, -53.02518427371979),
    ],
    "parallel": [
        (3.5482886761073202, 9.253137588500977, -45.45567560195923, -44.88403356075287),
        (7.463008236934429, 11.73177433013916, -44.6664514541626, -45.441415309906006),
        (4.3405371051402355, 7.740175247192383, -43.99086153507233, -45.97733294963837),
    ],
}
# Of the start: how many weights there are; then the sum of the weights, that of their absolute
# values, and that of each weight times its place in its parameter, which shows another order.
FIRST_WEIGHTS = (446080, 634.2940856278799, 8497.609668492443, 146175.85743065694)
# The same without the last one, of the weights that train.
FIRST_TRAINED = {"none": FIRST_WEIGHTS[:3],
                 "parallel": (33152, 0.8230304734003369, 264.3710640048213)}
FIRST_PAIR_NUMBERS = [40998, 36627, 43354]             # their sum in each update


def checksum(parameters: list[Tensor]) -> tuple[int, float, float, float]:
    """What FIRST_WEIGHTS says."""
    count = 0
    total = 0.0
    absolute = 0.0
    by_place = 0.0
    for parameter in parameters:
        weights = parameter.detach().double().flatten()
        count += len(weights)
        total += weights.sum().item()
        absolute += weights.abs().sum().item()
        by_place += (weights * torch.arange(len(weights))).sum().item()
    return count, total, absolute, by_place


def shifted_start(model: GPT2, batch: data.PackedBatch) -> Tensor:
    """A reference (2B,) that differs from the policy, by up to 24 nats."""
    chosen_shift = 12.0 * ((7 * batch.indices) % 5 - 2)
    rejected_shift = 12.0 * ((3 * batch.indices) % 4 - 1)
    with torch.no_grad():
        return dpo.packed_logps(model, batch) + torch.cat([chosen_shift, rejected_shift])


@pytest.mark.parametrize("adapter", ["none", "parallel"])
def test_three_updates_have_the_numbers_of_the_first_edition(adapter):
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_layer=2, n_head=4, n_embd=128, n_positions=128, vocab_size=257,
                            n_inner=512))
    nn.init.normal_(model.wte.weight, std=0.1)
    assert checksum(list(model.parameters())) == pytest.approx(FIRST_WEIGHTS, rel=1e-6)

    splits, _ = data.split(data.demo_pairs(3000, seed=0), [], val_share=0.1, test_share=0.1)
    pairs, _ = data.tokenize(splits["train"], data.encoding_of(demo=True), max_tokens=100,
                             max_prompt_tokens=60)
    updates = data.batches(pairs, batch_pairs=32, micro_pairs=32, seed=0)
    batches = []
    for _ in range(3):
        batch, = next(updates)
        batches.append(batch._replace(reference_logps=shifted_start(model, batch)))
    assert len(pairs) == 2459
    assert [batch.indices.sum().item() for batch in batches] == FIRST_PAIR_NUMBERS

    torch.manual_seed(1)
    add_adapters(model, adapter, width=64)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert checksum(trained)[:3] == pytest.approx(FIRST_TRAINED[adapter], rel=1e-6)

    def loss_function(model: GPT2, batch: data.PackedBatch) -> dict[str, Tensor]:
        return dpo.dpo_metrics(dpo.packed_logps(model, batch), batch.reference_logps, beta=1.0)

    optimizer = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.0, fused=True)
    for batch, expected in zip(batches, FIRST_EDITION[adapter], strict=True):
        metrics = dpo.train_step(model, [batch], optimizer, loss_function, max_norm=1.0)
        found = [metrics[name] for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected")]
        assert found == pytest.approx(expected, rel=1e-5)
