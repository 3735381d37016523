"""One backward pass per response and two sums, against the gradient of a loss with the final advantages."""

from __future__ import annotations

import pytest
import torch
from pieces import make_samples, tiny_policy
from torch import nn

from vespo_lightning.objectives.min_variance import min_variance_baseline
from vespo_lightning.training.micro_batches import collate
from vespo_lightning.training.per_sequence import min_variance_backward
from vespo_lightning.training.policy import Policy

LENGTHS = [(3, 7), (3, 2), (3, 4), (6, 1), (6, 12), (6, 3), (2, 5), (2, 9), (2, 2)]
GROUP = torch.arange(3).repeat_interleave(3)
REWARDS = torch.tensor([1.0, 0.0, 0.3, 0.7, 0.7, 0.7, -5.0, 2.0, 2.0])  # the second group has no signal
WEIGHT = torch.tensor([1.0, 0.2, 3.0, 1.0, 1.0, 1.0, 0.5, 8.0, 0.1])


class Losses:
    """The loss of each response at advantage 1: minus a weight times its log-prob under the tiny policy, float32."""

    tolerance = 1e-4

    def __init__(self) -> None:
        model = tiny_policy(experts="eager")
        self.policy: nn.Module = Policy(model)
        self.samples = make_samples(model, LENGTHS, group=3)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.policy.parameters())

    def loss(self, i: int) -> torch.Tensor:
        return -WEIGHT[i] * self.policy(collate([self.samples[i]])).log_prob.sum()

    def backward(self, i: int) -> None:
        self.loss(i).backward()

    def gradients(self) -> list[torch.Tensor | None]:
        found = [p.grad for p in self.parameters]
        self.policy.zero_grad(set_to_none=True)
        return found

    def squared_norms(self) -> torch.Tensor:
        norms = []
        for i in range(len(REWARDS)):
            self.backward(i)
            norms.append(sum(float(g.double().square().sum()) for g in self.gradients() if g is not None))
        return torch.tensor(norms, dtype=torch.float64)


class DoubleLosses(Losses):
    """Of a network that computes in float64 throughout, as transformers' norms and routers do not.

    Each response passes through one of four experts, each of whose parameters has no gradient in the others.
    """

    tolerance = 1e-10

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = [torch.randint(20, (t,), generator=generator) for _, t in LENGTHS]
        expert = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)]
        self.policy = nn.ModuleList([nn.Embedding(20, 8), nn.Linear(8, 20), *expert]).double()
        with torch.no_grad():
            for p in self.policy.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))

    def loss(self, i: int) -> torch.Tensor:
        embedding, head, *experts = self.policy
        logits = head(experts[i % 3](embedding(self.ids[i])))
        return -WEIGHT[i] * torch.log_softmax(logits, -1).gather(1, self.ids[i].flip(0)[:, None]).sum()


def direct(losses: Losses, advantage: torch.Tensor) -> list[torch.Tensor | None]:
    """The second pass that the two sums save."""
    sum(a * losses.loss(i) for i, a in enumerate(advantage.tolist())).backward()
    return losses.gradients()


def largest_difference(a: list[torch.Tensor | None], b: list[torch.Tensor | None]) -> float:
    assert [g is None for g in a] == [g is None for g in b] and sum(g is not None for g in b) > 8
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


@pytest.mark.parametrize("kind", [Losses, DoubleLosses])
def test_equal_to_a_second_pass_with_the_final_advantages(kind):
    losses, tolerance = kind(), kind.tolerance
    found = min_variance_backward(losses.parameters, REWARDS, GROUP, losses.backward)
    gradients = losses.gradients()
    norms = losses.squared_norms()
    torch.testing.assert_close(found.squared_norm, norms, rtol=tolerance, atol=0)
    advantage = REWARDS.double() - min_variance_baseline(REWARDS, norms, GROUP)
    torch.testing.assert_close(found.advantage, advantage, rtol=tolerance, atol=1e-12)
    assert found.advantage[3:6].tolist() == [0.0] * 3
    assert largest_difference(gradients, direct(losses, advantage)) < tolerance
    mean = REWARDS.double() - torch.tensor([1.3 / 3, 0.7, -1 / 3]).repeat_interleave(3).double()
    assert largest_difference(gradients, direct(losses, mean)) > 0.05  # another baseline shows


def test_a_shift_of_all_rewards_changes_nothing():
    """Also a large one: the sums are of rewards around their mean."""
    losses = DoubleLosses()
    min_variance_backward(losses.parameters, REWARDS, GROUP, losses.backward)
    expected = losses.gradients()
    min_variance_backward(losses.parameters, REWARDS.double() + 1e6, GROUP, losses.backward)
    assert largest_difference(losses.gradients(), expected) < 1e-8


def test_gradients_that_are_there_already_are_added_to():
    losses = DoubleLosses()
    min_variance_backward(losses.parameters, REWARDS, GROUP, losses.backward)
    alone = losses.gradients()
    losses.parameters[0].grad = torch.full_like(losses.parameters[0], 2.5)
    found = min_variance_backward(losses.parameters, REWARDS, GROUP, losses.backward)
    gradients = losses.gradients()
    torch.testing.assert_close(gradients[0], alone[0] + 2.5)
    torch.testing.assert_close(gradients[1], alone[1])
    torch.testing.assert_close(found.squared_norm, losses.squared_norms())


def test_parameters_without_gradient():
    """An expert that no token of a response visits, one that nobody visits, and a frozen parameter."""
    first, second, unused, frozen = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(4))
    frozen.requires_grad_(False)

    def backward(i: int) -> None:
        ((first if i == 0 else second) * (i + 1.0)).sum().backward()

    rewards, group = torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.long)
    found = min_variance_backward([first, second, unused, frozen], rewards, group, backward)
    assert found.squared_norm.tolist() == pytest.approx([2.0, 8.0])
    assert found.advantage.tolist() == pytest.approx([0.8, -0.2])  # b = (2 * 1 + 8 * 0) / 10
    assert first.grad.tolist() == pytest.approx([0.8] * 2)
    assert second.grad.tolist() == pytest.approx([-0.4] * 2)
    assert unused.grad is None and frozen.grad is None


def test_groups_without_signal_give_nothing():
    parameter = nn.Parameter(torch.ones(2))
    rewards = torch.full((3,), 0.1)
    found = min_variance_backward(
        [parameter], rewards, torch.zeros(3, dtype=torch.long), lambda i: (parameter * i).sum().backward()
    )
    assert found.advantage.tolist() == [0.0] * 3
    assert found.squared_norm.tolist() == pytest.approx([0.0, 2.0, 8.0])
    assert parameter.grad is None


def test_sums_of_bfloat16_gradients_are_kept_in_float32():
    """300 equal gradients: a bfloat16 sum of ones stops at 256."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    rewards = torch.cat([torch.ones(300), torch.zeros(300)])
    slope = torch.cat([torch.ones(300), -torch.ones(300)])
    min_variance_backward(
        [parameter], rewards, torch.zeros(600, dtype=torch.long), lambda i: (parameter * slope[i]).sum().backward()
    )
    assert parameter.grad.dtype == torch.bfloat16
    assert parameter.grad.item() == 300.0  # 300 * 0.5 * 1 + 300 * -0.5 * -1


def test_responses_of_a_group_must_follow_each_other():
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="2 groups in 3 runs"):
        min_variance_backward([parameter], torch.zeros(3), torch.tensor([0, 1, 0]), lambda i: None)
