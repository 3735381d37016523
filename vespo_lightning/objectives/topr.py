"""TOPR, tapered off-policy REINFORCE (arXiv 2503.14286)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.sequence import SequenceObjective, of_active_tokens
from vespo_lightning.objectives.statistics import means


class Topr(SequenceObjective):
    """Coefficient 1 for a good sequence, ``min(W, 1)`` for a bad one; W is the product of its importance ratios.

    Good responses are imitated however unlikely they have become, as in supervised learning; bad ones are let go
    as the policy leaves them, so that nothing pushes their probability down forever. Without importance weights
    on the good ones no sequence ever counts more than 1.

    The limits 0 and 1 are the paper's; there is nothing to tune. Disagreements:

    * the paper decides by the sign of the reward, from which a constant baseline may have been taken; here, as in
      every objective, by the sign of the advantage. Advantage 0 counts as good and has no gradient either way;
    * W is the ratio of whole responses, as in the paper. Trinity-RFT's implementation truncates the ratio of each
      token instead, which is another method;
    * the paper sums log-probs over the response: ``aggregation=seq-mean-token-sum``.

    Part of the definition: the log-ratio of each token is clamped to [-20, 20], and so is their sum. A NaN log-prob
    of a bad sequence stays NaN.
    """

    name: ClassVar[str] = "topr"

    def kernel(self, log_weight: Tensor, advantage: Tensor) -> Tensor:
        return torch.where(advantage >= 0, 1.0, log_weight.clamp(max=0.0).exp())

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Those of every sequence-level objective, and the share of active tokens in sequences with A < 0, W > 1."""
        capped = (batch.advantage < 0) & (self.log_weight(batch) > 0)
        return super().statistics(batch) | means({"objective/capped_share": of_active_tokens(capped, batch)})
