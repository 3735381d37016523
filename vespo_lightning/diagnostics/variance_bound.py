"""VESPO's bound on the second moment of its coefficients (arXiv 2602.10693): E[phi^2] <= Z K C.

``Z = E[phi]`` and ``C = E[phi W] / E[phi]``, the mean weight under the proposal that phi stands for, are measured;
``K = sup phi(W) / W`` follows from the constants. It holds for every batch, because phi^2 = phi * (phi / W) * W. The
bound says nothing about bias.
"""

from __future__ import annotations

import math

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.sequence import SequenceObjective
from vespo_lightning.objectives.statistics import means


def largest_slope(c1: float, c2: float) -> float:
    """K: supremum of ``W^(c1 - 1) * exp(c2 * (1 - W))`` over W > 0, infinite where that has none."""
    if c1 < 1 or (c1 > 1 and c2 == 0):
        return math.inf
    if c1 == 1:
        return math.exp(c2)  # at W -> 0
    return math.exp((c1 - 1) * math.log((c1 - 1) / c2) + c2 - c1 + 1)


def require_bound(c1: float, c2: float, suffix: str = "") -> float:
    """K of a kernel.

    Args:
        suffix: what follows ``c1`` and ``c2`` in their configuration keys.

    Raises:
        UserError: it is infinite, so that nothing bounds the second moment.
    """
    slope = largest_slope(c1, c2)
    if math.isfinite(slope):
        return slope
    reason, remedy = (
        (f"c1{suffix}={c1:g} below 1", f"raise objective.c1{suffix} to at least 1")
        if c1 < 1
        else (f"c2{suffix}=0 and c1{suffix}={c1:g} above 1", f"raise objective.c2{suffix} above 0")
    )
    raise UserError(
        f"objective.variance_bound=true is not possible with objective.{reason}, where no bound exists; {remedy},"
        " or set objective.variance_bound=false"
    )


def second_moments(
    objective: SequenceObjective, batch: TokenBatch, positive: float, negative: float
) -> dict[str, float]:
    """Both sides of the bound by sign of the advantage, named ``objective/...``; absent without active responses.

    W is what phi is computed from: after clamps, normalisation and corrections.

    Args:
        positive, negative: K for the constants of either sign.
    """
    log_weight = objective.log_weight(batch)
    phi = objective.kernel(log_weight, batch.advantage)  # in float64: the two sides may be equal
    weighted = phi * log_weight.exp()  # Z C is its mean
    active = batch.length > 0
    good, bad = active & (batch.advantage > 0), active & (batch.advantage < 0)
    return means(
        {
            "objective/second_moment_positive": phi[good].square(),
            "objective/variance_bound_positive": positive * weighted[good],
            "objective/second_moment_negative": phi[bad].square(),
            "objective/variance_bound_negative": negative * weighted[bad],
        }
    )
