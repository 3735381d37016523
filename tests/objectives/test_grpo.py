from __future__ import annotations

import math

import pytest

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.objectives.reinforce import Reinforce

R05, R07, R15, R4 = (math.log(r) for r in (0.5, 0.7, 1.5, 4.0))


def test_clips_only_in_the_direction_of_the_advantage(make_batch):
    ratios = [[R07, 0.0, R15], [R07, 0.0, R15]]
    coefficient = Grpo(0.2, 0.28).coefficient(make_batch(ratios, [1.0, -1.0]))
    assert coefficient.tolist() == pytest.approx([0.7, 1.0, 0.0, 0.0, 1.0, 1.5], rel=1e-12)


def test_dual_clip_stops_negative_advantages_only(make_batch):
    batch = make_batch([[R4], [R4]], [-1.0, 1.0])
    assert Grpo(0.2, 9.0, dual_clip=None).coefficient(batch).tolist() == pytest.approx([4.0, 4.0])
    assert Grpo(0.2, 9.0, dual_clip=3.0).coefficient(batch).tolist() == pytest.approx([0.0, 4.0])


def test_tokens_beyond_the_log_ratio_clamp_have_no_gradient(make_batch):
    batch = make_batch([[20.001], [19.999], [-20.001]], [-1.0, -1.0, 1.0])
    assert Grpo().coefficient(batch).tolist() == pytest.approx([0.0, math.exp(19.999), 0.0])


def test_statistics(make_batch):
    """8 active tokens: 3 positive (1 clipped), 5 negative (2 below, 1 beyond the dual clip)."""
    ratios = [[R15, 0.0, R07], [R05, R07, R4, 0.0, R15], [R15, R15], [R05]]
    masks = [[True] * 3, [True] * 5, [True] * 2, [False]]
    batch = make_batch(ratios, [2.0, -1.0, 0.0, -1.0], masks)
    assert Grpo(0.2, 0.2, 3.0).statistics(batch) == pytest.approx(
        {
            "objective/coefficient_positive_mean": (0 + 1 + 0.7) / 3,
            "objective/coefficient_negative_mean": (0 + 0 + 0 + 1 + 1.5) / 5,
            "objective/zero_share": 4 / 8,
            "objective/clip_low_share": 2 / 8,
            "objective/clip_high_share": 1 / 8,
            "objective/dual_clip_share": 1 / 8,
        },
        rel=1e-12,
    )
    assert "objective/dual_clip_share" not in Grpo().statistics(batch)
    assert Grpo().statistics(make_batch([[0.1]], [0.0])) == {}


def test_reinforce_statistics(make_batch):
    batch = make_batch([[R4, R4], [R05]], [1.0, -1.0])
    assert Reinforce().statistics(batch) == {
        "objective/coefficient_positive_mean": 1.0,
        "objective/coefficient_negative_mean": 1.0,
        "objective/zero_share": 0.0,
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clip_low", -0.1),
        ("clip_low", 1.1),
        ("clip_high", -0.2),
        ("clip_high", "wide"),
        ("dual_clip", 1.0),
        ("dual_clip", float("nan")),
    ],
)
def test_invalid_values_are_named(key, value):
    with pytest.raises(UserError, match=rf"^objective\.{key}={value} is not allowed"):
        Grpo(**{key: value})
