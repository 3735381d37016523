"""REINFORCE (Williams, 1992): the policy gradient without any off-policy correction."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vespo_lightning.objectives.base import Objective, Scope, TokenBatch
from vespo_lightning.objectives.statistics import coefficient_statistics


class Reinforce(Objective):
    """Coefficient 1 for every token: exact on-policy, biased and without a trust region on stale data."""

    name: ClassVar[str] = "reinforce"
    scope: ClassVar[Scope] = "token"
    depends_on_advantage: ClassVar[bool] = False

    def coefficient(self, batch: TokenBatch) -> Tensor:
        return torch.ones_like(batch.log_prob)

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        return coefficient_statistics(self.coefficient(batch), batch)
