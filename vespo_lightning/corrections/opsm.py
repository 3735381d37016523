"""OPSM, off-policy sequence masking (DeepSeek-V3.2, equation 9)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from vespo_lightning.corrections.checks import require_number
from vespo_lightning.corrections.filters import ResponseFilter, kept_length_ratio, mean_per_token
from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.statistics import means
from vespo_lightning.objectives.token_ratio import clamped_log_ratio


class Opsm(ResponseFilter):
    """A bad response leaves the loss when the policy has left it: A < 0 and ``mean_t log(old / pi) > delta``.

    ``old`` is the denominator of the run. With ``denominator=behaviour`` the mean holds the engine's mismatch too, as
    in TRL, which compares with the log-probs that sampled; DeepSeek and slime take the old policy. With
    ``denominator=recomputed`` and one update per rollout the ratio is 1 and nothing ever happens, which is refused
    at start.

    Constants: DeepSeek publishes none; slime has delta = 1e-4, the default here; TRL has none and gives 0.5 as an
    example. 1e-4 nats per token is little: a bfloat16 engine alone, with 0.031 nats of noise per token, has a mean of
    about 5e-4, so that with ``denominator=behaviour`` most bad responses of such an engine leave the loss.

    Part of the definition: log-ratios are clamped to [-20, 20]. A response with a NaN log-prob stays in the loss.

    Args:
        delta: largest mean log-ratio that stays, in nats per token, at least 0.

    Raises:
        UserError: a value below 0.
    """

    name: ClassVar[str] = "opsm"

    def __init__(self, delta: float = 1e-4) -> None:
        self.delta = require_number("opsm.delta", delta, 0.0)

    def rejected(self, batch: TokenBatch) -> Tensor:
        return (batch.advantage < 0) & (-mean_per_token(clamped_log_ratio(batch), batch) > self.delta)

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Of the responses with A < 0 and tokens in the loss: share that leaves, mean length of what stays over all."""
        bad = batch.advantage < 0
        rejected = self.rejected(batch)
        only_bad = replace(batch, loss_mask=batch.loss_mask & bad[batch.sequence_index])
        return means(
            {
                "correction/opsm_rejected_share": rejected[bad & (batch.length > 0)],
                "correction/opsm_kept_length_ratio": kept_length_ratio(rejected, only_bad),
            }
        )
