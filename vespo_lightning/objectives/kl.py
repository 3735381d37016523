"""A penalty for leaving a reference policy: Kullback-Leibler divergence in the reward or in the loss."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.statistics import means

Estimator = Literal["k1", "k2", "k3"]
Placement = Literal["reward", "loss"]

#: Bound of the log-ratio of one token between policy and reference.
LOG_RATIO_BOUND = 20.0
#: Where each estimator belongs, and why not elsewhere.
_PLACEMENT: dict[Estimator, Placement] = {"k1": "reward", "k2": "loss", "k3": "loss"}
_WHY = {
    "k1": "the gradient of k1 in the loss is 0 on average and pulls nowhere",
    "k2": "k2 in the reward is not an unbiased estimate of the divergence",
    "k3": "k3 in the reward does not have the gradient of the divergence",
}


class KlPenalty:
    """``coefficient`` times an estimate of the divergence from the policy to a frozen reference policy.

    With d = log pi - log reference of a token (Schulman, "Approximating KL divergence", 2020):

    * ``k1``, in the reward: the reward of a response falls by coefficient * sum of d, with the log-probs that it
      was sampled with. So d is that of generation time, and the advantage spreads it over the response.
    * ``k2``, in the loss: d^2 / 2 per token, whose gradient is ``d grad log pi``. Of tokens that the policy itself
      sampled its mean is the gradient of KL(pi || reference).
    * ``k3``, in the loss (GRPO, arXiv 2402.03300): exp(-d) - 1 + d per token, whose gradient is
      ``(1 - exp(-d)) grad log pi``. Its mean is the gradient of KL(reference || pi).

    The term in the loss has no importance weight, as GRPO published it: on stale data its mean is over the policy
    that sampled. DeepSeek-V3.2 weights it. d is clamped to [-20, 20] before the estimator; a token beyond is still
    pulled back, as hard as at the bound.

    Args:
        coefficient: at least 0; 0 only measures.
        estimator: ``k1``, ``k2`` or ``k3``.
        placement: ``reward`` for k1, ``loss`` for k2 and k3.
        reference: folder or hub id of the reference policy; None is what the run started from.

    Raises:
        UserError: a value outside these ranges, or an estimator where its gradient is not that of a divergence.
    """

    def __init__(
        self,
        coefficient: float = 0.001,
        estimator: Estimator = "k3",
        placement: Placement = "loss",
        reference: str | None = None,
    ) -> None:
        number = isinstance(coefficient, int | float) and not isinstance(coefficient, bool)
        if not number or not math.isfinite(coefficient) or coefficient < 0:
            raise UserError(f"kl.coefficient={coefficient} is not allowed; give a finite number of at least 0")
        if estimator not in _PLACEMENT:
            raise UserError(f"kl.estimator={estimator} is unknown; valid: {', '.join(_PLACEMENT)}")
        if placement not in ("reward", "loss"):
            raise UserError(f"kl.placement={placement} is unknown; valid: reward, loss")
        if placement != _PLACEMENT[estimator]:
            raise UserError(
                f"kl.placement={placement} does not go with kl.estimator={estimator}, because {_WHY[estimator]}; "
                "take kl=reward_k1, kl=loss_k2 or kl=loss_k3"
            )
        if reference is not None and (not isinstance(reference, str) or not reference):
            raise UserError(
                f"kl.reference={reference!r} is no folder or hub id; give one, or null for what the run starts from"
            )
        self.coefficient = float(coefficient)
        self.estimator: Estimator = estimator
        self.placement: Placement = placement
        self.reference = reference

    def reward_penalty(self, sampled: np.ndarray, reference: np.ndarray, loss_mask: np.ndarray) -> float:
        """What the reward of one response of T tokens falls by; 0 for a penalty in the loss.

        Args:
            sampled: [T] log-probs of the policy that sampled.
            reference: [T] log-probs of the reference policy.
            loss_mask: bool [T] tokens that the policy wrote.
        """
        if self.placement != "reward":
            return 0.0
        difference = sampled.astype(np.float64) - reference.astype(np.float64)
        return self.coefficient * float(difference[loss_mask].sum())

    def multiplier(self, batch: TokenBatch) -> Tensor:
        """[T] what is added to the objective's multiplier of ``grad log pi``; 0 where ``loss_mask`` is False."""
        difference = self._log_ratio(batch)
        if self.placement == "reward":
            return torch.zeros_like(difference)
        pull = difference if self.estimator == "k2" else -torch.expm1(-difference)
        return torch.where(batch.loss_mask, -self.coefficient * pull, 0.0)

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Divergence from the reference per token, by two estimators, and the size of the penalty."""
        inside = batch.loss_mask
        difference = self._log_ratio(batch)[inside].double()
        k3 = torch.expm1(-difference) + difference
        if self.placement == "reward":
            apart = torch.where(inside, (batch.behaviour_log_prob - self._reference(batch)).double(), 0.0)
            penalty = batch.sequence_sum(apart)[batch.length > 0]
        else:
            penalty = difference.square() / 2 if self.estimator == "k2" else k3
        return means(
            {"kl/reference_k1": difference, "kl/reference_k3": k3, "kl/penalty": self.coefficient * penalty},
        )

    def _log_ratio(self, batch: TokenBatch) -> Tensor:
        """[T] d of each token, clamped; 0 outside the loss mask."""
        difference = torch.where(batch.loss_mask, batch.log_prob - self._reference(batch), 0.0)
        return difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)

    @staticmethod
    def _reference(batch: TokenBatch) -> Tensor:
        assert batch.reference_log_prob is not None, "a KL penalty without log-probs of the reference policy"
        return batch.reference_log_prob
