"""The row of an update: collected by the module, written here, once."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import lightning as L

Row = dict[str, float]


@runtime_checkable
class RowObserver(Protocol):
    """A callback that looks at every finished row, wherever in the list it stands (progress bar, summary)."""

    def on_row(self, trainer: L.Trainer, module: Any, update: int, row: Row) -> None: ...


def write_row(trainer: L.Trainer, module: Any, update: int, row: Row) -> None:
    """Log ``row`` at ``update`` through every logger, and show it to the callbacks that look at rows."""
    for logger in trainer.loggers:
        logger.log_metrics(row, step=update)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RowObserver):
            callback.on_row(trainer, module, update, row)


class MetricWriter(L.Callback):
    """Writes what the other callbacks recorded during an update as one row, at step ``module.update``.

    It stands after every callback that records and before the one that saves checkpoints. A checkpoint is
    never ahead of the metrics when whoever writes it calls :meth:`flush` first.
    """

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        row = {name: float(value) for name, value in module.take_record().items()}
        if row:
            write_row(trainer, module, module.update, row)

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        self.flush(trainer)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self.flush(trainer)

    @staticmethod
    def flush(trainer: L.Trainer) -> None:
        """Hand everything logged so far to the operating system."""
        for logger in trainer.loggers:
            logger.save()
