"""Importance sampling on whole sequences, plain and truncated."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.checks import require_number
from vespo_lightning.objectives.sequence import SequenceObjective, of_active_tokens
from vespo_lightning.objectives.statistics import means


class SequenceIs(SequenceObjective):
    """Coefficient ``W``, or ``min(W, cap)`` with a cap, the product of the importance ratios of the sequence.

    Without a cap this is the exact off-policy policy gradient (Precup et al., 2000): unbiased, with a variance that
    grows exponentially with the drift summed over the response. The cap (Ionides, 2008) trades bias for variance:
    a sequence beyond it keeps a gradient, with the coefficient ``cap``. Exact together with
    ``aggregation=seq-mean-token-sum``; other aggregations weigh the sequences by their length.

    The published caps do not agree: 8 in VCPO's sequence-level baseline (arXiv 2602.17616), 2 by default in verl, 3
    in TRL. In the last two the truncated weight corrects the engine's mismatch only and multiplies another
    method's loss; here it is the whole method. None is taken as the default.

    Part of the definition: the log-ratio of each token is clamped to [-20, 20], and so is their sum, as in verl's
    sequence-level weight (which does not clamp tokens first). Above exp(20) = 4.9e8 the estimate is thus truncated
    even without a cap. A NaN log-prob stays NaN.

    Args:
        cap: largest weight, at least 1 so that nothing is cut on-policy; None for none.

    Raises:
        UserError: the cap is below 1 or no number.
    """

    name: ClassVar[str] = "sequence_is"
    depends_on_advantage: ClassVar[bool] = False

    def __init__(self, cap: float | None = None) -> None:
        self.cap = None if cap is None else require_number("cap", cap, 1.0)

    def kernel(self, log_weight: Tensor, advantage: Tensor) -> Tensor:
        return log_weight.exp().clamp(max=self.cap) if self.cap is not None else log_weight.exp()

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Those of every sequence-level objective, and with a cap the share of active tokens in sequences beyond it."""
        common = super().statistics(batch)
        if self.cap is None:
            return common
        capped = self.log_weight(batch).exp() > self.cap
        return common | means({"objective/capped_share": of_active_tokens(capped, batch)})
