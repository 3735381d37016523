"""Cutting a mini-batch into micro-batches, and laying out token ids for one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.training.policy import ModelInputs

Layout = Literal["padded", "packed"]


def plan_micro_batches(lengths: Sequence[int], token_budget: int, layout: Layout = "padded") -> list[list[int]]:
    """Group sequences so that no forward pass exceeds the budget; whole sequences stay together.

    Longest first, so that padded rows of one micro-batch are of like length. The plan depends on nothing but its
    arguments.

    Args:
        lengths: tokens per sequence, prompt included.
        token_budget: largest number of tokens of one forward pass, padding included.

    Raises:
        UserError: a single sequence is longer than the budget.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > token_budget:
        raise UserError(
            f"batching.token_budget={token_budget} is smaller than one sequence of {lengths[order[0]]} tokens; "
            f"set it to at least {lengths[order[0]]}"
        )
    plan: list[list[int]] = []
    used = 0
    for i in order:
        cost = lengths[plan[-1][0]] if plan and layout == "padded" else lengths[i]
        if not plan or used + cost > token_budget:
            plan.append([])
            used, cost = 0, lengths[i]
        plan[-1].append(i)
        used += cost
    return plan


def collate(samples: Sequence[Sample], layout: Layout = "padded", pad_id: int = 0) -> ModelInputs:
    """Token ids of whole sequences as one forward pass: right-padded rows, or one packed row.

    Packed sequences are told apart by position ids that start again at 0.
    """
    lengths = np.array([len(s.prompt_ids) + len(s.response_ids) for s in samples])
    columns = int(lengths.sum()) if layout == "packed" else int(lengths.max())
    starts = np.cumsum(lengths) - lengths if layout == "packed" else np.arange(len(samples)) * columns
    rows = 1 if layout == "packed" else len(samples)
    ids = np.full(rows * columns, pad_id, dtype=np.int64)
    place = np.zeros(rows * columns, dtype=np.int64)
    mask = np.zeros(rows * columns, dtype=np.int64)
    positions = []
    for sample, start, length in zip(samples, starts, lengths, strict=True):
        prompt = len(sample.prompt_ids)
        ids[start : start + prompt] = sample.prompt_ids
        ids[start + prompt : start + length] = sample.response_ids
        place[start : start + length] = np.arange(length)
        mask[start : start + length] = 1
        positions.append(np.arange(start + prompt - 1, start + length - 1))
    return ModelInputs(
        input_ids=torch.from_numpy(ids.reshape(rows, columns)),
        position_ids=torch.from_numpy(place.reshape(rows, columns)),
        attention_mask=None if layout == "packed" else torch.from_numpy(mask.reshape(rows, columns)),
        positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(np.concatenate([s.response_ids for s in samples]).astype(np.int64)),
        starts=tuple(starts.tolist()),
    )
