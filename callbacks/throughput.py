"""Samples and tokens per second, and where the time of an update went."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import lightning as L


class Throughput(L.Callback):
    """Records the rates of training and the time of each update.

    Rates are over as many updates as one rollout serves: a window of that length holds
    exactly one generation phase wherever it lies, so that the curve does not jump between the first update of
    a rollout and the others. The time is the wall clock's, with everything between two updates in it:
    generation, weight synchronisation, evaluation, checkpoints. Samples and tokens are rank 0's times the
    number of ranks.
    """

    def __init__(self) -> None:
        self._window: deque[tuple[int, int, float]] = deque()
        self._clock = 0.0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self._window.clear()
        self._clock = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        result = module.last_update
        mini_batch = result.mini_batch
        now = time.perf_counter()
        self._window.append((len(mini_batch.samples), len(result.tokens.log_prob), now - self._clock))
        self._clock = now
        while len(self._window) > mini_batch.rollout_size * mini_batch.passes:
            self._window.popleft()
        samples, tokens, seconds = (sum(column) for column in zip(*self._window, strict=True))
        module.record(
            {
                "performance/samples_per_second": samples * trainer.world_size / seconds,
                "performance/tokens_per_second": tokens * trainer.world_size / seconds,
                "performance/update_seconds": result.seconds,
            }
        )
