"""Sums over tokens, some of them per MoE layer, that add up over micro-batches and ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor


class LayerSums(ABC):
    """Statistics whose tensor attributes, those of nested ones included, are all sums; ratios come at the end.

    Args:
        layers: decoder layer of each of the L MoE layers.
    """

    def __init__(self, layers: list[int], device: torch.device | str = "cpu") -> None:
        self.layers = layers
        self._device = device

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self._device)

    def sums(self) -> Tensor:
        """float64 [n]: everything that adds up, in one vector, so that one all-reduce serves all of it."""
        return torch.cat([value.reshape(-1) for value in self._tensors()])

    def set_sums(self, sums: Tensor) -> None:
        """Take over the vector of :meth:`sums` after it was added over ranks."""
        tensors = list(self._tensors())
        for value, part in zip(tensors, sums.split([value.numel() for value in tensors]), strict=True):
            value.copy_(part.view_as(value))

    def _tensors(self) -> Iterator[Tensor]:
        for value in vars(self).values():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, LayerSums):
                yield from value._tensors()

    @abstractmethod
    def per_layer(self) -> dict[str, Tensor]:
        """float64 [L] for each statistic that has data."""

    @abstractmethod
    def pooled(self) -> dict[str, float]:
        """Statistics of all layers together that are not the mean over layers of :meth:`per_layer`."""

    def metrics(self) -> dict[str, float]:
        """``name`` for all layers and ``name/layer_03`` for each (the decoder layer's index)."""
        metrics: dict[str, float] = {}
        for name, values in self.per_layer().items():
            metrics[name] = values.mean().item()
            for layer, value in zip(self.layers, values.tolist(), strict=True):
                metrics[f"{name}/layer_{layer:02d}"] = value
        return metrics | self.pooled()


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """float64 [L]: sum over tokens of ``values`` [T, L] where ``mask`` [T, L] or [T, 1]; elsewhere may be anything."""
    return torch.where(mask, values.double(), 0.0).sum(dim=0)
