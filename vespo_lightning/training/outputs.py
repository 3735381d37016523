"""What the module hands to callbacks: one record per micro-batch, one per update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.rollouts.sample import MiniBatch, Sample

if TYPE_CHECKING:
    import lightning as L


@dataclass(frozen=True)
class RoutingBatch:
    """Routing of the positions that predict the response tokens. T tokens, L MoE layers, E experts, K per token."""

    layers: list[int]
    """Decoder layer of each of the L entries."""
    experts: Tensor
    """int64 [T, L, K] experts used by the forward pass just done"""
    logits: Tensor
    """float32 [T, L, E] detached router logits of that pass"""
    probs: Tensor
    """float32 [T, L, E] detached router probabilities of that pass"""
    mask: Tensor
    """bool [T] tokens that count"""
    recorded_experts: Tensor | None
    """int64 [T, L, K] experts at generation time, -1 where unknown; None where the engine returned none"""
    recorded_top_probs: Tensor | None
    """float32 [T, L, K] router probabilities of those experts at generation time"""
    native_experts: Tensor
    """int64 [T, L, K] experts that the routers would have used by themselves; ``experts`` but for routing replay"""


@dataclass(frozen=True)
class MicroBatchOutput:
    samples: list[Sample]
    tokens: TokenBatch
    routing: RoutingBatch | None
    """None for dense models, or when nobody asked for it."""


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step, skipped ones included. Everything is detached; T tokens of S sequences in sample order."""

    mini_batch: MiniBatch
    tokens: TokenBatch
    """before corrections: what the data are"""
    corrected: TokenBatch
    """after corrections: what the objective saw"""
    coefficient: Tensor
    """[T] the objective's coefficient with the weights of corrections, before the advantage"""
    entropy: Tensor
    """[T] entropy of the policy at each position, nats"""
    loss: float
    grad_norm: float
    """before clipping; may be non-finite when ``skipped``"""
    learning_rate: float
    skipped: bool
    """True when a non-finite loss or gradient made the step be left out"""
    seconds: float


@runtime_checkable
class MicroBatchObserver(Protocol):
    """A callback that looks at every micro-batch, because what it measures is too large to keep for a mini-batch."""

    def on_micro_batch_end(self, trainer: L.Trainer, module: Any, output: MicroBatchOutput) -> None: ...
