"""Expert backends give eager's numbers on every layout; one that cannot run is refused by name at the start."""

import importlib.util
from itertools import product

import pytest
import torch
from experts_parity import FAMILIES, bfloat16_errors, differences, torch_megablocks_ops, toy_experts, toy_run
from routing.moe_families import family_model
from torch import Tensor

from vespo_lightning.errors import UserError
from vespo_lightning.models import megablocks_experts
from vespo_lightning.models.experts import BACKENDS, check_experts_backend, register_experts_backends

LAYOUTS = [pytest.param(*x, id="gate{:d}-bias{:d}-transposed{:d}".format(*x)) for x in product([True, False], repeat=3)]
OURS = ["loop", "megablocks"]


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered, with MegaBlocks' kernels in torch; the real ones are in test_megablocks_kernels.py."""
    register_experts_backends()
    monkeypatch.setattr(megablocks_experts, "megablocks_ops", torch_megablocks_ops)


@pytest.mark.parametrize("backend", [*OURS, "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_float32(family, backend):
    log_prob, gradient = differences(family_model(family), backend)
    assert log_prob <= 1e-6
    assert gradient <= 5e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_bfloat16(family):
    """Each backend as near to float32 as eager is."""
    errors = bfloat16_errors(family, ["eager", *OURS, "grouped_mm"])
    log_prob, gradient = errors["eager"]
    assert 1e-4 < log_prob < 0.05 and 1e-3 < gradient < 0.25
    for name in (*OURS, "grouped_mm"):
        assert errors[name][0] <= 1.1 * log_prob, name
        assert errors[name][1] <= 1.1 * gradient, name


@pytest.mark.parametrize("family", FAMILIES)
def test_loop_computes_in_float64(family):
    log_prob, gradient = differences(family_model(family).double(), "loop")
    assert log_prob <= 1e-12
    assert gradient <= 1e-12


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize(("gate", "bias", "transposed"), LAYOUTS)
def test_every_layout(gate, bias, transposed, backend):
    experts = toy_experts(gate, bias, transposed)
    for index in ([[3, 1], [1, 0], [3, 2], [0, 1], [1, 3]], [[2], [0], [2]], [[2, 0, 3]]):
        expected, expected_gradients = toy_run(experts, "eager", index)
        out, gradients = toy_run(experts, backend, index)
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, atol=4e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("backend", OURS)
def test_experts_without_tokens_have_zero_gradients(backend):
    experts = toy_experts(gate=True, bias=True, transposed=False)
    _, gradients = toy_run(experts, backend, [[2, 0], [0, 2], [2, 0]])
    for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
        assert gradients[name][[1, 3]].abs().max() == 0
        assert gradients[name][[0, 2]].abs().amax(dim=tuple(range(1, gradients[name].dim()))).min() > 0


def test_one_expert(monkeypatch):
    """MegaBlocks returns a cumulative sum without dimension when there is one expert."""
    ops = torch_megablocks_ops()
    monkeypatch.setattr(ops, "inclusive_cumsum", lambda x, dim: torch.cumsum(x, dim).int().squeeze())
    monkeypatch.setattr(megablocks_experts, "megablocks_ops", lambda: ops)
    experts = toy_experts(gate=True, bias=False, transposed=False)
    for name, value in list(experts.named_parameters()):
        setattr(experts, name, torch.nn.Parameter(value[:1].detach().clone()))
    experts.num_experts = 1
    out, _ = toy_run(experts, "megablocks", [[0], [0]])
    expected, _ = toy_run(experts, "loop", [[0], [0]])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_gemm_is_called_as_it_wants(transposed, monkeypatch):
    """The package grouped_gemm wants contiguous operands, int64 row counts on the CPU, and a flag for [E, out, in]."""
    calls = []

    def gmm(x: Tensor, weight: Tensor, rows: Tensor, trans_b: bool) -> Tensor:
        assert x.is_contiguous() and weight.is_contiguous()
        assert rows.dtype == torch.int64 and rows.device.type == "cpu" and rows.tolist() == [0, 2, 1, 3]
        calls.append(trans_b)
        parts = zip(x.split(rows.tolist()), weight, strict=True)
        return torch.cat([part @ (w.T if trans_b else w) for part, w in parts])

    monkeypatch.setattr(megablocks_experts, "grouped_gemm_for", lambda x: gmm)
    experts = toy_experts(gate=True, bias=False, transposed=transposed)
    out, _ = toy_run(experts, "megablocks", [[3, 1], [2, 3], [1, 3]])
    expected, _ = toy_run(experts, "eager", [[3, 1], [2, 3], [1, 3]])
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    assert calls == [not transposed] * 2


def test_stand_in_for_the_compiled_part():
    compiled = megablocks_experts.compiled_ops_stand_in()
    ids = torch.tensor([3, 1, 3, 0, 1], dtype=torch.int32)
    values, order, sums = torch.empty_like(ids), torch.empty_like(ids), torch.empty(1, 5, dtype=torch.int32)
    compiled.sort(ids, 2, values, order)
    assert values.tolist() == [0, 1, 1, 3, 3] and order.tolist() == [3, 1, 4, 0, 2]
    counts = compiled.histogram(values, 5)
    assert counts.dtype == torch.int32 and counts.tolist() == [1, 2, 0, 2, 0]
    compiled.inclusive_cumsum(counts.view(1, -1), 1, sums)
    assert sums.tolist() == [[1, 3, 3, 5, 5]]
    assert not hasattr(compiled, "exclusive_cumsum")


def installed(monkeypatch: pytest.MonkeyPatch, *names: str, cuda: bool = False) -> None:
    """Of the optional packages, these are found and nothing else."""
    find = importlib.util.find_spec
    optional = ("triton", "megablocks", "stk", "megablocks_ops")
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: (x in names or None) if x in optional else find(x))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("names", "cuda", "sentence"),
    [
        (
            (),
            True,
            r"megablocks, stk, triton not installed; install it \(pip install .* stanford-stk==0\.7\.1 triton;",
        ),
        (
            ("triton", "stk"),
            True,
            r"megablocks not installed; install it \(pip install .* stanford-stk==0\.7\.1;",
        ),
        (("triton",), True, r"megablocks, stk not installed; .* or use model\.experts=grouped_mm$"),
        ((), False, "kernels need a CUDA device"),
        (("triton", "megablocks", "stk"), False, r"kernels need a CUDA device; use model\.experts=grouped_mm on a CPU"),
    ],
)
def test_megablocks_that_cannot_run_is_refused(names, cuda, sentence, monkeypatch):
    installed(monkeypatch, *names, cuda=cuda)
    assert not megablocks_experts.is_available()
    with pytest.raises(UserError, match=f"^model\\.experts=megablocks cannot run: .*{sentence}") as error:
        check_experts_backend("megablocks")
    assert "\n" not in str(error.value)


