"""Refusing recorded routing that would be replayed wrongly, and silently."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.sample import Sample

_OTHER_MODEL = "let engine and trainer run the same model, or set routing=native engine.record_routing=false"
_BROKEN_CAPTURE = "use another version of the engine, or set routing=native engine.record_routing=false"


def check_recorded_experts(
    sample: Sample, num_decoder_layers: int, layers: Sequence[int], num_experts: int, top_k: int
) -> None:
    """Raise where ``sample.routed_experts`` cannot be the routing of this sample in this model.

    What a check of one sample cannot see: routing of other weights of the same shape, and, for one expert per token,
    a capture that is zero in some layers (it looks like a router that always takes expert 0). DeepSeek-V2 with
    ``topk_method=group_limited_greedy`` sets scores outside the live groups to 0, so an expert replayed from another
    group gets the gate weight 0 there; DeepSeek-V3 and its relatives read the plain scores and are exact.

    Args:
        num_decoder_layers: dense layers included; what they hold is not looked at.
        layers: decoder layers that are MoE.
        num_experts: E of the trainer's model.
        top_k: K of the trainer's model.

    Raises:
        UserError: names the sample and what is wrong.
    """
    experts = sample.routed_experts
    tokens = len(sample.prompt_ids) + len(sample.response_ids)
    if experts is None:
        raise _wrong(sample, "are missing", "use an engine that returns routing, or set routing=native")
    if experts.ndim != 3 or not np.issubdtype(experts.dtype, np.integer):
        raise _wrong(sample, f"are {experts.dtype} {experts.shape}, not integer [tokens - 1, layers, K]")
    if experts.shape[1:] != (num_decoder_layers, top_k):
        problem = (
            f"are for {experts.shape[1]} layers with {experts.shape[2]} experts per token, the trainer's model has "
            f"{num_decoder_layers} with {top_k}"
        )
        raise _wrong(sample, problem, _OTHER_MODEL)
    if len(experts) != tokens - 1:
        problem = f"have {len(experts)} rows for {tokens} tokens instead of {tokens - 1}: one per token but the last"
        raise _wrong(sample, problem)
    used = experts[:, list(layers)]
    _check_ids(sample, used, layers, num_experts)


def _check_ids(sample: Sample, used: np.ndarray, layers: Sequence[int], num_experts: int) -> None:
    """``used`` [R, L, K], MoE layers only."""
    unknown = (used < 0).any(axis=(1, 2))
    if unknown.any():
        problem = f"are unknown for {unknown.sum()} of {len(used)} tokens, the first at position {unknown.argmax()}"
        raise _wrong(sample, problem)
    if used.max() >= num_experts:
        problem = f"go up to expert {used.max()}, the trainer's model has {num_experts} per layer"
        raise _wrong(sample, problem, _OTHER_MODEL)
    # With one expert per token, a single layer of zeros may be a router's true choice.
    zero = (used == 0).all(axis=(0, 2))
    if zero.all() if used.shape[2] == 1 else zero.any():
        where = ", ".join(str(layer) for layer, empty in zip(layers, zero, strict=True) if empty)
        raise _wrong(sample, f"are expert 0 throughout in decoder layers {where}: the engine captured nothing there")
    ordered = np.sort(used, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)  # [R, L]
    if twice.any():
        row, entry = np.argwhere(twice)[0]
        raise _wrong(sample, f"name an expert twice at position {row} in decoder layer {layers[entry]}")


def check_recorded_probs(sample: Sample) -> None:
    """Raise where ``sample.router_top_probs`` cannot be the probabilities of its ``routed_experts``.

    Raises:
        UserError: names the sample and what is wrong.
    """
    experts, probs = sample.routed_experts, sample.router_top_probs
    subject = "router probabilities"
    if probs is None or experts is None:
        way_out = "use an engine that returns them (engine=transformers), or replay experts only"
        raise _wrong(sample, "are missing", way_out, subject)
    if probs.shape != experts.shape:
        raise _wrong(sample, f"have the shape {probs.shape}, its routed experts {experts.shape}", subject=subject)
    known = probs[(experts >= 0).all(axis=-1)].astype(np.float32)
    if not ((known >= 0) & (known <= 1)).all() or not (known.sum(axis=-1) > 0).all():
        raise _wrong(sample, "are not all between 0 and 1 with a sum above 0", subject=subject)


def _wrong(sample: Sample, problem: str, way_out: str = _BROKEN_CAPTURE, subject: str = "routed experts") -> UserError:
    return UserError(
        f"engine: {subject} of sample {sample.group_id}/{sample.index} (prompt {sample.prompt_id}) {problem}; {way_out}"
    )
