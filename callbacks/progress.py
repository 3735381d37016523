"""The progress bar: reward, effective sample size, lag and speed at a glance."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from vespo_lightning.callbacks.metric_writer import Row

#: Label on the bar -> metric.
SHOWN = {
    "reward": "reward/mean",
    "ESS": "importance/ess_ratio",
    "lag": "staleness/lag_mean",
    "samples/s": "performance/samples_per_second",
    "accuracy": "eval/accuracy",
}


class Progress(TQDMProgressBar):
    """Lightning's bar with the figures that matter here; without a terminal a plain line now and then.

    Args:
        every_seconds: least time between two plain lines, where the output goes to a file or a pipe.
    """

    def __init__(self, every_seconds: float = 15.0) -> None:
        self.on_terminal = sys.stdout.isatty()
        super().__init__(refresh_rate=1 if self.on_terminal else 0)
        self.every_seconds = every_seconds
        self._figures: dict[str, str] = {}
        self._last_line = -math.inf

    def on_row(self, trainer: L.Trainer, module: Any, update: int, row: Row) -> None:
        self._figures |= {label: f"{row[name]:.3g}" for label, name in SHOWN.items() if name in row}
        now = time.monotonic()
        due = update == self.total_train_batches or now - self._last_line >= self.every_seconds
        if due and not self.on_terminal and trainer.is_global_zero:
            self._last_line = now
            figures = "  ".join(f"{label} {value}" for label, value in self._figures.items())
            print(f"update {update}/{self.total_train_batches}  {figures}", flush=True)

    def get_metrics(self, trainer: L.Trainer, module: Any) -> dict[str, Any]:
        return dict(self._figures)

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        # Lightning does this in on_train_epoch_start, which a run resumed in the middle of its one epoch
        # never sees.
        self.train_progress_bar.total = self.total_train_batches
        self.train_progress_bar.set_description("updates")

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Nothing: the bar is ready, and the number of the only epoch says nothing."""
