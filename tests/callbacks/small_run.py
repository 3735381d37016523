"""A module with what callbacks use of the real one, mini-batches for it, and a trainer of a few updates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import nn

from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.rollouts.sample import MiniBatch, Sample
from vespo_lightning.training.outputs import UpdateResult

LOG_RATIO = 0.25


def sample(group: int, index: int, text: str = "4") -> Sample:
    return Sample(
        prompt_id=f"sum-{group}",
        group_id=f"0/{group}",
        index=index,
        seed=7,
        prompt_ids=np.array([group, 65, 66], dtype=np.int32),
        response_ids=np.array([10 + index, 11], dtype=np.int32),
        behaviour_log_probs=np.array([-1.0, -2.0], dtype=np.float32),
        version_runs=[(0, 1), (1, 1)],
        loss_mask=np.ones(2, dtype=bool),
        finish_reason="stop",
        text=text,
        reward=float(index % 2),
    )


def mini_batch(update: int, rollout_size: int = 1, groups: int = 2) -> MiniBatch:
    """Groups of two samples with rewards 0 and 1 and two tokens each."""
    samples = [sample(group, index) for group in range(groups) for index in range(2)]
    return MiniBatch(
        update=update,
        rollout=update // rollout_size,
        position=update % rollout_size,
        rollout_size=rollout_size,
        samples=samples,
        advantages=torch.tensor([-1.0, 1.0]).repeat(groups),
        in_loss=[True] * len(samples),
    )


def update_result(batch: MiniBatch, version: int, skipped: bool = False) -> UpdateResult:
    """Log-ratios are ``LOG_RATIO`` for every token."""
    count = len(batch.samples)
    behaviour = torch.tensor([-1.0, -2.0]).repeat(count)
    tokens = TokenBatch(
        log_prob=behaviour + LOG_RATIO,
        behaviour_log_prob=behaviour,
        sequence_index=torch.arange(count).repeat_interleave(2),
        loss_mask=torch.ones(2 * count, dtype=torch.bool),
        advantage=batch.advantages,
        group=batch.group_index(),
        version_made=torch.tensor([0, 1], dtype=torch.int32).repeat(count),
        policy_version=version,
    )
    return UpdateResult(
        mini_batch=batch,
        tokens=tokens,
        corrected=tokens,
        coefficient=torch.ones(2 * count),
        entropy=torch.ones(2 * count),
        loss=0.5,
        grad_norm=1.0,
        learning_rate=1e-3,
        skipped=skipped,
        seconds=0.125,
    )


class Tokenizer:
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "ids " + " ".join(map(str, ids))


class FakeModule(L.LightningModule):
    """Counts updates, makes one parameter step, records a reward that grows with the update.

    ``fail_at`` raises in that update; ``skip_at`` calls that update skipped.
    """

    def __init__(
        self, fail_at: int | None = None, skip_at: int | None = None, error: BaseException | None = None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokenizer = Tokenizer()
        self.update = 0
        self.policy_version = 0
        self.last_update: UpdateResult | None = None
        self.fail_at, self.skip_at = fail_at, skip_at
        self.error = error or RuntimeError("the machine is on fire")
        self._record: dict[str, float] = {}

    def record(self, metrics: dict[str, float]) -> None:
        self._record.update(metrics)

    def take_record(self) -> dict[str, float]:
        row, self._record = self._record, {}
        return row

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def training_step(self, batch: MiniBatch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.weight.sum())
        optimizer.step()
        self.update += 1
        self.policy_version += 1
        if self.update == self.fail_at:
            raise self.error
        self.last_update = update_result(batch, self.policy_version, skipped=self.update == self.skip_at)
        self.record({"reward/mean": self.update / 10, "train/loss": 0.1 * self.update})

    def on_save_checkpoint(self, checkpoint) -> None:
        checkpoint["update"] = self.update

    def on_load_checkpoint(self, checkpoint) -> None:
        self.update = self.policy_version = checkpoint["update"]


def trainer(folder: Path, callbacks: list[L.Callback], loggers=(), **options) -> L.Trainer:
    options = {"enable_progress_bar": False, "enable_checkpointing": False, "max_epochs": 1} | options
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=callbacks,
        logger=list(loggers) or False,
        enable_model_summary=False,
        **options,
    )


class Loader:
    """Sized, so that Lightning does not look ahead; not a list, which Lightning takes for several loaders."""

    def __init__(self, items: list[MiniBatch]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[MiniBatch]:
        return iter(self.items)


def batches(count: int, rollout_size: int = 1, start: int = 0) -> Loader:
    return Loader([mini_batch(update, rollout_size) for update in range(start, count)])
