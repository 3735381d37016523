"""The gradient with a baseline that depends on the norms of the gradients of single responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vespo_lightning.objectives.min_variance import min_variance_baseline

#: Gradient by parameter; parameters that took no part are absent.
Gradients = dict[nn.Parameter, Tensor]


@dataclass(frozen=True)
class MinVariancePass:
    """What one pass over S responses found out."""

    advantage: Tensor
    """float64 [S], ``R - b``; exactly 0 in groups with equal rewards"""
    squared_norm: Tensor
    """float64 [S], squared norm of the gradient of each response at advantage 1"""


def min_variance_backward(
    parameters: Iterable[nn.Parameter], rewards: Tensor, group: Tensor, backward: Callable[[int], None]
) -> MinVariancePass:
    """Add the gradient with the minimum-variance baseline to ``p.grad``, from one backward pass per response.

    With g_i the gradient of response i at advantage 1, two sums are kept for a group: of ``R_i g_i`` and of ``g_i``.
    When its last response is done the norms give b, and ``sum of (R_i - b) g_i`` is the first sum less b times the
    second. Memory: the sums, and the gradient of one response, each as large as the parameters (float32 at least).

    The norms are of whole gradients of this process: a group is not spread over ranks, parameters are not sharded,
    and gradients are averaged over ranks afterwards.

    Args:
        parameters: those whose gradients count. Gradients that they have already are added to the result.
        rewards: [S].
        group: int64 [S]; the responses of a group follow each other.
        backward: ``backward(i)`` adds the gradient of the loss of response i at advantage 1, which is
            ``-sum over t of (weight * coefficient) * log pi``, to ``p.grad``. It may leave out responses of groups
            with equal rewards, whose advantage is 0.
    """
    parameters = [p for p in parameters if p.requires_grad]
    _check_contiguous(group)
    rewards, group = rewards.detach().double().cpu(), group.cpu()
    squared_norm, advantage = torch.zeros_like(rewards), torch.zeros_like(rewards)
    total: Gradients = {}
    _add(total, _take_gradients(parameters), 1.0)
    for number in torch.unique_consecutive(group):
        members = (group == number).nonzero()[:, 0]
        # b moves along with the rewards; around their mean the two sums cancel least
        centred = rewards[members] - rewards[members].mean()
        uniform = bool((rewards[members] == rewards[members[0]]).all())
        gradient_sum: Gradients = {}
        for i, reward in zip(members.tolist(), centred.tolist(), strict=True):
            backward(i)
            gradient = _take_gradients(parameters)
            squared_norm[i] = _squared_norm(gradient)
            if not uniform:
                _add(total, gradient, reward)
                _add(gradient_sum, gradient, 1.0)
        if not uniform:
            baseline = min_variance_baseline(centred, squared_norm[members], group[members])
            advantage[members] = centred - baseline
            _add(total, gradient_sum, -float(baseline[0]))
    for parameter, summed in total.items():
        parameter.grad = summed.to(parameter.dtype)
    return MinVariancePass(advantage, squared_norm)


def _check_contiguous(group: Tensor) -> None:
    runs, groups = len(torch.unique_consecutive(group)), len(torch.unique(group))
    if runs != groups:
        raise ValueError(f"{groups} groups in {runs} runs: the responses of a group must follow each other")


def _take_gradients(parameters: list[nn.Parameter]) -> Gradients:
    found = {p: p.grad for p in parameters if p.grad is not None}
    for parameter in found:
        parameter.grad = None
    return found


def _add(total: Gradients, gradient: Gradients, factor: float) -> None:
    for parameter, value in gradient.items():
        if parameter not in total:
            total[parameter] = torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32))
        total[parameter].add_(value, alpha=factor)


def _squared_norm(gradient: Gradients) -> float:
    norms = [
        torch.linalg.vector_norm(value, dtype=torch.promote_types(value.dtype, torch.float32)).double()
        for value in gradient.values()
    ]
    return float(torch.stack(norms).square().sum()) if norms else 0.0
