"""M2PO's mask and adaptive clip against plain Python, in float64."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_multipliers import close, gradient
from test_objective_properties import anything_finite, batches, quick, usual, with_tokens
from test_token_multipliers import CASES, case, clamp

from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.objectives.m2po import M2po


def tokens(case: str) -> list[tuple[float, float, bool, bool]]:
    """(clamped log-ratio, advantage, in the loss, beyond the clamp) of every token."""
    found = []
    for ratios, advantage, mask in zip(*CASES[case](), strict=True):
        found += [(clamp(r, -20, 20), advantage, m, abs(r) > 20) for r, m in zip(ratios, mask, strict=True)]
    return found


def harmful(log_ratio: float, advantage: float, in_loss: bool) -> bool:
    return in_loss and ((advantage > 0 and log_ratio > 0) or (advantage < 0 and log_ratio < 0))


def moved_away(case: str) -> list[float]:
    """(log r)^2 of the trust-region tokens."""
    return [r * r for r, advantage, in_loss, _ in tokens(case) if harmful(r, advantage, in_loss)]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def multipliers(case: str, silent) -> list[float]:
    """``r A``, 0 where ``silent(log r)`` holds for a trust-region token."""
    expected = []
    for r, advantage, in_loss, beyond in tokens(case):
        masked = beyond or not in_loss or (harmful(r, advantage, in_loss) and silent(r))
        expected.append(0.0 if masked else math.exp(r) * advantage)
    return expected


@case
@pytest.mark.parametrize("budget", [0.04, 0.1, 0.5, 1e-6])
def test_mask_equals_the_algorithm(make_batch, case, budget):
    """One after the other, the largest of what is left, with its equals."""
    left = moved_away(case)
    while left and mean(left) > budget:
        left = [v for v in left if v < max(left)]
    limit = max(left, default=-1.0)
    expected = multipliers(case, lambda r: r * r > limit)
    close(M2po(budget).multiplier(make_batch(*CASES[case]())), expected)


def tau_by_bisection(values: list[float], budget: float) -> float:
    if not values or mean(values) <= budget:
        return math.inf
    low, high = 0.0, 20.0
    for _ in range(200):
        middle = (low + high) / 2
        if mean([min(v, middle * middle) for v in values]) > budget:
            high = middle
        else:
            low = middle
    return low


def tau_of_the_data(values: list[float], budget: float) -> float:
    """The released code's: largest abs(log r) at which the capped sum stays below the budget, 0 if none does."""
    if not values or mean(values) <= budget:
        return math.inf
    fitting = [v for v in values if mean([min(u, v) for u in values]) < budget]
    return math.sqrt(max(fitting, default=0.0))


@case
@pytest.mark.parametrize("tau_of", [tau_by_bisection, tau_of_the_data])
@pytest.mark.parametrize("budget", [0.04, 0.1, 0.5, 1e-6])
@pytest.mark.parametrize(("low", "high"), [(0.3, 0.5), (None, None), (1.0, None)])
def test_adaptive_clip_equals_its_definition(make_batch, case, tau_of, budget, low, high):
    tau = tau_of(moved_away(case), budget)
    smallest = min(math.exp(-tau), 1 - low) if low is not None else math.exp(-tau)
    largest = max(math.exp(tau), 1 + high) if high is not None else math.exp(tau)
    expected = multipliers(case, lambda r: not smallest <= math.exp(r) <= largest)
    close(M2po(budget, "adaptive_clip", low, high).multiplier(make_batch(*CASES[case]())), expected)


def test_the_cases_are_masked_in_part(make_batch):
    """Otherwise the comparisons above show little."""
    for mode in ("mask", "adaptive_clip"):
        for budget in (0.04, 0.1):
            found = M2po(budget, mode).statistics(make_batch(*CASES["far"]()))
            assert found["objective/second_moment"] > budget
            assert found["objective/clip_low_share"] > 0.02 and found["objective/clip_high_share"] > 0.02
            assert found["objective/zero_share"] < found["objective/trust_region_share"] - 0.2


