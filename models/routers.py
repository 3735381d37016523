"""Routers of a Mixture-of-Experts model: frozen, or computed in float32 inside a model of lower precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vespo_lightning.errors import UserError
from vespo_lightning.routing.tap import _moe_blocks


def freeze_routers(model: PreTrainedModel) -> None:
    """No parameter of a router is trained.

    Losses of router logits still reach the layers before the router.
    """
    for router in _routers(model):
        router.requires_grad_(False)


def compute_routers_in_float32(model: PreTrainedModel) -> None:
    """Routers keep their parameters in float32 and compute in it, under autocast too.

    The stream goes into a router as float32. Gate weights come out in float32 where the family's own code does not
    cast them, as DeepSeek and Mixtral have them anyway: experts functions multiply by them in float32 and return what
    they were given. Routers of more precise models stay as they are.
    """
    for router in _routers(model):
        for parameter in router.parameters():
            parameter.data = parameter.data.to(_at_least_float32(parameter.dtype))
        hook = _Float32Hook()
        router.register_forward_pre_hook(hook.before)
        router.register_forward_hook(hook.after, always_call=True)


@contextmanager
def routers_loaded_in_float32(path: str) -> Iterator[None]:
    """Models loaded inside the block take their routers' numbers unrounded, whatever dtype is asked for.

    Args:
        path: of the folder, or hub id, that will be loaded.
    """
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    routers = {id(parameter) for router in _routers(skeleton) for parameter in router.parameters()}
    names = {name for name, parameter in skeleton.named_parameters() if id(parameter) in routers}
    cls = type(skeleton)
    # transformers reads this at every load: parameters that half precision would harm
    own = "_keep_in_fp32_modules_strict" in vars(cls)
    before = cls._keep_in_fp32_modules_strict
    cls._keep_in_fp32_modules_strict = {*(before or ()), *names}
    try:
        yield
    finally:
        if own:
            cls._keep_in_fp32_modules_strict = before
        else:
            del cls._keep_in_fp32_modules_strict


class _Float32Hook:
    """Around the forward pass of one router. Does not mind which other hooks run before or after it.

    An object, not a closure: a deep copy of the model takes a copy along.
    """

    def __init__(self) -> None:
        self._autocast: torch.autocast | None = None

    @torch.compiler.disable
    def before(self, router: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        rounded = [p.dtype for p in router.parameters() if p.dtype != _at_least_float32(p.dtype)]
        if rounded:
            raise UserError(
                f"model.router_dtype=float32: something turned the parameters of {type(router).__name__} to "
                f"{str(rounded[0]).removeprefix('torch.')} after they were loaded; use model.router_dtype=null"
            )
        device = next(value.device for value in args if isinstance(value, Tensor))
        self._autocast = torch.autocast(device.type, enabled=False)
        self._autocast.__enter__()
        return tuple(_raised(value) for value in args)

    @torch.compiler.disable
    def after(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        autocast, self._autocast = self._autocast, None
        if autocast is not None:
            autocast.__exit__(None, None, None)


def _routers(model: PreTrainedModel) -> list[nn.Module]:
    return [router for router, _ in _moe_blocks(model).values()]


def _raised(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(_at_least_float32(value.dtype))
    return value


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
