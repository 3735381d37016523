"""What the tests of expert backends share: the same numbers from two backends, and MegaBlocks' operations in torch."""

from types import SimpleNamespace

import torch
from routing.moe_families import VOCAB, family_model
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from vespo_lightning.models.megablocks_experts import compiled_ops_stand_in

#: with and without shared experts, grouped choice, sigmoid scores, linear attention, transposed and biased experts
FAMILIES = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "glm4_moe", "qwen3_next"]


def log_probs_and_gradients(model: nn.Module, backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of all next tokens ``[B, L, V]`` and the gradient of a loss that weighs the tokens unevenly."""
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(2)).to(model.device)
    model.set_experts_implementation(backend)
    assert model.config._experts_implementation == backend
    model.zero_grad()
    logits = model(ids).logits
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    taken = log_probs[:, :-1].gather(-1, ids[:, 1:, None])
    (taken * torch.linspace(-1, 1, taken.numel(), device=ids.device).view_as(taken)).sum().backward()
    return log_probs.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def differences(model: nn.Module, backend: str) -> tuple[float, float]:
    """Against eager: largest difference of log-probs, largest relative error of a parameter's gradient."""
    expected, expected_gradients = log_probs_and_gradients(model, "eager")
    actual, gradients = log_probs_and_gradients(model, backend)
    assert gradients.keys() == expected_gradients.keys()
    errors = [float((gradients[name] - g).norm() / g.norm()) for name, g in expected_gradients.items() if g.any()]
    return float((actual - expected).abs().max()), max(errors)


def bfloat16_errors(family: str, backends: list[str], device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Per backend, errors in bfloat16 against eager in float32: rms of log-probs, relative error of all gradients.

    Every run takes the choices and gate weights of the float32 run: in these models a rounding that changes a choice
    changes log-probs by 0.5, and would hide what a backend's own arithmetic does.
    """
    model = family_model(family).to(device, torch.bfloat16).float()
    given: dict[str, tuple[Tensor, Tensor]] = {}

    def pin(at: str, hidden_states: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        first_index, first_weights = given.setdefault(at, (index, weights.detach()))
        return hidden_states, first_index, first_weights.to(weights.dtype)

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda _, args, at=name: pin(at, *args))
    expected, expected_gradients = log_probs_and_gradients(model, "eager")
    model = model.bfloat16()
    errors = {}
    for backend in backends:
        actual, gradients = log_probs_and_gradients(model, backend)
        pairs = [(gradients[name].float(), expected_gradients[name]) for name in gradients]
        squares = torch.tensor([[float((a - e).square().sum()), float(e.square().sum())] for a, e in pairs]).sum(0)
        errors[backend] = float((actual - expected).square().mean().sqrt()), float((squares[0] / squares[1]).sqrt())
    return errors


class _Experts(nn.Module):
    """Four experts of one of the eight layouts that transformers describes, inputs 16, inner size 8."""

    def __init__(self, config: SimpleNamespace, gate: bool, bias: bool, transposed: bool) -> None:
        super().__init__()
        self.num_experts = 4
        self.act_fn = nn.functional.silu
        inner, name = (16, "gate_up_proj") if gate else (8, "up_proj")
        for projection, size_in, size_out in ((name, 16, inner), ("down_proj", 8, 16)):
            shape = (4, size_in, size_out) if transposed else (4, size_out, size_in)
            self.register_parameter(projection, nn.Parameter(0.3 * torch.randn(shape)))
            if bias:
                self.register_parameter(f"{projection}_bias", nn.Parameter(torch.randn(4, size_out)))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Every expert on every token, in einsums that know nothing of sorting."""
        name = "gate_up_proj" if self.has_gate else "up_proj"
        x = self._all(name, hidden_states[:, None].expand(-1, 4, -1))
        x = self._all("down_proj", self._apply_gate(x) if self.has_gate else self.act_fn(x))
        gates = torch.zeros(len(x), 4, dtype=x.dtype, device=x.device).scatter_add(1, top_k_index, top_k_weights.to(x))
        return (x * gates[..., None]).sum(1)

    def _all(self, name: str, x: Tensor) -> Tensor:
        weight = getattr(self, name)
        x = torch.einsum("tei,eio->teo" if self.is_transposed else "tei,eoi->teo", x, weight)
        return x + getattr(self, f"{name}_bias") if self.has_bias else x


def toy_experts(gate: bool, bias: bool, transposed: bool) -> nn.Module:
    """Experts that run ``module.config._experts_implementation``, here ``eager``."""
    layout = {"has_gate": gate, "has_bias": bias, "is_transposed": transposed}
    kind = use_experts_implementation(type("ToyExperts", (_Experts,), {}), **layout)
    return kind(SimpleNamespace(_experts_implementation="eager"), gate, bias, transposed)


def toy_run(
    experts: nn.Module, backend: str, index: list[list[int]], device: str = "cpu"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients of inputs, gate weights and parameters; the same inputs for every backend."""
    draw = torch.Generator().manual_seed(3)
    choice = torch.tensor(index, device=device)
    x = torch.randn(len(index), 16, generator=draw).to(device).requires_grad_()
    weights = torch.rand(choice.shape, generator=draw).to(device).requires_grad_()
    experts.to(device).zero_grad()
    experts.config._experts_implementation = backend
    out = experts(x, choice, weights)
    (out * torch.randn(out.shape, generator=draw).to(device)).sum().backward()
    return out.detach(), {
        "x": x.grad,
        "weights": weights.grad,
        **{n: p.grad.clone() for n, p in experts.named_parameters()},
    }


def torch_megablocks_ops() -> SimpleNamespace:
    """The five functions of ``megablocks.ops`` that the backend calls, their kernels replaced by indexing."""
    compiled = compiled_ops_stand_in()

    def sort(x: Tensor, end_bit: int) -> tuple[Tensor, Tensor]:
        values, order = torch.empty_like(x), torch.empty_like(x)
        compiled.sort(x, end_bit, values, order)
        return values, order

    def inclusive_cumsum(x: Tensor, dim: int) -> Tensor:
        out = torch.empty_like(x)
        compiled.inclusive_cumsum(x, dim, out)
        return out

    def gather(x: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
        return x[indices // top_k]

    def scatter(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor, bins: Tensor, top_k: int) -> Tensor:
        weighted = (x.float() * weights[indices, None].float()).to(x.dtype)
        return torch.empty_like(x).index_copy(0, indices.long(), weighted).view(-1, top_k, x.shape[1]).sum(1)

    return SimpleNamespace(
        sort=sort, histogram=compiled.histogram, inclusive_cumsum=inclusive_cumsum, gather=gather, scatter=scatter
    )
