"""Routers in float32 inside models of lower precision, and routers that are not trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pieces import fit, make_mini_batch, make_samples, tiny_policy, tokenizer
from routing.moe_families import FAMILIES, family_model, other_experts, router_gradients, routers, token_ids
from torch import Tensor, nn

from vespo_lightning.errors import UserError
from vespo_lightning.models.experts import check_experts_backend
from vespo_lightning.models.export import export_hf
from vespo_lightning.models.loading import load_model
from vespo_lightning.models.routers import compute_routers_in_float32, freeze_routers, routers_loaded_in_float32
from vespo_lightning.objectives.vespo import Vespo
from vespo_lightning.rollouts.weight_check import fingerprint
from vespo_lightning.routing.tap import RouterTap
from vespo_lightning.training.module import PolicyModule
from vespo_lightning.training.optimizers import build_adamw
from vespo_lightning.weights import InPlaceLoader, checkpoint_tensors

LINEAR = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss"]
#: Families that compute their logits in the stream's precision if nobody asks for more.
ROUNDING = ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "granitemoe", "qwen2_moe", "lfm2_moe", "gemma4", "afmoe"]


def saved(model: nn.Module, folder: Path) -> str:
    return str(export_hf(model, tokenizer(), folder / "model"))


@pytest.fixture
def half(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Module:
    """A family in bfloat16 with routers in float32, as a run with precision=bf16-true loads it."""
    return load_model(saved(family_model(request.param), tmp_path), "bfloat16", router_dtype="float32").eval()


def watch_routers(model: nn.Module) -> list[tuple[tuple[Any, ...], Any]]:
    """(arguments before anybody's hooks, output) of each router, in layer order."""
    seen: list[tuple[tuple[Any, ...], Any]] = []
    given: dict[nn.Module, tuple[Any, ...]] = {}
    for router in routers(model):
        router.register_forward_pre_hook(lambda module, args: given.__setitem__(module, args), prepend=True)
        router.register_forward_hook(lambda module, args, output: seen.append((given[module], output)))
    return seen


def raised(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("half", FAMILIES, indirect=True)
@torch.no_grad()
def test_routers_compute_what_the_family_computes_in_float32(half):
    seen = watch_routers(half)
    hidden = half.base_model(token_ids()).last_hidden_state
    assert hidden.dtype == torch.bfloat16 and hidden.isfinite().all()
    assert len(seen) == len(routers(half))
    for router, (args, output) in zip(routers(half), seen, strict=True):
        assert args[0].dtype == torch.bfloat16
        wanted = router.forward(*map(raised, args))  # past the hooks
        for value, expected in zip(output, wanted, strict=True):
            assert value.dtype == expected.dtype and torch.equal(value, expected)


@pytest.mark.parametrize("half", LINEAR, indirect=True)
@torch.no_grad()
def test_logits_are_a_float32_product(half):
    seen = watch_routers(half)
    half(token_ids())
    for router, (args, output) in zip(routers(half), seen, strict=True):
        hidden = args[0].reshape(-1, args[0].shape[-1])
        assert router.weight.dtype == torch.float32
        assert torch.equal(output[0], F.linear(hidden.float(), router.weight, getattr(router, "bias", None)))


@pytest.mark.parametrize("experts", ["grouped_mm", "eager", "loop"])
@pytest.mark.parametrize("half", LINEAR, indirect=True)
def test_experts_take_float32_gate_weights_and_return_the_stream(half, experts):
    check_experts_backend(experts, torch.bfloat16)
    half.set_experts_implementation(experts)
    seen: list[tuple[torch.dtype, ...]] = []
    for name, module in half.named_modules():
        if name.endswith(".experts"):
            module.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, args[2].dtype, out.dtype)))
    half(token_ids()).logits.float().logsumexp(-1).sum().backward()
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.bfloat16)}
    assert all(g.abs().max() > 0 for g in router_gradients(half).values())


