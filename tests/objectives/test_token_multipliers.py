"""Token-level multipliers against plain Python, and against autograd of the published surrogates, in float64."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from test_multipliers import CASES as LOG_RATIO_CASES
from test_multipliers import clamp, close, gradient

from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.cispo import Cispo
from vespo_lightning.objectives.dppo import Dppo
from vespo_lightning.objectives.m2po import M2po
from vespo_lightning.objectives.minirl import MiniRl
from vespo_lightning.objectives.minpro import Minpro
from vespo_lightning.objectives.sapo import Sapo


def with_empty_responses():
    """Responses without tokens first, in the middle and last, and one that is masked out at its start and end."""
    ratios = [[], [0.4, -0.2], [], [0.3, -1.2, 0.9, 0.1, -0.6], [], []]
    masks = [[], [True] * 2, [], [False, True, True, True, False], [], []]
    return ratios, [1.0, -2.0, 1.0, 0.7, -1.0, 0.5], masks


IN_BOTH_PRECISIONS = [Sapo(), Cispo(), Dppo(), Dppo("binary_kl"), Dppo("topk_tv"), Dppo("topk_kl"), Minpro()]
IN_BOTH_PRECISIONS += [M2po(), M2po(mode="adaptive_clip"), MiniRl()]
CASES = LOG_RATIO_CASES | {"empty responses": with_empty_responses}
case = pytest.mark.parametrize("case", list(CASES))


def rows(case: str):
    """One (log-ratios, advantage, mask) per response."""
    return zip(*CASES[case](), strict=True)


def log_probs(case: str) -> list[list[tuple[float, float]]]:
    """(old, new) of each token, whose difference is its log-ratio; one of them drawn, both at most 0."""
    rng = random.Random(5)
    found = []
    for ratios, _, _ in rows(case):
        higher = [-rng.expovariate(1.0) * rng.choice([1e-6, 0.05, 1.0, 8.0]) for _ in ratios]
        pairs = zip(higher, ratios, strict=True)
        found.append([(top - r, top) if r >= 0 else (top, top + r) for top, r in pairs])
    return found


def probable_batch(make_batch, case: str) -> TokenBatch:
    """The case with log-probs on both sides, NaN outside the mask. Recomputed ones are the engine's, plus noise."""
    batch = make_batch(*CASES[case]())
    pairs = torch.tensor([p for row in log_probs(case) for p in row], dtype=torch.float64).reshape(-1, 2)
    old, new = torch.where(batch.loss_mask[:, None], pairs, float("nan")).unbind(1)
    noise = 0.1 * torch.randn(len(old), generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return dataclasses.replace(batch, log_prob=new, behaviour_log_prob=old, recomputed_log_prob=old + noise)


def sech_squared(x: float) -> float:
    return 4 / (math.exp(x) + math.exp(-x)) ** 2 if abs(x) < 300 else 0.0


@case
@pytest.mark.parametrize(("positive", "negative"), [(1.0, 1.05), (0.3, 8.0)])
def test_sapo_equals_formula(make_batch, case, positive, negative):
    expected = []
    for ratios, advantage, mask in rows(case):
        tau = positive if advantage > 0 else negative
        for log_ratio, in_loss in zip(ratios, mask, strict=True):
            ratio = math.exp(log_ratio) if abs(log_ratio) <= 20 else 0.0
            gate = sech_squared(tau * (ratio - 1) / 2)
            expected.append(ratio * gate * advantage if in_loss else 0.0)
    close(Sapo(positive, negative).multiplier(make_batch(*CASES[case]())), expected)


@case
@pytest.mark.parametrize(("low", "high"), [(0.0, 5.0), (0.8, 1.2), (0.0, 1e8)])
def test_cispo_equals_formula(make_batch, case, low, high):
    expected = []
    for ratios, advantage, mask in rows(case):
        for log_ratio, in_loss in zip(ratios, mask, strict=True):
            weight = clamp(math.exp(clamp(log_ratio, -20, 20)), low, high)
            expected.append(weight * advantage if in_loss else 0.0)
    close(Cispo(low, high).multiplier(make_batch(*CASES[case]())), expected)


@case
@pytest.mark.parametrize(("low", "high"), [(0.0, 5.0), (0.5, 1.5), (0.0, 1e8)])
def test_minpro_equals_formula(make_batch, case, low, high):
    expected = []
    for ratios, advantage, mask in rows(case):
        prefix: list[float] = []
        for log_ratio, in_loss in zip(ratios, mask, strict=True):
            if not in_loss:
                expected.append(0.0)
                continue
            ratio = math.exp(clamp(log_ratio, -20, 20))
            expected.append(clamp(min(prefix, default=1.0) * ratio, low, high) * advantage)
            prefix.append(ratio)
    close(Minpro(low, high).multiplier(make_batch(*CASES[case]())), expected)


def divergence(name: str, old: float, new: float) -> float:
    m, p = math.exp(old), math.exp(new)
    if name == "binary_tv":
        return abs(m - p)
    others = math.log((-math.expm1(old) + 1e-8) / (-math.expm1(new) + 1e-8))
    return m * (old - new) - math.expm1(old) * others


@case
@pytest.mark.parametrize("name", ["binary_tv", "binary_kl"])
@pytest.mark.parametrize(("threshold", "cap"), [(None, 5.0), (0.01, None), (0.6, 1.1)])
def test_dppo_equals_formula(make_batch, case, name, threshold, cap):
    limit = threshold if threshold is not None else {"binary_tv": 0.15, "binary_kl": 0.05}[name]
    expected = []
    for (_, advantage, mask), pairs in zip(rows(case), log_probs(case), strict=True):
        for (old, new), in_loss in zip(pairs, mask, strict=True):
            far = divergence(name, old, new) > limit
            masked = far and ((advantage > 0 and new > old) or (advantage < 0 and new < old))
            ratio = min(math.exp(clamp(new - old, -20, 20)), cap or math.inf)
            expected.append(ratio * advantage if in_loss and not masked else 0.0)
    close(Dppo(name, threshold, cap).multiplier(probable_batch(make_batch, case)), expected)


@pytest.mark.parametrize("name", ["binary_tv", "binary_kl"])
def test_some_tokens_of_the_cases_are_masked_and_some_are_not(make_batch, name):
    """Otherwise the comparison above shows little."""
    batch = probable_batch(make_batch, "far")
    found = Dppo(name).statistics(batch)
    assert found["objective/clip_low_share"] > 0.05 and found["objective/clip_high_share"] > 0.05
    assert 0.1 < found["objective/zero_share"] < 0.5


@case
@pytest.mark.parametrize(("positive", "negative"), [(1.0, 1.05), (0.3, 8.0)])
def test_sapo_equals_autograd_of_sigmoid_surrogate(make_batch, case, positive, negative):
    batch = make_batch(*CASES[case]())
    advantage = batch.advantage[batch.sequence_index]
    tau = torch.where(advantage > 0, advantage.new_tensor(positive), advantage.new_tensor(negative))

    def surrogate(log_ratio):
        return (4 / tau * torch.sigmoid(tau * (log_ratio.clamp(-20, 20).exp() - 1)) * advantage).sum()

    # atol: autograd takes p (1 - p), which has lost its digits where the gate is closed
    expected = gradient(batch, surrogate)
    torch.testing.assert_close(Sapo(positive, negative).multiplier(batch), expected, rtol=1e-10, atol=1e-13)


@case
def test_cispo_and_minpro_equal_autograd_of_weighted_log_prob(make_batch, case):
    batch = make_batch(*CASES[case]())
    advantage = batch.advantage[batch.sequence_index]

    def cispo(log_ratio):
        weight = log_ratio.detach().clamp(-20, 20).exp().clamp(max=5.0)
        return (weight * advantage * log_ratio).sum()

    def minpro(log_ratio):
        ratio = log_ratio.detach().clamp(-20, 20).exp()
        prefix = torch.ones_like(ratio)
        for t in range(len(ratio)):
            before = (batch.sequence_index == batch.sequence_index[t]) & batch.loss_mask
            before[t:] = False
            if before.any():
                prefix[t] = ratio[before].min()
        return ((prefix * ratio).clamp(max=5.0) * advantage * log_ratio).sum()

    close(Cispo().multiplier(batch), gradient(batch, cispo))
    close(Minpro().multiplier(batch), gradient(batch, minpro))


@case
@pytest.mark.parametrize("name", ["binary_tv", "binary_kl"])
def test_dppo_equals_autograd_of_masked_surrogate(make_batch, case, name):
    """``M r A`` itself, where no weight is bounded: the mask has no derivative and r' = r."""
    batch = probable_batch(make_batch, case)
    advantage = batch.advantage[batch.sequence_index]
    new, old = batch.log_prob, batch.behaviour_log_prob
    p, m = new.exp(), old.exp()
    others = torch.log((1 - m + 1e-8) / (1 - p + 1e-8))
    far = ((m - p).abs() > 0.15) if name == "binary_tv" else (m * (old - new) + (1 - m) * others > 0.05)
    keep = ~(far & (((advantage > 0) & (p > m)) | ((advantage < 0) & (p < m))))
    inside = (new - old).abs() <= 20

    def surrogate(log_ratio):
        return torch.where(keep & inside, log_ratio.clamp(-20, 20).exp() * advantage, 0.0).sum()

    ours = torch.where(inside, Dppo(name, cap=None).multiplier(batch), 0.0)
    close(ours, gradient(batch, surrogate))


@pytest.mark.parametrize("objective", IN_BOTH_PRECISIONS, ids=lambda o: o.name)
def test_float32_agrees_with_float64(make_batch, objective):
    double = probable_batch(make_batch, "near")
    single = dataclasses.replace(
        double,
        log_prob=double.log_prob.float(),
        behaviour_log_prob=double.behaviour_log_prob.float(),
        recomputed_log_prob=double.recomputed_log_prob.float(),
        advantage=double.advantage.float(),
    )
    multiplier = objective.multiplier(single)
    assert multiplier.dtype == torch.float32
    torch.testing.assert_close(multiplier.double(), objective.multiplier(double), rtol=1e-5, atol=1e-30)
