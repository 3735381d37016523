"""The baseline of least variance off-policy (VCPO's OPOB, arXiv 2602.17616)."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.advantages import Advantage, Groups

Estimator = Literal["exact", "proxy"]


class MinVariance(Advantage):
    """``A_i = R_i - b`` with the b of the group that minimises ``sum of n_i (R_i - b)^2``.

    ``n_i`` is the squared norm of the gradient of response i as it enters the loss, so b is known only after the
    trainer has looked at every response. Until then the advantage is that of the group mean, which is 0 for the same
    groups; :meth:`advantage` gives the final one.

    Needs an objective whose coefficient does not depend on the advantage, else n_i would change with b.

    Args:
        estimator: where n_i comes from. ``exact``: the whole gradient, from one backward pass per response.
            ``proxy``: the gradient of the output embedding only, from one more forward pass.
        leave_one_out: b of response i from the other responses, so that it does not depend on response i; with
            ``proxy`` only.

    Raises:
        UserError: an unknown estimator, or leave-one-out from a single backward pass.
    """

    name: ClassVar[str] = "min_variance"

    def __init__(self, estimator: Estimator = "exact", leave_one_out: bool = False) -> None:
        if estimator not in get_args(Estimator):
            raise UserError(f"advantage.estimator={estimator} is unknown; valid: {', '.join(get_args(Estimator))}")
        if not isinstance(leave_one_out, bool):
            raise UserError(f"advantage.leave_one_out={leave_one_out} must be true or false")
        if leave_one_out and estimator == "exact":
            raise UserError(
                "advantage.leave_one_out=true needs the norms of a group before its backward passes, which "
                "advantage.estimator=exact makes only then; use advantage.estimator=proxy"
            )
        self.estimator: Estimator = estimator
        self.leave_one_out = leave_one_out

    def _compute(self, groups: Groups) -> Tensor:
        return groups.centred

    def advantage(self, rewards: Tensor, squared_norm: Tensor, group: Tensor) -> Tensor:
        """float32 [S], see :func:`min_variance_advantage`."""
        return min_variance_advantage(rewards, squared_norm, group, self.leave_one_out).float()


def min_variance_advantage(rewards: Tensor, squared_norm: Tensor, group: Tensor, leave_one_out: bool = False) -> Tensor:
    """float64 [S] ``R - b``, see :func:`min_variance_baseline`; exactly 0 in groups with equal rewards."""
    rewards = rewards.double()
    advantage = rewards - min_variance_baseline(rewards, squared_norm, group, leave_one_out)
    return torch.where(Groups.of(rewards, group).constant, 0.0, advantage)


def min_variance_baseline(rewards: Tensor, squared_norm: Tensor, group: Tensor, leave_one_out: bool = False) -> Tensor:
    """float64 [S]: ``b = sum of n_j R_j / sum of n_j`` over the group of each response.

    It minimises ``sum of n_j (R_j - b)^2``, the second moment of the group's gradient when responses are independent,
    and its variance too where the importance weight is not truncated, because then the mean does not depend on b.

    The norm already holds the square of the importance weight, so nothing is multiplied with it here. VCPO's code
    multiplies norms that hold it with the squared weight once more.

    Args:
        rewards: [S].
        squared_norm: [S], at least 0: of ``w_i * grad log pi_i``, weights of aggregation included. Where all are 0
            any b will do, and it is the mean reward.
        group: int64 [S], in any order.
        leave_one_out: without response i itself in the sums. A response without others gets its own reward.
    """
    baseline = torch.empty_like(rewards, dtype=torch.float64)
    for number in torch.unique(group):
        members = (group == number).nonzero()[:, 0]
        baseline[members] = _of_one_group(rewards[members].double(), squared_norm[members].double(), leave_one_out)
    return baseline


def _of_one_group(rewards: Tensor, squared_norm: Tensor, leave_one_out: bool) -> Tensor:
    """[n] from [n]. Others are summed up, not taken from the sum of all, which one large norm may drown them in."""
    counted = torch.ones(len(rewards), len(rewards), dtype=rewards.dtype, device=rewards.device)
    if leave_one_out:
        counted.fill_diagonal_(0.0)
    weight = counted * squared_norm
    weight = torch.where(weight.sum(1, keepdim=True) == 0, counted, weight)
    total = weight.sum(1)
    return torch.where(total == 0, rewards, weight @ rewards / torch.where(total == 0, 1.0, total))
