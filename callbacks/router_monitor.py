"""How a Mixture-of-Experts policy routes its response tokens, and how far that drifted since generation."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np

from vespo_lightning.callbacks.tensorboard import draw_heat_map, summary_writer
from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.sample import MiniBatch
from vespo_lightning.routing.drift import RoutingDrift
from vespo_lightning.routing.statistics import RouterStatistics
from vespo_lightning.training.outputs import MicroBatchOutput

#: Statistics that are drawn over time -> tag of the image and what its colours mean.
OVER_TIME = {
    "load_max_violation": ("router/load_max_violation_over_time", "max load / even load - 1"),
    "changed_sets": ("router/changed_sets_over_time", "share of changed expert sets"),
}
#: Columns of a heat map over time.
MAX_COLUMNS = 256


class RouterMonitor(L.Callback):
    """Record ``router/*`` for every update, and draw heat maps for some.

    Silent for dense models. Formulas: :class:`~vespo_lightning.routing.statistics.RouterStatistics`. Names with
    ``engine_`` compare the same routing with the engine's as :class:`~vespo_lightning.routing.drift.RoutingDrift` does,
    but only for tokens written by the very weights of the update, where all that differs is engine and trainer.

    Args:
        heatmap_every: updates between two sets of heat maps, layers x experts and layers x time; the first update has
            one.

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
        self._engine: RoutingDrift | None = None
        self._top_k = 0
        self._history = {name: LayerHistory() for name in OVER_TIME}

    def on_micro_batch_end(self, trainer: L.Trainer, module: Any, output: MicroBatchOutput) -> None:
        routing = output.routing
        if routing is None:
            return
        if self._statistics is None or self._engine is None:
            device = routing.probs.device
            self._statistics = RouterStatistics(routing.layers, routing.probs.shape[-1], device)
            self._engine = RoutingDrift(routing.layers, device, prefix="engine_")
            self._top_k = routing.experts.shape[-1]
        self._statistics.update(routing)
        fresh = routing.mask & (output.tokens.version_made == output.tokens.policy_version)
        self._engine.update_since_generation(routing, fresh)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: MiniBatch, batch_idx: int
    ) -> None:
        statistics, engine = self._statistics, self._engine
        self._statistics = self._engine = None
        if statistics is None or engine is None:
            return
        for part in (statistics, engine):
            part.set_sums(trainer.strategy.reduce(part.sums(), reduce_op="sum"))
            module.record({f"router/{name}": value for name, value in part.metrics().items()})
        per_layer = statistics.per_layer()
        for name, history in self._history.items():
            if name in per_layer:
                history.add(batch.update, per_layer[name].tolist())
        if batch.update % self.heatmap_every == 0 and statistics.tokens > 0:
            self._draw_load(trainer, module, statistics)
            self._draw_history(trainer, module, statistics.layers)

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

    def _draw_history(self, trainer: L.Trainer, module: Any, layers: list[int]) -> None:
        writer = summary_writer(trainer)
        if writer is None:
            return
        for name, (tag, meaning) in OVER_TIME.items():
            values = self._history[name].means()
            if not np.isfinite(values).any():
                continue
            width = self._history[name].width
            image = draw_heat_map(
                values,
                [str(layer) for layer in layers],
                title=f"{name}, up to update {module.update}",
                x_label="update" if width == 1 else f"update / {width}, means of {width} updates",
                y_label="decoder layer",
                value_label=meaning,
                value_range=(0.0, max(float(np.nanmax(values)), 1e-3)),
            )
            writer.add_image(tag, image, global_step=module.update, dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        return {"history": {name: history.state() for name, history in self._history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history = {name: LayerHistory(**state) for name, state in state_dict["history"].items()}


class LayerHistory:
    """A statistic of L layers over the whole run, in at most ``MAX_COLUMNS`` columns of equally many updates.

    A column holds the mean over its updates. When the columns are used up, two become one: leaving out every other one
    would show a single place of the rollouts, such as the first mini-batches, on which routing has drifted least.

    Args:
        width: updates per column; update u is in column u // width.
        totals: per column the sum of each layer's values; empty where there is none.
        counts: per column the number of updates with values.
    """

    def __init__(
        self, width: int = 1, totals: list[list[float]] | None = None, counts: list[int] | None = None
    ) -> None:
        self.width = width
        self.totals: list[list[float]] = [] if totals is None else totals
        self.counts: list[int] = [] if counts is None else counts

    def add(self, update: int, values: list[float]) -> None:
        """The values [L] of an update, 0-based."""
        while update // self.width >= MAX_COLUMNS:
            self.width *= 2
            self.totals = [_sum(self.totals[i : i + 2]) for i in range(0, len(self.totals), 2)]
            self.counts = [sum(self.counts[i : i + 2]) for i in range(0, len(self.counts), 2)]
        column = update // self.width
        while len(self.counts) <= column:
            self.totals.append([])
            self.counts.append(0)
        self.totals[column] = _sum([self.totals[column], values])
        self.counts[column] += 1

    def means(self) -> np.ndarray:
        """float64 [L, columns], nan in columns without values; [0, 0] before the first."""
        num_layers = max(map(len, self.totals), default=0)
        columns = [
            [value / count for value in total] if count else [np.nan] * num_layers
            for total, count in zip(self.totals, self.counts, strict=True)
        ]
        return np.array(columns, dtype=float).reshape(len(columns), num_layers).T

    def state(self) -> dict[str, Any]:
        """The arguments, in plain containers."""
        return {"width": self.width, "totals": [list(total) for total in self.totals], "counts": list(self.counts)}


def _sum(lists: list[list[float]]) -> list[float]:
    """Elementwise; empty lists count as zeros."""
    return [sum(values) for values in zip(*filter(None, lists), strict=True)]