def test_megablocks_that_does_not_import_is_refused(monkeypatch):
    def broken() -> None:
        raise ImportError("megablocks_ops.so: undefined symbol: _ZN3c10\nlong story")

    installed(monkeypatch, "triton", "megablocks", "stk", cuda=True)
    monkeypatch.setattr(megablocks_experts, "megablocks_ops", broken)
    with pytest.raises(UserError, match=r"\(ImportError: megablocks_ops\.so: undefined symbol: _ZN3c10\); install"):
        check_experts_backend("megablocks")


def test_what_can_run_passes(monkeypatch):
    installed(monkeypatch, "triton", "megablocks", "stk", cuda=True)
    for name in (*BACKENDS, "batched_mm"):
        check_experts_backend(name, torch.bfloat16)
    for name in ("eager", "loop"):
        check_experts_backend(name, torch.float64)


def test_names_and_types_that_no_backend_has():
    with pytest.raises(UserError, match=r"^model\.experts=fast is unknown; use grouped_mm, eager, loop or megablocks$"):
        check_experts_backend("fast")
    for name in ("grouped_mm", "megablocks"):
        with pytest.raises(
            UserError, match=f"^model.experts={name} does not compute in float64; use model.experts=loop"
        ):
            check_experts_backend(name, torch.float64)


def test_megablocks_refuses_what_its_kernels_would_compute_wrongly():
    experts = toy_experts(gate=True, bias=False, transposed=False)
    tokens = torch.empty(2**27, 16, device="meta")
    choice = torch.empty(2**27, 1, device="meta", dtype=torch.int64)
    with pytest.raises(UserError, match="32 bits and 134217728 tokens x 1 experts x 16 are more; lower the tokens"):
        megablocks_experts.megablocks_experts(experts, tokens, choice, choice)
    experts._is_expert_parallel = True
    with pytest.raises(UserError, match="does not know expert parallelism"):
        megablocks_experts.megablocks_experts(experts, tokens[:4], choice[:4], choice[:4])
