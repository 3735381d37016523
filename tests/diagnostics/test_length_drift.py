from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from vespo_lightning.diagnostics.length_drift import (
    LONGEST_USABLE,
    fit_length,
    length_drift,
    length_statistics,
    starved_positives,
    usable_length,
    usable_lengths,
)
from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.gspo import Gspo
from vespo_lightning.objectives.respo import Respo
from vespo_lightning.objectives.sequence_is import SequenceIs
from vespo_lightning.objectives.topr import Topr
from vespo_lightning.objectives.vespo import Vespo


def responses(log_ratios: list[list[float]], advantages: list[float] | None = None, version: int = 3) -> TokenBatch:
    count = len(log_ratios)
    ratio = torch.tensor([r for row in log_ratios for r in row], dtype=torch.float64)
    return TokenBatch(
        log_prob=ratio - 1,
        behaviour_log_prob=-torch.ones(len(ratio), dtype=torch.float64),
        sequence_index=torch.repeat_interleave(torch.arange(count), torch.tensor([len(row) for row in log_ratios])),
        loss_mask=torch.ones(len(ratio), dtype=torch.bool),
        advantage=torch.tensor(advantages or [1.0] * count, dtype=torch.float64),
        group=torch.zeros(count, dtype=torch.int64),
        version_made=torch.full((len(ratio),), version, dtype=torch.int32),
        policy_version=3,
    )


def test_fit_equals_a_fit_by_numpy():
    rng = np.random.default_rng(1)
    length = rng.integers(1, 50, 30)
    log_weight = -0.02 * length + rng.normal(0, 0.3, 30)
    fit = fit_length(torch.tensor(log_weight), torch.tensor(length))
    (slope, _), covariance = np.polyfit(length, log_weight, 1, cov=True)
    assert fit.slope == pytest.approx(slope, rel=1e-9)
    assert fit.error == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-9)


def test_two_responses_have_a_slope_and_no_certainty():
    fit = fit_length(torch.tensor([0.0, -1.0]), torch.tensor([2, 6]))
    assert fit.slope == -0.25 and fit.error == math.inf


def test_constant_drift_per_token_is_the_slope():
    batch = responses([[-0.01] * n for n in (1, 5, 9, 30, 31)])
    assert length_drift(batch).slope == pytest.approx(-0.01, rel=1e-9)
    statistics = length_statistics(batch, longest=400)
    assert statistics["importance/log_weight_length_bias"] == pytest.approx(-4.0, rel=1e-9)
    assert "importance/log_weight_length_bias" not in length_statistics(batch, None)


def test_mean_log_weight_by_length_quartile():
    lengths = [1, 2, 3, 4, 5, 6, 7, 8]
    batch = responses([[0.1 * n] + [0.0] * (n - 1) for n in lengths])
    statistics = length_statistics(batch, None)
    quartiles = [statistics[f"importance/log_weight_length_q{q}"] for q in (1, 2, 3, 4)]
    assert quartiles == pytest.approx([0.15, 0.35, 0.55, 0.75], rel=1e-9)


def test_equal_lengths_share_a_quartile_and_empty_ones_are_absent():
    statistics = length_statistics(responses([[0.1]] * 5 + [[0.2] * 3]), None)
    assert statistics["importance/log_weight_length_q1"] == pytest.approx(0.1)
    assert statistics["importance/log_weight_length_q4"] == pytest.approx(0.6)
    assert not {f"importance/log_weight_length_q{q}" for q in (2, 3)} & statistics.keys()


def test_only_tokens_in_the_loss_count():
    batch = responses([[0.5, 9.0], [0.25, 0.25], [7.0]])
    batch = dataclasses.replace(batch, loss_mask=torch.tensor([True, False, True, True, False]))
    assert length_drift(batch).slope == pytest.approx(0.0, abs=1e-12)
    assert length_statistics(batch, None)["importance/log_weight_length_q1"] == pytest.approx(0.5)


def test_equal_lengths_have_no_slope():
    assert length_statistics(responses([[0.1, 0.2], [0.3, -1.0]]), 10) == {}
    assert length_statistics(responses([[0.1]]), 10) == {}


# ---- starved responses -----------------------------------------------------------------------------------------------


