"""The clipped token-level surrogate of PPO (arXiv 1707.06347), as GRPO (arXiv 2402.03300) uses it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vespo_lightning.objectives.base import Objective, Scope, TokenBatch
from vespo_lightning.objectives.checks import require_number
from vespo_lightning.objectives.statistics import active_tokens, coefficient_statistics, means
from vespo_lightning.objectives.token_ratio import beyond_bound, clamped_log_ratio


class Grpo(Objective):
    """Importance ratio of each token, 0 once it is past the clip range in the direction of the advantage.

    The gradient of ``min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` is ``r A`` where not clipped and 0
    elsewhere; that is the multiplier here. With ``dual_clip`` = c (arXiv 1912.09729) the surrogate of a
    negative advantage is not allowed below ``c A``: the coefficient is 0 for r > c as well.

    Part of the definition: log-ratios are clamped to [-20, 20] before the exponential, as verl does, and the
    derivative of that clamp is followed: beyond it the coefficient is 0. Without that, one token that became
    exp(20) times likelier with a negative advantage would own the whole update.

    The default 0.2 / 0.2 is that of the PPO and GRPO papers; VESPO's baseline and DAPO take 0.2 / 0.28.

    Args:
        clip_low: a ratio below 1 - clip_low is clipped where the advantage is negative; 1 never clips.
        clip_high: a ratio above 1 + clip_high is clipped where the advantage is positive.
        dual_clip: above 1 (commonly 3), or None for no bound.

    Raises:
        UserError: a value outside these ranges.
    """

    name: ClassVar[str] = "grpo"
    scope: ClassVar[Scope] = "token"

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None) -> None:
        self.clip_low = require_number("clip_low", clip_low, 0.0, 1.0)
        self.clip_high = require_number("clip_high", clip_high, 0.0)
        self.dual_clip = None if dual_clip is None else require_number("dual_clip", dual_clip, 1.0, open_low=True)

    def coefficient(self, batch: TokenBatch) -> Tensor:
        ratio = clamped_log_ratio(batch).exp()
        saturated = beyond_bound(batch)
        for clipped in self._clipped(ratio, batch).values():
            saturated = saturated | clipped
        return torch.where(saturated, 0.0, ratio)

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Common numbers, and the share of active tokens clipped on each side."""
        active = active_tokens(batch)
        ratio = clamped_log_ratio(batch).exp()
        clipped = {f"objective/{side}_share": mask[active] for side, mask in self._clipped(ratio, batch).items()}
        return coefficient_statistics(self.coefficient(batch), batch) | means(clipped)

    def _clipped(self, ratio: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        """bool [T] for each side that can clip."""
        advantage = batch.advantage[batch.sequence_index]
        sides = {
            "clip_low": (advantage < 0) & (ratio < 1 - self.clip_low),
            "clip_high": (advantage > 0) & (ratio > 1 + self.clip_high),
        }
        if self.dual_clip is not None:
            sides["dual_clip"] = (advantage < 0) & (ratio > self.dual_clip)
        return sides
