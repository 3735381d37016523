"""What other objectives would have done with a mini-batch that one of them was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vespo_lightning.diagnostics.importance import log_weights
from vespo_lightning.objectives.base import Need, Objective, TokenBatch
from vespo_lightning.objectives.statistics import active_tokens

#: The name under which the run's own objective is compared.
RUN = "run"
#: Names of the bins of log W, and the ends between them; each end belongs to the bin above it.
LOG_WEIGHT_BINS = ("below_m1", "m1_0", "0_1", "above_1")
BIN_ENDS = (-1.0, 0.0, 1.0)
_FIELDS: dict[Need, str] = {
    "recomputed_log_prob": "recomputed_log_prob",
    "top_log_probs": "top",
    "router_shift": "router_shift",
}


class _SharedBatch(TokenBatch):
    """Computes once what nearly every method asks for."""

    @cached_property
    def log_ratio(self) -> Tensor:
        return super().log_ratio

    @cached_property
    def length(self) -> Tensor:
        return super().length


def missing_parts(objective: Objective, batch: TokenBatch) -> list[Need]:
    """Parts of the batch that the objective cannot do without and that are not there."""
    return sorted(need for need in objective.needs if getattr(batch, _FIELDS[need]) is None)


def shadow_statistics(methods: Mapping[str, Objective], batch: TokenBatch, run_coefficient: Tensor) -> dict[str, float]:
    """``shadow/NAME/...`` for each method and for the run itself, as ``shadow/run/...``.

    Everything is over active tokens, each counting the same. Values without data are absent: the mean over positive
    advantages when there are none, everything but means and zero share of a method whose coefficients are all 0, and
    what a NaN log-prob makes NaN.

    Args:
        methods: by name.
        batch: what the run's objective saw, that is after corrections; the methods get the same ones.
        run_coefficient: [T] of the run's objective, with the weights of corrections.
    """
    active = active_tokens(batch).nonzero()[:, 0]
    if not len(active):
        return {}
    batch = _SharedBatch(**vars(batch))
    rows = {RUN: run_coefficient} | {name: method.corrected_coefficient(batch) for name, method in methods.items()}
    sequence = batch.sequence_index[active]
    coefficients = torch.stack([row[active] for row in rows.values()]).double()
    numbers = compare(coefficients, batch.advantage[sequence], log_weights(batch)[sequence])
    table = torch.stack(list(numbers.values()), 1).tolist()  # one transfer from the device for all methods
    return {
        f"shadow/{method}/{name}": value
        for method, values in zip(rows, table, strict=True)
        for name, value in zip(numbers, values, strict=True)
        if value == value
    }


def compare(coefficients: Tensor, advantage: Tensor, log_weight: Tensor) -> dict[str, Tensor]:
    """float64 [M] numbers of M methods by name, over n tokens; NaN where there is nothing to measure.

    Args:
        coefficients: float64 [M, n] before the advantage; the first method is the one that the others are compared
            with.
        advantage: [n], never 0.
        log_weight: [n] log W of the response that a token belongs to.
    """
    # Matrix products rather than sums of products: no further matrix as large as the first is made.
    signs = torch.stack([advantage > 0, advantage < 0], 1).double()  # [n, 2]
    sums = coefficients @ signs  # [M, 2]
    by_sign = sums / signs.sum(0)
    tokens = coefficients.new_tensor(coefficients.shape[1])
    multiplier = coefficients * advantage.double()
    square = torch.linalg.vecdot(multiplier, multiplier)
    cosine = multiplier @ multiplier[0] / (square * square[0]).sqrt()
    ends = torch.tensor(BIN_ENDS, dtype=log_weight.dtype, device=log_weight.device)
    in_bin = one_hot(torch.bucketize(log_weight, ends, right=True), len(LOG_WEIGHT_BINS))  # [n, bins]
    mass = multiplier.abs_() @ in_bin.double()
    share = mass / mass.sum(1, keepdim=True)
    return {
        "coefficient_positive_mean": by_sign[:, 0],
        "coefficient_negative_mean": by_sign[:, 1],
        "ess_ratio": sums.sum(1).square() / (tokens * torch.linalg.vecdot(coefficients, coefficients)),
        "zero_share": (tokens - coefficients.count_nonzero(1)) / tokens,
        "cosine": cosine,
        **{f"mass_{name}": share[:, i] for i, name in enumerate(LOG_WEIGHT_BINS)},
    }
