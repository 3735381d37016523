"""Routing of the positions that predict response tokens, now and at generation time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.routing.layout import collapse_layers
from vespo_lightning.routing.tap import RoutingRecord
from vespo_lightning.training.outputs import RoutingBatch


def routing_batch(
    record: RoutingRecord, positions: Tensor, samples: Sequence[Sample], mask: Tensor, layers: list[int]
) -> RoutingBatch:
    """The rows of ``record`` at ``positions`` [T], beside what the engine recorded for the same tokens.

    The token at response place t is predicted from input position P - 1 + t, so it is the routing of that position
    which moved its log-prob: rows P - 1 .. P + T - 2 of ``Sample.routed_experts``.
    """
    chosen = record.select(positions)
    return RoutingBatch(
        layers=layers,
        experts=chosen.experts,
        logits=chosen.logits,
        probs=chosen.probs,
        mask=mask,
        recorded_experts=_recorded([s.routed_experts for s in samples], samples, layers, positions.device),
        recorded_top_probs=_recorded([s.router_top_probs for s in samples], samples, layers, positions.device),
    )


def _recorded(
    arrays: Sequence[np.ndarray | None], samples: Sequence[Sample], layers: list[int], device: torch.device
) -> Tensor | None:
    rows = []
    for array, sample in zip(arrays, samples, strict=True):
        if array is None:
            return None
        rows.append(array[len(sample.prompt_ids) - 1 :])
    return collapse_layers(np.concatenate(rows), layers).to(device)
