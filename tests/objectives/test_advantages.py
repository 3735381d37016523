from __future__ import annotations

import statistics

import pytest
import torch

from vespo_lightning.objectives.advantages import BatchStd, GroupMean, GroupMeanStd, LeaveOneOut
from vespo_lightning.objectives.min_variance import MinVariance

ALL = [GroupMean(), GroupMeanStd(), LeaveOneOut(), BatchStd(), MinVariance()]
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
            spread = {"group_mean_std": members, "batch_std": rewards}.get(name)
            result.append(centred / (statistics.stdev(spread) + 1e-6) if spread else centred)
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
    assert BatchStd()(rewards, group).tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)


def test_batch_std_keeps_the_weights_of_groups():
    """A group with small differences stays small, where the std of each group would make both alike."""
    rewards, group = torch.tensor([1.0, 0.0, 0.6, 0.5]), torch.tensor([0, 0, 1, 1])
    spread = statistics.stdev(rewards.tolist())
    assert BatchStd()(rewards, group).tolist() == pytest.approx(
        [0.5 / spread, -0.5 / spread, 0.05 / spread, -0.05 / spread], rel=1e-5
    )


def test_batch_std_scales_by_the_rewards_of_uniform_groups_too():
    rewards, group = torch.tensor([1.0, 0.0, 9.0, 9.0]), torch.tensor([0, 0, 1, 1])
    result = BatchStd()(rewards, group)
    scaled = 0.5 / statistics.stdev([1.0, 0.0, 9.0, 9.0])
    assert result.tolist() == pytest.approx([scaled, -scaled, 0.0, 0.0], rel=1e-5)


def test_batch_std_of_a_batch_without_variance_is_zero():
    assert BatchStd()(torch.full((6,), 0.1), torch.arange(3).repeat_interleave(2)).tolist() == [0.0] * 6


def test_batch_std_equals_trl():
    """``scale_rewards="batch"``, with TRL's own standard deviation; it adds 1e-4 to it, we add 1e-6."""
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    means = rewards.view(6, 4).mean(1).repeat_interleave(4)
    std = utils.nanstd(rewards)
    result = BatchStd()(rewards, torch.arange(6).repeat_interleave(4)).double()
    torch.testing.assert_close(result, (rewards - means) / (std + 1e-6), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(result, (rewards - means) / (std + 1e-4), rtol=1e-3, atol=1e-7)


@every_advantage
def test_the_order_of_responses_changes_nothing(advantage):
    generator = torch.Generator().manual_seed(3)
    group = torch.arange(4).repeat_interleave(5)
    rewards, order = torch.rand(20, generator=generator), torch.randperm(20, generator=generator)
    expected = advantage(rewards, group)[order]
    torch.testing.assert_close(advantage(rewards[order], 7 * group[order] - 3), expected)


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
