"""The one loader of a run: a lazy, sized iterable of mini-batches, cut from rollouts as they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.advantages import Advantage
from vespo_lightning.objectives.kl import KlPenalty
from vespo_lightning.rollouts.gathering import Rollout
from vespo_lightning.rollouts.producer import RolloutProducer
from vespo_lightning.rollouts.sample import MiniBatch, Sample
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
        passes: times that the mini-batches of a rollout are gone through, in the same order, before the next rollout.
        kl: penalty for leaving a reference policy; here the one in the reward, which advantages are made of.

    Raises:
        UserError: ``mini_batch_size`` does not hold whole groups, or a penalty lacks its reference log-probs.
    """

    def __init__(
        self,
        producer: RolloutProducer,
        sizes: RolloutSizes,
        advantage: Advantage,
        *,
        updates: int,
        mini_batch_size: int = 64,
        passes: int = 1,
        kl: KlPenalty | None = None,
    ) -> None:
        if mini_batch_size < 1 or mini_batch_size % producer.group_size:
            raise UserError(
                f"mini_batch_size={mini_batch_size} is not a multiple of rollout.group_size={producer.group_size}; "
                "a mini-batch holds whole groups"
            )
        if passes < 1:
            raise UserError(f"rollout.passes={passes} must be a whole number of at least 1")
        if kl is not None and not producer.reference:
            raise UserError("a KL penalty needs a producer with reference=True, which stores the reference's log-probs")
        self.producer, self.sizes, self.advantage = producer, sizes, advantage
        self.updates = updates
        self.passes = passes
        self.kl = kl
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
        if self._current is None and self._identity:  # the run goes on
            self.producer.check_reference(self._identity)
        if self._position == self._size * self.passes:
            metrics = self._begin_rollout()
        elif self._current is None:
            self._current = self.producer.reload(self._rollout, self._identity)
        assert self._current is not None
        per_batch = self.groups_per_mini_batch * self.producer.group_size
        pass_number, place = divmod(self._position, self._size)
        samples = self._current.samples[place * per_batch : (place + 1) * per_batch]
        batch = MiniBatch(
            update=self._update,
            rollout=self._rollout,
            position=self._position,
            rollout_size=self._size,
            samples=samples,
            advantages=torch.zeros(len(samples)),
            in_loss=[not (s.truncated and self.producer.truncated == "mask") for s in samples],
            rollout_metrics=metrics,
            passes=self.passes,
            pass_number=pass_number,
            reward_penalty=self._reward_penalty(samples),
        )
        batch.advantages.copy_(self.advantage(batch.penalised_rewards, batch.group_index()))
        self._update += 1
        self._position += 1
        return batch

    def _reward_penalty(self, samples: Sequence[Sample]) -> Tensor | None:
        """float64 [S]"""
        if self.kl is None or self.kl.placement != "reward":
            return None
        penalties = []
        for sample in samples:
            assert sample.reference_log_probs is not None
            penalties.append(
                self.kl.reward_penalty(sample.behaviour_log_probs, sample.reference_log_probs, sample.loss_mask)
            )
        return torch.tensor(penalties, dtype=torch.float64)

    def _begin_rollout(self) -> dict[str, float]:
        rollout = self._rollout + 1 if self._size else 0
        size = min(self.sizes.rollout_size(rollout), self.updates - self._update)
        prompts = self._prompts.take(size * self.groups_per_mini_batch)
        self._current = self.producer.produce(rollout, prompts, self._prompts.take)
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
