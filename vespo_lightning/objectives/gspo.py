"""GSPO, group sequence policy optimization (arXiv 2507.18071)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.checks import require_number
from vespo_lightning.objectives.sequence import Normalisation, SequenceObjective, of_active_tokens
from vespo_lightning.objectives.statistics import means

#: Above this log of the sequence ratio there is no gradient.
LOG_RATIO_MAX = 10.0


class Gspo(SequenceObjective):
    """The clipped surrogate of PPO on ``s = W^(1/T)``, the geometric mean of a sequence's token ratios.

    The surrogate ``min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)`` has the gradient
    ``s A (1/T) sum_t grad log pi_t`` where not clipped, and 0 elsewhere. The coefficient here is ``s`` or 0; the
    ``1/T`` of each sequence belongs to the loss of GSPO, which is ``aggregation=seq-mean-token-mean``, and has to be
    asked for. With another aggregation this is a variant: ``token-mean`` weighs responses by their length.

    ``s`` stays near 1 whatever the length, hence the narrow range: 3e-4 / 4e-4 in the paper and here. The
    default of libraries for ``grpo``, 0.2, would hardly ever clip.

    Part of the definition, where implementations disagree:

    * no gradient for ``log s > 10``: verl clamps log s there and follows the derivative of the clamp; the paper and
      TRL have no such bound. It acts on negative advantages only, positive ones being clipped long before;
    * log-ratios of tokens are clamped to [-20, 20] before the mean, so that any finite input gives a finite
      coefficient; verl and TRL do not.

    T counts the tokens in the loss. A NaN log-prob stays NaN.

    Args:
        clip_low: below 1 - clip_low a sequence with a negative advantage is clipped; 1 never clips.
        clip_high: above 1 + clip_high a sequence with a positive advantage is clipped.

    Raises:
        UserError: a value outside these ranges.
    """

    name: ClassVar[str] = "gspo"
    folds_engine_weight: ClassVar[bool] = False  # s is a geometric mean, in which a weight would lose its size
    normalisation: Normalisation = "length"

    def __init__(self, clip_low: float = 3e-4, clip_high: float = 4e-4) -> None:
        self.clip_low = require_number("clip_low", clip_low, 0.0, 1.0)
        self.clip_high = require_number("clip_high", clip_high, 0.0)

    def kernel(self, log_weight: Tensor, advantage: Tensor) -> Tensor:
        ratio = log_weight.exp()
        low, high = self._clipped(ratio, advantage)
        return torch.where(low | high | (log_weight > LOG_RATIO_MAX), 0.0, ratio)

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Those of every sequence-level objective, and the share of active tokens clipped on each side."""
        low, high = self._clipped(self.log_weight(batch).exp(), batch.advantage)
        clipped = {
            "objective/clip_low_share": of_active_tokens(low, batch),
            "objective/clip_high_share": of_active_tokens(high, batch),
        }
        return super().statistics(batch) | means(clipped)

    def _clipped(self, ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """bool [S] each: clipped below, clipped above."""
        return (advantage < 0) & (ratio < 1 - self.clip_low), (advantage > 0) & (ratio > 1 + self.clip_high)
