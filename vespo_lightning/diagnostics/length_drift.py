"""How log W depends on the length of the response, and what length the engine's mismatch leaves usable.

A product over tokens drifts with their number wherever the mean log-ratio is not 0. Objectives on whole responses then
judge the length before they judge anything else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vespo_lightning.diagnostics import importance
from vespo_lightning.diagnostics.mismatch import comparable_tokens
from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.sequence import SequenceObjective

#: Longer than any context: what "no limit" looks like in a chart.
LONGEST_USABLE = 1_000_000
#: A response is of use while its coefficient is at least half of that at W = 1.
USABLE_COEFFICIENT = 0.5
#: Good responses below this log W are the ones that VESPO's kernel starves (ReSPO, arXiv 2609.35433).
STARVED_BELOW = -1.0
#: Mean log W by quartile of the response length, shortest first.
QUARTILES = (
    "importance/log_weight_length_q1",
    "importance/log_weight_length_q2",
    "importance/log_weight_length_q3",
    "importance/log_weight_length_q4",
)


@dataclass(frozen=True)
class LengthFit:
    """Least squares of log W against the response length."""

    slope: float
    """nats per token"""
    error: float
    """standard error of the slope, infinite for fewer than three responses"""


def fit_length(log_weight: Tensor, length: Tensor) -> LengthFit | None:
    """Line through (length, log W) of [n] responses; None when all lengths are equal."""
    if len(length) < 2 or (length == length[0]).all():
        return None
    x, y = length.double(), log_weight.double()
    x, y = x - x.mean(), y - y.mean()
    spread = x.square().sum()
    slope = (x * y).sum() / spread
    residual = (y - slope * x).square().sum()
    error = (residual / (len(x) - 2) / spread).sqrt().item() if len(x) > 2 else math.inf
    return LengthFit(slope.item(), error)


def length_drift(batch: TokenBatch) -> LengthFit | None:
    """Fit over the responses in the loss, lengths counted in tokens in the loss."""
    counted = importance.in_loss(batch)
    return fit_length(importance.log_weights(batch)[counted], batch.length[counted])


def length_statistics(batch: TokenBatch, longest: int | None) -> dict[str, float]:
    """``importance/log_weight_length_...``: slope, what it adds over ``longest`` tokens, mean log W by length quartile.

    Absent when all responses are equally long, the bias also without ``longest``.
    """
    fit = length_drift(batch)
    if fit is None:
        return {}
    result = {"importance/log_weight_length_slope": fit.slope}
    if longest is not None:
        result["importance/log_weight_length_bias"] = fit.slope * longest
    counted = importance.in_loss(batch)
    log_weight, length = importance.log_weights(batch)[counted], batch.length[counted].double()
    bounds = torch.quantile(length, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=length.device))
    quartile = torch.bucketize(length, bounds)  # equal lengths share a quartile
    for number in range(len(QUARTILES)):
        values = log_weight[quartile == number]
        if len(values):
            result[QUARTILES[number]] = values.mean().item()
    return result


def starved_positives(coefficient: Tensor, batch: TokenBatch) -> dict[str, float]:
    """Responses with A > 0 and log W < -1: their share of those with A > 0, and of the coefficients of these.

    Args:
        coefficient: [T] of the objective, before the advantage.
    """
    log_weight = importance.by_sign(importance.log_weights(batch), batch)["positive"]
    mass = importance.by_sign(importance.sequence_coefficients(coefficient, batch), batch)["positive"].double()
    if not len(log_weight):
        return {}
    starved = log_weight < STARVED_BELOW
    result = {"importance/starved_positive_share": starved.double().mean().item()}
    if mass.sum() != 0:
        result["importance/starved_positive_mass"] = (mass[starved].sum() / mass.sum()).item()
    return result


def usable_lengths(batch: TokenBatch, objective: SequenceObjective) -> dict[str, float]:
    """``mismatch/...``: d = log p_trainer - log p_engine per token at equal weights, and the lengths that it allows.

    log W of a response of T tokens taken against the engine is about ``T * mean(d)``, give or take
    ``sqrt(T) * std(d)``; the mean alone decides here. {} where nothing is comparable.
    """
    trainer, compared = comparable_tokens(batch)
    if not compared.any():
        return {}
    d = (trainer - batch.behaviour_log_prob)[compared].double()
    drift = d.mean().item()
    return {
        "mismatch/token_log_ratio_mean": drift,
        "mismatch/token_log_ratio_std": d.std(correction=0).item(),
        "mismatch/usable_length_positive": usable_length(objective, drift, 1.0),
        "mismatch/usable_length_negative": usable_length(objective, drift, -1.0),
    }


def usable_length(
    objective: SequenceObjective, drift: float, sign: float, coefficient: float = USABLE_COEFFICIENT
) -> float:
    """Most tokens for which phi stays at or above ``coefficient`` when log W grows by ``drift`` nats per token.

    Args:
        sign: of the advantage.

    Returns:
        A whole number, at most :data:`LONGEST_USABLE`; NaN when the drift is.
    """
    if not math.isfinite(drift):
        return math.nan
    if drift == 0:
        return float(LONGEST_USABLE)
    ratio = _distance_to(objective, math.copysign(1.0, drift), sign, coefficient) / abs(drift)
    if objective.normalisation == "length":  # log W is the mean log-ratio, whatever the length
        return float(LONGEST_USABLE) if ratio >= 1 else 0.0
    length = ratio if objective.normalisation == "none" else ratio * ratio
    return float(math.floor(length)) if length < LONGEST_USABLE else float(LONGEST_USABLE)


def _distance_to(objective: SequenceObjective, direction: float, sign: float, coefficient: float) -> float:
    """abs(log W) at which phi first falls below ``coefficient`` on the way from W = 1; infinite if it never does."""
    low, high = 0.0, abs(objective.log_weight_bounds[int(direction > 0)])
    for _ in range(4):  # each grid is 1024 times finer
        distance = torch.linspace(low, high, 1025, dtype=torch.float64)
        below = (objective.kernel(direction * distance, torch.full_like(distance, sign)) < coefficient).nonzero()
        if not len(below):
            return math.inf
        first = int(below[0])
        if first == 0:
            return low
        low, high = distance[first - 1].item(), distance[first].item()
    return low
