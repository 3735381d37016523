"""Corrections: what is done about importance ratios that are too far off, whatever the objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from vespo_lightning.objectives.base import Need, TokenBatch


class Correction(ABC):
    """Token batch in, token batch out; nothing here is differentiated.

    A correction may clear ``loss_mask`` (the token or response leaves the loss, with ratio 1 in every product, and
    stays in its normalisation), set ``engine_log_weight`` (a factor of the importance ratio) or ``final_weight`` (a
    factor of the finished coefficient). Where an earlier correction has set one already, the two multiply.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    """Optional parts of the batch that the correction cannot do without."""

    @abstractmethod
    def __call__(self, batch: TokenBatch) -> TokenBatch:
        """The corrected batch."""

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """The correction's own numbers, named ``correction/...``, from the batch before it. Default: none."""
        return {}


def corrected(corrections: Sequence[Correction], batch: TokenBatch) -> TokenBatch:
    """``batch`` after all corrections, in order."""
    for correction in corrections:
        batch = correction(batch)
    return batch


def correction_statistics(corrections: Sequence[Correction], batch: TokenBatch) -> dict[str, float]:
    """Statistics of all corrections, each seeing what the earlier ones left."""
    result: dict[str, float] = {}
    for correction in corrections:
        result |= correction.statistics(batch)
        batch = correction(batch)
    return result
