"""How a Mixture-of-Experts policy routes its response tokens, and how far that drifted since generation."""

from __future__ import annotations

from typing import Any

import lightning as L

from vespo_lightning.callbacks.tensorboard import draw_heat_map, summary_writer
from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.sample import MiniBatch
from vespo_lightning.routing.statistics import RouterStatistics
from vespo_lightning.training.outputs import MicroBatchOutput


class RouterMonitor(L.Callback):
    """Record ``router/*`` for every update and a heat map of the expert load for some.

    Silent for dense models. Formulas: :class:`~vespo_lightning.routing.statistics.RouterStatistics`.

    Args:
        heatmap_every: updates between two heat maps of the expert load; the first update has one.

    Raises:
        UserError: ``heatmap_every`` is not at least 1.
    """

    def __init__(self, heatmap_every: int = 25) -> None:
        if heatmap_every < 1:
            raise UserError(
                f"callbacks.router_monitor.heatmap_every={heatmap_every} must be at least 1: it is the "
                "number of updates between two heat maps."
            )
        self.heatmap_every = heatmap_every
        self._statistics: RouterStatistics | None = None
        self._top_k = 0

    def on_micro_batch_end(self, trainer: L.Trainer, module: Any, output: MicroBatchOutput) -> None:
        routing = output.routing
        if routing is None:
            return
        if self._statistics is None:
            self._statistics = RouterStatistics(routing.layers, routing.probs.shape[-1], routing.probs.device)
            self._top_k = routing.experts.shape[-1]
        self._statistics.update(routing)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: MiniBatch, batch_idx: int
    ) -> None:
        statistics, self._statistics = self._statistics, None
        if statistics is None:
            return
        statistics.set_sums(trainer.strategy.reduce(statistics.sums(), reduce_op="sum"))
        module.record({f"router/{name}": value for name, value in statistics.metrics().items()})
        if batch.update % self.heatmap_every == 0 and statistics.tokens > 0:
            self._draw_load(trainer, module, statistics)

    def _draw_load(self, trainer: L.Trainer, module: Any, statistics: RouterStatistics) -> None:
        writer = summary_writer(trainer)
        if writer is None:
            return
        load = statistics.relative_load()
        image = draw_heat_map(
            load.cpu().numpy(),
            [str(layer) for layer in statistics.layers],
            title=f"Expert load, update {module.update}",
            x_label="expert",
            y_label="decoder layer",
            value_label="load / even load",
            value_range=(0.0, min(load.shape[1] / self._top_k, 4.0)),
        )
        writer.add_image("router/load", image, global_step=module.update, dataformats="HWC")