def test_share_and_mass_of_starved_positives():
    batch = responses([[-2.0], [-0.5, -0.6], [-0.9], [0.2], [-5.0]], [1.0, 1.0, 2.0, 0.5, -1.0])
    phi = Vespo().phi(batch)
    result = starved_positives(Vespo().coefficient(batch), batch)
    assert result["importance/starved_positive_share"] == 0.5
    assert result["importance/starved_positive_mass"] == pytest.approx((phi[:2].sum() / phi[:4].sum()).item())
    respo = starved_positives(Respo().coefficient(batch), batch)
    assert respo["importance/starved_positive_mass"] > result["importance/starved_positive_mass"]


def test_no_positives_and_no_mass():
    batch = responses([[-2.0], [0.1]], [-1.0, 0.0])
    assert starved_positives(torch.ones(2), batch) == {}
    batch = responses([[-2.0], [0.1]], [1.0, 1.0])
    assert starved_positives(torch.zeros(2), batch) == {"importance/starved_positive_share": 0.5}


# ---- usable length ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "lengths"),
    [
        (2e-3, (759, 1266, 244, 621)),
        (1.5e-3, (1012, 1688, 326, 828)),
        (5e-4, (3036, 5064, 978, 2483)),
        (2e-4, (7589, 12660, 2444, 6208)),
        (5e-5, (30355, 50641, 9776, 24832)),
    ],
)
def test_lengths_at_which_the_mean_alone_pushes_vespo_down(kl, lengths):
    """To 0.5 and 0.1, good responses and bad ones, from the KL divergence per token of published engines."""
    found = [usable_length(Vespo(), -kl, sign, level) for sign in (1.0, -1.0) for level in (0.5, 0.1)]
    assert found == pytest.approx(lengths, abs=1)


@pytest.mark.parametrize("objective", [Vespo(), Vespo(1.5, 0.4, 2.5, 6.0), Respo(), SequenceIs(2.0)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("drift", [-0.003, 0.0007])
def test_coefficient_falls_below_a_half_just_beyond_the_usable_length(objective, sign, drift):
    length = usable_length(objective, drift, sign)

    def phi(tokens: float) -> float:
        log_weight = torch.tensor([drift * tokens], dtype=torch.float64)
        return objective.kernel(log_weight, torch.tensor([sign])).item()

    if length == LONGEST_USABLE:
        assert phi(length) >= 0.5
    else:
        assert phi(length) >= 0.5 > phi(length + 1)
        assert all(phi(tokens) >= 0.5 for tokens in np.linspace(0, length, 200))


def test_methods_that_never_suppress_have_no_limit():
    assert usable_length(Topr(), -0.1, 1.0) == LONGEST_USABLE
    assert usable_length(Topr(), -0.1, -1.0) == math.floor(math.log(2) / 0.1)
    assert usable_length(Vespo(), 0.0, 1.0) == usable_length(Vespo(), 1e-9, 1.0) == LONGEST_USABLE
    assert math.isnan(usable_length(Vespo(), math.nan, 1.0))


def test_normalised_weights():
    """A mean over the length does not add up; a root adds up as the square."""
    assert usable_length(Vespo(normalisation="length"), -0.1, 1.0) == LONGEST_USABLE
    assert usable_length(Vespo(normalisation="length"), -1.6, 1.0) == 0
    assert usable_length(Gspo(clip_high=1e-3), 2e-3, 1.0) == 0
    assert usable_length(Vespo(), -0.1, 1.0) == 15
    assert usable_length(Vespo(normalisation="sqrt_length"), -0.1, 1.0) == pytest.approx(15.178**2, abs=1)


def test_drift_is_measured_at_equal_weights_only():
    rows = [[-0.002, 0.004], [-0.008]]
    fresh = usable_lengths(responses(rows), Vespo())
    assert fresh["mismatch/token_log_ratio_mean"] == pytest.approx(-0.002, rel=1e-9)
    assert fresh["mismatch/token_log_ratio_std"] == pytest.approx(np.std([-0.002, 0.004, -0.008]), rel=1e-9)
    assert fresh["mismatch/usable_length_positive"] == pytest.approx(759, abs=1)
    assert fresh["mismatch/usable_length_negative"] == pytest.approx(244, abs=1)
    stale = responses(rows, version=2)
    assert usable_lengths(stale, Vespo()) == {}
    recomputed = dataclasses.replace(stale, recomputed_log_prob=stale.behaviour_log_prob - 0.001)
    assert usable_lengths(recomputed, Vespo())["mismatch/token_log_ratio_mean"] == pytest.approx(-0.001, rel=1e-9)
