"""The gradient of a mini-batch does not depend on how it is cut, padded or packed; and it is the right one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pieces import fit, make_mini_batch, make_samples, tiny_policy

from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.objectives.vespo import Vespo
from vespo_lightning.rollouts.sample import MiniBatch
from vespo_lightning.training.module import PolicyModule
from vespo_lightning.training.token_batches import MiniBatchTokens

AGGREGATIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"]
TEMPERATURE, ENTROPY, LIMIT = 0.8, 0.01, 20
#: One forward pass for all, a few, and one sequence each (the longest sample has 18 tokens).
SPLITS = [(10_000, "padded"), (40, "padded"), (18, "padded"), (10_000, "packed"), (25, "packed")]


def masked_mini_batch(model) -> MiniBatch:
    """Six samples: one out of the loss, one with tokens that the policy did not write."""
    samples = make_samples(model)
    mask = np.ones(12, dtype=bool)
    mask[[0, 4, 5]] = False
    samples[3].loss_mask = mask
    return make_mini_batch(samples, in_loss=[True, True, True, True, False, True])


def gradients(model, batch, objective, aggregation, budget, layout) -> dict[str, torch.Tensor]:
    """Through PolicyModule.training_step under a Lightning trainer, at a learning rate of 0."""
    module = PolicyModule(
        model,
        objective,
        lr=0.0,
        max_grad_norm=None,
        token_budget=budget,
        layout=layout,
        temperature=TEMPERATURE,
        aggregation=aggregation,
        max_response_tokens=LIMIT,
        entropy_coefficient=ENTROPY,
        head_chunk=5,
    )
    double = next(model.parameters()).dtype == torch.float64
    fit(module, [batch], precision="64-true" if double else "32-true")
    assert module.layout == layout
    assert module.policy_version == 1 and not module.last_update.skipped
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def brute_force(model, batch: MiniBatch, objective, aggregation) -> dict[str, torch.Tensor]:
    """One plain forward pass per sample, the loss written as the names of its parts say."""
    model.zero_grad()
    tokens = sum(int(s.loss_mask.sum()) for s in batch.samples)
    for i, sample in enumerate(batch.samples):
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1] / TEMPERATURE
        log_p = torch.log_softmax(logits, -1)
        chosen = log_p.gather(1, torch.tensor(sample.response_ids).long()[:, None])[:, 0]
        in_loss = torch.from_numpy(sample.loss_mask & batch.in_loss[i])
        length = len(sample.response_ids)
        numbers = TokenBatch(
            log_prob=chosen.detach(),
            behaviour_log_prob=torch.from_numpy(sample.behaviour_log_probs),
            sequence_index=torch.zeros(length, dtype=torch.long),
            loss_mask=in_loss,
            advantage=batch.advantages[i : i + 1],
            group=torch.zeros(1, dtype=torch.long),
            version_made=torch.zeros(length, dtype=torch.int32),
            policy_version=0,
        )
        divisor = {
            "token-mean": tokens,
            "seq-mean-token-mean": len(batch.samples) * int(sample.loss_mask.sum()),
            "seq-mean-token-sum": len(batch.samples),
            "constant": len(batch.samples) * LIMIT,
        }[aggregation]
        per_token = objective.multiplier(numbers) * chosen + ENTROPY * -(log_p.exp() * log_p).sum(-1)
        loss = -(per_token * in_loss).sum() * float(np.float32(1 / divisor))  # weights are float32 by definition
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative to the norm of each tensor, the largest of all tensors."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


@pytest.mark.parametrize("objective", [Vespo(), Grpo()], ids=["vespo", "grpo"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_float64_equals_brute_force_for_every_split(objective, aggregation):
    model = tiny_policy(experts="eager").double()
    batch = masked_mini_batch(model)
    expected = brute_force(model, batch, objective, aggregation)
    for budget, layout in SPLITS:
        found = gradients(model, batch, objective, aggregation, budget, layout)
        assert largest_difference(found, expected) < 1e-10, (budget, layout)


@pytest.mark.parametrize("objective", [Vespo(), Grpo()], ids=["vespo", "grpo"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS[:2])
def test_float32_with_grouped_mm(objective, aggregation):
    model = tiny_policy(experts="grouped_mm")
    batch = masked_mini_batch(model)
    expected = brute_force(model, batch, objective, aggregation)
    for budget, layout in SPLITS:
        found = gradients(model, batch, objective, aggregation, budget, layout)
        assert largest_difference(found, expected) < 1e-5, (budget, layout)


def test_the_order_of_samples_changes_nothing():
    model = tiny_policy(experts="eager").double()
    batch = masked_mini_batch(model)
    order = [3, 0, 5, 4, 1, 2]
    shuffled = replace(
        batch,
        samples=[batch.samples[i] for i in order],
        advantages=batch.advantages[order],
        in_loss=[batch.in_loss[i] for i in order],
    )
    expected = gradients(model, batch, Vespo(), "token-mean", 40, "padded")
    found = gradients(model, shuffled, Vespo(), "token-mean", 40, "padded")
    assert largest_difference(found, expected) < 1e-10


def test_masked_samples_and_tokens_have_no_gradient():
    """Behaviour log-probs and advantages of what is masked can be anything, NaN included."""
    model = tiny_policy(experts="eager").double()
    batch = masked_mini_batch(model)
    expected = gradients(model, batch, Vespo(), "token-mean", 40, "padded")
    batch.samples[3].behaviour_log_probs[~batch.samples[3].loss_mask] = np.nan
    batch.samples[4].behaviour_log_probs[:] = np.nan
    batch.advantages[4] = 1e6
    found = gradients(model, batch, Vespo(), "token-mean", 40, "padded")
    assert largest_difference(found, expected) == 0.0


def test_an_update_with_the_brute_force_gradient():
    """Clipping and AdamW come after: the first step of AdamW moves every weight by lr * sign(gradient)."""
    model = tiny_policy(experts="eager").double()
    batch = masked_mini_batch(model)
    expected = brute_force(model, batch, Vespo(), "token-mean")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norm = float(torch.stack([g.norm() for g in expected.values()]).norm())
    module = PolicyModule(
        model,
        Vespo(),
        lr=1e-3,
        eps=0.0,
        max_grad_norm=norm / 10,
        temperature=TEMPERATURE,
        entropy_coefficient=ENTROPY,
    )
    fit(module, [batch], precision="64-true")
    assert module.last_update.grad_norm == pytest.approx(norm, rel=1e-9)
    clipped = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert float(clipped) == pytest.approx(norm / 10, rel=1e-5)
    for name, parameter in model.named_parameters():
        clear = expected[name].abs() > 1e-9 * norm
        moved = parameter.detach() - before[name]
        torch.testing.assert_close(moved[clear], -1e-3 * expected[name][clear].sign(), rtol=1e-9, atol=1e-12)


def test_tokens_of_chosen_sequences_come_in_the_order_asked_for():
    batch = masked_mini_batch(tiny_policy())
    tokens = MiniBatchTokens.build(batch, "behaviour", torch.device("cpu"))
    assert tokens.length.tolist() == [7, 2, 1, 12, 5, 9]
    assert tokens.written.tolist() == [7, 2, 1, 9, 5, 9]
    assert tokens.loss_mask.sum().item() == 7 + 2 + 1 + 9 + 0 + 9
    assert tokens.token_index([2, 0]).tolist() == [9, *range(7)]
    piece = tokens.select([4, 2], torch.arange(6.0), policy_version=3)
    wanted = [*batch.samples[4].behaviour_log_probs, *batch.samples[2].behaviour_log_probs]
    assert piece.behaviour_log_prob.tolist() == pytest.approx(wanted)
    assert piece.sequence_index.tolist() == [0] * 5 + [1]
    assert piece.advantage.tolist() == batch.advantages[[4, 2]].tolist()
    assert piece.group.tolist() == [2, 1]
    assert piece.loss_mask.tolist() == [False] * 5 + [True]
