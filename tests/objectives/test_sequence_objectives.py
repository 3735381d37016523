"""What each sequence-level objective says of itself: shapes of the kernels, limits, statistics, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_objective_properties import batches, quick, usual

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.gspo import Gspo
from vespo_lightning.objectives.kernel import Kernel
from vespo_lightning.objectives.reinforce import Reinforce
from vespo_lightning.objectives.respo import Respo
from vespo_lightning.objectives.sequence_is import SequenceIs
from vespo_lightning.objectives.topr import Topr
from vespo_lightning.objectives.vespo import Vespo

GRID = torch.linspace(-12, 6, 180_001, dtype=torch.float64)  # of log W, steps of 1e-4
constants = st.floats(0.05, 6.0)


def over_grid(objective, sign: float) -> torch.Tensor:
    return objective.kernel(GRID, torch.full_like(GRID, sign))


# ---- the gamma kernel and VESPO's ablations --------------------------------------------------------------------------


@given(c1=constants, c2=constants)
@quick
def test_kernel_is_largest_at_c1_over_c2(c1, c2):
    values = over_grid(Kernel(c1, c2), 1.0)
    assert GRID[values.argmax()].item() == pytest.approx(math.log(c1 / c2), abs=1e-4)
    assert values.max().item() == pytest.approx((c1 / c2) ** c1 * math.exp(c2 - c1), rel=1e-6)


@given(c1=st.floats(1.01, 6.0), c2=constants)
@quick
def test_kernel_over_weight_is_bounded_for_c1_above_one(c1, c2):
    ratio = over_grid(Kernel(c1, c2), 1.0) / GRID.exp()
    bound = ((c1 - 1) / c2) ** (c1 - 1) * math.exp(c2 - c1 + 1)
    assert ratio.max().item() <= bound * (1 + 1e-9)
    assert ratio.max().item() == pytest.approx(bound, rel=1e-6)


@given(batch=batches(usual), c1=st.floats(1.0, 6.0), c2=constants)
@quick
def test_the_bound_of_the_kernel_is_that_of_vespo_and_logged_on_demand(batch, c1, c2):
    asked, plain = Kernel(c1, c2, variance_bound=True).statistics(batch), Kernel(c1, c2).statistics(batch)
    assert asked == Vespo(c1, c2, c1, c2).statistics(batch)
    added = {f"objective/{name}_{s}" for name in ("second_moment", "variance_bound") for s in ("positive", "negative")}
    assert asked.keys() - plain.keys() <= added and not plain.keys() & added
    for sign in ("positive", "negative"):
        if f"objective/phi_{sign}_mean" in plain:
            assert asked[f"objective/second_moment_{sign}"] <= asked[f"objective/variance_bound_{sign}"] * (1 + 1e-12)


def test_kernel_over_weight_is_unbounded_for_c1_below_one():
    ratio = over_grid(Kernel(0.9, 1.0), 1.0) / GRID.exp()
    assert ratio.argmax() == 0 and ratio[0] > math.exp(0.1 * 12)


@given(batch=batches(usual))
@quick
def test_kernel_is_vespo_with_equal_constants(batch):
    assert torch.equal(Kernel(1.7, 0.6).multiplier(batch), Vespo(1.7, 0.6, 1.7, 0.6).multiplier(batch))


@given(batch=batches(usual))
@quick
def test_kernel_contains_reinforce_and_importance_sampling(batch):
    assert torch.equal(Kernel(0.0, 0.0).multiplier(batch), Reinforce().multiplier(batch))
    # their lower clamps of W differ: 1e-8 and exp(-20)
    torch.testing.assert_close(Kernel(1.0, 0.0).multiplier(batch), SequenceIs().multiplier(batch), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("normalisation", "log_weights"),
    [
        ("none", [-0.4, -0.4, 0.5, 0.0, 20.0, math.log(1e-8)]),
        ("length", [-0.4, -0.1, 0.25, 0.0, 20.0, math.log(1e-8)]),
        ("sqrt_length", [-0.4, -0.2, 0.5 / math.sqrt(2), 0.0, 20.0, math.log(1e-8)]),
    ],
)
def test_normalisation_divides_by_the_tokens_in_the_loss(make_batch, normalisation, log_weights):
    ratios = [[-0.4], [-0.1] * 4, [0.2, 9.0, 0.3], [], [1e4] * 9, [-1e4] * 9]
    masks = [[True], [True] * 4, [True, False, True], [], [True] * 9, [True] * 9]
    objective = Vespo(normalisation=normalisation)
    assert objective.log_weight(make_batch(ratios, [1.0] * 6, masks)).tolist() == pytest.approx(log_weights, rel=1e-12)


def test_a_normalised_weight_is_not_reported_as_clamped(make_batch):
    batch = make_batch([[-0.4] * 4, [25.0, -1.0]], [1.0, 1.0])
    for normalisation in ("none", "length", "sqrt_length"):
        assert Vespo(normalisation=normalisation).statistics(batch)["objective/clamped_share"] == 0.5


# ---- the others ------------------------------------------------------------------------------------------------------


@given(batch=batches(usual), cap=st.floats(1.0, 1e6))
@quick
def test_truncation_changes_weights_beyond_the_cap_only(batch, cap):
    plain, truncated = SequenceIs().phi(batch).double(), SequenceIs(cap).phi(batch).double()
    torch.testing.assert_close(truncated, plain.clamp(max=cap), rtol=1e-6, atol=0.0)


def test_topr_never_weighs_a_sequence_more_than_once():
    assert over_grid(Topr(), 1.0).unique().tolist() == [1.0]
    bad = over_grid(Topr(), -1.0)
    assert torch.equal(bad, GRID.exp().clamp(max=1.0))


def test_respo_keeps_good_sequences_of_a_drifted_policy():
    good, bad = over_grid(Respo(), 1.0), over_grid(Respo(), -1.0)
    assert (good.diff() < 0).all()
    assert good[0].item() == pytest.approx(math.e / 2, rel=1e-5) and good.max() < math.e / 2
    assert GRID[bad.argmax()].item() == pytest.approx(math.log(1 / 4), abs=1e-4)
    assert bad.max().item() == pytest.approx(math.e / 2, rel=1e-9)
    assert over_grid(Vespo(), 1.0)[0] < 1e-8


@given(batch=batches(usual), low=st.floats(0.0, 1.0), high=st.floats(0.0, 3.0))
@quick
def test_gspo_never_clips_where_the_gradient_leads_towards_one(batch, low, high):
    objective = Gspo(low, high)
    log_ratio = objective.log_weight(batch)
    returning = ((batch.advantage >= 0) & (log_ratio <= 0)) | ((batch.advantage < 0) & (log_ratio >= 0))
    assert torch.equal(objective.phi(batch)[returning], log_ratio.exp().float()[returning])


def test_gspo_clips_on_either_side_of_its_range(make_batch):
    logs = [math.log(r) for r in (1.00039, 1.00041, 0.99971, 0.99969)]
    batch = make_batch([[x] * 5 for x in logs], [1.0, 1.0, -1.0, -1.0])
    assert Gspo().phi(batch).tolist() == pytest.approx([1.00039, 0.0, 0.99971, 0.0], rel=1e-12)


def test_gspo_has_no_gradient_beyond_its_clamp(make_batch):
    batch = make_batch([[9.9], [10.1], [9.9, 10.3], [30.0, -2.0]], [-1.0] * 4)
    assert Gspo().phi(batch).tolist() == pytest.approx([math.exp(9.9), 0.0, 0.0, math.exp(9.0)], rel=1e-12)


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_statistics_of_truncated_importance_sampling(make_batch):
    ratios = [[math.log(4.0)], [math.log(0.05), 0.0], [math.log(3.0)], [9.0], [25.0]]
    batch = make_batch(ratios, [1.0, 1.0, -1.0, 0.0, -1.0])
    assert SequenceIs(2.0).statistics(batch) == pytest.approx(
        {
            "objective/coefficient_positive_mean": (2 + 0.05 + 0.05) / 3,
            "objective/coefficient_negative_mean": 2.0,
            "objective/zero_share": 0.0,
            "objective/phi_positive_mean": (2 + 0.05) / 2,
            "objective/phi_negative_mean": 2.0,
            "objective/suppressed_positive_share": 1 / 2,
            "objective/suppressed_negative_share": 0.0,
            "objective/clamped_share": 1 / 4,
            "objective/capped_share": 3 / 5,
        },
        rel=1e-9,
    )
    assert "objective/capped_share" not in SequenceIs().statistics(batch)


def test_statistics_of_topr(make_batch):
    batch = make_batch([[1.0], [1.0], [-1.0, 0.0], [2.0]], [1.0, -1.0, -1.0, 0.0])
    statistics = Topr().statistics(batch)
    assert statistics["objective/capped_share"] == pytest.approx(1 / 4)
    assert statistics["objective/coefficient_negative_mean"] == pytest.approx((1 + 2 * math.exp(-1)) / 3)
    assert statistics["objective/phi_negative_mean"] == pytest.approx((1 + math.exp(-1)) / 2)


def test_statistics_of_gspo(make_batch):
    """Clip shares count tokens, as for grpo: 3 of 7 clipped above, 1 of 7 below."""
    batch = make_batch([[0.1] * 3, [-0.1], [0.0] * 3, [5.0]], [1.0, -1.0, 1.0, 0.0])
    statistics = Gspo().statistics(batch)
    assert statistics["objective/clip_high_share"] == pytest.approx(3 / 7)
    assert statistics["objective/clip_low_share"] == pytest.approx(1 / 7)
    assert statistics["objective/zero_share"] == pytest.approx(4 / 7)
    assert statistics["objective/suppressed_positive_share"] == pytest.approx(1 / 2)
    assert statistics["objective/phi_positive_mean"] == pytest.approx(1 / 2)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Kernel(c1=-0.1), r"^objective\.c1=-0\.1 is not allowed; give a finite number at least 0$"),
        (lambda: Kernel(c2=float("nan")), r"^objective\.c2=nan is not allowed"),
        (lambda: Kernel(c1=None), r"^objective\.c1=None is not allowed"),
        (lambda: Kernel(5.0, 0.0), r"^objective\.c1=5 with objective\.c2=0 gives .*; lower c1 or raise c2$"),
        (lambda: Kernel(0.0, 90.0), r"^objective\.c1=0 with objective\.c2=90 gives"),
        (
            lambda: Kernel(0.5, 2.0, variance_bound=True),
            r"^objective\.variance_bound=true .* objective\.c1=0\.5 below 1.*set objective\.variance_bound=false$",
        ),
        (lambda: SequenceIs(0.9), r"^objective\.cap=0\.9 is not allowed; give a finite number at least 1$"),
        (lambda: SequenceIs("2"), r"^objective\.cap=2 is not allowed"),
        (lambda: SequenceIs(float("inf")), r"^objective\.cap=inf is not allowed"),
        (lambda: Gspo(clip_low=1.1), r"^objective\.clip_low=1\.1 is not allowed; .* at least 0 and at most 1$"),
        (lambda: Gspo(clip_high=-1), r"^objective\.clip_high=-1 is not allowed"),
        (
            lambda: Vespo(normalisation="sqrt"),
            r"^objective\.normalisation=sqrt is unknown; valid: none, length, sqrt_length$",
        ),
        (lambda: Vespo(normalisation=None), r"^objective\.normalisation=None is unknown"),
    ],
)
def test_values_that_make_no_sense_are_named(build, sentence):
    with pytest.raises(UserError, match=sentence):
        build()
