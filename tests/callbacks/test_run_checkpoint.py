import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from vespo_lightning.callbacks.run_checkpoint import RunCheckpoint, newest_checkpoint
from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.store import RolloutStore


class Loader(SimpleNamespace):
    def __len__(self) -> int:
        return 10


def make_trainer(tmp_path: Path, saved: list[str]):
    """A trainer that writes a line per checkpoint, and a loader in rollout update // 2."""
    store = RolloutStore(tmp_path / "rollouts")
    loader = Loader(rollout=0, producer=SimpleNamespace(store=store))

    def save_checkpoint(path: Path) -> None:
        saved.append(path.name)
        Path(path).write_text("whole")

    logger = SimpleNamespace(save=lambda: saved.append("metrics"))
    return SimpleNamespace(loggers=[logger], save_checkpoint=save_checkpoint, train_dataloader=loader)


def run(callback: RunCheckpoint, trainer, updates: range) -> None:
    for update in updates:
        trainer.train_dataloader.rollout = (update - 1) // 2
        (trainer.train_dataloader.producer.store.folder / f"rollout-{(update - 1) // 2:06d}").mkdir(
            parents=True, exist_ok=True
        )
        callback.on_train_batch_end(trainer, SimpleNamespace(update=update), None, None, update)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_saves_every_few_updates_and_at_the_end_and_keeps_the_newest(tmp_path: Path):
    saved: list[str] = []
    trainer = make_trainer(tmp_path, saved)
    callback = RunCheckpoint(str(tmp_path / "checkpoints"), every=4, keep=2)
    (tmp_path / "checkpoints").mkdir()
    run(callback, trainer, range(1, 11))
    # metrics are flushed before each, so that a checkpoint is never ahead of them
    assert saved == [part for update in (4, 8, 10) for part in ("metrics", f"update-{update:06d}.partial")]
    assert names(tmp_path / "checkpoints") == ["update-000008.ckpt", "update-000010.ckpt"]
    assert callback.last_path == tmp_path / "checkpoints" / "update-000010.ckpt"


def test_rollouts_that_no_kept_checkpoint_needs_are_deleted(tmp_path: Path):
    trainer = make_trainer(tmp_path, [])
    (tmp_path / "checkpoints").mkdir()
    run(RunCheckpoint(str(tmp_path / "checkpoints"), every=4, keep=1), trainer, range(1, 9))
    # update 8 is the second mini-batch of rollout 3
    assert names(tmp_path / "rollouts") == ["rollout-000003"]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = make_trainer(tmp_path, [])
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    callback = RunCheckpoint(str(folder), every=2, keep=2)
    run(callback, trainer, range(1, 3))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"update-000004\.ckpt could not be written .*update-000002\.ckpt"):
        run(callback, trainer, range(3, 5))
    assert names(folder) == ["update-000002.ckpt"]
    assert newest_checkpoint(folder) == folder / "update-000002.ckpt"


@pytest.mark.parametrize("setting", [{"every": 0}, {"keep": 0}])
def test_settings_below_1_are_refused(setting, tmp_path: Path):
    with pytest.raises(UserError, match=r"callbacks\.checkpoint"):
        RunCheckpoint(str(tmp_path), **setting)
