from __future__ import annotations

import math

import pytest
import torch

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.vespo import Vespo


def phi(make_batch, objective: Vespo, log_weights: list[float], sign: float, dtype=torch.float64) -> torch.Tensor:
    return objective.phi(make_batch([[w] for w in log_weights], [sign] * len(log_weights), dtype=dtype))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficient_is_exactly_one_on_policy(make_batch, sign, dtype):
    for objective in (Vespo(), Vespo(1.3, 0.7, 2.9, 3.1)):
        assert phi(make_batch, objective, [0.0], sign, dtype).item() == 1.0


@pytest.mark.parametrize(("sign", "c1", "c2", "highest"), [(1.0, 2.0, 3.0, 1.208), (-1.0, 3.0, 2.0, 1.242)])
def test_coefficient_peaks_at_c1_over_c2(make_batch, sign, c1, c2, highest):
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    values = phi(make_batch, Vespo(), grid.tolist(), sign)
    assert grid[values.argmax()].exp().item() == pytest.approx(c1 / c2, rel=1e-4)
    assert values.max().item() == pytest.approx((c1 / c2) ** c1 * math.exp(c2 - c1), rel=1e-7)
    assert values.max().item() == pytest.approx(highest, abs=5e-4)


def test_zero_advantage_takes_the_positive_constants(make_batch):
    assert phi(make_batch, Vespo(), [-1.0], 0.0).item() == phi(make_batch, Vespo(), [-1.0], 1.0).item()


def test_weight_is_a_plain_sum_whatever_the_length(make_batch):
    short_and_long = make_batch([[-0.5], [-0.005] * 100], [1.0, 1.0])
    assert Vespo().log_weight(short_and_long).tolist() == pytest.approx([-0.5, -0.5], rel=1e-12)
    long = make_batch([[0.001] * 4096], [1.0], dtype=torch.float32)
    assert Vespo().log_weight(long).item() == pytest.approx(4.096, rel=1e-6)


def test_masked_tokens_have_ratio_one(make_batch):
    masked = make_batch([[0.2, 7.0, -0.1]], [1.0], [[True, False, True]])
    without = make_batch([[0.2, -0.1]], [1.0])
    assert Vespo().phi(masked).item() == Vespo().phi(without).item()
    assert Vespo().multiplier(masked).tolist() == [
        Vespo().phi(without).item(),
        0.0,
        Vespo().phi(without).item(),
    ]


def test_clamps(make_batch):
    """Token clamp first: 1e4 and -25 make 20 - 20 = 0. Then the sum, to [log 1e-8, 20]."""
    batch = make_batch([[1e4, -25.0], [-1e4], [15.0, 15.0]], [1.0] * 3)
    assert Vespo().log_weight(batch).tolist() == [0.0, math.log(1e-8), 20.0]
    assert Vespo().phi(batch).tolist() == pytest.approx([1.0, 1e-16 * math.exp(3.0), 0.0], rel=1e-6)


def test_nan_in_the_loss_stays_visible(make_batch):
    batch = make_batch([[float("nan"), 0.1], [0.1]], [1.0, 1.0])
    assert Vespo().multiplier(batch).isnan().tolist() == [True, True, False]


def test_statistics(make_batch):
    ratios = [[0.0], [-3.0], [-3.0, 0.0], [0.5], [40.0], [9.0], [1.0, 2.0]]
    advantages = [1.0, 1.0, -1.0, -1.0, -1.0, 0.0, 1.0]
    masks = [[True], [True], [True, True], [True], [True], [True], [False, False]]
    batch = make_batch(ratios, advantages, masks)
    kernel = {w: (math.exp(2 * w + 3 - 3 * math.exp(w)), math.exp(3 * w + 2 - 2 * math.exp(w))) for w in (-3.0, 0.5)}
    low_positive, (low_negative, high_negative) = kernel[-3.0][0], (kernel[-3.0][1], kernel[0.5][1])
    assert Vespo(variance_bound=False).statistics(batch) == pytest.approx(
        common := {
            "objective/coefficient_positive_mean": (1 + low_positive) / 2,
            "objective/coefficient_negative_mean": (2 * low_negative + high_negative + 0) / 4,
            "objective/zero_share": 1 / 6,
            "objective/phi_positive_mean": (1 + low_positive) / 2,
            "objective/phi_negative_mean": (low_negative + high_negative) / 3,
            "objective/suppressed_positive_share": 1 / 2,
            "objective/suppressed_negative_share": 2 / 3,
            "objective/clamped_share": 1 / 5,
        },
        rel=1e-9,
    )
    both_sides = {
        "objective/second_moment_positive": (1 + low_positive**2) / 2,
        "objective/variance_bound_positive": math.exp(2) / 3 * (1 + low_positive * math.exp(-3)) / 2,
        "objective/second_moment_negative": (low_negative**2 + high_negative**2) / 3,
        "objective/variance_bound_negative": (low_negative * math.exp(-3) + high_negative * math.exp(0.5)) / 3,
    }
    assert Vespo().statistics(batch) == pytest.approx(common | both_sides, rel=1e-9)


def test_statistics_without_active_sequences_are_absent(make_batch):
    assert Vespo().statistics(make_batch([[0.1], [0.2]], [0.0, 0.0])) == {}


@pytest.mark.parametrize("key", ["c1_positive", "c2_positive", "c1_negative", "c2_negative"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "two", None, True])
def test_invalid_constants_are_named(key, value):
    with pytest.raises(UserError, match=rf"^objective\.{key}={value} is not allowed"):
        Vespo(**{key: value})


def test_constants_that_overflow_float32_are_refused(make_batch):
    with pytest.raises(UserError, match=r"objective\.c1_negative=5 .* lower c1_negative"):
        Vespo(c1_negative=5.0, c2_negative=0.0)
    with pytest.raises(UserError, match=r"objective\.c2_positive=90 "):
        Vespo(c1_positive=0.0, c2_positive=90.0)
    grid = [x / 10 for x in range(-200, 210)]
    for c1, c2 in [(4.0, 0.0), (0.0, 80.0), (9.0, 0.001)]:
        values = phi(make_batch, Vespo(c1, c2, variance_bound=False), grid, 1.0, torch.float32)
        assert values.isfinite().all() and values.max() > 1e30
