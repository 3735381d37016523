from __future__ import annotations

import statistics

import pytest
import torch

from vespo_lightning.objectives.advantages import GroupMean, GroupMeanStd, LeaveOneOut

ALL = [GroupMean(), GroupMeanStd(), LeaveOneOut()]
every_advantage = pytest.mark.parametrize("advantage", ALL, ids=lambda a: a.name)


def brute_force(name: str, rewards: list[float], group: list[int]) -> list[float]:
    result = []
    for place, (reward, number) in enumerate(zip(rewards, group, strict=True)):
        members = [r for r, g in zip(rewards, group, strict=True) if g == number]
        others = [r for p, (r, g) in enumerate(zip(rewards, group, strict=True)) if g == number and p != place]
        if len(set(members)) == 1:
            result.append(0.0)
        elif name == "leave_one_out":
            result.append(reward - statistics.fmean(others))
        else:
            centred = reward - statistics.fmean(members)
            result.append(centred / (statistics.stdev(members) + 1e-6) if name == "group_mean_std" else centred)
    return result


@every_advantage
def test_equals_brute_force(advantage):
    """Groups of 1, 2, 3 and 8 interleaved, one of them without variance."""
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([7, 2, 5, 5, 2, 5] + [3] * 8 + [9] * 2)[torch.randperm(16, generator=generator)]
    rewards = torch.randn(16, generator=generator)
    rewards[group == 9] = 0.1
    result = advantage(rewards, group)
    expected = brute_force(advantage.name, rewards.double().tolist(), group.tolist())
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_known_values():
    rewards, group = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.int64)
    assert GroupMean()(rewards, group).tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert GroupMeanStd()(rewards, group).tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    assert LeaveOneOut()(rewards, group).tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])


@every_advantage
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e8])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_groups_without_variance_get_exactly_zero(advantage, reward, size):
    """Also where the mean of equal rewards rounds to something else, and for a group of one."""
    rewards = torch.full((size,), reward, dtype=torch.float64)
    assert advantage(rewards, torch.full((size,), 4)).tolist() == [0.0] * size


@every_advantage
def test_advantages_of_a_group_sum_to_zero(advantage):
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(1))
    result = advantage(rewards, torch.arange(3).repeat_interleave(8)).view(3, 8)
    assert result.sum(1).abs().max() < 1e-5
    assert result.abs().max() > 0.3


@every_advantage
def test_smallest_group_that_gives_a_signal(advantage):
    assert advantage.min_group_size == 2
    smallest = advantage(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]))
    assert smallest[1] > 0 > smallest[0]
