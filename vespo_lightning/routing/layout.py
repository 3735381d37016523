"""From routing of the MoE layers to routing of all decoder layers, which samples store, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def expand_layers(values: Tensor, layers: Sequence[int], num_decoder_layers: int) -> np.ndarray:
    """[T, L, K] of MoE layers -> [T, num_decoder_layers, K], the format of ``Sample``.

    Args:
        values: integer (experts) or floating (their probabilities) [T, L, K].
        layers: decoder-layer index of each of the L entries.
        num_decoder_layers: dense layers included.

    Returns:
        int16 with -1 in dense layers, or float16 with 0 there.
    """
    tokens, _, experts_per_token = values.shape
    floating = values.is_floating_point()
    expanded = values.new_full(
        (tokens, num_decoder_layers, experts_per_token),
        0.0 if floating else -1,
        dtype=torch.float16 if floating else torch.int16,
    )
    expanded[:, list(layers)] = values.to(expanded.dtype)
    return expanded.cpu().numpy()


def collapse_layers(values: np.ndarray, layers: Sequence[int]) -> Tensor:
    """[T, num_decoder_layers, K] of a ``Sample`` -> [T, L, K] of the MoE layers, int64 or float32."""
    selected = torch.from_numpy(values[:, list(layers)])
    return selected.float() if selected.is_floating_point() else selected.long()
