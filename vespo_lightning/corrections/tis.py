"""TIS, truncated importance sampling of the engine's mismatch."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from vespo_lightning.corrections.base import Correction
from vespo_lightning.corrections.checks import require_number
from vespo_lightning.corrections.ratios import engine_log_ratio, with_engine_weight
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import Need, TokenBatch
from vespo_lightning.objectives.statistics import means
from vespo_lightning.objectives.token_ratio import MAX_RATIO


class TokenTis(Correction):
    """Weight ``w_t = min(pi_old / mu, cap)`` of each token: the trainer at generation weights against the engine.

    Objectives that multiply the ratios of a response take w_t into that product, as a sum of logs; the others
    multiply their finished coefficient with it, clip and mask included. (VESPO's fork of verl multiplies the ratio
    before the clip of GRPO, GSPO and SAPO; verl, TRL and slime multiply the loss, as here.)

    Constants: cap 2 (Yao et al. 2025, verl, slime), 3 (TRL), 5 (MiniRL). A cap acts from above only, so the product
    over a response is biased low.

    ``denominator=behaviour`` refuses it: the importance ratio ``pi / mu`` then holds ``pi_old / mu`` already, and
    would get it twice.

    Part of the definition: the log-ratio is clamped to [-20, 20] (VESPO's code stops at 1e-8 instead of exp(-20)). NaN
    stays NaN.

    Args:
        cap: largest weight, at least 1.

    Raises:
        UserError: the cap is below 1 or above 1e8; or, on a batch, ``denominator=behaviour``.
    """

    name: ClassVar[str] = "tis"
    needs: ClassVar[frozenset[Need]] = frozenset({"recomputed_log_prob"})

    def __init__(self, cap: float = 2.0) -> None:
        self.cap = require_number("tis.cap", cap, 1.0, MAX_RATIO)

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        return with_engine_weight(batch, self._log_weight(batch))

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Share of tokens in the loss whose ratio is truncated, and the mean weight after it."""
        in_loss = batch.loss_mask
        return means(
            {
                "correction/tis_truncated_share": engine_log_ratio(batch)[in_loss] > math.log(self.cap),
                "correction/tis_weight_mean": self._log_weight(batch)[in_loss].exp(),
            }
        )

    def _log_weight(self, batch: TokenBatch) -> Tensor:
        if batch.denominator == "behaviour":
            raise UserError(
                "correction=tis with denominator=behaviour would count the engine's mismatch twice, since the "
                "importance ratio holds it already; set denominator=recomputed or take tis out of correction"
            )
        return engine_log_ratio(batch).clamp(max=math.log(self.cap))
