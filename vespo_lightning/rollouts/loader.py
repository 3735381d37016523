"""The one loader of a run: a lazy, sized iterable of mini-batches, cut from rollouts as they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.advantages import Advantage
from vespo_lightning.rollouts.producer import Rollout, RolloutProducer
from vespo_lightning.rollouts.sample import MiniBatch
from vespo_lightning.tasks.prompts import PromptStream


class RolloutSizes(Protocol):
    """Decides the staleness: how many mini-batches each rollout holds."""

    def rollout_size(self, rollout: int) -> int: ...


class RolloutLoader:
    """``updates`` mini-batches of ``mini_batch_size`` samples.

    Sized, because Lightning fetches one item ahead from loaders without length, which would generate with weights
    that are one update too old. Nothing happens before the first item is asked for. The state is a handful of
    numbers; rollouts in progress are read back from the producer's store.

    Args:
        producer: makes rollouts.
        sizes: the staleness scheduler.
        advantage: rewards of a mini-batch to advantages.
        updates: length of the whole run.
        mini_batch_size: samples per update, a multiple of the producer's group size.

    Raises:
        UserError: ``mini_batch_size`` does not hold whole groups.
    """

    def __init__(
        self,
        producer: RolloutProducer,
        sizes: RolloutSizes,
        advantage: Advantage,
        *,
        updates: int,
        mini_batch_size: int = 64,
    ) -> None:
        if mini_batch_size < 1 or mini_batch_size % producer.group_size:
            raise UserError(
                f"mini_batch_size={mini_batch_size} is not a multiple of rollout.group_size={producer.group_size}; "
                "a mini-batch holds whole groups"
            )
        self.producer, self.sizes, self.advantage = producer, sizes, advantage
        self.updates = updates
        self.groups_per_mini_batch = mini_batch_size // producer.group_size
        self._update = 0
        self._rollout = 0
        self._position = 0
        self._size = 0
        self._prompts = PromptStream(producer.task, producer.seed)
        self._identity: dict[str, Any] = {}
        self._current: Rollout | None = None

    def __len__(self) -> int:
        return self.updates

    def __iter__(self) -> Iterator[MiniBatch]:
        while self._update < self.updates:
            yield self._next()

    def _next(self) -> MiniBatch:
        metrics: dict[str, float] = {}
        if self._position == self._size:
            metrics = self._begin_rollout()
        elif self._current is None:
            self._current = self.producer.reload(self._rollout, self._identity)
        assert self._current is not None
        per_batch = self.groups_per_mini_batch * self.producer.group_size
        samples = self._current.samples[self._position * per_batch : (self._position + 1) * per_batch]
        batch = MiniBatch(
            update=self._update,
            rollout=self._rollout,
            position=self._position,
            rollout_size=self._size,
            samples=samples,
            advantages=torch.zeros(len(samples)),
            in_loss=[not (s.truncated and self.producer.truncated == "mask") for s in samples],
            rollout_metrics=metrics,
        )
        batch.advantages.copy_(self.advantage(batch.rewards, batch.group_index()))
        self._update += 1
        self._position += 1
        return batch

    def _begin_rollout(self) -> dict[str, float]:
        rollout = self._rollout + 1 if self._size else 0
        size = min(self.sizes.rollout_size(rollout), self.updates - self._update)
        self._current = self.producer.produce(rollout, self._prompts.take(size * self.groups_per_mini_batch))
        self._rollout, self._size, self._position = rollout, size, 0
        self._identity = self._current.identity
        return self._current.metrics

    @property
    def rollout(self) -> int:
        """Number of the rollout in use: older ones are not needed to go on from here."""
        return self._rollout

    def state_dict(self) -> dict[str, Any]:
        return {
            "update": self._update,
            "rollout": self._rollout,
            "position": self._position,
            "size": self._size,
            "prompts": self._prompts.state_dict(),
            "identity": dict(self._identity),
            "reward_errors": self.producer.reward_errors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._update, self._rollout, self._position = state["update"], state["rollout"], state["position"]
        self._size = state["size"]
        self._prompts.load_state_dict(state["prompts"])
        self._identity = dict(state["identity"])
        self.producer.reward_errors = state["reward_errors"]
        self._current = None
