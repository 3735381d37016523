"""VESPO, variational sequence-level soft policy optimization (arXiv 2602.10693)."""

from __future__ import annotations

from typing import ClassVar, get_args

from torch import Tensor

from vespo_lightning.diagnostics.variance_bound import largest_slope, require_bound, second_moments
from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.checks import require_choice, require_number
from vespo_lightning.objectives.kernel import LOG_WEIGHT_BOUNDS, check_peak, gamma_kernel
from vespo_lightning.objectives.sequence import Normalisation, SequenceObjective, by_sign


class Vespo(SequenceObjective):
    """Soft trust region on whole sequences: ``phi(W) = W^c1 * exp(c2 * (1 - W))`` times the advantage.

    ``W`` is the product of the importance ratios of all tokens in the loss: a plain sum of log-ratios, with
    no division by the length. Tokens outside the loss mask count with ratio 1. ``phi(1) = 1``; the maximum is at
    ``W = c1 / c2``. ``c1_positive, c2_positive`` hold for advantages >= 0, the others for negative ones: a good
    response that became likelier is no longer pushed up, a bad one that became unlikelier no longer down.

    Part of the definition, following the published code where it differs from the formula:

    * the log-ratio of each token is clamped to [-20, 20] before the sum;
    * the sum is clamped to [log 1e-8, 20] = [-18.42, 20]. The code's two clamps amount to that, except that
      they let the W inside ``exp(c2 * (1 - W))`` go down to exp(-20), a relative difference below 1e-7.

    Not followed: the code's floor of 1e-4 under c2 (values are used as given), and its replacement of NaN
    by 0 (a NaN log-prob stays NaN, so that the non-finite guard sees it).

    ``normalisation`` and equal constants are the paper's ablations. W becomes the geometric mean of the ratios
    with ``length`` (log W divided by T, the number of tokens in the loss), with ``sqrt_length`` log W is divided
    by sqrt(T): both collapse, according to the paper. Its code for them is not published; the division comes
    between the two clamps here. (2, 3) for both signs is unstable there, (3, 2) stable but slower.

    Args:
        c1_positive, c2_positive: constants for advantage >= 0 (paper and code: 2, 3).
        c1_negative, c2_negative: constants for advantage < 0 (paper and code: 3, 2).
        normalisation: ``none``, ``length`` or ``sqrt_length``.
        variance_bound: log E[phi^2] and its bound Z K C (:mod:`vespo_lightning.diagnostics.variance_bound`), which
            exists for ``c1 >= 1`` only.

    Raises:
        UserError: a constant is negative, the largest coefficient would not fit in float32, there is no such
            normalisation, or the bound is asked for where there is none.
    """

    name: ClassVar[str] = "vespo"
    log_weight_bounds: ClassVar[tuple[float, float]] = LOG_WEIGHT_BOUNDS

    def __init__(
        self,
        c1_positive: float = 2.0,
        c2_positive: float = 3.0,
        c1_negative: float = 3.0,
        c2_negative: float = 2.0,
        normalisation: Normalisation = "none",
        variance_bound: bool = True,
    ) -> None:
        self.c1_positive = require_number("c1_positive", c1_positive, 0.0)
        self.c2_positive = require_number("c2_positive", c2_positive, 0.0)
        self.c1_negative = require_number("c1_negative", c1_negative, 0.0)
        self.c2_negative = require_number("c2_negative", c2_negative, 0.0)
        self.normalisation = require_choice("normalisation", normalisation, get_args(Normalisation))
        check_peak(self.c1_positive, self.c2_positive, "_positive")
        check_peak(self.c1_negative, self.c2_negative, "_negative")
        self.variance_bound = variance_bound
        if self.variance_bound:
            require_bound(self.c1_positive, self.c2_positive, "_positive")
            require_bound(self.c1_negative, self.c2_negative, "_negative")

    def kernel(self, log_weight: Tensor, advantage: Tensor) -> Tensor:
        c1 = by_sign(advantage, self.c1_positive, self.c1_negative)
        c2 = by_sign(advantage, self.c2_positive, self.c2_negative)
        return gamma_kernel(log_weight, c1, c2)

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Those of every sequence-level objective, and with ``variance_bound`` both sides of the bound."""
        common = super().statistics(batch)
        if not self.variance_bound:
            return common
        positive = largest_slope(self.c1_positive, self.c2_positive)
        negative = largest_slope(self.c1_negative, self.c2_negative)
        return common | second_moments(self, batch, positive, negative)
