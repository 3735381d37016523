"""model.experts=megablocks on MegaBlocks' real Triton kernels, on a GPU or in Triton's interpreter.

Needs triton and MegaBlocks, which the project does not install; docs/experts.md says how. Without a GPU:
``TRITON_INTERPRET=1 python -m pytest tests/models/test_megablocks_kernels.py``
"""

import importlib.util
import os
import sys

import pytest
import torch
from experts_parity import FAMILIES, bfloat16_errors, differences, torch_megablocks_ops, toy_experts, toy_run
from routing.moe_families import family_model

from vespo_lightning.models.experts import check_experts_backend, register_experts_backends
from vespo_lightning.models.megablocks_experts import megablocks_ops

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MISSING = [name for name in ("triton", "megablocks", "stk") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"{', '.join(MISSING)} not installed (docs/experts.md)", allow_module_level=True)
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; TRITON_INTERPRET=1 runs the kernels without one", allow_module_level=True)

#: of eager's own errors in bfloat16; Triton's interpreter cuts a float32 off where a GPU rounds it to nearest
BFLOAT16_SLACK = 1.1 if GPU else 1.25

INDEX = [[3, 1], [1, 0], [3, 0], [0, 1], [1, 3]]  # expert 2 gets nothing


@pytest.fixture(autouse=True)
def registered() -> None:
    register_experts_backends()


def test_the_kernels_are_megablocks_own():
    check_experts_backend("megablocks")
    assert megablocks_ops().gather.__self__.__module__ == "megablocks.ops.gather"
    kernel = sys.modules["megablocks.backend.kernels"]._padded_copy.fn
    assert type(kernel).__name__ == ("JITFunction" if GPU else "InterpretedFunction")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 96])  # below one block of 64 columns, and one and a half
def test_gather_and_scatter(width, dtype):
    """There and back, with gradients, against the same steps by indexing; T=5 tokens, K=2."""
    results = []
    for ops in (megablocks_ops(), torch_megablocks_ops()):
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(5, width, generator=draw).to(DEVICE, dtype).requires_grad_()
        weights = torch.rand(10, generator=draw).to(DEVICE).requires_grad_()
        ids = torch.tensor(INDEX, device=DEVICE, dtype=torch.int32).view(-1)
        bin_ids, indices = ops.sort(ids, 2)
        bins = ops.inclusive_cumsum(ops.histogram(bin_ids, 4), 0)
        assert bins.tolist() == [3, 7, 7, 10] and bin_ids.tolist() == sorted(ids.tolist())
        gathered = ops.gather(x, indices, bin_ids, bins, 2)
        out = ops.scatter(gathered * 1.5, indices, bin_ids, weights, bins, 2)
        (out.float() * torch.randn(out.shape, generator=draw).to(DEVICE)).sum().backward()
        results.append((gathered.detach(), out.detach(), x.grad, weights.grad))
    kernels, torch_ = results
    assert torch.equal(kernels[0], torch_[0])
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7  # a product of weight and value, rounded or cut off
    for actual, expected in zip(kernels[1:], torch_[1:], strict=True):
        torch.testing.assert_close(actual, expected, atol=tolerance * float(expected.abs().max()), rtol=tolerance)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias_and_transposed", [True, False])
def test_layouts(gate, bias_and_transposed):
    experts = toy_experts(gate, bias_and_transposed, bias_and_transposed)
    for index in (INDEX, [[2, 0, 3]]):
        expected, expected_gradients = toy_run(experts, "eager", index, DEVICE)
        out, gradients = toy_run(experts, "megablocks", index, DEVICE)
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, atol=4e-6, rtol=1e-5, msg=name)
            if name not in ("x", "weights"):
                used = torch.tensor(index, device=DEVICE).unique()
                assert not gradients[name][[e for e in range(4) if e not in used]].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_float32(family):
    log_prob, gradient = differences(family_model(family).to(DEVICE), "megablocks")
    print(f"{family} float32: log-probs {log_prob:.1e}, gradients {gradient:.1e}")
    assert log_prob <= 1e-6
    assert gradient <= 5e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_bfloat16(family):
    errors = bfloat16_errors(family, ["eager", "megablocks"], DEVICE)
    print(f"{family} bfloat16 (log-probs, gradients): {errors}")
    assert errors["megablocks"][0] <= BFLOAT16_SLACK * errors["eager"][0]
    assert errors["megablocks"][1] <= BFLOAT16_SLACK * errors["eager"][1]
