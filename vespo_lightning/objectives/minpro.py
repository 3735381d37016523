"""MinPRO, minimum prefix ratio (arXiv 2601.22718)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from vespo_lightning.objectives.base import Objective, Scope, TokenBatch
from vespo_lightning.objectives.checks import require_number
from vespo_lightning.objectives.statistics import active_tokens, coefficient_statistics, means
from vespo_lightning.objectives.token_ratio import MAX_RATIO, bound_shares, clamped_log_ratio


class Minpro(Objective):
    """Token ratio times the smallest ratio before it in the response, bounded and not differentiated, as in CISPO.

    The exact weight of a token is the product of all ratios up to it, which runs to 0 or infinity. Here the part
    before the token is replaced by its smallest factor: the coefficient of token t is
    ``clip(m_t r_t, ratio_min, ratio_max)`` with ``m_t = min_{i<t} r_i``, and ``m_1 = 1`` (of an empty prefix; the
    paper leaves it open). From the second token on ``m_t`` never rises, so that the rest of a response stays
    down-weighted after one token that became unlikely. ``m_t`` exceeds 1 while all tokens before t became likelier:
    it is the minimum of the formula, not of the formula and 1. Tokens outside the loss mask take no part in it.

    Constants: the paper clips at ``1 - eps_low`` and ``1 + eps_high`` and publishes neither, nor code. Chosen here:
    no lower bound, which would undo the down-weighting, and 5 above, the value of :class:`Cispo`, so that the two
    differ in nothing but the prefix. **Bounds are values of the weight itself**, not distances from 1. Aggregation:
    mean over all tokens (``aggregation=token-mean``).

    Part of the definition: the log-ratio of each token is clamped to [-20, 20] before minimum and product, inside the
    weight that is not differentiated.

    Args:
        ratio_min: smallest weight, at most 1; 0 is no bound.
        ratio_max: largest weight, at least 1.

    Raises:
        UserError: a bound outside these ranges, or ratio_max above 1e8.
    """

    name: ClassVar[str] = "minpro"
    scope: ClassVar[Scope] = "sequence"
    depends_on_advantage: ClassVar[bool] = False

    def __init__(self, ratio_min: float = 0.0, ratio_max: float = 5.0) -> None:
        self.ratio_min = require_number("ratio_min", ratio_min, 0.0, 1.0)
        self.ratio_max = require_number("ratio_max", ratio_max, 1.0, MAX_RATIO)

    def coefficient(self, batch: TokenBatch) -> Tensor:
        return self._weight(batch).clamp(self.ratio_min, self.ratio_max)

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Common numbers, mean minimum of the prefix, and the shares of active tokens at a bound."""
        active = active_tokens(batch)
        numbers = {"objective/prefix_minimum_mean": log_prefix_minimum(batch).exp()[active]}
        numbers |= bound_shares(self._weight(batch)[active], self.ratio_min, self.ratio_max)
        return coefficient_statistics(self.coefficient(batch), batch) | means(numbers)

    def _weight(self, batch: TokenBatch) -> Tensor:
        """[T] ``m_t r_t`` without bounds."""
        return (log_prefix_minimum(batch) + clamped_log_ratio(batch)).exp()


def log_prefix_minimum(batch: TokenBatch) -> Tensor:
    """[T] smallest log-ratio of the tokens in the loss before each token of the same sequence; 0 without any."""
    counts = torch.bincount(batch.sequence_index, minlength=len(batch.advantage))
    first = counts.cumsum(0) - counts
    place = torch.arange(len(batch.sequence_index), device=counts.device) - first[batch.sequence_index]
    log_ratio = torch.where(batch.loss_mask, clamped_log_ratio(batch), math.inf)
    # One column ahead, so that the minimum up to a column is that of the tokens before it.
    width = int(counts.max()) + 1 if len(counts) else 1
    rows = log_ratio.new_full((len(counts), width), math.inf)
    rows[batch.sequence_index, place + 1] = log_ratio
    minimum = rows.cummin(1).values[batch.sequence_index, place]
    return torch.where(minimum == math.inf, 0.0, minimum)
