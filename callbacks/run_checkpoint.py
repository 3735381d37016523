"""Checkpoints that a killed run goes on from, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.loader import RolloutLoader


class RunCheckpoint(Checkpoint):
    """Saves ``FOLDER/update-000128.ckpt`` every so many updates and at the end, keeping the newest few.

    A checkpoint appears under its name only when it is whole and on the disk, and the metrics of its updates are
    flushed before it. Rollouts that no kept checkpoint needs are deleted.

    Args:
        folder: where checkpoints go.
        every: updates between checkpoints.
        keep: checkpoints kept.
    """

    def __init__(self, folder: str, every: int = 64, keep: int = 2) -> None:
        super().__init__()
        if every < 1 or keep < 1:
            raise UserError(f"callbacks.checkpoint: every={every} and keep={keep} must be at least 1")
        self.folder = Path(folder)
        self.every = every
        self.keep = keep
        self._rollout_of: dict[str, int] = {}

    @property
    def last_path(self) -> Path | None:
        """The last good checkpoint, of this process or of the one that it goes on for."""
        return newest_checkpoint(self.folder)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loader: Any = trainer.train_dataloader
        if module.update % self.every == 0 or module.update == len(loader):
            self.save(trainer, module, loader)

    def save(self, trainer: L.Trainer, module: Any, loader: RolloutLoader) -> None:
        """Write a checkpoint of this moment.

        Raises:
            UserError: the disk does not take it; earlier checkpoints are intact.
        """
        for logger in trainer.loggers:
            logger.save()
        path = self.folder / f"update-{module.update:06d}.ckpt"
        partial = path.with_suffix(".partial")
        self._rollout_of[path.name] = loader.rollout
        try:
            trainer.save_checkpoint(partial)
            _flush_to_disk(partial)
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            previous = f"the last good one is {self.last_path}" if self.last_path else "there is none yet"
            raise UserError(
                f"checkpoint {path} could not be written ({error}); {previous}: free disk space and resume"
            ) from error
        self._prune(loader)

    def _prune(self, loader: RolloutLoader) -> None:
        checkpoints = sorted(self.folder.glob("update-*.ckpt"))
        for path in checkpoints[: -self.keep]:
            path.unlink()
            self._rollout_of.pop(path.name, None)
        oldest = checkpoints[-self.keep :][0]
        if oldest.name in self._rollout_of:
            loader.producer.store.prune(self._rollout_of[oldest.name])

    def state_dict(self) -> dict[str, Any]:
        return {"rollout_of": dict(self._rollout_of)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rollout_of = dict(state_dict["rollout_of"])


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest update in a folder of checkpoints."""
    checkpoints = sorted(folder.glob("update-*.ckpt"))
    return checkpoints[-1] if checkpoints else None
