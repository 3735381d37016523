"""What Lightning's true-precision plugins (``bf16-true``, ``64-true``) must leave alone."""

from __future__ import annotations

import warnings
from typing import Any, Self

import lightning as L


class PreciseModule(L.LightningModule):
    """A module whose parameters take the precision of the trainer, and nothing else does.

    Batches: the plugins cast every floating-point tensor that they find in one, which would round advantages.
    Buffers: transformers keeps some in float32 whatever the parameters are (rotary frequencies, steering biases of
    routers). Rounded to bfloat16, positions beyond a few hundred would point elsewhere than in the engine.
    """

    def setup(self, stage: str) -> None:
        # on purpose: the policy has no dropout in training either
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        self.trainer.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        kept = [(module, dict(module._buffers)) for module in self.modules()]
        super().to(*args, **kwargs)
        for module, buffers in kept:
            for name, before in buffers.items():
                after = module._buffers[name]
                if before is not None and after is not None and after.dtype != before.dtype:
                    module._buffers[name] = before.to(after.device)
        return self
