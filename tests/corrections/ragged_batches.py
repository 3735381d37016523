"""Batches of responses of any lengths with log-probs of the policy, of the trainer before it, and of the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from hypothesis import strategies as st

from vespo_lightning.objectives.base import TokenBatch

Rows = Sequence[Sequence[float]]


def build(
    mismatch: Rows,
    drift: Rows | None = None,
    advantages: Sequence[float] | None = None,
    masks: Sequence[Sequence[bool]] | None = None,
    denominator: Literal["behaviour", "recomputed"] = "recomputed",
    dtype: torch.dtype = torch.float64,
) -> TokenBatch:
    """One response per row. Tokens outside the mask hold NaN everywhere.

    Args:
        mismatch: log of trainer over engine, both at generation weights.
        drift: log of the policy over the trainer at generation weights; none by default.
    """
    lengths = [len(row) for row in mismatch]
    flat_mismatch = torch.tensor([x for row in mismatch for x in row], dtype=dtype)
    flat_drift = torch.zeros_like(flat_mismatch)
    if drift is not None:
        flat_drift = torch.tensor([x for row in drift for x in row], dtype=dtype)
    mask = torch.ones(sum(lengths), dtype=torch.bool)
    if masks is not None:
        mask = torch.tensor([m for row in masks for m in row], dtype=torch.bool)
    hole = torch.where(mask, 0.0, math.nan).to(dtype)
    return TokenBatch(
        log_prob=flat_mismatch + flat_drift + hole,
        behaviour_log_prob=hole,
        recomputed_log_prob=flat_mismatch + hole,
        sequence_index=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        loss_mask=mask,
        advantage=torch.tensor(advantages or [1.0] * len(lengths), dtype=dtype),
        group=torch.zeros(len(lengths), dtype=torch.int64),
        version_made=torch.zeros(sum(lengths), dtype=torch.int32),
        policy_version=0,
        denominator=denominator,
    )


def rows_of(values: torch.Tensor, batch: TokenBatch) -> list[list[float]]:
    """Per response the values of its tokens."""
    return [values[batch.sequence_index == i].tolist() for i in range(len(batch.advantage))]


def close(value: torch.Tensor, expected: Sequence[float]) -> None:
    torch.testing.assert_close(value, torch.tensor(expected, dtype=value.dtype), rtol=1e-12, atol=0)


@st.composite
def batches(draw: st.DrawFn, log_probs: st.SearchStrategy[float]) -> TokenBatch:
    """float32 batches with every optional part that a correction may need."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    tokens, sequences = sum(lengths), len(lengths)

    def per_token(values: st.SearchStrategy) -> torch.Tensor:
        return torch.tensor(draw(st.lists(values, min_size=tokens, max_size=tokens)), dtype=torch.float32)

    advantage = st.one_of(st.just(0.0), st.floats(-100, 100, width=32))
    return TokenBatch(
        log_prob=per_token(log_probs),
        behaviour_log_prob=per_token(log_probs),
        recomputed_log_prob=per_token(log_probs),
        router_shift=per_token(st.floats(-16.5, 0, width=32)),
        sequence_index=torch.repeat_interleave(torch.arange(sequences), torch.tensor(lengths)),
        loss_mask=per_token(st.booleans()).bool(),
        advantage=torch.tensor(draw(st.lists(advantage, min_size=sequences, max_size=sequences)), dtype=torch.float32),
        group=torch.zeros(sequences, dtype=torch.int64),
        version_made=torch.zeros(tokens, dtype=torch.int32),
        policy_version=0,
        denominator=draw(st.sampled_from(["behaviour", "recomputed"])),
    )
