"""MiniRL, the minimal baseline of "Stabilizing RL with LLMs" (arXiv 2512.01374)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vespo_lightning.objectives.base import Need, Objective, Scope, TokenBatch
from vespo_lightning.objectives.checks import require_number
from vespo_lightning.objectives.statistics import active_tokens, coefficient_statistics, means
from vespo_lightning.objectives.token_ratio import MAX_RATIO, TOKEN_LOG_RATIO_BOUND


class MiniRl(Objective):
    """Weight on the true token ratio, PPO's clip on the recomputed one.

    With pi the current policy, mu the engine that sampled and old the trainer at the weights that sampled, the true
    ratio splits into two: ``pi / mu = (old / mu) * (pi / old)``, mismatch of the engines times staleness. The
    coefficient is ``min(pi / mu, cap)``, not differentiated, and 0 where A > 0 and ``pi / old > 1 + clip_high`` or
    A < 0 and ``pi / old < 1 - clip_low``: mismatch is corrected for but never clips, staleness clips.

    **Both ratios are taken whatever the** ``denominator`` **of the run**, which says only what diagnostics call the
    ratio: with ``denominator=behaviour`` they show the weight that is used here.

    Constants are the paper's: 0.2, 0.27 and 5. It gives the 5 as the threshold of token-level truncated importance
    sampling; here it bounds ``pi / mu`` as a whole. Advantage: R - mean of the group, without division by the standard
    deviation. No length normalisation: ``aggregation=seq-mean-token-sum``.

    Disagreement: DPPO (arXiv 2602.04879) anchors the trust region at mu and finds MiniRL with truncated importance
    sampling to collapse early.

    Part of the definition: the log of each ratio is clamped to [-20, 20] before the exponential, inside the weight that
    is not differentiated.

    Args:
        clip_low: a recomputed ratio below 1 - clip_low is masked where the advantage is negative; 1 never masks.
        clip_high: a recomputed ratio above 1 + clip_high is masked where the advantage is positive.
        cap: largest weight, at least 1; None for no bound but that of the clamp.

    Raises:
        UserError: a value outside these ranges.
    """

    name: ClassVar[str] = "minirl"
    scope: ClassVar[Scope] = "token"
    needs: ClassVar[frozenset[Need]] = frozenset({"recomputed_log_prob"})

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.27, cap: float | None = 5.0) -> None:
        self.clip_low = require_number("clip_low", clip_low, 0.0, 1.0)
        self.clip_high = require_number("clip_high", clip_high, 0.0)
        self.cap = None if cap is None else require_number("cap", cap, 1.0, MAX_RATIO)

    def coefficient(self, batch: TokenBatch) -> Tensor:
        coefficient = _ratio(batch, batch.behaviour_log_prob)
        if self.cap is not None:
            coefficient = coefficient.clamp(max=self.cap)
        for masked in self._masked(batch).values():
            coefficient = torch.where(masked, 0.0, coefficient)
        return coefficient

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Common numbers, and the shares of active tokens masked on each side and capped."""
        active = active_tokens(batch)
        numbers = {side: masked[active] for side, masked in self._masked(batch).items()}
        if self.cap is not None:
            numbers["objective/capped_share"] = _ratio(batch, batch.behaviour_log_prob)[active] > self.cap
        return coefficient_statistics(self.coefficient(batch), batch) | means(numbers)

    def _masked(self, batch: TokenBatch) -> dict[str, Tensor]:
        """bool [T] for each side: the weights have moved the token too far since it was sampled."""
        assert batch.recomputed_log_prob is not None, "objective=minirl without recomputed log-probs"
        advantage = batch.advantage[batch.sequence_index]
        since = _ratio(batch, batch.recomputed_log_prob)
        return {
            "objective/clip_low_share": (advantage < 0) & (since < 1 - self.clip_low),
            "objective/clip_high_share": (advantage > 0) & (since > 1 + self.clip_high),
        }


def _ratio(batch: TokenBatch, old_log_prob: Tensor) -> Tensor:
    """[T] probability of each token now over that under ``old_log_prob``; 1 outside the loss mask."""
    log_ratio = torch.where(batch.loss_mask, batch.log_prob - old_log_prob, 0.0)
    return log_ratio.clamp(-TOKEN_LOG_RATIO_BOUND, TOKEN_LOG_RATIO_BOUND).exp()
