"""How far the inference engine and the trainer disagree at equal weights."""

from __future__ import annotations

from typing import Any

import lightning as L

from vespo_lightning.diagnostics.mismatch import mismatch_statistics


class EngineMismatch(L.Callback):
    """Records ``mismatch/*`` on the updates where it is defined.

    These are the first of each rollout, or all of them with recomputed log-probs. Elsewhere nothing is
    recorded: the metric is absent, not 0.
    """

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        update = module.last_update
        if update is not None and (statistics := mismatch_statistics(update.tokens)):
            module.record(statistics)
