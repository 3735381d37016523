"""How MoE blocks compute their experts: ``model.experts=grouped_mm|eager|loop|megablocks``.

transformers keeps a table of expert functions that every MoE family reads (``ALL_EXPERTS_FUNCTIONS``); ``grouped_mm``
and ``eager`` are its own. This module adds two:

* ``loop``: the experts one after another, in any dtype (float64 too) and on any device; a reference.
* ``megablocks``: see `vespo_lightning.models.megablocks_experts`.

An expert function takes the experts module, hidden states ``[T, H]``, expert ids ``[T, K]`` and gate weights
``[T, K]``, and returns ``[T, H]``. The module says how its weights lie: ``has_gate`` (``gate_up_proj`` or ``up_proj``
alone), ``has_bias``, ``is_transposed`` (``[E, in, out]`` instead of ``[E, out, in]``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from vespo_lightning.errors import UserError
from vespo_lightning.models import megablocks_experts

#: What `docs/experts.md` describes; anything else in transformers' table works too.
BACKENDS = ("grouped_mm", "eager", "loop", "megablocks")


def register_experts_backends() -> None:
    """Adds ``loop`` and ``megablocks`` to transformers' table. Call before a model is loaded; again is harmless."""
    ALL_EXPERTS_FUNCTIONS.register("loop", loop_experts)
    ALL_EXPERTS_FUNCTIONS.register("megablocks", megablocks_experts.megablocks_experts)


def check_experts_backend(name: str, dtype: torch.dtype = torch.float32) -> None:
    """Refuses, before a model is loaded, a backend that could not run.

    Raises:
        UserError: an unknown name, MegaBlocks that is not there or does not run here, float64 on a backend without it.
    """
    register_experts_backends()
    if name != "eager" and name not in ALL_EXPERTS_FUNCTIONS:
        raise UserError(f"model.experts={name} is unknown; use {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")
    if dtype == torch.float64 and name in ("grouped_mm", "megablocks"):
        raise UserError(f"model.experts={name} does not compute in float64; use model.experts=loop")
    if name == "megablocks":
        found = megablocks_experts.is_available()
        if not found:
            raise UserError(f"model.experts=megablocks cannot run: {found.reason}; {found.remedy}")


def loop_experts(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Expert by expert, summed in at least float32 and in the order of the experts, so the same on every run."""
    project_in = _projections(experts, "gate_up_proj" if experts.has_gate else "up_proj")
    activate = experts._apply_gate if experts.has_gate else experts.act_fn
    project_out = _projections(experts, "down_proj")
    total = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    for expert in range(experts.num_experts):
        token, slot = torch.where(top_k_index == expert)
        y = project_out[expert](activate(project_in[expert](hidden_states[token])))
        total = total.index_add(0, token, (y * top_k_weights[token, slot, None]).to(total.dtype))
    return total.to(hidden_states.dtype)


def _projections(experts: Any, name: str) -> list[Callable[[Tensor], Tensor]]:
    """One linear map per expert of the fused parameter ``name``."""
    # unbind, not weight[expert]: the gradient is then put together once, not once per expert
    weights = getattr(experts, name).unbind()
    biases = getattr(experts, f"{name}_bias").unbind() if experts.has_bias else [None] * len(weights)
    return [
        partial(F.linear, weight=weight.T if experts.is_transposed else weight, bias=bias)
        for weight, bias in zip(weights, biases, strict=True)
    ]
