"""Truncated importance sampling against plain Python, and where its weight enters each kind of objective."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from ragged_batches import build, close

from vespo_lightning.corrections.tis import TokenTis
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.cispo import Cispo
from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.objectives.gspo import Gspo
from vespo_lightning.objectives.kernel import Kernel
from vespo_lightning.objectives.reinforce import Reinforce
from vespo_lightning.objectives.respo import Respo
from vespo_lightning.objectives.sequence_is import SequenceIs
from vespo_lightning.objectives.topr import Topr
from vespo_lightning.objectives.vespo import Vespo

MISMATCH = [[0.3, 2.0, -1.5], [], [-30.0], [30.0, 0.1], [0.7]]
DRIFT = [[0.1, -0.4, 0.05], [], [0.2], [-0.3, 0.0], [-0.1]]
MASKS = [[True, True, True], [], [True], [True, True], [False]]
ADVANTAGES = [1.0, 1.0, -1.0, -0.5, 2.0]


def batch(**options):
    return build(MISMATCH, DRIFT, ADVANTAGES, MASKS, **options)


def weight(mismatch: float, cap: float = 2.0) -> float:
    return min(math.exp(max(min(mismatch, 20), -20)), cap)


@pytest.mark.parametrize("cap", [1.0, 2.0, 5.0])
def test_weight_is_the_truncated_ratio_and_one_outside_the_loss(cap):
    found = TokenTis(cap)(batch()).engine_log_weight.exp()
    close(found, [weight(x, cap) for x in (0.3, 2.0, -1.5, -30, 30, 0.1)] + [1.0])


@pytest.mark.parametrize("objective", [Grpo(), Cispo(), Reinforce(), Gspo(0.5, 0.5)], ids=lambda o: o.name)
def test_objectives_on_tokens_multiply_the_finished_coefficient(objective):
    plain, after = batch(), TokenTis()(batch())
    weights = [weight(x) for x in (0.3, 2.0, -1.5, -30, 30, 0.1)] + [1.0]
    expected = objective.multiplier(plain) * torch.tensor(weights, dtype=torch.float64)
    assert not torch.equal(expected, objective.multiplier(plain))
    torch.testing.assert_close(objective.multiplier(after), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("objective", [Vespo(), Kernel(), SequenceIs(), Topr(), Respo()], ids=lambda o: o.name)
def test_objectives_on_responses_take_it_into_the_product(objective):
    """phi of the batch whose policy is further away by the log-weights, and of no other."""
    plain, after = batch(), TokenTis()(batch())
    moved = replace(plain, log_prob=plain.log_prob + after.engine_log_weight)
    close(objective.multiplier(after), objective.multiplier(moved).tolist())
    assert not torch.equal(objective.multiplier(after), objective.multiplier(plain))


def test_vespo_with_it_is_the_formula():
    found = Vespo().multiplier(TokenTis()(batch()))
    w = math.exp(0.1 - 0.4 + 0.05) * weight(0.3) * weight(2.0) * weight(-1.5)
    good = w**2 * math.exp(3 * (1 - w))
    w = max(math.exp(0.2) * weight(-30), 1e-8)
    bad = w**3 * math.exp(2 * (1 - w)) * -1.0
    close(found[:4], [good] * 3 + [bad])


def test_nothing_changes_where_the_engine_agrees():
    same = build([[0.0, 0.0], [0.0]], [[0.4, -0.3], [0.1]])
    for objective in (Vespo(), Grpo()):
        assert torch.equal(objective.multiplier(TokenTis()(same)), objective.multiplier(same))


def test_weights_of_an_earlier_correction_multiply():
    earlier = torch.full((7,), 0.25, dtype=torch.float64)
    found = TokenTis()(replace(batch(), engine_log_weight=earlier)).engine_log_weight
    close(found, (TokenTis()(batch()).engine_log_weight + 0.25).tolist())


def test_statistics_count_tokens_in_the_loss():
    weights = [weight(x) for x in (0.3, 2.0, -1.5, -30, 30, 0.1)]
    assert TokenTis().statistics(batch()) == {
        "correction/tis_truncated_share": pytest.approx(2 / 6),
        "correction/tis_weight_mean": pytest.approx(sum(weights) / 6),
    }


def test_nan_of_the_engine_reaches_the_loss():
    broken = batch()
    broken.behaviour_log_prob[0] = math.nan
    assert Grpo().multiplier(TokenTis()(broken)).isnan().tolist() == [True] + [False] * 6


def test_the_ratio_against_the_engine_is_not_corrected_twice():
    with pytest.raises(UserError, match=r"^correction=tis with denominator=behaviour would count .* twice"):
        TokenTis()(batch(denominator="behaviour"))


def test_without_recomputed_log_probs():
    with pytest.raises(UserError, match="denominator=recomputed"):
        TokenTis()(replace(batch(), recomputed_log_prob=None))


@pytest.mark.parametrize("cap", [0.5, 2e8, "2", True, float("nan")])
def test_cap_outside_its_domain(cap):
    with pytest.raises(UserError, match=rf"^correction\.tis\.cap={cap} is not allowed"):
        TokenTis(cap)
