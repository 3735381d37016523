"""MIS, masked importance sampling of the engine's mismatch, also known as IcePop."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from vespo_lightning.corrections.base import Correction
from vespo_lightning.corrections.checks import require_range
from vespo_lightning.corrections.ratios import behaviour_log_ratio, outside, with_engine_weight
from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.statistics import means


class MaskedIs(Correction):
    """Tokens whose ratio against the engine lies outside [low, high] leave the loss.

    * ``denominator=recomputed``: the ratio is ``pi_old / mu``, the trainer at generation weights against the engine,
      and the tokens that stay are weighted with it.
    * ``denominator=behaviour``: the ratio is the importance ratio ``pi / mu``, which already weights the tokens by
      the mismatch, so nothing is multiplied.

    A token that leaves the loss counts with ratio 1 in the product over its response, never with 0: phi is that of
    the tokens that stay. (TRL's ``token_mask`` puts a zero into VESPO's product and so gives the whole response
    phi = 2e-15 for one masked token.) It stays in the normalisation of the loss, as in IcePop.

    Constants: [0.5, 5] (IcePop), [0.5, 2] (slime's script).

    Part of the definition: log-ratios are clamped to [-20, 20]. A token with a NaN ratio stays in the loss, where
    the trainer sees it.

    Args:
        low: smallest ratio that stays, at most 1.
        high: largest ratio that stays, at least 1.

    Raises:
        UserError: a bound outside these ranges.
    """

    name: ClassVar[str] = "mis"

    def __init__(self, low: float = 0.5, high: float = 5.0) -> None:
        self.low, self.high = require_range("mis", low, high)

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        log_ratio = behaviour_log_ratio(batch)
        kept = replace(batch, loss_mask=batch.loss_mask & ~outside(log_ratio, self.low, self.high))
        return with_engine_weight(kept, log_ratio) if batch.denominator == "recomputed" else kept

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Share of tokens in the loss that leave it, and the mean weight of those that stay, where they get one."""
        log_ratio = behaviour_log_ratio(batch)
        masked = outside(log_ratio, self.low, self.high)
        numbers = {"correction/mis_masked_share": masked[batch.loss_mask]}
        if batch.denominator == "recomputed":
            numbers["correction/mis_weight_mean"] = log_ratio[batch.loss_mask & ~masked].exp()
        return means(numbers)