@pytest.mark.parametrize("family", ROUNDING)
@torch.no_grad()
def test_without_it_logits_are_rounded(family, tmp_path):
    folder = saved(family_model(family), tmp_path)
    records = []
    for router_dtype in (None, "float32"):
        model = load_model(folder, "bfloat16", router_dtype=router_dtype).eval()
        with RouterTap.attach(model).recording() as record:
            model(token_ids())
        records.append(record.logits[:, 0])
    rounded, exact = records
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_autocast_stays_outside_of_routers(family):
    model = family_model(family)
    compute_routers_in_float32(model)
    seen = watch_routers(model)
    after: list[bool] = []
    for router in routers(model):
        router.register_forward_hook(lambda *_: after.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        model(token_ids())
    for router, (args, output) in zip(routers(model), seen, strict=True):
        for value, expected in zip(output, router.forward(*map(raised, args)), strict=True):
            assert torch.equal(value, expected)
    assert all(after) and len(after) == len(seen) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", LINEAR)
@torch.no_grad()
def test_precise_models_do_not_change(family, dtype):
    model = family_model(family).to(dtype)
    model.set_experts_implementation("eager")
    before = model(token_ids()).logits
    compute_routers_in_float32(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model(token_ids()).logits, before)


def run(model: nn.Module, tap: RouterTap, *, autocast: bool, checkpointing: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and router gradients of a replayed pass."""
    with tap.recording() as record, torch.no_grad():
        model(token_ids())
    experts = other_experts(record.experts)
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    with tap.replaying(experts):
        with tap.recording() as record, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(token_ids(), use_cache=False).logits.float()
        assert torch.equal(record.experts, experts)
        torch.log_softmax(logits, -1)[..., 3].sum().backward()
    return logits.detach(), router_gradients(model)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", LINEAR)
def test_replay_and_checkpointing_in_either_order_of_hooks(family, autocast, tmp_path):
    model = load_model(saved(family_model(family), tmp_path), "float32" if autocast else "bfloat16").eval()
    tap_first, hook_first, checkpointed = (copy.deepcopy(model) for _ in range(3))
    tap = RouterTap.attach(tap_first)
    for other in (tap_first, hook_first, checkpointed):
        compute_routers_in_float32(other)
    logits, gradients = run(tap_first, tap, autocast=autocast, checkpointing=False)
    assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in gradients.values()) and gradients
    for other, checkpointing in ((hook_first, False), (checkpointed, True)):
        again, same = run(other, RouterTap.attach(other), autocast=autocast, checkpointing=checkpointing)
        assert torch.equal(again, logits)
        for name, gradient in gradients.items():
            assert torch.equal(same[name], gradient), name


def test_an_error_in_a_router_leaves_autocast_as_it_was():
    model = family_model("qwen3_moe")
    tap = RouterTap.attach(model)
    compute_routers_in_float32(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with pytest.raises(RuntimeError, match="the replay has 3 rows"), tap.replaying(torch.zeros(3, 2, 2).long()):
            model(token_ids())
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        before = model(token_ids()).logits
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(model(token_ids()).logits, before)


def test_parameters_that_were_rounded_later_are_refused():
    model = family_model("qwen3_moe")
    compute_routers_in_float32(model)
    with pytest.raises(UserError, match=r"^model\.router_dtype=float32: .* Qwen3MoeTopKRouter to bfloat16 .*=null$"):
        model.bfloat16()(token_ids())


@pytest.mark.parametrize("half", [*LINEAR, "ernie4_5_moe", "gemma4"], indirect=True)
def test_routers_are_loaded_unrounded_and_saved_so(half, request, tmp_path):
    wanted = family_model(request.node.callspec.params["half"]).state_dict()
    own = {id(p) for router in routers(half) for p in router.parameters()}
    exact = {name for name, parameter in half.named_parameters() if id(parameter) in own}
    assert exact
    for name, parameter in half.named_parameters():
        if name in exact:
            assert torch.equal(parameter, wanted[name]), name
        elif "bias" not in name:
            assert parameter.dtype == torch.bfloat16, name
    folder = saved(half, tmp_path / "again")
    again = load_model(folder, "bfloat16", router_dtype="float32")
    for name, tensor in half.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and again.state_dict()[name].dtype == tensor.dtype
    plain = load_model(folder, "float32")
    assert all(torch.equal(plain.state_dict()[name], wanted[name]) for name in exact)


def test_loading_leaves_nothing_behind(tmp_path):
    folder = saved(family_model("qwen3_moe"), tmp_path)
    load_model(folder, "bfloat16", router_dtype="float32")
    assert {p.dtype for p in load_model(folder, "bfloat16").parameters()} == {torch.bfloat16}
    with pytest.raises(ZeroDivisionError), routers_loaded_in_float32(folder):
        raise ZeroDivisionError
    assert {p.dtype for p in load_model(folder, "bfloat16").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("half", LINEAR, indirect=True)
def test_engines_take_the_weights_in_their_own_precision(half, tmp_path):
    """What arrives is the rounding of what was sent, and the checksum says so."""
    engine = load_model(saved(half, tmp_path), "bfloat16")
    with torch.no_grad():
        for router in routers(half):
            router.weight.mul_(1.37)
    InPlaceLoader(engine).load(checkpoint_tensors(half))
    for sent, got in zip(routers(half), routers(engine), strict=True):
        assert torch.equal(got.weight, sent.weight.bfloat16()) and not torch.equal(got.weight.float(), sent.weight)
    sent, got = (fingerprint((t for _, t in checkpoint_tensors(m)), torch.bfloat16) for m in (half, engine))
    assert sent == got


@pytest.mark.parametrize("half", ["qwen3_moe", "deepseek_v3"], indirect=True)
def test_mixed_precisions_train(half):
    """Masters, clipping and steps with bfloat16 and float32 parameters side by side."""
    optimizer = build_adamw(half, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in half.named_parameters()}
    half(token_ids()).logits.float().logsumexp(-1).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(half.parameters(), 1.0)
    assert norm.isfinite() and norm > 0
    optimizer.step()
    for router in routers(half):
        assert router.weight.dtype == torch.float32 and router.weight.grad.dtype == torch.float32
    moved = {name for name, p in half.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if "gate.weight" in name} <= moved


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_routers_are_all_that_is_frozen(family):
    model, free = family_model(family), family_model(family)
    freeze_routers(model)
    own = {id(p) for router in routers(model) for p in router.parameters()}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    already = {name for name, p in free.named_parameters() if not p.requires_grad}
    assert frozen == already | {name for name, p in model.named_parameters() if id(p) in own}
    assert len(own) > 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_frozen_routers_do_not_move(precision):
    model = tiny_policy()
    batches = [make_mini_batch(make_samples(model), update=update) for update in range(2)]
    freeze_routers(model)
    if precision == "bf16-true":
        model = model.bfloat16()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    module = PolicyModule(model, Vespo(), lr=1e-2, weight_decay=0.1)  # enough to move a bfloat16 norm
    fit(module, batches, precision=precision)
    assert module.policy_version == 2
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if name.endswith("mlp.gate.weight")} == before.keys() - moved
