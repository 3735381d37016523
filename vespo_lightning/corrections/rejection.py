"""Rejection of whole responses whose ratio against the engine is too far from 1."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vespo_lightning.corrections.checks import require_range
from vespo_lightning.corrections.filters import ResponseFilter, kept_length_ratio, mean_per_token
from vespo_lightning.corrections.ratios import behaviour_log_ratio, outside
from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.statistics import means


class Geometric(ResponseFilter):
    """A response leaves the loss when the geometric mean of its token ratios lies outside [low, high].

    The ratio is ``pi_old / mu`` with ``denominator=recomputed``, the trainer at generation weights against the engine,
    and the importance ratio ``pi / mu`` with ``denominator=behaviour``. Responses that stay get no weight; stack
    ``tis`` behind it for one.

    Constants: [0.999, 1.001] (verl's documentation), [0.9999, 1.0001] (slime's mis.yaml).

    A length filter: the mean of T ratios with spread s per token has spread s / sqrt(T), so short responses leave
    first. With s = 0.031, reported for bfloat16 engines, the default range keeps about a quarter of the responses of
    100 tokens, and nearly all of 10000. ``correction/geometric_kept_length_ratio`` shows it.

    Part of the definition: log-ratios are clamped to [-20, 20]. A response with a NaN ratio stays in the loss.

    Args:
        low: smallest geometric mean that stays, at most 1.
        high: largest that stays, at least 1.

    Raises:
        UserError: a bound outside these ranges.
    """

    name: ClassVar[str] = "geometric"

    def __init__(self, low: float = 0.999, high: float = 1.001) -> None:
        self.low, self.high = require_range("geometric", low, high)

    def rejected(self, batch: TokenBatch) -> Tensor:
        return outside(mean_per_token(behaviour_log_ratio(batch), batch), self.low, self.high)

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Share of responses with tokens in the loss that leave it, and mean length of those that stay over all."""
        rejected = self.rejected(batch)
        return means(
            {
                "correction/geometric_rejected_share": rejected[batch.length > 0],
                "correction/geometric_kept_length_ratio": kept_length_ratio(rejected, batch),
            }
        )


class SequenceRejection(ResponseFilter):
    """A response leaves the loss when the product of its token ratios lies outside [low, high].

    Which ratio, and what happens to responses that stay, is as in :class:`Geometric`.

    Constants: no common ones. TRL's ``sequence_mask`` has an upper bound of 3 and weights what stays with the ratio;
    verl's documentation gives 2 to 10 for sequence weights. Chosen here: [0.5, 2], a factor of 2 either way.

    A length filter the other way round than :class:`Geometric`: the sum of T log-ratios has spread s * sqrt(T), and a
    mean that falls in proportion to T, so long responses leave first. With s = 0.031 per token, reported for
    Qwen3-4B in bfloat16, a factor of 8 keeps 86 % of the responses of 2048 tokens and 60 % of 6332.
    ``correction/sequence_kept_length_ratio`` shows it; weighting up what stays does not repair it.

    Args:
        low: smallest product that stays, at most 1.
        high: largest that stays, at least 1.

    Raises:
        UserError: a bound outside these ranges.
    """

    name: ClassVar[str] = "sequence_rejection"

    def __init__(self, low: float = 0.5, high: float = 2.0) -> None:
        self.low, self.high = require_range("sequence_rejection", low, high)

    def rejected(self, batch: TokenBatch) -> Tensor:
        return outside(batch.sequence_sum(behaviour_log_ratio(batch).double()), self.low, self.high)

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """As of :class:`Geometric`."""
        rejected = self.rejected(batch)
        return means(
            {
                "correction/sequence_rejected_share": rejected[batch.length > 0],
                "correction/sequence_kept_length_ratio": kept_length_ratio(rejected, batch),
            }
        )
