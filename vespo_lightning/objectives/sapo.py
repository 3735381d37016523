"""SAPO, soft adaptive policy optimization (arXiv 2511.20347)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vespo_lightning.objectives.base import Objective, Scope, TokenBatch
from vespo_lightning.objectives.checks import require_number
from vespo_lightning.objectives.statistics import SUPPRESSED_BELOW, active_tokens, coefficient_statistics, means
from vespo_lightning.objectives.token_ratio import beyond_bound, clamped_log_ratio

#: Steepest gate that can be configured: at 1000 it is nearly closed for a ratio off by 0.5 %.
MAX_TEMPERATURE = 1000.0


class Sapo(Objective):
    """A smooth gate around a token ratio of 1 in place of a clip range.

    The surrogate is ``4 / tau * sigmoid(tau * (r - 1)) * A``. Its gradient, the coefficient here, is
    ``r * 4 p (1 - p)`` with ``p = sigmoid(tau * (r - 1))``: the ratio times ``sech^2(tau * (r - 1) / 2)``. It is 1 at
    r = 1, falls on both sides whatever the sign of the advantage, and falls faster for a larger ``tau``. The name
    temperature is the paper's; it multiplies, so a higher one is a narrower gate.

    Constants: paper, TRL and Liger 1.0 for positive, 1.05 for other advantages, as here. Aggregation in the paper:
    mean over the tokens of a response, then over responses (``aggregation=seq-mean-token-mean``), advantages
    normalised by the standard deviation of the group.

    Disagreements: verl reads ``actor.tau_pos`` and ``actor.tau_neg``, while its example scripts set
    ``policy_loss.tau_*``, which nothing reads. Advantage 0 counts as negative there and as neither here; it has no
    gradient.

    Part of the definition: log-ratios are clamped to [-20, 20] before the exponential, as verl does (TRL and Liger do
    not clamp), and the derivative of that clamp is followed: beyond it the coefficient is 0. The gate is 0 there
    anyway above, and the ratio below 2.1e-9 below.

    Args:
        tau_positive: steepness of the gate for advantages above 0.
        tau_negative: the same for the others.

    Raises:
        UserError: a value is not above 0, or above 1000.
    """

    name: ClassVar[str] = "sapo"
    scope: ClassVar[Scope] = "token"

    def __init__(self, tau_positive: float = 1.0, tau_negative: float = 1.05) -> None:
        self.tau_positive = require_number("tau_positive", tau_positive, 0.0, MAX_TEMPERATURE, open_low=True)
        self.tau_negative = require_number("tau_negative", tau_negative, 0.0, MAX_TEMPERATURE, open_low=True)

    def coefficient(self, batch: TokenBatch) -> Tensor:
        log_ratio = clamped_log_ratio(batch)
        positive = batch.advantage[batch.sequence_index] > 0
        # new_tensor: a where between Python numbers would round the constants to float32
        tau = torch.where(positive, log_ratio.new_tensor(self.tau_positive), log_ratio.new_tensor(self.tau_negative))
        steepness = tau * torch.expm1(log_ratio)
        # sigmoid(-x) rather than 1 - sigmoid(x), which is 0 from x = 17 on in float32
        gate = 4 * torch.sigmoid(steepness) * torch.sigmoid(-steepness)
        return torch.where(beyond_bound(batch), 0.0, gate * log_ratio.exp())

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Common numbers, and the share of tokens that the gate nearly closes, by sign of the advantage."""
        coefficient = self.coefficient(batch)
        active = active_tokens(batch)
        positive = batch.advantage[batch.sequence_index] > 0
        return coefficient_statistics(coefficient, batch) | means(
            {
                "objective/suppressed_positive_share": coefficient[active & positive] < SUPPRESSED_BELOW,
                "objective/suppressed_negative_share": coefficient[active & ~positive] < SUPPRESSED_BELOW,
            }
        )
