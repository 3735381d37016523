"""VESPO, variational sequence-level soft policy optimization (arXiv 2602.10693)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import Objective, Scope, TokenBatch
from vespo_lightning.objectives.checks import require_number
from vespo_lightning.objectives.statistics import coefficient_statistics, means

#: Bound of the log-ratio of one token, as in the published code.
TOKEN_LOG_RATIO_BOUND = 20.0
#: Bounds of the log of the sequence weight. The published code clamps the sum to [-20, 20], then takes
#: log(max(W, 1e-8)) of it.
LOG_WEIGHT_MIN = math.log(1e-8)
LOG_WEIGHT_MAX = 20.0
#: Below this coefficient a sequence hardly takes part in the update.
SUPPRESSED_BELOW = 0.1
#: exp(80) is representable in float32 with room for the advantage.
MAX_LOG_COEFFICIENT = 80.0


class Vespo(Objective):
    """Soft trust region on whole sequences: ``phi(W) = W^c1 * exp(c2 * (1 - W))`` times the advantage.

    ``W`` is the product of the importance ratios of all tokens in the loss: a plain sum of log-ratios, with
    no division by the length (dividing by T or sqrt(T) collapses, according to the paper). Tokens outside
    the loss mask count with ratio 1. ``phi(1) = 1``; the maximum is at ``W = c1 / c2``. ``c1_positive,
    c2_positive`` hold for advantages >= 0, the others for negative ones: a good response that became
    likelier is no longer pushed up, a bad one that became unlikelier no longer down.

    Part of the definition, following the published code where it differs from the formula:

    * the log-ratio of each token is clamped to [-20, 20] before the sum;
    * the sum is clamped to [log 1e-8, 20] = [-18.42, 20]. The code's two clamps amount to that, except that
      they let the W inside ``exp(c2 * (1 - W))`` go down to exp(-20), a relative difference below 1e-7.

    Not followed: the code's floor of 1e-4 under c2 (values are used as given), and its replacement of NaN
    by 0 (a NaN log-prob stays NaN, so that the non-finite guard sees it).

    Args:
        c1_positive, c2_positive: constants for advantage >= 0 (paper and code: 2, 3).
        c1_negative, c2_negative: constants for advantage < 0 (paper and code: 3, 2).

    Raises:
        UserError: a constant is negative, or the largest coefficient would not fit in float32.
    """

    name: ClassVar[str] = "vespo"
    scope: ClassVar[Scope] = "sequence"

    def __init__(
        self,
        c1_positive: float = 2.0,
        c2_positive: float = 3.0,
        c1_negative: float = 3.0,
        c2_negative: float = 2.0,
    ) -> None:
        self.c1_positive = require_number("c1_positive", c1_positive, 0.0)
        self.c2_positive = require_number("c2_positive", c2_positive, 0.0)
        self.c1_negative = require_number("c1_negative", c1_negative, 0.0)
        self.c2_negative = require_number("c2_negative", c2_negative, 0.0)
        _check_peak("positive", self.c1_positive, self.c2_positive)
        _check_peak("negative", self.c1_negative, self.c2_negative)

    def log_weight(self, batch: TokenBatch) -> Tensor:
        """float64 [S]: log W after both clamps."""
        # Summed in float64, so that the order of the terms (packing, GPU atomics) does not show.
        clamped = batch.log_ratio.double().clamp(-TOKEN_LOG_RATIO_BOUND, TOKEN_LOG_RATIO_BOUND)
        return batch.sequence_sum(clamped).clamp(LOG_WEIGHT_MIN, LOG_WEIGHT_MAX)

    def phi(self, batch: TokenBatch) -> Tensor:
        """[S]: the coefficient of each sequence."""
        positive = batch.advantage >= 0
        log_weight = self.log_weight(batch)
        # new_tensor: a where between Python numbers would round the constants to float32
        c1 = torch.where(positive, log_weight.new_tensor(self.c1_positive), log_weight.new_tensor(self.c1_negative))
        c2 = torch.where(positive, log_weight.new_tensor(self.c2_positive), log_weight.new_tensor(self.c2_negative))
        return torch.exp(c1 * log_weight - c2 * torch.expm1(log_weight)).to(batch.log_prob.dtype)

    def coefficient(self, batch: TokenBatch) -> Tensor:
        return self.phi(batch)[batch.sequence_index]

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Common numbers by token; mean phi and share of suppressed sequences by sign of the advantage."""
        phi = self.phi(batch)
        raw = batch.sequence_sum(batch.log_ratio.double())
        active = (batch.advantage != 0) & (batch.length > 0)
        positive, negative = phi[active & (batch.advantage > 0)], phi[active & (batch.advantage < 0)]
        return coefficient_statistics(phi[batch.sequence_index], batch) | means(
            {
                "objective/phi_positive_mean": positive,
                "objective/phi_negative_mean": negative,
                "objective/suppressed_positive_share": positive < SUPPRESSED_BELOW,
                "objective/suppressed_negative_share": negative < SUPPRESSED_BELOW,
                "objective/clamped_share": ((self.log_weight(batch) - raw).abs() > 1e-6)[active],
            }
        )


def _check_peak(sign: str, c1: float, c2: float) -> None:
    """Refuse constants whose largest coefficient over all clamped weights overflows float32."""
    peak = LOG_WEIGHT_MAX if c1 >= c2 * math.exp(LOG_WEIGHT_MAX) else math.log(max(c1 / c2, 1e-8))
    if c1 * peak - c2 * math.expm1(peak) > MAX_LOG_COEFFICIENT:
        raise UserError(
            f"objective.c1_{sign}={c1:g} with objective.c2_{sign}={c2:g} gives coefficients too large"
            f" for float32; lower c1_{sign} or raise c2_{sign}"
        )
