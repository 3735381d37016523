"""Masked importance sampling: which tokens leave, and that they leave the product W with ratio 1."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from ragged_batches import build, close

from vespo_lightning.corrections.masked_is import MaskedIs
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.objectives.kernel import Kernel
from vespo_lightning.objectives.respo import Respo
from vespo_lightning.objectives.sequence_is import SequenceIs
from vespo_lightning.objectives.topr import Topr
from vespo_lightning.objectives.vespo import Vespo

MISMATCH = [[0.3, 2.0, -1.5], [], [-30.0], [1.6, 0.1], [9.0]]
DRIFT = [[0.1, -0.4, 0.05], [], [0.2], [-0.3, 0.0], [-0.1]]
MASKS = [[True, True, True], [], [True], [True, True], [False]]
ADVANTAGES = [1.0, 1.0, -1.0, -0.5, 2.0]
sequence_objectives = pytest.mark.parametrize(
    "objective", [Vespo(), Kernel(), SequenceIs(), Topr(), Respo()], ids=lambda o: o.name
)


def batch(**options):
    return build(MISMATCH, DRIFT, ADVANTAGES, MASKS, **options)


def test_tokens_outside_the_range_leave_and_the_others_get_their_ratio():
    after = MaskedIs()(batch())
    assert after.loss_mask.tolist() == [True, False, False, False, True, True, False]
    close(after.engine_log_weight.exp(), [math.exp(0.3), 1, 1, 1, math.exp(1.6), math.exp(0.1), 1])
    found = Grpo().multiplier(after)
    assert found[[1, 2, 3, 6]].tolist() == [0.0] * 4
    close(found[[0, 5]], [math.exp(0.1 + 0.3), -0.5 * math.exp(0.1)])


@pytest.mark.parametrize(("bounds", "kept"), [((0.5, 2.0), 2), ((0.0, 5.0), 5), ((0.2, 8.0), 5), ((1.0, 1.0), 0)])
def test_bounds(bounds, kept):
    assert int(MaskedIs(*bounds)(batch()).loss_mask.sum()) == kept


def test_bounds_themselves_stay():
    edges = [math.log(0.5), math.log(0.4999999), math.log(5.0), math.log(5.0000001)]
    assert MaskedIs()(build([edges])).loss_mask.tolist() == [True, False, True, False]


@sequence_objectives
def test_phi_is_that_of_the_tokens_that_stay(objective):
    after = MaskedIs()(batch())
    only = build([[0.3], [], [], [1.6, 0.1], []], [[0.1], [], [], [-0.3, 0.0], []], ADVANTAGES)
    only = replace(only, engine_log_weight=torch.tensor([0.3, 1.6, 0.1], dtype=torch.float64))
    assert torch.equal(objective.phi(after), objective.phi(only))


def test_one_masked_token_does_not_silence_the_response():
    """With ratio 0 in the product phi would be exp(-2 * 18.42 + 3) = 2e-15."""
    phi = Vespo().phi(MaskedIs()(build([[0.1] * 9 + [7.0]])))
    w = math.exp(0.9)
    assert phi.item() == pytest.approx(w**2 * math.exp(3 * (1 - w))) and phi.item() > 0.07


@sequence_objectives
def test_with_behaviour_as_denominator_it_masks_by_the_whole_ratio_and_multiplies_nothing(objective):
    after = MaskedIs()(batch(denominator="behaviour"))
    whole = [0.4, 1.6, -1.45, None, 1.3, 0.1, None]
    assert after.loss_mask.tolist() == [x is not None and 0.5 <= math.exp(x) <= 5 for x in whole]
    assert after.engine_log_weight is None and after.final_weight is None
    only = build([[0.4, 1.6], [], [], [1.3, 0.1], []], None, ADVANTAGES, denominator="behaviour")
    torch.testing.assert_close(objective.phi(after), objective.phi(only), rtol=1e-12, atol=0)


def test_the_denominator_decides_not_whether_recomputed_log_probs_are_there():
    with_them = batch(denominator="behaviour")
    without = replace(with_them, recomputed_log_prob=None)
    assert torch.equal(MaskedIs()(with_them).loss_mask, MaskedIs()(without).loss_mask)


def test_statistics():
    weights = [math.exp(x) for x in (0.3, 1.6, 0.1)]
    assert MaskedIs().statistics(batch()) == {
        "correction/mis_masked_share": pytest.approx(3 / 6),
        "correction/mis_weight_mean": pytest.approx(sum(weights) / 3),
    }
    assert MaskedIs().statistics(batch(denominator="behaviour")) == {
        "correction/mis_masked_share": pytest.approx(2 / 6)
    }


def test_a_nan_ratio_stays_in_the_loss():
    broken = batch()
    broken.recomputed_log_prob[0] = math.nan
    after = MaskedIs()(broken)
    assert after.loss_mask[0] and Grpo().multiplier(after)[0].isnan()


@pytest.mark.parametrize(
    ("bounds", "key"),
    [((-0.1, 5.0), "low=-0.1"), ((1.5, 5.0), "low=1.5"), ((0.5, 0.9), "high=0.9"), ((0.5, 1e9), "high=1000000000.0")],
)
def test_bounds_outside_their_domain(bounds, key):
    with pytest.raises(UserError, match=rf"^correction\.mis\.{key}"):
        MaskedIs(*bounds)
