"""A rollout as it grows, group by group: which groups it holds, and what is known about all that were generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vespo_lightning.rollouts.sample import Sample


@dataclass(frozen=True)
class Rollout:
    samples: list[Sample]
    """whole groups, in the order of the prompts"""
    metrics: dict[str, float]
    identity: dict[str, Any]
    """what made it; plain values, part of checkpoints"""


class Gathering:
    """Groups of rollout number ``rollout``; those whose rewards are all equal may be exchanged for others.

    Every place of the rollout holds a group from the first round on, and a refill gives each place with a uniform
    group a new one. So places never shift, and where refills end early nothing is missing.

    Args:
        identity: of the first round.
    """

    def __init__(self, rollout: int, identity: dict[str, Any]) -> None:
        self.number = rollout
        self.identity = identity
        self.groups: list[list[Sample]] = []
        """all of them, in the order in which they were generated"""
        self.chunks = 0
        """files that they came in"""
        self.refills: list[str] = []
        """digest of the prompts of each refill"""
        self._places = list(range(identity["groups"]))  # number of the group in each place
        self._seconds: dict[str, float] = {}

    @property
    def samples(self) -> list[Sample]:
        """Everything that was generated."""
        return [sample for group in self.groups for sample in group]

    def add(self, samples: Sequence[Sample], seconds: dict[str, float]) -> None:
        """The next chunk."""
        size = self.identity["group_size"]
        self.groups += [list(samples[start : start + size]) for start in range(0, len(samples), size)]
        self.chunks += 1
        for name, value in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + value

    def uniform_places(self) -> list[int]:
        """Places whose group has equal rewards."""
        return [place for place, group in enumerate(self._places) if _is_uniform(self.groups[group])]

    def refill(self, places: Sequence[int], digest: str) -> None:
        """Put the groups added last into ``places``."""
        first = len(self.groups) - len(places)
        for offset, place in enumerate(places):
            self._places[place] = first + offset
        self.refills.append(digest)

    def rollout(self) -> Rollout:
        """What it is now. The metrics are those of everything that was generated: dropping uniform groups would
        bias a mean reward."""
        samples = [sample for group in self._places for sample in self.groups[group]]
        return Rollout(samples, self._seconds | self._metrics(), {**self.identity, "refills": self.refills})

    def refill_metrics(self) -> dict[str, float]:
        """What dynamic sampling did."""
        return {
            "reward/dropped_groups": float(len(self.groups) - len(self._places)),
            "reward/refill_rounds": float(len(self.refills)),
            "reward/refill_shortfall": float(len(self.uniform_places())),
        }

    def _metrics(self) -> dict[str, float]:
        samples = self.samples
        return {
            "reward/rollout_mean": float(np.mean([s.reward for s in samples])),
            "reward/errors": float(sum(s.reward_error is not None for s in samples)),
            "reward/truncated_share": float(np.mean([s.truncated for s in samples])),
            "reward/response_length": float(np.mean([len(s.response_ids) for s in samples])),
            "reward/uniform_group_share": float(np.mean([_is_uniform(group) for group in self.groups])),
        }


def _is_uniform(group: Sequence[Sample]) -> bool:
    return len({sample.reward for sample in group}) == 1
