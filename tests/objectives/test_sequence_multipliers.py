"""Sequence-level objectives against plain Python and against autograd of the surrogates, in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from test_multipliers import CASES as COMMON_CASES
from test_multipliers import clamp, close, gradient

from vespo_lightning.objectives.gspo import Gspo
from vespo_lightning.objectives.kernel import Kernel
from vespo_lightning.objectives.respo import Respo
from vespo_lightning.objectives.sequence_is import SequenceIs
from vespo_lightning.objectives.topr import Topr
from vespo_lightning.objectives.vespo import Vespo
from vespo_lightning.training.aggregation import Totals, token_weights

LOG_1E8 = math.log(1e-8)


def with_empty():
    """Empty responses at both ends and between; one wholly masked; drift of either direction."""
    ratios = [[], [0.3, -0.9], [], [0.4], [-0.5, 0.2, 0.1], [2.0, 7.0], []]
    masks = [[], [True, True], [], [False], [True, False, True], [True, False], []]
    return ratios, [1.0, -0.5, 0.0, 2.0, 0.7, -1.3, -1.0], masks


CASES = COMMON_CASES | {"empty responses": with_empty}
every_case = pytest.mark.parametrize("case", list(CASES))


# ---- the formulas: phi from the clamped sum s of log-ratios, the number of tokens t and the advantage a -----------


def gamma(c1: float, c2: float, log_weight: float) -> float:
    weight = math.exp(clamp(log_weight, LOG_1E8, 20))
    return weight**c1 * math.exp(c2 * (1 - weight)) if c2 * weight < 700 else 0.0


def vespo(power: float) -> Callable[[float, int, float], float]:
    return lambda s, t, a: gamma(*((2, 3) if a >= 0 else (3, 2)), s / max(t, 1) ** power)


def truncated(cap: float) -> Callable[[float, int, float], float]:
    return lambda s, t, a: min(math.exp(clamp(s, -20, 20)), cap)


def gspo(low: float, high: float) -> Callable[[float, int, float], float]:
    def coefficient(s: float, t: int, a: float) -> float:
        ratio = math.exp(s / max(t, 1))
        clipped = (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low) or ratio > math.exp(10)
        return 0.0 if clipped else ratio

    return coefficient


def topr(s: float, t: int, a: float) -> float:
    return min(math.exp(clamp(s, -20, 20)), 1.0) if a < 0 else 1.0


def respo(s: float, t: int, a: float) -> float:
    weight = math.exp(clamp(s, -20, 20))
    if weight > 1e5:
        return 0.0
    if a >= 0:
        return (1 + weight) / 2 * math.exp(1 - weight)
    return math.sqrt(weight) * math.exp(2 * (1 - math.sqrt(weight)))


FORMULAS = {
    "vespo, length": (Vespo(normalisation="length"), vespo(1)),
    "vespo, sqrt_length": (Vespo(normalisation="sqrt_length"), vespo(0.5)),
    "kernel": (Kernel(), lambda s, t, a: gamma(3, 2, s)),
    "kernel, other constants": (Kernel(0.3, 2.9), lambda s, t, a: gamma(0.3, 2.9, s)),
    "sequence_is": (SequenceIs(), truncated(math.inf)),
    "sequence_is, truncated": (SequenceIs(1.5), truncated(1.5)),
    "gspo": (Gspo(), gspo(3e-4, 4e-4)),
    "gspo, wide": (Gspo(0.1, 0.3), gspo(0.1, 0.3)),
    "topr": (Topr(), topr),
    "respo": (Respo(), respo),
}
every_formula = pytest.mark.parametrize(("objective", "formula"), FORMULAS.values(), ids=FORMULAS.keys())


def expected_multiplier(formula, ratios, advantages, masks) -> list[float]:
    expected = []
    for row, advantage, mask in zip(ratios, advantages, masks, strict=True):
        total = math.fsum(clamp(r, -20, 20) for r, m in zip(row, mask, strict=True) if m)
        phi = formula(total, sum(mask), advantage)
        expected += [phi * advantage if m else 0.0 for m in mask]
    return expected


@every_case
@every_formula
def test_multiplier_equals_formula(make_batch, case, objective, formula):
    data = CASES[case]()
    close(objective.multiplier(make_batch(*data)), expected_multiplier(formula, *data))


def test_the_cases_tell_the_formulas_apart(make_batch):
    """So that each comparison above can fail."""
    data = CASES["far"]()
    results = {name: tuple(expected_multiplier(formula, *data)) for name, (_, formula) in FORMULAS.items()}
    assert len(set(results.values())) == len(results)


@every_formula
def test_float32_agrees_with_float64(make_batch, objective, formula):
    single = objective.multiplier(make_batch(*CASES["far"](), dtype=torch.float32))
    double = objective.multiplier(make_batch(*CASES["far"]()))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=5e-6, atol=1e-30)


@every_formula
def test_no_tokens_at_all(make_batch, objective, formula):
    batch = make_batch([[], []], [1.0, -1.0])
    assert objective.multiplier(batch).shape == (0,)
    assert objective.phi(batch).tolist() == [1.0, 1.0]
    assert objective.statistics(batch) == {}


@every_formula
@pytest.mark.parametrize("sign", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficient_is_exactly_one_on_policy(make_batch, objective, formula, sign, dtype):
    assert objective.phi(make_batch([[0.0], [0.0] * 7], [sign] * 2, dtype=dtype)).tolist() == [1.0, 1.0]


@every_formula
def test_masked_tokens_are_as_if_they_were_not_there(make_batch, objective, formula):
    masked = make_batch([[0.2, 7.0, -0.21], [5.0]], [-1.0, 1.0], [[True, False, True], [False]])
    without = make_batch([[0.2, -0.21], []], [-1.0, 1.0])
    assert torch.equal(objective.phi(masked), objective.phi(without))
    assert objective.statistics(masked) == objective.statistics(without)


@every_formula
def test_nan_in_the_loss_stays_visible(make_batch, objective, formula):
    batch = make_batch([[float("nan"), 0.1], [0.1]], [-1.0, -1.0])
    assert objective.multiplier(batch).isnan().tolist() == [True, True, False]


def test_differences_that_overflow_float32_are_finite(make_batch):
    """One side of the ratio at the least, the other at the largest float32: log-ratios of -inf and inf."""
    largest = torch.finfo(torch.float32).max
    batch = make_batch([[largest, -largest], [largest], [-largest]] * 2, [1.0] * 3 + [-1.0] * 3, dtype=torch.float32)
    batch = dataclasses.replace(batch, behaviour_log_prob=-batch.log_prob)
    assert batch.log_ratio.isinf().all()
    for objective, _ in FORMULAS.values():
        assert objective.multiplier(batch).isfinite().all()
        assert objective.phi(batch)[0] == 1.0  # both clamped, to 20 and -20


# ---- autograd of the surrogates, where no clamp acts -----------------------------------------------------------------


surrogate_cases = pytest.mark.parametrize("case", ["near", "far", "one token", "empty responses"])


@surrogate_cases
def test_plain_importance_sampling_is_the_gradient_of_the_reweighted_return(make_batch, case):
    batch = make_batch(*CASES[case]())
    expected = gradient(batch, lambda log_ratio: (batch.sequence_sum(log_ratio).exp() * batch.advantage).sum())
    close(SequenceIs().multiplier(batch), expected)


@surrogate_cases
def test_respo_is_the_gradient_of_its_surrogate_for_bad_responses(make_batch, case):
    """E[f(W) A] with f(W) = -exp(2 - 2 sqrt W), so that f'(W) W = phi(W). That of good ones has no closed form."""
    batch = make_batch(*CASES[case]())
    batch = dataclasses.replace(batch, advantage=-batch.advantage.abs())

    def surrogate(log_ratio):
        root = (batch.sequence_sum(log_ratio) / 2).exp()
        return (-torch.exp(2 - 2 * root) * batch.advantage).sum()

    close(Respo().multiplier(batch), gradient(batch, surrogate))


@surrogate_cases
@pytest.mark.parametrize(("low", "high"), [(3e-4, 4e-4), (0.1, 0.3), (1.0, 9.0)])
def test_gspo_is_the_gradient_of_its_surrogate_under_its_aggregation(make_batch, case, low, high):
    """Mean over the sequences of min(s A, clip(s) A): the 1/T of its gradient is in the weights of the tokens."""
    batch = make_batch(*CASES[case]())
    sequences = len(batch.advantage)

    def surrogate(log_ratio):
        ratio = (batch.sequence_sum(log_ratio) / batch.length.clamp(min=1)).exp()
        clipped = ratio.clamp(1 - low, 1 + high)
        return torch.minimum(ratio * batch.advantage, clipped * batch.advantage).sum() / sequences

    totals = Totals(tokens=len(batch.log_prob), sequences=sequences)
    weights = token_weights("seq-mean-token-mean", batch.length, batch.sequence_index, totals)
    close(weights * Gspo(low, high).multiplier(batch), gradient(batch, surrogate))
