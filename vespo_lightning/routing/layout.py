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


#: Expert that stands for "unknown" in compact form.
_UNKNOWN = 255


def compact_experts(experts: np.ndarray) -> np.ndarray:
    """int16 experts with -1 for unknown -> uint8 with 255 for unknown, where every id is below 255.

    Half the bytes on disk. Larger ids stay int16, so the dtype tells :func:`widen_experts` which form it is.
    """
    if experts.max(initial=-1) >= _UNKNOWN:
        return experts
    return np.where(experts < 0, _UNKNOWN, experts).astype(np.uint8)


def widen_experts(experts: np.ndarray) -> np.ndarray:
    """int16 with -1 for unknown, from either form of :func:`compact_experts`."""
    if experts.dtype != np.uint8:
        return experts
    wide = experts.astype(np.int16)
    wide[experts == _UNKNOWN] = -1
    return wide
