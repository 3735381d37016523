"""Batches of response tokens with any lengths, log-ratios and advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from vespo_lightning.objectives.base import TokenBatch, TopLogProbs


def build(
    log_ratios: Sequence[Sequence[float]],
    advantages: Sequence[float],
    masks: Sequence[Sequence[bool]] | None = None,
    dtype: torch.dtype = torch.float64,
) -> TokenBatch:
    """One sequence per entry. Tokens outside the mask hold NaN on both sides of the ratio.

    The recomputed log-probs are those of the engine, and the two likeliest tokens have not moved.
    """
    lengths = [len(ratios) for ratios in log_ratios]
    difference = torch.tensor([r for ratios in log_ratios for r in ratios], dtype=dtype)
    mask = torch.ones(len(difference), dtype=torch.bool)
    if masks is not None:
        mask = torch.tensor([m for row in masks for m in row], dtype=torch.bool)
    behaviour = torch.zeros(len(difference), dtype=dtype)
    log_prob = torch.where(mask, difference, float("nan"))
    behaviour = torch.where(mask, behaviour, float("nan"))
    likeliest = torch.tensor([0.5, 0.2], dtype=dtype).log().expand(len(mask), 2)
    return TokenBatch(
        log_prob=log_prob,
        behaviour_log_prob=behaviour,
        recomputed_log_prob=behaviour,
        top=TopLogProbs(likeliest, likeliest, torch.zeros_like(mask)),
        sequence_index=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        loss_mask=mask,
        advantage=torch.tensor(advantages, dtype=dtype),
        group=torch.arange(len(lengths)),
        version_made=torch.zeros(len(difference), dtype=torch.int32),
        policy_version=0,
    )


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., TokenBatch]:
    return build
