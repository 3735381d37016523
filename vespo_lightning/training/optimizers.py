"""AdamW for float32 parameters, and for bfloat16 parameters with float32 master weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class MasterWeightAdamW(torch.optim.AdamW):
    """AdamW that steps float32 copies of low-precision parameters and rounds them back.

    At learning rates of 1e-6 an update is smaller than the spacing of bfloat16 numbers: without master weights most
    updates would round to nothing. The masters are part of the optimizer's state.
    """

    def __init__(self, params: Iterable[nn.Parameter], **options: Any) -> None:
        self.model_params = list(params)
        self.masters = [p.detach().float().clone() for p in self.model_params]
        super().__init__(self.masters, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for master, param in zip(self.masters, self.model_params, strict=True):
            master.grad = None if param.grad is None else param.grad.float()
        super().step()
        for master, param in zip(self.masters, self.model_params, strict=True):
            param.copy_(master)
            master.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for param in self.model_params:
            param.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "masters": [m.clone() for m in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        saved = state.pop("masters")
        super().load_state_dict(state)
        for master, value in zip(self.masters, saved, strict=True):
            master.copy_(value)


def build_adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; matrices decay, vectors (norms, biases) do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    low_precision = any(p.dtype in (torch.bfloat16, torch.float16) for p in trainable)
    options: dict[str, Any] = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "fused": trainable[0].device.type in ("cpu", "cuda"),
    }
    optimizer: torch.optim.AdamW
    if low_precision:
        optimizer = MasterWeightAdamW(trainable, weight_decay=weight_decay, **options)
    else:
        optimizer = torch.optim.AdamW(trainable, weight_decay=weight_decay, **options)
    if weight_decay:
        group = optimizer.param_groups[0]
        vectors = [p for p in group["params"] if p.ndim < 2]
        group["params"] = [p for p in group["params"] if p.ndim >= 2]
        optimizer.add_param_group({"params": vectors, "weight_decay": 0.0})
    return optimizer