@case
def test_mask_equals_autograd_of_the_masked_surrogate(make_batch, case):
    batch = make_batch(*CASES[case]())
    advantage = batch.advantage[batch.sequence_index]
    keep = M2po().coefficient(batch) > 0

    def surrogate(log_ratio):
        return torch.where(keep, log_ratio.clamp(-20, 20).exp() * advantage, 0.0).sum()

    close(M2po().multiplier(batch), gradient(batch, surrogate))


@case
def test_adaptive_clip_equals_autograd_of_the_clipped_surrogate(make_batch, case):
    batch = make_batch(*CASES[case]())
    advantage = batch.advantage[batch.sequence_index]
    tau = tau_by_bisection(moved_away(case), 0.04)

    def surrogate(log_ratio):
        ratio = log_ratio.clamp(-20, 20).exp()
        clipped = ratio.clamp(min(math.exp(-tau), 0.7), max(math.exp(tau), 1.5))
        return torch.minimum(ratio * advantage, clipped * advantage).sum()

    close(M2po(mode="adaptive_clip").multiplier(batch), gradient(batch, surrogate))


@pytest.mark.parametrize("seed", range(20))
def test_no_smaller_set_of_masked_tokens_would_do(make_batch, seed):
    """Every subset of 9 trust-region tokens, removed."""
    rng = random.Random(seed)
    ratios = [abs(rng.gauss(0, 0.3)) for _ in range(9)]
    batch = make_batch([[r] for r in ratios], [1.0] * 9)
    enough = [
        len(removed)
        for size in range(10)
        for removed in itertools.combinations(range(9), size)
        if size == 9 or mean([r * r for place, r in enumerate(ratios) if place not in removed]) <= 0.04
    ]
    assert int((M2po().coefficient(batch) == 0).sum()) == min(enough)


def test_entries_of_one_size_are_masked_together(make_batch):
    """0.3^2 twice and 0.01 make 0.063; without one of them 0.05, without both 0.01."""
    batch = make_batch([[0.3], [0.1, -0.3], [-0.3]], [1.0, 1.0, -1.0])
    coefficient = M2po(0.055).coefficient(batch)
    assert coefficient.tolist() == pytest.approx([0.0, math.exp(0.1), math.exp(-0.3), 0.0])


def test_smallest_entry_beyond_the_budget_is_masked_too(make_batch):
    batch = make_batch([[0.3, -0.3], [-0.4, 0.4]], [1.0, -1.0])
    assert M2po().coefficient(batch).tolist() == pytest.approx([0.0, math.exp(-0.3), 0.0, math.exp(0.4)])


def test_other_responses_decide(make_batch):
    """So a coefficient has to be taken of the whole mini-batch, before it is cut into micro-batches."""
    loud, quiet = [0.5] + [0.01] * 3, [0.01] * 3
    together = M2po().coefficient(make_batch([loud, quiet, quiet], [1.0, 1.0, 1.0]))
    assert together[0].item() == pytest.approx(math.exp(0.5))
    alone = M2po().coefficient(make_batch([loud], [1.0]))
    assert alone[0].item() == 0.0 and (alone[1:] > 0).all()
    assert M2po().coefficient(make_batch([loud, quiet, quiet], [1.0, 0.0, 0.0]))[0].item() == 0.0


def test_masked_and_towards_tokens_do_not_count(make_batch):
    """Only trust-region tokens in the loss enter the second moment."""
    batch = make_batch([[0.1, -5.0], [5.0, -0.1], [9.0]], [1.0, -1.0, 1.0], [[True] * 2, [True] * 2, [False]])
    assert M2po(0.0101).multiplier(batch).count_nonzero() == 4
    assert M2po(0.0101).statistics(batch)["objective/second_moment"] == pytest.approx(0.01)


