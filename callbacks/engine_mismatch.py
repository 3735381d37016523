"""How far the inference engine and the trainer disagree at equal weights."""

from __future__ import annotations

from typing import Any

import lightning as L

from vespo_lightning.diagnostics.mismatch import EqualRouting, mismatch_statistics
from vespo_lightning.training.outputs import MicroBatchOutput


class EngineMismatch(L.Callback):
    """Records ``mismatch/*`` on the updates where it is defined.

    These are the first of each rollout, or all of them with recomputed log-probs. Elsewhere nothing is
    recorded: the metric is absent, not 0. For MoE models whose engine returns its experts, routing flips are counted
    and the difference on tokens without one is recorded apart.
    """

    def __init__(self) -> None:
        self._equal_routing = EqualRouting()

    def on_micro_batch_end(self, trainer: L.Trainer, module: Any, output: MicroBatchOutput) -> None:
        routing = output.routing
        if routing is not None and routing.recorded_experts is not None:
            self._equal_routing.update(output.tokens, routing.experts, routing.recorded_experts)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        update = module.last_update
        if update is not None and (statistics := mismatch_statistics(update.tokens)):
            module.record({**statistics, **self._equal_routing.metrics()})
        self._equal_routing = EqualRouting()
