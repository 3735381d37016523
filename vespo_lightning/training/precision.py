"""What Lightning's true-precision plugins (``bf16-true``, ``64-true``) must leave alone."""

from __future__ import annotations

import warnings
from typing import Any, Self

import lightning as L
import torch
from torch import nn


def precise_parameters(module: nn.Module, dtype: torch.dtype | None) -> list[nn.Parameter]:
    """Parameters that a cast to ``dtype`` must not round: more precise ones of a module that was loaded in ``dtype``.

    They were loaded so on purpose: routers under ``model.router_dtype=float32``, steering biases of some families.
    """
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    if dtype not in {p.dtype for p in parameters}:
        return []
    return [p for p in parameters if p.dtype != dtype and torch.promote_types(p.dtype, dtype) == p.dtype]


class PreciseModule(L.LightningModule):
    """A module whose parameters take the precision of the trainer, and nothing else does.

    Parameters: what was loaded more precisely than the rest stays so, see :func:`precise_parameters`.

    Batches: the plugins cast every floating-point tensor that they find in one, which would round advantages.
    Buffers: transformers keeps some in float32 whatever the parameters are (rotary frequencies, steering biases of
    routers). Rounded to bfloat16, positions beyond a few hundred would point elsewhere than in the engine.
    """

    def setup(self, stage: str) -> None:
        # on purpose: the policy has no dropout in training either
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        self.trainer.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        precise = [(p, p.data) for p in precise_parameters(self, torch._C._nn._parse_to(*args, **kwargs)[1])]
        kept = [(module, dict(module._buffers)) for module in self.modules()]
        super().to(*args, **kwargs)
        for parameter, before in precise:
            parameter.data = before.to(parameter.device)
        for module, buffers in kept:
            for name, buffer in buffers.items():
                after = module._buffers[name]
                if buffer is not None and after is not None and after.dtype != buffer.dtype:
                    module._buffers[name] = buffer.to(after.device)
        return self
