"""DPPO, divergence proximal policy optimization (arXiv 2602.04879), with its two binary divergences."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import Objective, Scope, TokenBatch
from vespo_lightning.objectives.checks import require_number
from vespo_lightning.objectives.statistics import active_tokens, coefficient_statistics, means
from vespo_lightning.objectives.token_ratio import MAX_RATIO, clamped_log_ratio

#: Thresholds of the paper's stability study.
DEFAULT_THRESHOLDS = {"binary_tv": 0.15, "binary_kl": 0.05}
#: Added to both probabilities of "any other token" in the KL divergence, as in the published code.
PROBABILITY_EPSILON = 1e-8


class Dppo(Objective):
    """Token ratio, 0 where the policy moved too far *in probability* and the advantage would move it further.

    With m = exp(old log-prob) and p = exp(log-prob) of the sampled token, the token against all others:

    * ``binary_tv``: D = ``|m - p|``
    * ``binary_kl``: D = ``m log(m / p) + (1 - m) log((1 - m) / (1 - p))``

    The coefficient is ``min(r, cap)``, and 0 where D > threshold and either A > 0 and r > 1 or A < 0 and r < 1. A
    ratio clip is wrong at both ends: 1e-4 to 1e-2 is a ratio of 100 but moves 1 % of the probability, 0.99 to 0.8 is
    a ratio of 0.81 and moves 19 %.

    The paper's third divergence, over the 20 most likely tokens, is not here: it needs their log-probs from the
    engine, and no engine returns them.

    ============  ===================  =================  ================  =====================
    constant      paper, stability     paper, scaling     verl's examples   here
    ============  ===================  =================  ================  =====================
    threshold TV  0.15                 0.2 (LoRA 0.15)    0.15              0.15
    threshold KL  0.05                 0.05               0.05              0.05
    cap           none                 5                  10000             5
    ============  ===================  =================  ================  =====================

    The paper finds no difference for thresholds of 0.10-0.20 (TV) and 0.05-0.15 (KL). Its advantages are not divided
    by a standard deviation, its loss is a sum over tokens divided by a constant (``aggregation=constant``).

    Disagreements: the paper anchors ratio and divergence at the policy that sampled, that is ``denominator=behaviour``,
    and finds a recomputed anchor to collapse; verl recomputes by default. Here both follow the denominator of the run.
    verl reads the thresholds from ``clip_ratio_low`` and ``clip_ratio_high``, which default to 0.2, so that its
    ``clip_ratio`` has no effect, and the cap from ``clip_ratio_c``, which defaults to 3, not to the 20 in its code.

    Part of the definition: log-ratios are clamped to [-20, 20] before the exponential, as verl does, inside the weight
    that is not differentiated; 1e-8 is added to 1 - m and to 1 - p in the KL divergence, as in verl; a log-prob above
    0 counts as 0 in the divergence.

    Args:
        divergence: ``binary_tv`` or ``binary_kl``.
        threshold: largest divergence that is not masked; None takes 0.15 for ``binary_tv``, 0.05 for ``binary_kl``.
        cap: largest weight, at least 1; None for no bound but that of the clamp.

    Raises:
        UserError: a value outside these ranges.
    """

    name: ClassVar[str] = "dppo"
    scope: ClassVar[Scope] = "token"

    def __init__(self, divergence: str = "binary_tv", threshold: float | None = None, cap: float | None = 5.0) -> None:
        if divergence not in DEFAULT_THRESHOLDS:
            raise UserError(
                f"objective.divergence={divergence} is not available; use binary_tv or binary_kl"
                " (the top-k divergence needs log-probs that no engine returns)"
            )
        self.divergence = divergence
        self.threshold = (
            DEFAULT_THRESHOLDS[divergence] if threshold is None else require_number("threshold", threshold, 0.0)
        )
        self.cap = None if cap is None else require_number("cap", cap, 1.0, MAX_RATIO)

    def coefficient(self, batch: TokenBatch) -> Tensor:
        coefficient = clamped_log_ratio(batch).exp()
        if self.cap is not None:
            coefficient = coefficient.clamp(max=self.cap)
        for masked in self._masked(self._divergence(batch), batch).values():
            coefficient = torch.where(masked, 0.0, coefficient)
        return coefficient

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Common numbers, mean divergence, and the shares of active tokens masked on each side and capped."""
        active = active_tokens(batch)
        divergence = self._divergence(batch)
        numbers = {"objective/divergence_mean": divergence[active]}
        numbers |= {side: masked[active] for side, masked in self._masked(divergence, batch).items()}
        if self.cap is not None:
            numbers["objective/capped_share"] = clamped_log_ratio(batch).exp()[active] > self.cap
        return coefficient_statistics(self.coefficient(batch), batch) | means(numbers)

    def _divergence(self, batch: TokenBatch) -> Tensor:
        """float64 [T]: divergence of each token in the loss, 0 elsewhere."""
        # float64: in float32 1 - p has no digits left for the likely tokens that make up most of a response
        old = torch.where(batch.loss_mask, batch.old_log_prob, 0.0).double().clamp(max=0.0)
        new = torch.where(batch.loss_mask, batch.log_prob, 0.0).double().clamp(max=0.0)
        if self.divergence == "binary_tv":
            return (old.exp() - new.exp()).abs()
        others_old, others_new = -torch.expm1(old), -torch.expm1(new)
        others = ((others_old + PROBABILITY_EPSILON) / (others_new + PROBABILITY_EPSILON)).log()
        return old.exp() * (old - new) + others_old * others

    def _masked(self, divergence: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        """bool [T] for each side: too far, and the advantage would move the token further."""
        advantage = batch.advantage[batch.sequence_index]
        far = divergence > self.threshold
        return {
            "objective/clip_low_share": far & (advantage < 0) & (batch.log_ratio < 0),
            "objective/clip_high_share": far & (advantage > 0) & (batch.log_ratio > 0),
        }
