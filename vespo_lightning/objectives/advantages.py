"""Advantages of responses from the rewards of their group (the responses to one prompt)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Advantage(ABC):
    """Rewards in, advantages out.

    A group whose rewards are all equal, a group of one included, gets exactly 0: it says nothing about which
    response is better.
    """

    name: ClassVar[str]
    min_group_size: ClassVar[int] = 2
    """Responses per prompt below which every advantage would be 0."""

    def __call__(self, rewards: Tensor, group: Tensor) -> Tensor:
        """float32 [S] advantages, computed in float64.

        Args:
            rewards: [S], finite.
            group: int64 [S], one number per group, in any order.
        """
        groups = Groups.of(rewards.double(), group)
        advantage = self._compute(groups)
        # Rounding in the mean of equal rewards would leave 1e-17: an active sample where there is none.
        return torch.where(groups.constant, 0.0, advantage).float()

    @abstractmethod
    def _compute(self, groups: Groups) -> Tensor:
        """float64 [S]; finite for groups with different rewards."""


class GroupMean(Advantage):
    """``A = R - mean of the group`` (VESPO's paper, Dr. GRPO)."""

    name: ClassVar[str] = "group_mean"

    def _compute(self, groups: Groups) -> Tensor:
        return groups.centred


class GroupMeanStd(Advantage):
    """``A = (R - mean) / (std + 1e-6)`` with the unbiased std of the group (GRPO; the code of VESPO)."""

    name: ClassVar[str] = "group_mean_std"

    def _compute(self, groups: Groups) -> Tensor:
        variance = groups.sum(groups.centred.square()) / (groups.size - 1).clamp(min=1)
        return groups.centred / (variance.sqrt() + 1e-6)


class LeaveOneOut(Advantage):
    """``A = R - mean of the other responses of the group`` (RLOO, arXiv 2402.14740), unbiased."""

    name: ClassVar[str] = "leave_one_out"

    def _compute(self, groups: Groups) -> Tensor:
        return groups.centred * groups.size / (groups.size - 1).clamp(min=1)


class BatchStd(Advantage):
    """``A = (R - mean of the group) / (std + 1e-6)`` with the unbiased std of all rewards of the mini-batch.

    The scale is the same for all groups, so that easy and hard prompts keep their weights (TRL's
    ``scale_rewards="batch"``, which adds 1e-4 instead of 1e-6; arXiv 2508.08221).
    """

    name: ClassVar[str] = "batch_std"

    def _compute(self, groups: Groups) -> Tensor:
        rewards = groups.rewards
        variance = (rewards - rewards.mean()).square().sum() / max(len(rewards) - 1, 1)
        return groups.centred / (variance.sqrt() + 1e-6)


class Groups:
    """Statistics of groups, spread back to their members. S samples, ``count`` groups."""

    @classmethod
    def of(cls, rewards: Tensor, group: Tensor) -> Groups:
        """Of float64 [S] ``rewards`` with int64 [S] group numbers, in any order."""
        numbers, index = torch.unique(group, return_inverse=True)
        return cls(rewards, index, len(numbers))

    def __init__(self, rewards: Tensor, index: Tensor, count: int) -> None:
        self._index, self._count = index, count
        self.rewards = rewards  # [S]
        self.size = self.sum(torch.ones_like(rewards))  # [S]
        self.centred = rewards - self.sum(rewards) / self.size  # [S]
        empty = rewards.new_zeros(count)
        highest = empty.scatter_reduce(0, index, rewards, "amax", include_self=False)
        lowest = empty.scatter_reduce(0, index, rewards, "amin", include_self=False)
        self.constant = (highest == lowest)[index]  # bool [S]

    def sum(self, values: Tensor) -> Tensor:
        """[S]: sum of ``values`` [S] over the group of each sample."""
        return values.new_zeros(self._count).index_add_(0, self._index, values)[self._index]
