"""``model.experts=megablocks``: MegaBlocks' Triton kernels move tokens to experts and back, a grouped GEMM computes.

MegaBlocks 0.10.0 is pinned to a torch older than ours, so it is never a dependency: docs/experts.md has the commands
that install its Python files beside any torch. Those lack ``megablocks_ops``, its compiled part, without which none of
it imports. Only three of its functions are needed here (sort, histogram, inclusive cumsum of integer vectors), and
`compiled_ops_stand_in` computes them with torch. A compiled ``megablocks_ops`` is used where there is one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vespo_lightning.errors import UserError

INSTALL = "pip install --no-deps --no-build-isolation megablocks==0.10.0 stanford-stk==0.7.1"


@dataclass(frozen=True)
class Availability:
    """Whether the backend runs here; if not, why and what to do. True or false like a bool."""

    reason: str = ""
    remedy: str = ""

    def __bool__(self) -> bool:
        return not self.reason


def is_available() -> Availability:
    """Looks for a device and the packages, then imports MegaBlocks (seconds, once)."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return Availability("its Triton kernels need a CUDA device", "use model.experts=grouped_mm on a CPU")
    missing = [name for name in ("megablocks", "stk", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        command = INSTALL + " triton" * ("triton" in missing)
        remedy = f"install it ({command}; docs/experts.md has the details) or use model.experts=grouped_mm"
        return Availability(f"{', '.join(missing)} not installed", remedy)
    try:
        megablocks_ops()
    except (ImportError, RuntimeError, AttributeError) as error:
        said = str(error).strip().split("\n")[0]
        remedy = "install it as docs/experts.md says or use model.experts=grouped_mm"
        return Availability(f"megablocks does not import ({type(error).__name__}: {said})", remedy)
    return Availability()


@cache
def megablocks_ops() -> ModuleType:
    """``megablocks.ops``, with the stand-in below it when MegaBlocks' compiled part is missing."""
    if "megablocks_ops" not in sys.modules and importlib.util.find_spec("megablocks_ops") is None:
        sys.modules["megablocks_ops"] = compiled_ops_stand_in()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Grouped GEMM not available")
        ops = importlib.import_module("megablocks.ops")
    if not torch.cuda.is_available():
        # Triton's interpreter has no device to time the variants of a kernel on: keep the first
        kernels = importlib.import_module("megablocks.backend.kernels")
        for kernel in (kernels._padded_copy, kernels._padded_copy_wgrad):
            kernel.configs = kernel.configs[:1]
    return ops


def compiled_ops_stand_in() -> ModuleType:
    """A module ``megablocks_ops`` of the three functions used here, with the argument lists that MegaBlocks calls.

    The rest (exclusive_cumsum, indices, replicate_*) is left out: nothing here reaches it, and calling it must fail.
    """
    module = ModuleType("megablocks_ops", "torch stand-in for three of MegaBlocks' compiled functions")

    def sort(x: Tensor, end_bit: int, x_out: Tensor, order_out: Tensor) -> None:
        """Ascending and stable; ``end_bit`` only tells a radix sort where to stop."""
        values, order = torch.sort(x, stable=True)
        x_out.copy_(values)
        order_out.copy_(order)

    def histogram(x: Tensor, bins: int) -> Tensor:
        """How often 0 .. bins-1 occur, int32."""
        # not bincount, which waits for the device
        return x.new_zeros(bins, dtype=torch.int32).scatter_add_(0, x.long(), torch.ones_like(x, dtype=torch.int32))

    def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
        out.copy_(torch.cumsum(x, dim))

    vars(module).update(sort=sort, histogram=histogram, inclusive_cumsum=inclusive_cumsum)
    return module


def megablocks_experts(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An expert function of transformers' table (shapes: `vespo_lightning.models.experts`), without dropped tokens.

    Raises:
        UserError: more elements than the kernels' 32-bit offsets reach, or experts spread over processes.
    """
    if experts._is_expert_parallel:
        raise UserError("model.experts=megablocks does not know expert parallelism; use model.experts=grouped_mm")
    top_k = top_k_index.shape[1]
    if hidden_states.numel() * top_k >= 2**31:
        raise UserError(
            f"model.experts=megablocks counts elements in 32 bits and {hidden_states.shape[0]} tokens x {top_k} "
            f"experts x {hidden_states.shape[1]} are more; lower the tokens of a micro-batch or use "
            "model.experts=grouped_mm"
        )
    ops = megablocks_ops()
    key_bits = max((experts.num_experts - 1).bit_length(), 1)
    bin_ids, indices = ops.sort(top_k_index.reshape(-1).int(), key_bits)
    counts = ops.histogram(bin_ids, experts.num_experts)
    bins = ops.inclusive_cumsum(counts, 0).view(-1)  # MegaBlocks squeezes a single expert's away

    name_in = "gate_up_proj" if experts.has_gate else "up_proj"
    x = hidden_states.to(getattr(experts, name_in).dtype).contiguous()
    x = ops.gather(x, indices, bin_ids, bins, top_k)  # [T K, H], expert after expert
    x = _grouped_linear(experts, name_in, x, bin_ids, counts, bins)
    x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
    x = _grouped_linear(experts, "down_proj", x, bin_ids, counts, bins)
    weights = top_k_weights.reshape(-1).contiguous()
    return ops.scatter(x.contiguous(), indices, bin_ids, weights, bins, top_k).to(hidden_states.dtype)


def _grouped_linear(experts: Any, name: str, x: Tensor, bin_ids: Tensor, counts: Tensor, bins: Tensor) -> Tensor:
    weight = getattr(experts, name)
    x = x.to(weight.dtype)  # grouped GEMMs ignore autocast
    gmm = grouped_gemm_for(x)
    if gmm is None:
        out = F.grouped_mm(x, weight if experts.is_transposed else weight.transpose(1, 2), offs=bins)
    else:
        out = gmm(x.contiguous(), weight.contiguous(), counts.long().cpu(), trans_b=not experts.is_transposed)
    return out + getattr(experts, f"{name}_bias")[bin_ids] if experts.has_bias else out


def grouped_gemm_for(x: Tensor) -> Callable[..., Tensor] | None:
    """``gmm(x, weight, rows_per_expert, trans_b)`` of the package grouped_gemm, which takes only bfloat16 on CUDA."""
    return _installed_gmm() if x.is_cuda and x.dtype == torch.bfloat16 else None


@cache
def _installed_gmm() -> Callable[..., Tensor] | None:
    try:
        return importlib.import_module("grouped_gemm.ops").gmm
    except ImportError:
        return None
