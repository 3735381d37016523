"""The ratios that corrections look at, and how their weights enter a batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.token_ratio import TOKEN_LOG_RATIO_BOUND, clamped_log_ratio


def engine_log_ratio(batch: TokenBatch) -> Tensor:
    """[T] log-prob of the trainer at generation weights minus that of the engine, within [-20, 20]; 0 outside the mask.

    NaN stays NaN.

    Raises:
        UserError: the trainer's log-probs at generation weights are not there.
    """
    if batch.recomputed_log_prob is None:
        raise UserError(
            "a correction of the engine's mismatch needs the trainer's log-probs at generation weights; set "
            "denominator=recomputed"
        )
    difference = torch.where(batch.loss_mask, batch.recomputed_log_prob - batch.behaviour_log_prob, 0.0)
    return difference.clamp(-TOKEN_LOG_RATIO_BOUND, TOKEN_LOG_RATIO_BOUND)


def behaviour_log_ratio(batch: TokenBatch) -> Tensor:
    """[T] log-ratio against the engine that the importance ratio leaves to corrections, within [-20, 20].

    With ``denominator=recomputed`` the engine's mismatch, trainer against engine at generation weights; with
    ``denominator=behaviour`` the importance ratio itself, which holds that mismatch and the policy's change.
    """
    return engine_log_ratio(batch) if batch.denominator == "recomputed" else clamped_log_ratio(batch)


def with_engine_weight(batch: TokenBatch, log_weight: Tensor) -> TokenBatch:
    """``batch`` with the importance ratios multiplied by ``exp(log_weight)`` [T]; other tokens keep their weight 1."""
    log_weight = torch.where(batch.loss_mask, log_weight, 0.0)
    earlier = batch.engine_log_weight
    return replace(batch, engine_log_weight=log_weight if earlier is None else earlier + log_weight)


def with_final_weight(batch: TokenBatch, weight: Tensor) -> TokenBatch:
    """``batch`` with the finished coefficients multiplied by ``weight`` [T]; other tokens keep their weight 1."""
    weight = torch.where(batch.loss_mask, weight, 1.0)
    earlier = batch.final_weight
    return replace(batch, final_weight=weight if earlier is None else earlier * weight)


def outside(log_ratio: Tensor, low: float, high: float) -> Tensor:
    """bool, as ``log_ratio``: whether the ratio is not in [low, high]; False for NaN."""
    ratio = log_ratio.double().exp()
    return torch.logical_or(ratio < low, ratio > high)
