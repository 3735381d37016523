"""The importance ratio of single tokens, as every token-level objective takes it."""

from __future__ import annotations

from torch import Tensor

from vespo_lightning.objectives.base import TokenBatch

#: Bound of the log-ratio of one token.
TOKEN_LOG_RATIO_BOUND = 20.0
#: Largest bound of a ratio that can be configured: about the ratio at which the log-ratio is clamped.
MAX_RATIO = 1e8


def clamped_log_ratio(batch: TokenBatch) -> Tensor:
    """[T] log-ratio of each token, within [-20, 20]; 0 outside the loss mask. NaN stays NaN."""
    return batch.log_ratio.clamp(-TOKEN_LOG_RATIO_BOUND, TOKEN_LOG_RATIO_BOUND)


def beyond_bound(batch: TokenBatch) -> Tensor:
    """bool [T]: tokens whose log-ratio is clamped."""
    return batch.log_ratio.abs() > TOKEN_LOG_RATIO_BOUND


def bound_shares(weight: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """bool, as ``weight``: which weights a clip to [low, high] lowers, and which it raises if ``low`` is above 0."""
    shares = {"objective/capped_share": weight > high}
    if low > 0:
        shares["objective/raised_share"] = weight < low
    return shares
