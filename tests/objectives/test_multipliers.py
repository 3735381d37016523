"""Multipliers against plain Python, and against autograd of the published surrogates, in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch

from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.objectives.reinforce import Reinforce
from vespo_lightning.objectives.vespo import Vespo


def ragged(spread: float, seed: int):
    """9 sequences of 1 to 40 tokens, each a group of its own: log-ratios, advantages, masks."""
    rng = random.Random(seed)
    lengths = [1, 2, 3, 5, 8, 13, 21, 34, 40]
    ratios = [[rng.gauss(0, spread / math.sqrt(length)) for _ in range(length)] for length in lengths]
    advantages = [rng.choice([-1, 1]) * rng.uniform(0.1, 2) for _ in lengths]
    advantages[3] = 0.0
    masks = [[rng.random() > 0.2 for _ in range(length)] for length in lengths]
    masks[4] = [False] * 8  # a response masked out as a whole
    return ratios, advantages, masks


def extreme():
    """Log-ratios far beyond every clamp, at the clamps, and cancelling ones."""
    ratios = [
        [1e4, 0.1],
        [-1e4, 0.1],
        [1e4, -1e4],
        [20.0],
        [-20.0],
        [-18.42, -0.0007],
        [25.0, -19.0],
        [-25.0, 19.0],
    ]
    ratios = ratios + ratios
    advantages = [1.5] * 8 + [-0.5] * 8
    return ratios, advantages, [[True] * len(row) for row in ratios]


CASES = {
    "near": lambda: ragged(0.2, 0),
    "far": lambda: ragged(2.0, 1),
    "very far": lambda: ragged(20.0, 2),
    "extreme": extreme,
    "one token": lambda: ([[0.3]], [-1.0], [[True]]),
}
case = pytest.mark.parametrize("case", list(CASES))


def clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def close(actual: torch.Tensor, expected: torch.Tensor | list[float]) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-300)


@case
@pytest.mark.parametrize("constants", [(2.0, 3.0, 3.0, 2.0), (1.1, 0.7, 0.3, 2.9), (0.0, 0.0, 1.0, 0.0)])
def test_vespo_equals_formula(make_batch, case, constants):
    ratios, advantages, masks = CASES[case]()
    expected = []
    for row, advantage, mask in zip(ratios, advantages, masks, strict=True):
        c1, c2 = constants[:2] if advantage >= 0 else constants[2:]
        total = math.fsum(clamp(r, -20, 20) for r, m in zip(row, mask, strict=True) if m)
        weight = math.exp(clamp(total, math.log(1e-8), 20))
        phi = weight**c1 * math.exp(c2 * (1 - weight)) if c2 * weight < 700 else 0.0
        expected += [phi * advantage if m else 0.0 for m in mask]
    close(Vespo(*constants, variance_bound=False).multiplier(make_batch(ratios, advantages, masks)), expected)


@case
@pytest.mark.parametrize(("low", "high", "dual"), [(0.2, 0.2, None), (0.2, 0.28, 3.0), (1.0, 9.0, 1.5)])
def test_grpo_equals_formula(make_batch, case, low, high, dual):
    ratios, advantages, masks = CASES[case]()
    expected = []
    for row, advantage, mask in zip(ratios, advantages, masks, strict=True):
        for log_ratio, in_loss in zip(row, mask, strict=True):
            ratio = math.exp(clamp(log_ratio, -20, 20))
            clipped = (
                abs(log_ratio) > 20
                or (advantage > 0 and ratio > 1 + high)
                or (advantage < 0 and ratio < 1 - low)
                or (dual is not None and advantage < 0 and ratio > dual)
            )
            expected.append(ratio * advantage if in_loss and not clipped else 0.0)
    close(Grpo(low, high, dual).multiplier(make_batch(ratios, advantages, masks)), expected)


@case
def test_reinforce_is_the_advantage(make_batch, case):
    ratios, advantages, masks = CASES[case]()
    expected = [a if m else 0.0 for a, mask in zip(advantages, masks, strict=True) for m in mask]
    close(Reinforce().multiplier(make_batch(ratios, advantages, masks)), expected)


def gradient(batch, objective_of_log_ratio) -> torch.Tensor:
    """d objective / d log_prob [T] by autograd, for a scalar function of the log-ratios [T]."""
    log_prob = batch.log_prob.clone().requires_grad_()
    log_ratio = torch.where(batch.loss_mask, log_prob - batch.behaviour_log_prob, 0.0)
    (result,) = torch.autograd.grad(objective_of_log_ratio(log_ratio), log_prob)
    return result


@case
@pytest.mark.parametrize(("low", "high", "dual"), [(0.2, 0.2, None), (0.2, 0.28, 3.0)])
def test_grpo_equals_autograd_of_clipped_surrogate(make_batch, case, low, high, dual):
    batch = make_batch(*CASES[case]())
    advantage = batch.advantage[batch.sequence_index]

    def surrogate(log_ratio):
        ratio = log_ratio.clamp(-20, 20).exp()
        value = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        if dual is not None:
            value = torch.where(advantage < 0, torch.maximum(value, dual * advantage), value)
        return value.sum()

    close(Grpo(low, high, dual).multiplier(batch), gradient(batch, surrogate))


@case
def test_vespo_equals_autograd_of_detached_coefficient(make_batch, case):
    """The published code, step by step: both clamps, W at least 1e-8, coefficient detached."""
    batch = make_batch(*CASES[case]())
    positive = batch.advantage >= 0
    k = torch.where(positive, 2.0, 3.0).double()
    rate = torch.where(positive, 3.0, 2.0).double()

    def surrogate(log_ratio):
        total = batch.sequence_sum(log_ratio.detach().clamp(-20, 20)).clamp(-20, 20)
        weight = total.exp().clamp(min=1e-8)
        phi = (rate + k * weight.log() - rate * weight).exp()
        return (batch.sequence_sum(log_ratio) * phi * batch.advantage).sum()

    close(Vespo().multiplier(batch), gradient(batch, surrogate))


@pytest.mark.parametrize("case", ["near", "far", "one token"])
@pytest.mark.parametrize("constants", [(2.0, 3.0, 3.0, 2.0), (1.1, 0.7, 2.3, 2.9)])
def test_vespo_equals_autograd_of_incomplete_gamma_surrogate(make_batch, case, constants):
    """E[f(W) A] with f(W) = e^c2 c2^-c1 gamma(c1, c2 W), so that f'(W) W = phi(W). No clamp acts here."""
    batch = make_batch(*CASES[case]())
    constant = torch.tensor(constants, dtype=torch.float64)
    c1, c2 = torch.where((batch.advantage >= 0)[:, None], constant[:2], constant[2:]).unbind(1)

    def surrogate(log_ratio):
        weight = batch.sequence_sum(log_ratio).exp()
        scale = (c2 - c1 * c2.log() + torch.lgamma(c1)).exp()
        return (scale * torch.special.gammainc(c1, c2 * weight) * batch.advantage).sum()

    expected = gradient(batch, surrogate)
    assert expected.abs().max() > 0.1
    close(Vespo(*constants).multiplier(batch), expected)


@pytest.mark.parametrize("objective", [Vespo(), Grpo(), Grpo(dual_clip=3.0), Reinforce()], ids=lambda o: o.name)
def test_float32_agrees_with_float64(make_batch, objective):
    ratios, advantages, masks = CASES["far"]()
    single = objective.multiplier(make_batch(ratios, advantages, masks, dtype=torch.float32))
    double = objective.multiplier(make_batch(ratios, advantages, masks))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=2e-6, atol=1e-30)