def test_adaptive_range_is_never_narrower_than_its_floors(make_batch):
    """tau = 0.2 without floors: every entry is above the budget."""
    logs = [math.log(r) for r in (1.3, 1.49, 1.51)]
    batch = make_batch([logs, [math.log(r) for r in (0.8, 0.71, 0.69)]], [1.0, -1.0])
    assert (M2po(mode="adaptive_clip").coefficient(batch) == 0).tolist() == [False, False, True] * 2
    assert (M2po(mode="adaptive_clip", miniclip_high=None).coefficient(batch) == 0).tolist()[:3] == [True] * 3
    assert (M2po(mode="adaptive_clip", miniclip_low=None).coefficient(batch) == 0).tolist()[3:] == [True] * 3


def test_within_the_budget_nothing_is_clipped(make_batch):
    """Unlike PPO, however far a single token is."""
    batch = make_batch([[2.0] + [0.001] * 199], [1.0])
    assert Grpo().coefficient(batch)[0].item() == 0.0
    for mode in ("mask", "adaptive_clip"):
        assert M2po(mode=mode).coefficient(batch)[0].item() == pytest.approx(math.exp(2.0))


def test_statistics(make_batch):
    """9 active tokens, 5 of them in the trust region: 0.6, 0.1 and -0.5, -0.1, -0.1."""
    ratios = [[0.6, 0.1, -0.2], [-0.5, -0.1, -0.1, 0.3, 0.0, 0.0], [9.0], [-9.0]]
    masks = [[True] * 3, [True] * 6, [True], [False]]
    batch = make_batch(ratios, [1.0, -1.0, 0.0, -1.0], masks)
    expected = {
        "objective/coefficient_positive_mean": (math.exp(0.1) + math.exp(-0.2)) / 3,
        "objective/coefficient_negative_mean": (2 * math.exp(-0.1) + math.exp(0.3) + 2) / 6,
        "objective/zero_share": 2 / 9,
        "objective/clip_low_share": 1 / 9,
        "objective/clip_high_share": 1 / 9,
        "objective/trust_region_share": 5 / 9,
        "objective/second_moment": (0.36 + 0.25 + 3 * 0.01) / 5,
        "objective/second_moment_kept": 0.01,
    }
    assert M2po(0.04).statistics(batch) == pytest.approx(expected, rel=1e-12)
    clipped = M2po(0.04, "adaptive_clip").statistics(batch)
    assert clipped == pytest.approx(expected, rel=1e-12)
    assert "objective/second_moment" not in M2po().statistics(make_batch([[0.0]], [1.0]))
    assert M2po().statistics(make_batch([[0.1]], [0.0])) == {}


@given(batch=batches(anything_finite), budget=st.sampled_from([1e-6, 0.04, 3.0, 500.0]))
@quick
def test_what_is_left_is_within_the_budget(batch, budget):
    """And with one more value it would not be."""
    objective = M2po(budget)
    found = objective.statistics(batch)
    kept = found.get("objective/second_moment_kept", 0.0)
    assert kept <= budget * (1 + 1e-12)
    log_ratio = batch.log_ratio.clamp(-20, 20).double()
    away = batch.loss_mask & (log_ratio * batch.advantage.sign()[batch.sequence_index] > 0)
    square, masked = log_ratio.square()[away], (objective.coefficient(batch) == 0)[away]
    masked &= batch.log_ratio.abs()[away] <= 20
    if masked.any():
        smallest = square[masked].min()
        assert square[square <= smallest].mean() > budget * (1 - 1e-12)


@pytest.mark.parametrize("mode", ["mask", "adaptive_clip"])
@given(batch=batches(usual), data=st.data())
@quick
def test_the_same_tokens_are_masked_in_any_order(mode, batch, data):
    """Exactly, ties included."""
    objective = M2po(mode=mode)
    sequences = data.draw(st.permutations(range(len(batch.advantage))))
    order = torch.cat([(batch.sequence_index == s).nonzero()[:, 0] for s in sequences])
    lengths = torch.tensor([int((batch.sequence_index == s).sum()) for s in sequences])
    other = with_tokens(batch, order, torch.repeat_interleave(torch.arange(len(sequences)), lengths), sequences)
    whole, reordered = objective.multiplier(batch), objective.multiplier(other)
    assert torch.equal((whole == 0)[order], reordered == 0)
