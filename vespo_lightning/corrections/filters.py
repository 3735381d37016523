"""What corrections share that take whole responses out of the loss."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

from torch import Tensor

from vespo_lightning.corrections.base import Correction
from vespo_lightning.objectives.base import TokenBatch


class ResponseFilter(Correction):
    """All tokens of a rejected response leave the loss; they stay in its normalisation. No weight is multiplied."""

    @abstractmethod
    def rejected(self, batch: TokenBatch) -> Tensor:
        """bool [S]; False for responses with a NaN log-prob, so that the trainer sees them."""

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        return replace(batch, loss_mask=batch.loss_mask & ~self.rejected(batch)[batch.sequence_index])


def kept_length_ratio(rejected: Tensor, batch: TokenBatch) -> Tensor:
    """[1] or [0]: mean number of tokens in the loss of the responses that stay over that of all; needs some of both.

    Away from 1 the filter selects by length.

    Args:
        rejected: bool [S].
    """
    length = batch.length.double()
    kept = length[~rejected & (length > 0)]
    return kept.mean().div(length[length > 0].mean())[None] if len(kept) else length[:0]


def mean_per_token(per_token: Tensor, batch: TokenBatch) -> Tensor:
    """float64 [S]: mean over the tokens in the loss of ``per_token`` [T], which is 0 elsewhere; 0 without any."""
    return batch.sequence_sum(per_token.double()) / batch.length.double().clamp(min=1)
