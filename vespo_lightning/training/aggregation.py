"""How token losses become one number: the weight of each token, from counts over the whole mini-batch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vespo_lightning.errors import UserError

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"]


@dataclass(frozen=True)
class Totals:
    """Counts over the whole mini-batch on all ranks, known before the first backward.

    Everything that the policy wrote counts, responses left out of the loss included: masking leaves the
    numerator only and never makes the other tokens weigh more.
    """

    tokens: int
    """response tokens written by the policy"""
    sequences: int
    """responses"""
    max_response_tokens: int | None = None
    """limit of generated tokens per response, from the configuration; needed for ``constant`` only"""


def check_aggregation(aggregation: str) -> None:
    """Raises UserError, naming the nearest valid one, when there is no such aggregation."""
    known = get_args(Aggregation)
    if aggregation not in known:
        nearest = difflib.get_close_matches(str(aggregation), known, n=1, cutoff=0.0)[0]
        raise UserError(
            f"aggregation={aggregation} is not known; did you mean {nearest}? (there are {', '.join(known)})"
        )


def token_weights(aggregation: str, sequence_length: Tensor, sequence_index: Tensor, totals: Totals) -> Tensor:
    """[T] weight of each token's loss. Weighted losses are summed over micro-batches and ranks.

    * ``token-mean``: every token of the mini-batch weighs the same, 1 / tokens (VESPO's scripts, DAPO).
    * ``seq-mean-token-mean``: every response weighs the same, 1 / (sequences * its length) (GRPO, GSPO).
    * ``seq-mean-token-sum``: 1 / sequences, the plain policy gradient of the mean reward.
    * ``constant``: 1 / (sequences * max_response_tokens), the same direction at the scale of a mean
      (Dr. GRPO, arXiv 2503.20783).

    A weight depends on counts only, so neither the split into micro-batches nor padding changes the gradient.

    Args:
        sequence_length: [S] tokens of each sequence, counted as in ``totals``. The result has its dtype
        (float32
            where that is an integer).
        sequence_index: int64 [T] sequence of each token.

    Raises:
        UserError: no such aggregation.
    """
    check_aggregation(aggregation)
    dtype = sequence_length.dtype if sequence_length.is_floating_point() else torch.float32
    length = sequence_length.double()
    sequences = max(totals.sequences, 1)
    if aggregation == "token-mean":
        divisor = torch.full_like(length, max(totals.tokens, 1))
    elif aggregation == "seq-mean-token-mean":
        divisor = sequences * length.clamp(min=1)
    elif aggregation == "seq-mean-token-sum":
        divisor = torch.full_like(length, sequences)
    else:
        assert totals.max_response_tokens is not None, "aggregation=constant without max_response_tokens"
        divisor = torch.full_like(length, sequences * totals.max_response_tokens)
    return (1 / divisor).to(dtype)[sequence_index]
