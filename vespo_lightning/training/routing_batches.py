"""Routing of the positions that predict response tokens, now and at generation time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.routing.layout import collapse_layers, expand_layers
from vespo_lightning.routing.record import RoutingRecord
from vespo_lightning.routing.replay import replay_rows
from vespo_lightning.routing.tap import RouterTap
from vespo_lightning.training.outputs import RoutingBatch
from vespo_lightning.training.policy import ModelInputs

#: Whose recorded experts a forward pass uses: nobody's, the engine's (R3), the trainer's at generation weights (R2).
Replayed = Literal["none", "engine", "trainer"]


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
        logits=chosen.logits.detach(),
        probs=chosen.probs.detach(),
        mask=mask,
        recorded_experts=_recorded([s.routed_experts for s in samples], samples, layers, positions.device),
        recorded_top_probs=_recorded([s.router_top_probs for s in samples], samples, layers, positions.device),
        native_experts=chosen.native_experts,
    )


def replaying(
    tap: RouterTap | None, replayed: Replayed, gate_weights: bool, inputs: ModelInputs, samples: Sequence[Sample]
) -> AbstractContextManager[None]:
    """Around the forward and backward pass of ``inputs``, which holds ``samples``: their recorded routing.

    Args:
        replayed: whose; ``none`` leaves the routers alone.
        gate_weights: replay the engine's router probabilities too.
    """
    if replayed == "none" or tap is None:
        return nullcontext()
    device, total = inputs.input_ids.device, inputs.input_ids.numel()
    arrays = [s.routed_experts if replayed == "engine" else s.trainer_experts for s in samples]
    experts = replay_rows(arrays, inputs.starts, total, tap.layers, device)
    assert experts is not None, f"no sample has a record of the {replayed}'s routing"
    probs = None
    if gate_weights:
        probs = replay_rows([s.router_top_probs for s in samples], inputs.starts, total, tap.layers, device)
    return tap.replaying(experts, probs)


@contextmanager
def recording_trainer_experts(tap: RouterTap, inputs: ModelInputs, samples: Sequence[Sample]) -> Iterator[None]:
    """Around a forward pass of ``inputs``: its routing becomes ``trainer_experts`` of the samples in it."""
    with tap.recording() as record:
        yield
    for sample, start in zip(samples, inputs.starts, strict=True):
        tokens = len(sample.prompt_ids) + len(sample.response_ids)
        rows = torch.arange(start, start + tokens - 1, device=inputs.input_ids.device)
        sample.trainer_experts = expand_layers(record.select(rows).experts, tap.layers, tap.num_decoder_layers)


def _recorded(
    arrays: Sequence[np.ndarray | None], samples: Sequence[Sample], layers: list[int], device: torch.device
) -> Tensor | None:
    rows = []
    for array, sample in zip(arrays, samples, strict=True):
        if array is None:
            return None
        rows.append(array[len(sample.prompt_ids) - 1 :])
    return collapse_layers(np.concatenate(rows), layers).to(device)
