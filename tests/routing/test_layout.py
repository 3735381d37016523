import numpy as np
import pytest
import torch

from vespo_lightning.routing.layout import collapse_layers, compact_experts, expand_layers, widen_experts


def test_experts_go_to_their_decoder_layers_and_back() -> None:
    experts = torch.tensor([[[3, 1], [0, 300]], [[2, 5], [7, 6]]])  # [T=2, L=2, K=2]
    expanded = expand_layers(experts, layers=[1, 3], num_decoder_layers=5)
    assert expanded.dtype == np.int16
    assert expanded.shape == (2, 5, 2)
    assert expanded[0].tolist() == [[-1, -1], [3, 1], [-1, -1], [0, 300], [-1, -1]]
    back = collapse_layers(expanded, [1, 3])
    assert back.dtype == torch.int64
    assert torch.equal(back, experts)


def test_probabilities_are_kept_in_half_precision_and_zero_in_dense_layers() -> None:
    probs = torch.tensor([[[0.7, 0.2]]])
    expanded = expand_layers(probs, layers=[1], num_decoder_layers=2)
    assert expanded.dtype == np.float16
    assert expanded[0, 0].tolist() == [0.0, 0.0]
    back = collapse_layers(expanded, [1])
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, probs, atol=0, rtol=2**-11)


def test_no_tokens() -> None:
    assert expand_layers(torch.empty(0, 1, 2, dtype=torch.int64), [1], 3).shape == (0, 3, 2)


@pytest.mark.parametrize(("largest", "dtype"), [(7, np.uint8), (254, np.uint8), (255, np.int16), (2000, np.int16)])
def test_compact_experts_come_back(largest: int, dtype: type) -> None:
    experts = np.array([[[3, largest], [-1, -1]], [[0, 1], [-1, -1]]], dtype=np.int16)
    stored = compact_experts(experts)
    assert stored.dtype == dtype
    back = widen_experts(stored)
    assert back.dtype == np.int16
    assert back.tolist() == experts.tolist()


def test_compacting_no_tokens() -> None:
    stored = compact_experts(np.empty((0, 3, 2), dtype=np.int16))
    assert stored.shape == widen_experts(stored).shape == (0, 3, 2)
