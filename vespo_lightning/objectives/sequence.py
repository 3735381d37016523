"""What objectives on whole sequences share: the importance weight W of a response, and statistics per response."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vespo_lightning.objectives.base import Objective, Scope, TokenBatch
from vespo_lightning.objectives.statistics import SUPPRESSED_BELOW, active_tokens, coefficient_statistics, means
from vespo_lightning.objectives.token_ratio import clamped_log_ratio

Normalisation = Literal["none", "length", "sqrt_length"]


class SequenceObjective(Objective):
    """One coefficient per sequence, ``phi(W)``, for all its tokens.

    ``W`` is the product of the importance ratios of the tokens in the loss, of which there are T; other tokens
    count with ratio 1 and not in T. Its log is ``S``, the sum of the log-ratios, with ``normalisation=none``;
    ``S / T`` with ``length``; ``S / sqrt(T)`` with ``sqrt_length``. Log-ratios are clamped to [-20, 20] before
    the sum and log W to ``log_weight_bounds`` after the division. A sequence without tokens in the loss has W = 1.
    """

    scope: ClassVar[Scope] = "sequence"
    folds_engine_weight: ClassVar[bool] = True
    log_weight_bounds: ClassVar[tuple[float, float]] = (-20.0, 20.0)
    """Clamp of log W, in nats; -20 and 20 are common (verl's sequence-level correction, ReSPO)."""
    normalisation: Normalisation = "none"

    @abstractmethod
    def kernel(self, log_weight: Tensor, advantage: Tensor) -> Tensor:
        """float64 [S]: phi from log W (float64 [S]) and advantage [S]."""

    def log_weight(self, batch: TokenBatch) -> Tensor:
        """float64 [S]: log W after both clamps."""
        clamped = self._with_engine_weight(clamped_log_ratio(batch), batch)
        return self._log_weight(clamped, batch).clamp(*self.log_weight_bounds)

    def phi(self, batch: TokenBatch) -> Tensor:
        """[S]: the coefficient of each sequence."""
        return self.kernel(self.log_weight(batch), batch.advantage).to(batch.log_prob.dtype)

    def coefficient(self, batch: TokenBatch) -> Tensor:
        return self.phi(batch)[batch.sequence_index]

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Common numbers by token; mean phi and share of suppressed sequences by sign of the advantage."""
        phi = self.phi(batch)
        raw = self._log_weight(self._with_engine_weight(batch.log_ratio, batch), batch)
        active = (batch.advantage != 0) & (batch.length > 0)
        positive, negative = phi[active & (batch.advantage > 0)], phi[active & (batch.advantage < 0)]
        return coefficient_statistics(phi[batch.sequence_index], batch) | means(
            {
                "objective/phi_positive_mean": positive,
                "objective/phi_negative_mean": negative,
                "objective/suppressed_positive_share": positive < SUPPRESSED_BELOW,
                "objective/suppressed_negative_share": negative < SUPPRESSED_BELOW,
                "objective/clamped_share": ((self.log_weight(batch) - raw).abs() > 1e-6)[active],
            }
        )

    def _with_engine_weight(self, log_ratio: Tensor, batch: TokenBatch) -> Tensor:
        """float64 [T]: the weights of a correction enter W as factors; other tokens than those in the loss do not."""
        if batch.engine_log_weight is None or not self.folds_engine_weight:
            return log_ratio.double()
        return torch.where(batch.loss_mask, log_ratio.double() + batch.engine_log_weight.double(), 0.0)

    def _log_weight(self, log_ratio: Tensor, batch: TokenBatch) -> Tensor:
        """float64 [S] from float64 [T]."""
        # In float64, so that the order of the terms (packing, GPU atomics) does not show.
        total = batch.sequence_sum(log_ratio)
        if self.normalisation == "none":
            return total
        length = batch.length.double().clamp(min=1)
        return total / (length if self.normalisation == "length" else length.sqrt())


def of_active_tokens(per_sequence: Tensor, batch: TokenBatch) -> Tensor:
    """[active tokens]: what holds for the sequence [S] of each, so that shares compare with token-level objectives."""
    return per_sequence[batch.sequence_index[active_tokens(batch)]]


def by_sign(advantage: Tensor, positive: float, negative: float) -> Tensor:
    """float64 [S]: ``positive`` where the advantage is at least 0, else ``negative``."""
    # full_like: a where between Python numbers would round them to float32
    value = torch.full_like(advantage, negative, dtype=torch.float64)
    return value.masked_fill(advantage >= 0, positive)
