from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vespo_lightning.diagnostics.variance_bound import largest_slope, require_bound, second_moments
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.kernel import Kernel
from vespo_lightning.objectives.sequence import by_sign
from vespo_lightning.objectives.vespo import Vespo

quick = settings(max_examples=80, deadline=None, derandomize=True)
GRID = torch.linspace(-25, 15, 400_001, dtype=torch.float64)  # of log W, steps of 1e-4
SIGNS = ("positive", "negative")


def one_token_responses(log_weights: list[float], advantages: list[float]) -> TokenBatch:
    count = len(log_weights)
    return TokenBatch(
        log_prob=torch.tensor(log_weights, dtype=torch.float64),
        behaviour_log_prob=torch.zeros(count, dtype=torch.float64),
        sequence_index=torch.arange(count),
        loss_mask=torch.ones(count, dtype=torch.bool),
        advantage=torch.tensor(advantages, dtype=torch.float64),
        group=torch.zeros(count, dtype=torch.int64),
        version_made=torch.zeros(count, dtype=torch.int32),
        policy_version=0,
    )


@given(c1=st.floats(1.02, 6.0), c2=st.floats(0.05, 6.0))
@quick
def test_largest_slope_is_the_supremum_over_all_weights(c1, c2):
    ratio = torch.exp((c1 - 1) * GRID - c2 * torch.expm1(GRID))
    assert largest_slope(c1, c2) == pytest.approx(ratio.max().item(), rel=1e-6)
    assert ratio.max().item() <= largest_slope(c1, c2) * (1 + 1e-12)


def test_published_constants():
    assert largest_slope(2, 3) == pytest.approx(2.463, abs=5e-4)
    assert largest_slope(3, 2) == pytest.approx(1.0, abs=1e-12)


def test_edges():
    assert largest_slope(1.0, 2.0) == pytest.approx(math.exp(2.0))  # approached for W -> 0
    assert largest_slope(1.0, 0.0) == 1.0
    assert largest_slope(1.5, 0.0) == largest_slope(0.99, 3.0) == largest_slope(0.0, 0.0) == math.inf


def test_slope_is_finite_exactly_where_the_ratio_is_bounded():
    """c1 just below 1: phi / W grows without end as W falls."""
    for c1, bounded in [(0.9, False), (1.0, True), (1.1, True)]:
        ratio = torch.exp((c1 - 1) * torch.tensor([-50.0, -500.0], dtype=torch.float64) + 2.0)
        assert (ratio[1] <= ratio[0]).item() is bounded is math.isfinite(largest_slope(c1, 2.0))


@given(
    log_weights=st.lists(st.floats(-40, 40), min_size=1, max_size=12),
    constants=st.tuples(*[st.floats(1.0, 6.0), st.floats(0.1, 6.0)] * 2),
    data=st.data(),
)
@quick
def test_bound_holds_on_any_batch(log_weights, constants, data):
    advantages = data.draw(st.lists(st.sampled_from([1.0, -0.5, 0.0]), min_size=len(log_weights)))[: len(log_weights)]
    statistics = Vespo(*constants).statistics(one_token_responses(log_weights, advantages))
    for sign, value in zip(SIGNS, (1.0, -0.5), strict=True):
        present = value in advantages
        assert (f"objective/second_moment_{sign}" in statistics) == present
        if present:
            bound = statistics[f"objective/variance_bound_{sign}"]
            assert statistics[f"objective/second_moment_{sign}"] <= bound * (1 + 1e-12)


@pytest.mark.parametrize(("c1", "c2"), [(2.0, 3.0), (3.0, 2.0), (1.4, 0.3)])
def test_bound_is_tight_where_all_weights_are_at_the_steepest_point(c1, c2):
    steepest = math.log((c1 - 1) / c2)
    statistics = Kernel(c1, c2, variance_bound=True).statistics(one_token_responses([steepest] * 3, [1.0, 1.0, -2.0]))
    for sign in SIGNS:
        second, bound = (statistics[f"objective/{name}_{sign}"] for name in ("second_moment", "variance_bound"))
        assert second == pytest.approx(bound, rel=1e-12)
    apart = Kernel(c1, c2, variance_bound=True).statistics(one_token_responses([steepest, steepest + 1], [1.0, 1.0]))
    assert apart["objective/second_moment_positive"] < 0.99 * apart["objective/variance_bound_positive"]


def test_both_sides_equal_the_formula_with_the_constants_of_the_sign():
    weights, advantages = [-1.0, 0.3, 0.1, -0.4, 2.0], [1.0, 2.0, -1.0, -3.0, 0.0]
    objective = Vespo(1.7, 0.9, 2.2, 1.3)
    statistics = objective.statistics(one_token_responses(weights, advantages))
    for sign, chosen, c1, c2 in [("positive", weights[:2], 1.7, 0.9), ("negative", weights[2:4], 2.2, 1.3)]:
        phi = [math.exp(c1 * w + c2 * (1 - math.exp(w))) for w in chosen]
        z = sum(phi) / len(phi)
        c = sum(p * math.exp(w) for p, w in zip(phi, chosen, strict=True)) / sum(phi)
        k = ((c1 - 1) / c2) ** (c1 - 1) * math.exp(c2 - c1 + 1)
        second = sum(p * p for p in phi) / len(phi)
        assert statistics[f"objective/second_moment_{sign}"] == pytest.approx(second, rel=1e-12)
        assert statistics[f"objective/variance_bound_{sign}"] == pytest.approx(z * k * c, rel=1e-12)


def test_weights_are_those_that_the_coefficient_is_computed_from():
    """Clamped and normalised: with the raw W the bound would not hold."""
    batch = one_token_responses([-1e4, 1e4], [1.0, -1.0])
    result = second_moments(Vespo(), batch, 2.5, 1.0)
    low, high = math.log(1e-8), 20.0
    phi = torch.tensor([low, high], dtype=torch.float64)
    phi = torch.exp(by_sign(batch.advantage, 2.0, 3.0) * phi - by_sign(batch.advantage, 3.0, 2.0) * torch.expm1(phi))
    assert result["objective/variance_bound_positive"] == pytest.approx(2.5 * phi[0].item() * math.exp(low), rel=1e-12)
    assert result["objective/variance_bound_negative"] == pytest.approx(phi[1].item() * math.exp(high), rel=1e-12)


@pytest.mark.parametrize(
    ("c1", "c2", "sentence"),
    [
        (
            0.9,
            2.0,
            r"^objective\.variance_bound=true .* objective\.c1_positive=0\.9 below 1.*objective\.variance_bound=f",
        ),
        (0.0, 0.0, r"objective\.c1_positive=0 below 1.*raise objective\.c1_positive to at least 1"),
        (2.0, 0.0, r"objective\.c2_positive=0 and c1_positive=2 above 1.*raise objective\.c2_positive above 0"),
    ],
)
def test_constants_without_a_bound_are_refused(c1, c2, sentence):
    with pytest.raises(UserError, match=sentence):
        require_bound(c1, c2, "_positive")
    with pytest.raises(UserError, match=sentence):
        Vespo(c1_positive=c1, c2_positive=c2)
    Vespo(c1_positive=c1, c2_positive=c2, variance_bound=False)
    with pytest.raises(UserError, match=sentence.replace("_positive", "_negative")):
        Vespo(c1_negative=c1, c2_negative=c2)
    with pytest.raises(UserError, match=sentence.replace("_positive", "")):
        Kernel(c1, c2, variance_bound=True)
    assert not Kernel(c1, c2).variance_bound
