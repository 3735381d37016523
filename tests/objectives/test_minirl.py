"""MiniRL: mask on the recomputed ratio, weight on the true one."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from test_multipliers import close, gradient
from test_token_multipliers import CASES, case, clamp, log_probs, probable_batch

from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.objectives.minirl import MiniRl


def three_log_probs(make_batch, engine: list[float], recomputed: list[float], now: list[float], advantages):
    """One token per sequence, with its probability under each of the three."""
    batch = make_batch([[0.0]] * len(now), advantages)
    logs = [torch.tensor(p, dtype=torch.float64).log() for p in (engine, recomputed, now)]
    return dataclasses.replace(batch, behaviour_log_prob=logs[0], recomputed_log_prob=logs[1], log_prob=logs[2])


@case
@pytest.mark.parametrize(("low", "high", "cap"), [(0.2, 0.27, 5.0), (0.0, 0.0, None), (1.0, 3.0, 1.0)])
def test_equals_formula(make_batch, case, low, high, cap):
    batch = probable_batch(make_batch, case)
    recomputed = iter(batch.recomputed_log_prob.tolist())
    expected = []
    for (_, advantage, mask), pairs in zip(zip(*CASES[case](), strict=True), log_probs(case), strict=True):
        for (engine, now), in_loss in zip(pairs, mask, strict=True):
            old = next(recomputed)
            if not in_loss:
                expected.append(0.0)
                continue
            since = math.exp(clamp(now - old, -20, 20))
            masked = (advantage > 0 and since > 1 + high) or (advantage < 0 and since < 1 - low)
            weight = min(math.exp(clamp(now - engine, -20, 20)), cap or math.inf)
            expected.append(0.0 if masked else weight * advantage)
    close(MiniRl(low, high, cap).multiplier(batch), expected)


def test_the_case_is_masked_in_part(make_batch):
    """Otherwise the comparison above shows little."""
    found = MiniRl().statistics(probable_batch(make_batch, "far"))
    assert found["objective/clip_low_share"] > 0.1 and found["objective/clip_high_share"] > 0.1
    assert found["objective/zero_share"] < 0.6


@case
def test_equals_autograd_of_the_masked_weighted_log_prob(make_batch, case):
    batch = probable_batch(make_batch, case)
    advantage = batch.advantage[batch.sequence_index]
    since = (batch.log_prob - batch.recomputed_log_prob).exp()
    keep = ~(((advantage > 0) & (since > 1.27)) | ((advantage < 0) & (since < 0.8)))

    def surrogate(log_ratio):
        weight = log_ratio.detach().clamp(-20, 20).exp().clamp(max=5.0)
        return torch.where(keep & batch.loss_mask, weight * advantage * log_ratio, 0.0).sum()

    close(MiniRl().multiplier(batch), gradient(batch, surrogate))


def test_mismatch_weighs_and_staleness_clips(make_batch):
    """True ratios 2, 2 and 1.35; recomputed ones 1.2, 1.3 and 1.2."""
    batch = three_log_probs(make_batch, [0.3, 0.3, 0.4], [0.5, 0.6 / 1.3, 0.45], [0.6, 0.6, 0.54], [1.0] * 3)
    assert MiniRl().coefficient(batch).tolist() == pytest.approx([2.0, 0.0, 1.35])
    assert Grpo(0.2, 0.27).coefficient(batch).tolist() == pytest.approx([0.0, 0.0, 0.0])


@pytest.mark.parametrize("which", ["behaviour", "recomputed"])
def test_the_denominator_of_the_run_changes_nothing(make_batch, which):
    batch = three_log_probs(make_batch, [0.3, 0.5], [0.4, 0.6], [0.45, 0.3], [1.0, 1.0])
    other = dataclasses.replace(batch, denominator=which)
    assert MiniRl().coefficient(other).tolist() == pytest.approx([1.5, 0.6])
    assert MiniRl().statistics(other) == MiniRl().statistics(batch)


@case
def test_without_mismatch_and_cap_it_is_the_clip_of_ppo(make_batch, case):
    """Up to the clamp, of which GRPO follows the derivative."""
    batch = make_batch(*CASES[case]())
    inside = batch.log_ratio.abs() <= 20
    ours, clipped = MiniRl(cap=None).multiplier(batch), Grpo(0.2, 0.27).multiplier(batch)
    assert torch.equal(torch.where(inside, ours, 0.0), clipped)


def test_statistics(make_batch):
    engine, now = [0.05, 0.5, 0.6, 0.4, 0.1], [0.6, 0.5, 0.3, 0.2, 0.6]
    batch = three_log_probs(make_batch, engine, [0.55, 0.3, 0.5, 0.22, 0.1], now, [1.0, 1.0, -1.0, -1.0, 0.0])
    assert MiniRl().statistics(batch) == pytest.approx(
        {
            "objective/coefficient_positive_mean": (5 + 0) / 2,
            "objective/coefficient_negative_mean": (0 + 0.5) / 2,
            "objective/zero_share": 2 / 4,
            "objective/clip_low_share": 1 / 4,
            "objective/clip_high_share": 1 / 4,
            "objective/capped_share": 1 / 4,
        },
        rel=1e-12,
    )
    assert "objective/capped_share" not in MiniRl(cap=None).statistics(batch)


def test_it_asks_for_recomputed_log_probs(make_batch):
    assert MiniRl().needs == {"recomputed_log_prob"}
    with pytest.raises(AssertionError, match="without recomputed"):
        MiniRl().coefficient(dataclasses.replace(make_batch([[0.1]], [1.0]), recomputed_log_prob=None))
