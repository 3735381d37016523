"""Off-policy sequence masking: bad responses that the policy has left."""

from __future__ import annotations

import math

import pytest
from ragged_batches import build

from vespo_lightning.corrections.opsm import Opsm
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.grpo import Grpo

MISMATCH = [[0.1, 0.1], [0.1, 0.1], [], [0.3], [-0.2], [-0.2, 0.0], [0.0]]
DRIFT = [[-0.3, -0.1], [-0.3, -0.1], [], [-0.2], [0.1], [0.0, -9.0], [-0.2]]
MASKS = [[True, True], [True, True], [], [True], [True], [True, False], [True]]
ADVANTAGES = [-1.0, 1.0, -1.0, -0.1, -2.0, -1.0, 0.0]


def batch(denominator):
    return build(MISMATCH, DRIFT, ADVANTAGES, MASKS, denominator=denominator)


@pytest.mark.parametrize(
    ("denominator", "delta", "rejected"),
    [
        ("recomputed", 1e-4, [0, 3]),  # mean log(old / pi): 0.2, -, 0.2, -0.1, 0
        ("recomputed", 0.19, [0, 3]),
        ("recomputed", 0.21, []),
        ("behaviour", 1e-4, [0, 4, 5]),  # 0.1, -, -0.1, 0.1, 0.2
        ("behaviour", 0.15, [5]),
    ],
)
def test_bad_responses_beyond_delta_leave_the_loss(denominator, delta, rejected):
    before = batch(denominator)
    found = Opsm(delta).rejected(before)
    assert found.nonzero()[:, 0].tolist() == rejected
    after = Opsm(delta)(before)
    assert after.loss_mask.equal(before.loss_mask & ~found[before.sequence_index])
    assert after.engine_log_weight is None and after.final_weight is None


def test_nothing_leaves_where_the_ratio_is_one():
    same = build([[0.4, -0.3], [0.2]], None, [-1.0, -1.0])
    assert not Opsm(0.0).rejected(same).any()


def test_statistics_are_of_bad_responses():
    assert Opsm().statistics(batch("recomputed")) == {
        "correction/opsm_rejected_share": 2 / 4,
        "correction/opsm_kept_length_ratio": pytest.approx(1 / (5 / 4)),
    }
    assert Opsm().statistics(build([[0.1]], None, [1.0])) == {}


def test_a_response_with_nan_stays_in_the_loss():
    broken = batch("recomputed")
    broken.log_prob[0] = math.nan
    assert Grpo().multiplier(Opsm()(broken))[0].isnan()


def test_negative_delta():
    with pytest.raises(
        UserError, match=r"^correction\.opsm\.delta=-0.1 is not allowed; give a finite number at least 0$"
    ):
        Opsm(-0.1)
