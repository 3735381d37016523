"""Weights inside a vLLM model: loaded by checkpoint names, repaired, read back. Runs in vLLM's worker."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.weight_check import fingerprint

_IDENTITY_ROWS = 256


def reload(worker: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Replace all weights of a worker's model. Raises UserError naming what was refused or did not arrive."""
    model: Any = worker.get_model()
    loaded: set[str] = set()
    current = "none"
    load_weights = model.load_weights

    def named(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        nonlocal current
        for name, tensor in weights:
            current = name
            yield name, tensor

    def recorded(weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded.update(load_weights(weights))
        return loaded

    # An instance attribute shadows the method for the time of the reload: vLLM itself only logs what is
    # missing.
    model.load_weights = recorded
    try:
        worker.reload_weights(weights_iterator=named(tensors))
    except (KeyError, ValueError, AssertionError, RuntimeError, AttributeError, TypeError) as error:
        raise UserError(
            f"engine=vllm refused the weight {current} ({type(error).__name__}: {error}): its loader does "
            "not know this model's checkpoint names or shapes, use engine=transformers"
        ) from error
    finally:
        del model.load_weights
    held = [name for name, _ in (*model.named_parameters(), *_checkpoint_buffers(model))]
    missing = sorted({_plain(name) for name in held} - {_plain(name) for name in loaded})
    if missing:
        raise UserError(
            f"engine=vllm was not given {len(missing)} of its weights, among them {missing[0]}: the "
            "checkpoint names that the trainer sends do not cover vLLM's model, use engine=transformers"
        )
    repair(model)


def _plain(name: str) -> str:
    """vLLM's loaders report experts without the wrapper module that holds them."""
    return name.replace(".routed_experts.", ".")


def _checkpoint_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that checkpoints hold, such as the layer scale of Gemma 4.

    vLLM's own (``_k_scale`` and its like, which a plain checkpoint does not have) begin with an underscore.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            own = name.startswith("_") or name in module._non_persistent_buffers_set
            if not own and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{name}", buffer


def repair(model: nn.Module) -> None:
    """Redo, after a reload on a CPU, the packing that vLLM does only at the first load.

    Left out, experts stay unpacked under a kernel that expects packed ones, and an output head that shares
    the embedding keeps the packed copy of the old weights; both give wrong log-probs without an error.
    """
    shared = _shared_parameters(model)
    for module in model.modules():
        if hasattr(module, "cpu_linear") and id(module.weight) in shared:
            _repair_tied_linear(module)
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None and next(module.parameters()).device.type == "cpu":
            _repair_experts(module)


def _repair_tied_linear(module: Any) -> None:
    module.quant_method.process_weights_after_loading(module)


def _repair_experts(module: Any) -> None:
    module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)


def _shared_parameters(model: nn.Module) -> set[int]:
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def checksum(worker: Any, dtype: torch.dtype) -> int:
    """See :meth:`VllmEngine.fingerprint`."""
    return fingerprint(_weights_in_use(worker.get_model(), dtype), dtype)


@torch.inference_mode()
def _weights_in_use(model: nn.Module, dtype: torch.dtype) -> Iterator[Tensor]:
    yield from (buffer for _, buffer in _checkpoint_buffers(model))
    seen: set[int] = set()
    module: Any
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen and parameter.numel():
                seen.add(id(parameter))
                yield parameter
        if hasattr(module, "cpu_linear"):
            packed = _unpack_linear(module, dtype)
            # Where vLLM keeps the plain weight beside the packed one (output heads), two equal copies count
            # once.
            if not module.weight.numel() or fingerprint([packed]) != fingerprint([module.weight]):
                yield packed


def _unpack_linear(module: Any, dtype: torch.dtype) -> Tensor:
    """[in, out]: the weight that a packed CPU linear multiplies by, got exactly by giving it the identity."""
    if module.weight.numel():
        size, dtype = module.weight.shape[1], module.weight.dtype
    else:
        size = getattr(module, "input_size_per_partition", None) or module.input_size
    rows = [
        module.cpu_linear(chunk, module.weight, None) for chunk in torch.eye(size, dtype=dtype).split(_IDENTITY_ROWS)
    ]
    return torch.cat(rows)


def moe_layers(worker: Any) -> list[int]:
    """Decoder layers that route tokens to experts."""
    names = (name for name, _ in worker.get_model().named_parameters())
    found = (re.search(r"layers\.(\d+)\..*\bexperts\b.*\bw2_weight$", name) for name in names)
    return sorted({int(match[1]) for match in found if match})
