"""Numbers that mean the same for every objective, so that runs with different methods share their curves."""

from __future__ import annotations

from torch import Tensor

from vespo_lightning.objectives.base import TokenBatch

#: Below this coefficient a token or sequence hardly takes part in the update.
SUPPRESSED_BELOW = 0.1


def means(named: dict[str, Tensor]) -> dict[str, float]:
    """Mean of each tensor (booleans give shares). Empty ones are absent: without samples there is no mean."""
    return {name: values.double().mean().item() for name, values in named.items() if values.numel()}


def active_tokens(batch: TokenBatch) -> Tensor:
    """bool [T]: tokens that can receive a gradient, in the loss and with an advantage other than 0."""
    return batch.loss_mask & (batch.advantage[batch.sequence_index] != 0)


def coefficient_statistics(coefficient: Tensor, batch: TokenBatch) -> dict[str, float]:
    """Mean coefficient by sign of the advantage, and the share of active tokens with a coefficient of 0.

    Every token counts the same. Tokens with advantage 0 are left out, because no coefficient changes them.

    Args:
        coefficient: [T] from :meth:`Objective.coefficient`.
    """
    active = active_tokens(batch)
    positive = batch.advantage[batch.sequence_index] > 0
    return means(
        {
            "objective/coefficient_positive_mean": coefficient[active & positive],
            "objective/coefficient_negative_mean": coefficient[active & ~positive],
            "objective/zero_share": coefficient[active] == 0,
        }
    )
