"""Objectives are token multipliers: pure functions of detached numbers, and one line that makes a loss of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

Scope = Literal["token", "sequence", "mini-batch"]
Need = Literal["recomputed_log_prob", "top_log_probs", "router_shift"]


@dataclass(frozen=True)
class TopLogProbs:
    """Log-probs of the K tokens that were likeliest when the response was sampled. T tokens."""

    behaviour: Tensor
    """[T, K] under the policy that sampled, descending"""
    current: Tensor
    """[T, K] of the same token ids under the current policy"""
    holds_sampled: Tensor
    """bool [T]: whether the sampled token is one of the K"""


@dataclass(frozen=True)
class TokenBatch:
    """Response tokens of whole sequences, flattened: no padding. T tokens, S sequences.

    All tensors are detached; floating ones are float32 (float64 in tests).
    """

    log_prob: Tensor
    """[T] log-prob of each token under the current policy, at the sampling temperature"""
    behaviour_log_prob: Tensor
    """[T] log-prob under the policy that sampled, as the engine reported it"""
    sequence_index: Tensor
    """int64 [T], non-decreasing: the sequence that a token belongs to"""
    loss_mask: Tensor
    """bool [T]; False leaves the loss and every importance weight (tokens that the policy did not write)"""
    advantage: Tensor
    """[S]"""
    group: Tensor
    """int64 [S]"""
    version_made: Tensor
    """int32 [T], policy version that wrote the token"""
    policy_version: int
    """version of the current policy"""
    denominator: Literal["behaviour", "recomputed"] = "behaviour"
    recomputed_log_prob: Tensor | None = None
    """[T] the trainer's log-prob at generation weights"""
    reference_log_prob: Tensor | None = None
    """[T] log-prob under the reference policy of the KL penalty"""
    top: TopLogProbs | None = None
    router_shift: Tensor | None = None
    """[T] log of RSPO's router-shift ratio, at most 0 (see :mod:`vespo_lightning.corrections.router_shift`)"""
    engine_log_weight: Tensor | None = None
    """[T] log of a correction's weight of each token, to be multiplied with its importance ratio"""
    final_weight: Tensor | None = None
    """[T] weight of a correction that multiplies the finished coefficient"""

    @property
    def old_log_prob(self) -> Tensor:
        """[T] denominator of the importance ratio."""
        if self.denominator == "behaviour":
            return self.behaviour_log_prob
        assert self.recomputed_log_prob is not None, "denominator=recomputed without recomputed log-probs"
        return self.recomputed_log_prob

    @property
    def log_ratio(self) -> Tensor:
        """[T] log of the importance ratio; exactly 0 where ``loss_mask`` is False, whatever is stored there."""
        return torch.where(self.loss_mask, self.log_prob - self.old_log_prob, 0.0)

    def sequence_sum(self, per_token: Tensor) -> Tensor:
        """[S] sum of ``per_token`` [T] over each sequence. Empty sequences give 0."""
        return per_token.new_zeros(len(self.advantage)).index_add_(0, self.sequence_index, per_token)

    @property
    def length(self) -> Tensor:
        """[S] number of tokens in the loss."""
        return self.sequence_sum(self.loss_mask.to(self.log_prob.dtype))


class Objective(ABC):
    """One method: importance ratios and advantages in, token multipliers out.

    ``multiplier`` is what multiplies ``grad log pi`` of each token. Nothing here is differentiated.
    """

    name: ClassVar[str]
    scope: ClassVar[Scope]
    """What one multiplier depends on. Whole sequences stay in one micro-batch; for ``mini-batch`` the trainer first
    looks at all tokens in a forward pass without gradients."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    """Optional parts of the batch that the method cannot do without."""
    folds_engine_weight: ClassVar[bool] = False
    """Whether :meth:`coefficient` takes ``engine_log_weight`` into its importance weight; otherwise it multiplies the
    finished coefficient."""
    depends_on_advantage: ClassVar[bool] = True
    """False when the coefficient is the same whatever the advantage, its sign included."""

    @abstractmethod
    def coefficient(self, batch: TokenBatch) -> Tensor:
        """[T] coefficient of each token, before the advantage. Finite for every finite input."""

    def corrected_coefficient(self, batch: TokenBatch) -> Tensor:
        """[T] coefficient with the weights of corrections, before the advantage."""
        coefficient = self.coefficient(batch)
        if batch.engine_log_weight is not None and not self.folds_engine_weight:
            coefficient = coefficient * batch.engine_log_weight.exp()
        if batch.final_weight is not None:
            coefficient = coefficient * batch.final_weight
        return coefficient

    def multiplier(self, batch: TokenBatch) -> Tensor:
        """[T] ``corrected coefficient * advantage``; 0 where ``loss_mask`` is False."""
        weighted = self.corrected_coefficient(batch) * batch.advantage[batch.sequence_index]
        return torch.where(batch.loss_mask, weighted, 0.0)

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """The method's own numbers over a whole mini-batch, named ``objective/...``. Default: none."""
        return {}


def policy_loss(weight: Tensor, multiplier: Tensor, log_prob: Tensor) -> Tensor:
    """Scalar loss ``-(weight * multiplier * log_prob).sum()`` whose gradient is the policy gradient.

    Args:
        weight: [T] aggregation weights of the tokens (for example 1 / number of tokens in the mini-batch).
        multiplier: [T] from :meth:`Objective.multiplier`.
        log_prob: [T] with gradient.
    """
    return -(weight * multiplier.detach() * log_prob).sum()
