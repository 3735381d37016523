"""Where log-ratios of a Mixture-of-Experts policy come from, and how far one update moves its routing."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.sample import MiniBatch
from vespo_lightning.routing.drift import LogRatioSplit, RoutingSnapshot


class RouterDrift(L.Callback):
    """Looks at the mini-batch of some updates again, without gradients.

    Before the update with the routers' own choice and with the engine's experts, which splits each log-ratio into a
    part due to routing and the rest (:class:`~vespo_lightning.routing.drift.LogRatioSplit`; absent where the engine
    returned no experts). After the update with the routers' own choice, compared with the first look at the same
    tokens (:class:`~vespo_lightning.routing.drift.RoutingDrift`, names ``update_...``; absent where the update was
    skipped). That is three forward passes, about the price of one update. Training does not notice: weights,
    gradients and random states stay as they are. Silent for dense models.

    Args:
        every: updates between two measurements, 0 for none. What staleness does shows only if they fall on different
            places of a rollout, so it should have no factor in common with its number of mini-batches.

    Raises:
        UserError: ``every`` is not a whole number of at least 0.
    """

    def __init__(self, every: int = 61) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 0:
            raise UserError(
                f"callbacks.router_drift.every={every} is not allowed; give a whole number of updates, or 0 for no "
                "measurements"
            )
        self.every = every
        self._before: RoutingSnapshot | None = None
        self._seconds = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: MiniBatch, batch_idx: int) -> None:
        self._before = None
        if not module.is_moe or self.every == 0 or batch.update % self.every:
            return
        started = time.perf_counter()
        self._before = RoutingSnapshot.take(module.look(batch, "none"))
        if all(sample.routed_experts is not None for sample in batch.samples):
            module.record(self._split(trainer, module, batch, self._before.log_prob))
        self._seconds = time.perf_counter() - started

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: MiniBatch, batch_idx: int
    ) -> None:
        before, self._before = self._before, None
        if before is None:
            return
        started = time.perf_counter()
        if not module.last_update.skipped:
            drift = before.drift(module.look(batch, "none"))
            drift.set_sums(trainer.strategy.reduce(drift.sums(), reduce_op="sum"))
            module.record({f"router/{name}": value for name, value in drift.metrics().items()})
        module.record({"performance/router_drift_seconds": self._seconds + time.perf_counter() - started})

    @staticmethod
    def _split(trainer: L.Trainer, module: Any, batch: MiniBatch, native: torch.Tensor) -> dict[str, float]:
        split = LogRatioSplit(native.device)
        for done in module.look(batch, "engine"):
            split.update(native[done.index], done.tokens)
        split.sums = trainer.strategy.reduce(split.sums, reduce_op="sum")
        return split.metrics()
