"""Importance weights of a mini-batch: how far the data are from the current policy.

``W`` is the product of the importance ratios of a sequence, ``log W`` their sum in the log, before any
clamp of an objective. Sequences without a token in the loss are left out everywhere. What has no sample is
absent from the results, not 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vespo_lightning.objectives.base import TokenBatch

PERCENTILES = (1, 10, 50, 90, 99)


def log_weights(batch: TokenBatch) -> Tensor:
    """float64 [S]: log W of each sequence, 0 for those without a token in the loss (see :func:`in_loss`)."""
    return batch.sequence_sum(batch.log_ratio.double())


def in_loss(batch: TokenBatch) -> Tensor:
    """bool [S]: sequences with at least one token in the loss."""
    return batch.length > 0


def ess_ratio(log_weight: Tensor) -> float:
    """Effective sample size over sample size, ``(sum w)^2 / (n * sum w^2)``, in (0, 1].

    1 means that all weights are equal, 1/n that one of them is everything.

    Args:
        log_weight: [n], n >= 1. A common offset changes nothing, so that no exponential overflows.
    """
    weight = torch.exp(log_weight.double() - log_weight.max())
    return (weight.sum().square() / (len(weight) * weight.square().sum())).item()


def percentiles(values: Tensor, ranks: tuple[int, ...] = PERCENTILES) -> dict[str, float]:
    """``{"p01": ..., "p50": ...}`` of [n] values, n >= 1, with linear interpolation."""
    levels = torch.tensor(ranks, dtype=torch.float64, device=values.device) / 100
    return {
        f"p{rank:02d}": value
        for rank, value in zip(ranks, torch.quantile(values.double(), levels).tolist(), strict=True)
    }


def importance_statistics(batch: TokenBatch) -> dict[str, float]:
    """``importance/...``: distribution of log W over sequences and of the ratio over tokens."""
    counted = in_loss(batch)
    if not counted.any():
        return {}
    log_weight, length = log_weights(batch)[counted], batch.length[counted]
    log_ratio = batch.log_ratio[batch.loss_mask].double()
    longer = length > length.median()
    result = {
        "importance/ess_ratio": ess_ratio(log_weight),
        "importance/log_weight_mean": log_weight.mean().item(),
        "importance/log_weight_std": log_weight.std(correction=0).item(),
        "importance/token_ratio_mean": log_ratio.exp().mean().item(),
        "importance/token_ratio_max": log_ratio.max().exp().item(),
        "importance/token_log_ratio_mean": log_ratio.mean().item(),
        "importance/token_log_ratio_std": log_ratio.std(correction=0).item(),
        "importance/token_ess_ratio": ess_ratio(log_ratio),
    }
    if longer.any():
        result["importance/log_weight_long_mean"] = log_weight[longer].mean().item()
    return result | {f"importance/log_weight_{name}": value for name, value in percentiles(log_weight).items()}


def sequence_coefficients(coefficient: Tensor, batch: TokenBatch) -> Tensor:
    """[S] mean coefficient over the tokens of each sequence that are in the loss (phi itself, for VESPO)."""
    inside = torch.where(batch.loss_mask, coefficient, 0.0)
    return batch.sequence_sum(inside) / batch.length.clamp(min=1)


def by_sign(per_sequence: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
    """``{"positive": ..., "negative": ...}``: values of active sequences by the sign of their advantage.

    Sequences with advantage 0 belong to neither: no coefficient changes what they do.
    """
    counted = in_loss(batch)
    return {
        "positive": per_sequence[counted & (batch.advantage > 0)],
        "negative": per_sequence[counted & (batch.advantage < 0)],
    }


def coefficient_distribution(coefficient: Tensor, batch: TokenBatch) -> dict[str, float]:
    """``importance/coefficient_...``: spread of the objective's coefficient over active sequences.

    Args:
        coefficient: [T] of the objective, before the advantage.
    """
    signs = by_sign(sequence_coefficients(coefficient, batch), batch)
    result = {
        f"importance/coefficient_{sign}_{name}": value
        for sign, values in signs.items()
        if len(values)
        for name, value in percentiles(values, (10, 50, 90)).items()
    }
    everything = torch.cat(list(signs.values()))
    if everything.any():
        result["importance/coefficient_ess_ratio"] = ess_ratio(everything.double().log())
    return result
