"""CISPO, clipped importance sampling policy optimization (MiniMax-M1, arXiv 2506.13585)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vespo_lightning.objectives.base import Objective, Scope, TokenBatch
from vespo_lightning.objectives.checks import require_number
from vespo_lightning.objectives.statistics import active_tokens, coefficient_statistics, means
from vespo_lightning.objectives.token_ratio import MAX_RATIO, bound_shares, clamped_log_ratio


class Cispo(Objective):
    """REINFORCE with the token ratio as a weight that is bounded and not differentiated: no token is dropped.

    The coefficient is ``clip(r, ratio_min, ratio_max)``, the gradient of ``sg(clip(r)) * A * log pi``.

    **Both bounds are values of the ratio itself**, not distances from 1. The name "epsilon_high" has three meanings
    elsewhere: the paper and verl clip at ``1 + eps_high`` (verl's example sets 0.2: a ratio of 1.2), TRL and Liger
    take ``epsilon_high`` as the largest ratio itself (5.0, after ScaleRL, arXiv 2510.13786), slime wants
    ``eps_clip >= 1``. Here ``ratio_max=5`` is TRL's ``epsilon_high=5``, and ``ratio_max=1.2`` verl's 0.2.

    Constants: the paper uses no lower bound in effect and does not publish its upper one; verl's example the same with
    1.2 above; TRL, Liger and ScaleRL no lower bound and 5.0 above, as here. Aggregation: mean over all tokens
    (``aggregation=token-mean``); advantages normalised by the standard deviation of the group in the paper.

    Disagreement: best-scaling loss in ScaleRL, it collapses on mixture-of-experts base models or very stale data
    according to DPPO, M2PO and VESPO, for want of a trust region: negative advantages keep full weight up to
    ``ratio_max``.

    Part of the definition: log-ratios are clamped to [-20, 20] before the exponential, as verl does (TRL and Liger do
    not clamp). It shows only below: a ratio is at least 2.1e-9. The clamp is inside the weight that is not
    differentiated, so tokens beyond it keep their gradient.

    Args:
        ratio_min: smallest weight, at most 1; 0 is no bound.
        ratio_max: largest weight, at least 1.

    Raises:
        UserError: a bound outside these ranges, or ratio_max above 1e8.
    """

    name: ClassVar[str] = "cispo"
    scope: ClassVar[Scope] = "token"
    depends_on_advantage: ClassVar[bool] = False

    def __init__(self, ratio_min: float = 0.0, ratio_max: float = 5.0) -> None:
        self.ratio_min = require_number("ratio_min", ratio_min, 0.0, 1.0)
        self.ratio_max = require_number("ratio_max", ratio_max, 1.0, MAX_RATIO)

    def coefficient(self, batch: TokenBatch) -> Tensor:
        return clamped_log_ratio(batch).exp().clamp(self.ratio_min, self.ratio_max)

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Common numbers, and the share of active tokens whose ratio is lowered or raised to a bound."""
        ratio = clamped_log_ratio(batch).exp()[active_tokens(batch)]
        bounds = bound_shares(ratio, self.ratio_min, self.ratio_max)
        return coefficient_statistics(self.coefficient(batch), batch) | means(bounds)
