"""Rejection of whole responses by the geometric mean or the product of their ratios, and which lengths it prefers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from ragged_batches import build

from vespo_lightning.corrections.rejection import Geometric, SequenceRejection
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.vespo import Vespo

FILTERS = {
    "geometric": (Geometric(0.9, 1.1), lambda row: sum(row) / max(len(row), 1), 0.9, 1.1),
    "sequence_rejection": (SequenceRejection(), sum, 0.5, 2.0),
}
every_filter = pytest.mark.parametrize(("correction", "of", "low", "high"), FILTERS.values(), ids=FILTERS.keys())
both_denominators = pytest.mark.parametrize("denominator", ["recomputed", "behaviour"])

MISMATCH = [[0.3, -0.2], [], [0.12] * 5, [-0.08] * 9, [0.5, 0.5], [-0.4, -0.6], [25.0, -25.0], [0.0, 9.0]]
DRIFT = [[0.5, 0.5], [], [-0.1] * 5, [0.0] * 9, [-0.5, -0.4], [0.4, 0.6], [0.0, 0.0], [0.0, 0.0]]
MASKS = [[True] * len(row) for row in MISMATCH[:-1]] + [[True, False]]


def batch(denominator, advantages=None):
    return build(MISMATCH, DRIFT, advantages, MASKS, denominator=denominator)


def expected_rejected(of, low, high, denominator):
    rejected = []
    for mismatch, drift, mask in zip(MISMATCH, DRIFT, MASKS, strict=True):
        ratios = [m + (d if denominator == "behaviour" else 0) for m, d in zip(mismatch, drift, strict=True)]
        clamped = [max(min(x, 20.0), -20.0) for x, inside in zip(ratios, mask, strict=True) if inside]
        rejected.append(not low <= math.exp(of(clamped)) <= high)
    return rejected


@every_filter
@both_denominators
def test_rejected_responses(correction, of, low, high, denominator):
    expected = expected_rejected(of, low, high, denominator)
    assert 0 < sum(expected) < len(expected)
    assert correction.rejected(batch(denominator)).tolist() == expected


@every_filter
@both_denominators
def test_all_tokens_of_a_rejected_response_leave_and_nothing_else_changes(correction, of, low, high, denominator):
    before = batch(denominator)
    after = correction(before)
    gone = torch.tensor(expected_rejected(of, low, high, denominator))[before.sequence_index]
    assert torch.equal(after.loss_mask, before.loss_mask & ~gone)
    assert after.engine_log_weight is None and after.final_weight is None
    multiplier = Vespo().multiplier(after)
    assert (multiplier[gone] == 0).all()
    assert torch.equal(multiplier[~gone], Vespo().multiplier(before)[~gone])


def test_what_the_two_look_at_differs():
    results = {name: tuple(expected_rejected(*rest, "recomputed")) for name, (_, *rest) in FILTERS.items()}
    assert len(set(results.values())) == 2


def test_statistics():
    rejected = expected_rejected(sum, 0.5, 2.0, "recomputed")
    lengths = [sum(mask) for mask in MASKS]
    kept = [n for n, gone in zip(lengths, rejected, strict=True) if n and not gone]
    every = [n for n in lengths if n]
    assert SequenceRejection().statistics(batch("recomputed")) == {
        "correction/sequence_rejected_share": pytest.approx(1 - len(kept) / len(every)),
        "correction/sequence_kept_length_ratio": pytest.approx((sum(kept) / len(kept)) / (sum(every) / len(every))),
    }


def test_no_length_ratio_when_nothing_stays():
    assert Geometric().statistics(build([[5.0], [-5.0]])) == {"correction/geometric_rejected_share": 1.0}
    assert Geometric().statistics(build([[], []])) == {}


def test_they_are_length_filters_of_opposite_direction():
    """A perfect engine but for 0.031 nats of noise per token, as reported for bfloat16."""
    generator = torch.Generator().manual_seed(0)
    spread = 0.031
    lengths = [100] * 300 + [3000] * 300
    rows = [(torch.randn(n, generator=generator) * spread - spread**2 / 2).tolist() for n in lengths]
    noisy = build(rows)
    geometric = Geometric().statistics(noisy)
    sequence = SequenceRejection().statistics(noisy)
    assert geometric["correction/geometric_kept_length_ratio"] > 1.3
    assert sequence["correction/sequence_kept_length_ratio"] < 0.6
    short = ~Geometric().rejected(noisy)[:300]
    assert short.double().mean().item() == pytest.approx(0.25, abs=0.07)  # as the docstring says


@every_filter
def test_a_response_with_nan_stays_in_the_loss(correction, of, low, high):
    broken = batch("recomputed")
    broken.recomputed_log_prob[0] = math.nan
    after = correction(broken)
    assert after.loss_mask[:2].all() and Vespo().multiplier(after)[:2].isnan().all()


def test_recomputed_log_probs_are_needed_where_they_are_the_denominator():
    with pytest.raises(UserError, match="denominator=recomputed"):
        Geometric()(replace(batch("recomputed"), recomputed_log_prob=None))
    assert Geometric()(replace(batch("behaviour"), recomputed_log_prob=None)).loss_mask.any()


@pytest.mark.parametrize("build_filter", [Geometric, SequenceRejection])
def test_bounds_outside_their_domain(build_filter):
    with pytest.raises(UserError, match=rf"^correction\.{build_filter.name}\.low=1.2 is not allowed"):
        build_filter(1.2, 2.0)
    with pytest.raises(UserError, match=rf"^correction\.{build_filter.name}\.high=0.8 is not allowed"):
        build_filter(0.5, 0.8)
