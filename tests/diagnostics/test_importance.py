from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vespo_lightning.diagnostics import importance
from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.vespo import Vespo


def token_batch(log_ratios: list[list[float]], masks: list[list[bool]], advantages: list[float]) -> TokenBatch:
    """float32, NaN outside the loss mask."""
    mask = torch.tensor([m for row in masks for m in row])
    difference = torch.tensor([r for row in log_ratios for r in row])
    lengths = torch.tensor([len(row) for row in log_ratios])
    return TokenBatch(
        log_prob=torch.where(mask, difference - 1, float("nan")),
        behaviour_log_prob=torch.where(mask, -torch.ones_like(difference), float("nan")),
        sequence_index=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        loss_mask=mask,
        advantage=torch.tensor(advantages),
        group=torch.zeros(len(lengths), dtype=torch.int64),
        version_made=torch.zeros(len(difference), dtype=torch.int32),
        policy_version=3,
    )


@pytest.fixture
def ragged() -> tuple[TokenBatch, list[np.ndarray]]:
    """Seven sequences, one masked out as a whole; float64 log-ratios of the loss tokens of the others."""
    rng = np.random.default_rng(0)
    lengths = [1, 3, 4, 6, 9, 12, 5]
    masks = [(rng.random(n) > 0.2).tolist() for n in lengths]
    masks[0], masks[6] = [True], [False] * 5
    ratios = [rng.normal(-0.1, 0.5, n).tolist() for n in lengths]
    batch = token_batch(ratios, masks, [1.0, -1.0, 0.5, 0.0, -2.0, 1.0, 1.0])
    stored = (batch.log_prob - batch.behaviour_log_prob).double().numpy()
    index, mask = batch.sequence_index.numpy(), batch.loss_mask.numpy()
    return batch, [stored[(index == s) & mask] for s in range(6)]


def brute_ess(log_weights: np.ndarray) -> float:
    weights = np.exp(log_weights)
    return float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))


def test_statistics_equal_brute_force(ragged):
    batch, rows = ragged
    log_weight = np.array([row.sum() for row in rows])
    tokens = np.concatenate(rows)
    lengths = [len(row) for row in rows]
    longer = [n > sorted(lengths)[2] for n in lengths]  # the lower of the two middle lengths
    expected = {
        "importance/ess_ratio": brute_ess(log_weight),
        "importance/log_weight_mean": log_weight.mean(),
        "importance/log_weight_std": log_weight.std(),
        "importance/log_weight_long_mean": log_weight[longer].mean(),
        "importance/token_ratio_mean": np.exp(tokens).mean(),
        "importance/token_ratio_max": np.exp(tokens).max(),
        "importance/token_log_ratio_mean": tokens.mean(),
        "importance/token_log_ratio_std": tokens.std(),
        "importance/token_ess_ratio": brute_ess(tokens),
    }
    for rank in (1, 10, 50, 90, 99):
        expected[f"importance/log_weight_p{rank:02d}"] = np.percentile(log_weight, rank)
    assert importance.importance_statistics(batch) == pytest.approx(expected, rel=1e-12)
    assert 0 < sum(longer) < 6


def test_on_policy():
    batch = token_batch([[0.0] * 3, [0.0]], [[True] * 3, [True]], [1.0, -1.0])
    result = importance.importance_statistics(batch)
    assert result["importance/ess_ratio"] == result["importance/token_ess_ratio"] == 1.0
    assert result["importance/log_weight_std"] == result["importance/log_weight_p99"] == 0.0
    assert result["importance/token_ratio_max"] == 1.0


def test_sequences_of_one_length_have_no_longer_half():
    batch = token_batch([[0.1], [0.2]], [[True], [True]], [1.0, -1.0])
    assert "importance/log_weight_long_mean" not in importance.importance_statistics(batch)


def test_nothing_in_the_loss_gives_nothing():
    batch = token_batch([[0.1], [0.2]], [[False], [False]], [1.0, -1.0])
    assert importance.importance_statistics(batch) == {}
    assert importance.coefficient_distribution(torch.ones(2), batch) == {}


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_ess_ratio_does_not_overflow(offset):
    log_weight = torch.tensor([0.0, math.log(2), math.log(3)], dtype=torch.float64) + offset
    assert importance.ess_ratio(log_weight) == pytest.approx(36 / (3 * 14), rel=1e-9)


def test_ess_ratio_of_one_dominant_weight_is_one_over_n():
    assert importance.ess_ratio(torch.tensor([100.0, 0.0, -50.0, -1e6])) == pytest.approx(0.25, rel=1e-12)


def test_ess_ratio_of_log_normal_weights():
    """exp(-s^2) for log W ~ N(-s^2/2, s^2)."""
    log_weight = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double() - 0.5
    assert importance.ess_ratio(log_weight) == pytest.approx(math.exp(-1), rel=0.05)


def test_coefficient_distribution_counts_active_sequences_only(ragged):
    batch, _ = ragged
    phi = Vespo().phi(batch).double().numpy()
    positive, negative = phi[[0, 2, 5]], phi[[1, 4]]  # 3 has advantage 0, 6 has no token in the loss
    expected = {"importance/coefficient_ess_ratio": brute_ess(np.log(np.concatenate([positive, negative])))}
    for rank in (10, 50, 90):
        expected[f"importance/coefficient_positive_p{rank}"] = np.percentile(positive, rank)
        expected[f"importance/coefficient_negative_p{rank}"] = np.percentile(negative, rank)
    result = importance.coefficient_distribution(Vespo().coefficient(batch), batch)
    assert result == pytest.approx(expected, rel=1e-6)


def test_coefficient_of_a_sequence_is_the_mean_over_its_loss_tokens():
    batch = token_batch([[0.1] * 3, [0.1] * 2], [[True, False, True], [True, True]], [1.0, -1.0])
    coefficient = torch.tensor([1.0, float("nan"), 0.0, 0.2, 0.4])
    assert importance.sequence_coefficients(coefficient, batch).tolist() == pytest.approx([0.5, 0.3])


def test_coefficients_that_are_all_zero_have_no_ess():
    batch = token_batch([[0.1], [0.2]], [[True], [True]], [1.0, 1.0])
    assert importance.coefficient_distribution(torch.zeros(2), batch) == {
        "importance/coefficient_positive_p10": 0.0,
        "importance/coefficient_positive_p50": 0.0,
        "importance/coefficient_positive_p90": 0.0,
    }
