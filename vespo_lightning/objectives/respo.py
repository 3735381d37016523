"""ReSPO's pair of kernels (arXiv 2609.35433)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vespo_lightning.objectives.sequence import SequenceObjective


class Respo(SequenceObjective):
    """VESPO's idea with kernels that do not starve good responses of a drifted policy; by sign of the advantage

    * >= 0: ``phi(W) = (1 + W) / 2 * exp(1 - W)``, which tends to e / 2 = 1.36 for W -> 0, its supremum, where
      VESPO's falls like W^2;
    * < 0: ``phi(W) = sqrt(W) * exp(2 * (1 - sqrt(W)))``, largest, e / 2, at W = 1/4.

    W is the product of the importance ratios of the sequence, without division by the length; ``phi(1) = 1``
    for both. There is nothing to tune.

    The formulas are the paper's; its code is not public. Part of the definition: log W is clamped to [-20, 20] as in
    the paper, and the log-ratio of each token to the same range before the sum, of which the paper says nothing.
    A NaN log-prob stays NaN.
    """

    name: ClassVar[str] = "respo"

    def kernel(self, log_weight: Tensor, advantage: Tensor) -> Tensor:
        # In terms of W - 1, so that phi(1) is exactly 1.
        excess = torch.expm1(log_weight)
        good = torch.log1p(excess / 2) - excess
        half = log_weight / 2
        bad = half - 2 * torch.expm1(half)
        return torch.where(advantage >= 0, good, bad).exp()
