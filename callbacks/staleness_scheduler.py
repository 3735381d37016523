"""Decides how stale the data is allowed to get, and logs how stale it is."""

from __future__ import annotations

from typing import Any

import lightning as L

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.sample import MiniBatch


class StalenessScheduler(L.Callback):
    """Synchronous rollouts of a constant number of mini-batches.

    Mini-batch j of a rollout is trained on j updates after it was generated, so n = 1 is on-policy and n = 64 means
    a mean staleness of 31.5 updates.

    Args:
        n: mini-batches per rollout, N in the papers.
    """

    def __init__(self, n: int = 8) -> None:
        if not isinstance(n, int) or n < 1:
            raise UserError(f"staleness.n={n} must be a whole number of at least 1 (1 is on-policy)")
        self.n = n

    def rollout_size(self, rollout: int) -> int:
        """Mini-batches that rollout number ``rollout`` holds."""
        return self.n

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: MiniBatch, batch_idx: int
    ) -> None:
        tokens = module.last_update.tokens
        lag = (tokens.policy_version - tokens.version_made[tokens.loss_mask]).float()
        if not len(lag):
            return
        module.record(
            {
                "staleness/lag_mean": float(lag.mean()),
                "staleness/lag_min": float(lag.min()),
                "staleness/lag_max": float(lag.max()),
                "staleness/position": float(batch.position),
                "staleness/pass": float(batch.pass_number),
                "staleness/rollout_size": float(batch.rollout_size),
            }
        )
