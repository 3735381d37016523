"""The family of kernels that VESPO (arXiv 2602.10693) derives, with any constants."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from vespo_lightning.diagnostics.variance_bound import largest_slope, require_bound, second_moments
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.checks import require_number
from vespo_lightning.objectives.sequence import SequenceObjective

#: Bounds of the log of the sequence weight. VESPO's code clamps the sum to [-20, 20], then takes log(max(W, 1e-8)).
LOG_WEIGHT_BOUNDS = (math.log(1e-8), 20.0)
#: exp(80) is representable in float32 with room for the advantage.
MAX_LOG_COEFFICIENT = 80.0


class Kernel(SequenceObjective):
    """``phi(W) = W^c1 * exp(c2 * (1 - W))`` with the same constants for both signs of the advantage.

    The solution of VESPO's variational problem up to scale: c1 pulls the implicit proposal from the data
    (0) towards the policy (1, and beyond it), c2 is the price of large weights. ``phi(1) = 1``; the maximum is at
    ``W = c1 / c2``. The second moment of phi is bounded by the mean of W only for ``c1 >= 1``, where
    ``phi(W) / W <= K = ((c1 - 1) / c2)^(c1 - 1) * exp(c2 - c1 + 1)``. Members: (0, 0) is REINFORCE, (1, 0) plain
    importance sampling.

    VESPO itself has constants by sign (:class:`~vespo_lightning.objectives.vespo.Vespo`). Of the symmetric ones,
    its ablation calls (3, 2), the default here, stable but slower, and (2, 3) unstable.

    Part of the definition, as for VESPO: the clamp of each token's log-ratio to [-20, 20], and of their sum to
    [log 1e-8, 20] = [-18.42, 20]. A NaN log-prob stays NaN.

    Args:
        c1: at least 0.
        c2: at least 0.
        variance_bound: log E[phi^2] and its bound Z K C (:mod:`vespo_lightning.diagnostics.variance_bound`).

    Raises:
        UserError: a constant is negative, the largest coefficient would not fit in float32, or the bound is asked for
            where there is none.
    """

    name: ClassVar[str] = "kernel"
    depends_on_advantage: ClassVar[bool] = False
    log_weight_bounds: ClassVar[tuple[float, float]] = LOG_WEIGHT_BOUNDS

    def __init__(self, c1: float = 3.0, c2: float = 2.0, variance_bound: bool = False) -> None:
        self.c1 = require_number("c1", c1, 0.0)
        self.c2 = require_number("c2", c2, 0.0)
        self.variance_bound = variance_bound
        check_peak(self.c1, self.c2)
        if self.variance_bound:
            require_bound(self.c1, self.c2)

    def kernel(self, log_weight: Tensor, advantage: Tensor) -> Tensor:
        return gamma_kernel(log_weight, self.c1, self.c2)

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Those of every sequence-level objective, and with ``variance_bound`` both sides of the bound."""
        common = super().statistics(batch)
        if not self.variance_bound:
            return common
        slope = largest_slope(self.c1, self.c2)
        return common | second_moments(self, batch, slope, slope)


def gamma_kernel(log_weight: Tensor, c1: Tensor | float, c2: Tensor | float) -> Tensor:
    """``W^c1 * exp(c2 * (1 - W))`` from log W: exactly 1 at log W = 0."""
    return torch.exp(c1 * log_weight - c2 * torch.expm1(log_weight))


def check_peak(c1: float, c2: float, suffix: str = "") -> None:
    """Refuse constants whose largest coefficient over all clamped weights overflows float32.

    Args:
        suffix: what follows ``c1`` and ``c2`` in their configuration keys.

    Raises:
        UserError: it does.
    """
    low, high = LOG_WEIGHT_BOUNDS
    peak = high if c1 >= c2 * math.exp(high) else math.log(max(c1 / c2, math.exp(low)))
    if c1 * peak - c2 * math.expm1(peak) > MAX_LOG_COEFFICIENT:
        raise UserError(
            f"objective.c1{suffix}={c1:g} with objective.c2{suffix}={c2:g} gives coefficients too large"
            f" for float32; lower c1{suffix} or raise c2{suffix}"
        )
