"""Replayed routing: bitwise the native pass for its own experts, other experts where told, gradients to the router."""

import copy
import pickle
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from moe_families import (
    EXPERTS,
    FAMILIES,
    TOP_K,
    family_model,
    other_experts,
    router_gradients,
    routers,
    token_ids,
    watch_experts,
)
from torch import Tensor, nn

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.routing.replay import replay_rows
from vespo_lightning.routing.tap import RouterTap
from vespo_lightning.training.micro_batches import collate

CHECKPOINTED = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "qwen3_next"]
#: Sigmoid routers of these tiny models that do not normalise over the chosen experts, or only after a top-k of logits.
NO_GATE_REPLAY = {"dots1", "cohere2_moe"}


def attached(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, RouterTap]:
    model = family_model(family).to(dtype).train()
    tap = RouterTap.attach(model)
    assert tap is not None
    return model, tap


def loss_of(logits: Tensor) -> Tensor:
    return logits.float().square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those of the last backward pass, which are cleared."""
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_a_pass_to_itself_changes_no_bit(family: str, dtype: torch.dtype) -> None:
    model, tap = attached(family, dtype)
    with tap.recording() as record:
        native = model(token_ids()).logits
    loss_of(native).backward()
    expected = gradients(model)

    with tap.replaying(record.experts), tap.recording() as replayed:
        logits = model(token_ids()).logits
        loss_of(logits).backward()
    assert torch.equal(logits, native)
    assert torch.equal(replayed.experts, record.experts)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_other_experts_are_used_with_live_gate_weights(family: str) -> None:
    model, tap = attached(family)
    with torch.no_grad(), tap.recording() as record:
        native = model(token_ids()).logits
    experts = other_experts(record.experts)
    given = watch_experts(model)
    with tap.replaying(experts), tap.recording() as replayed:
        logits = model(token_ids()).logits
        loss_of(logits).backward()
    assert (logits - native).abs().max() > 0.05
    assert torch.equal(replayed.experts, experts)
    assert torch.equal(torch.stack([used for used, _ in given], dim=1), experts)
    # Weights are the live scores of these experts, up to scaling, in every family.
    weights = torch.stack([weights for _, weights in given], dim=1)
    live = replayed.probs.gather(-1, experts)
    torch.testing.assert_close(
        weights / weights.sum(-1, keepdim=True), live / live.sum(-1, keepdim=True), atol=1e-5, rtol=0
    )
    for name, gradient in router_gradients(model).items():
        assert gradient.abs().max() > 1e-6, name


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "ernie4_5_moe", "gpt_oss"])
def test_rows_without_experts_route_natively(family: str) -> None:
    model, tap = attached(family)
    with torch.no_grad(), tap.recording() as record:
        native = model(token_ids()).logits
    experts = other_experts(record.experts).to(torch.int16)
    experts[:5] = -1  # the whole first sequence
    experts[7, -1, 1] = -1  # an incomplete row is no row
    with torch.no_grad(), tap.replaying(experts), tap.recording() as replayed:
        logits = model(token_ids()).logits
    torch.testing.assert_close(logits[0], native[0])
    assert torch.equal(replayed.experts[:5], record.experts[:5])
    assert (replayed.experts[7, -1] >= 0).all()
    rest = torch.tensor([5, 6, 8, 9])
    assert torch.equal(replayed.experts[rest], experts[rest].long())


@pytest.mark.parametrize("family", CHECKPOINTED)
def test_recomputation_replays_too(family: str) -> None:
    model, tap = attached(family)
    with torch.no_grad(), tap.recording() as record:
        model(token_ids())
    experts = other_experts(record.experts)
    with tap.replaying(experts):
        loss_of(model(token_ids()).logits).backward()
    expected = gradients(model)

    model.gradient_checkpointing_enable({"use_reentrant": False})
    given = watch_experts(model)
    with tap.replaying(experts), tap.recording() as replayed:
        loss_of(model(token_ids()).logits).backward()
    assert len(given) == 2 * len(tap.layers)  # every router did run twice
    for place, (used, _) in enumerate(given[len(tap.layers) :]):
        assert torch.equal(used, experts[:, -1 - place])
    assert torch.equal(replayed.experts, experts)
    found = gradients(model)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_backward_may_run_in_another_thread() -> None:
    model, tap = attached("qwen3_moe")
    experts = torch.randint(EXPERTS, (10, 2, 1)) + torch.tensor([0, 3])
    experts %= EXPERTS
    with tap.replaying(experts):
        loss_of(model(token_ids()).logits).backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with tap.replaying(experts):
        loss = loss_of(model(token_ids()).logits)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    found = gradients(model)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_losses_of_captured_logits_reach_the_router_under_checkpointing() -> None:
    model, tap = attached("deepseek_v3")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    captured: list[Tensor] = []
    for router in routers(model):
        router.register_forward_hook(lambda _, args, output: captured.append(output[0]))
    with tap.replaying(torch.tensor([[[1, 2], [3, 4]]]).expand(10, -1, -1)):
        model(token_ids())
        torch.stack(captured[:2]).logsumexp(-1).square().mean().backward()
    assert all(gradient.abs().max() > 1e-4 for gradient in router_gradients(model).values())


def test_backward_after_the_block_is_an_error_under_checkpointing() -> None:
    model, tap = attached("mixtral")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with tap.replaying(torch.tensor([1, 2]).expand(10, 3, 2)):
        loss = loss_of(model(token_ids()).logits)
    with pytest.raises(RuntimeError, match="backward inside the same replaying"):
        loss.backward()
    # A native pass keeps its backward pass, whatever is replayed without gradients meanwhile.
    loss = loss_of(model(token_ids()).logits)
    with torch.no_grad(), tap.replaying(torch.tensor([1, 2]).expand(10, 3, 2)):
        model(token_ids())
    loss.backward()


def test_reentrant_checkpointing_is_refused() -> None:
    model, tap = attached("mixtral")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with (
        pytest.raises(UserError, match=r"model\.gradient_checkpointing=true .*use_reentrant"),
        tap.replaying(torch.zeros(10, 3, 2, dtype=torch.int64)),
    ):
        pass
    model.gradient_checkpointing_disable()
    with torch.no_grad(), tap.replaying(torch.tensor([1, 2]).expand(10, 3, 2)):
        model(token_ids())


@pytest.mark.long
@pytest.mark.parametrize("in_place", [True, False], ids=["model.compile", "torch.compile"])
def test_compiled_models_replay_and_record(in_place: bool) -> None:
    model, tap = attached("mixtral")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    experts = torch.tensor([1, 2]).expand(10, 3, 2)
    with tap.recording() as record:
        loss_of(model(token_ids()).logits).backward()
    native = gradients(model)
    with tap.replaying(experts):
        loss_of(model(token_ids()).logits).backward()
    expected = gradients(model)

    torch.compiler.reset()
    if in_place:
        model.compile(backend="eager")
    compiled = model if in_place else torch.compile(model, backend="eager")
    for routed, wanted in ((False, native), (True, expected), (False, native)):
        with tap.replaying(experts) if routed else nullcontext(), tap.recording() as found_record:
            loss_of(compiled(token_ids()).logits).backward()
        assert torch.equal(found_record.experts, experts if routed else record.experts)
        found = gradients(model)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-8)


def test_micro_batches_add_up_to_the_whole() -> None:
    model, tap = attached("qwen3_moe")
    ids = token_ids(batch=4)
    with torch.no_grad(), tap.recording() as record:
        model(ids)
    experts = other_experts(record.experts)
    with tap.replaying(experts):
        whole = model(ids).logits
        loss_of(whole).backward()
    expected = gradients(model)
    for part in (slice(0, 3), slice(3, 4)):
        rows = slice(5 * part.start, 5 * part.stop)
        with tap.replaying(experts[rows]):
            logits = model(ids[part]).logits
            (loss_of(logits) * len(ids[part]) / 4).backward()
        torch.testing.assert_close(logits, whole[part], atol=1e-5, rtol=0)
    found = gradients(model)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)


def test_autocast() -> None:
    model, tap = attached("qwen3_moe")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with tap.recording() as record:
            native = model(token_ids()).logits
        with tap.replaying(record.experts):
            assert torch.equal(model(token_ids()).logits, native)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NO_GATE_REPLAY))
def test_recorded_gate_weights_are_used(family: str) -> None:
    model, tap = attached(family)
    given = watch_experts(model)
    with torch.no_grad(), tap.recording() as record:
        model(token_ids())
    experts, probs = record.experts, record.top_probs
    wanted = torch.stack([weights for _, weights in given], dim=1)
    given.clear()
    with torch.no_grad():
        for router in routers(model):
            for value in router.parameters():
                if value.dim() == 2:
                    value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(5))
    probs[3] = 0.0
    experts[3] = -1
    with tap.replaying(experts, probs):
        loss_of(model(token_ids()).logits).backward()
    found = torch.stack([weights for _, weights in given], dim=1)
    known = experts[:, 0, 0] >= 0
    torch.testing.assert_close(found[known], wanted[known], atol=1e-5, rtol=1e-5)
    assert (found[3] - wanted[3]).abs().max() > 1e-3  # an unknown row follows the router as it is now
    for name, gradient in router_gradients(model).items():
        assert gradient.abs().max() > 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3", "lfm2_moe", "gpt_oss"])
def test_recorded_gate_weights_of_the_same_model_leave_gradients_as_they_are(family: str, dtype: torch.dtype) -> None:
    model, tap = attached(family, dtype)
    with tap.recording() as record:
        loss_of(model(token_ids()).logits).backward()
    expected = gradients(model)
    with tap.replaying(record.experts, record.top_probs):
        loss_of(model(token_ids()).logits).backward()
    found = gradients(model)
    for name, value in expected.items():
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * value.abs().max().item() + 1e-9)


@pytest.mark.parametrize("family", sorted(NO_GATE_REPLAY))
def test_gate_weights_that_probabilities_do_not_determine_are_refused(family: str) -> None:
    model, tap = attached(family)
    with torch.no_grad(), tap.recording() as record:
        model(token_ids())
    with (
        pytest.raises(
            UserError, match=rf"{type(routers(model)[0]).__name__} of decoder layer \d .*replay experts only"
        ),
        tap.replaying(record.experts, record.top_probs),
    ):
        model(token_ids())


def test_deepseek_v2_gives_no_weight_to_experts_of_other_groups() -> None:
    model, tap = attached("deepseek_v2_grouped")
    given = watch_experts(model)
    with torch.no_grad(), tap.recording() as record:
        model(token_ids())
    other_group = (record.experts + EXPERTS // 2) % EXPERTS  # two groups, of which one is live
    given.clear()
    with torch.no_grad(), tap.replaying(other_group):
        model(token_ids())
    assert given[0][1].abs().max() == 0  # the known difference that routing.validation describes
    given.clear()
    with torch.no_grad(), tap.replaying(other_group, record.top_probs):
        model(token_ids())
    torch.testing.assert_close(given[0][1], record.top_probs[:, 0])


def test_a_router_that_does_not_choose_by_one_top_k_is_refused_by_name() -> None:
    model, tap = attached("mixtral")
    router = routers(model)[1]

    def by_sorting(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, router.hidden_dim) @ router.weight.T
        weights, experts = logits.softmax(-1).sort(descending=True)
        return logits, weights[:, :TOP_K], experts[:, :TOP_K]

    router.forward = by_sorting
    with (
        pytest.raises(UserError, match="MixtralTopKRouter of decoder layer 1 made 0 expert choices"),
        tap.replaying(torch.tensor([1, 2]).expand(10, 3, 2)),
    ):
        model(token_ids())


def test_a_copy_of_the_model_is_not_replayed() -> None:
    model, tap = attached("mixtral")
    other = copy.deepcopy(model)
    with torch.no_grad():
        native = other(token_ids()).logits
        with tap.replaying(torch.tensor([1, 2]).expand(10, 3, 2)):
            assert torch.equal(other(token_ids()).logits, native)
            assert (model(token_ids()).logits - native).abs().max() > 0.05
        assert torch.equal(model(token_ids()).logits, native)  # and nothing stays behind


def test_a_model_with_a_tap_can_be_pickled() -> None:
    model, _ = attached("mixtral")
    other = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(other(token_ids()).logits, model(token_ids()).logits)


def test_what_does_not_fit_is_an_error_and_leaves_nothing_behind() -> None:
    model, tap = attached("mixtral")
    experts = torch.tensor([1, 2]).expand(10, 3, 2)
    with torch.no_grad():
        native = model(token_ids()).logits
        with (
            pytest.raises(RuntimeError, match="the replay has 9 rows, the forward pass 10"),
            tap.replaying(experts[1:]),
        ):
            model(token_ids())
        with pytest.raises(RuntimeError, match="layer 0 ran twice in one replay"), tap.replaying(experts):
            model(token_ids())
            model(token_ids())
        not_run = pytest.raises(RuntimeError, match=r"decoder layers \[0, 1, 2\] did not run in this replay")
        with not_run, tap.replaying(experts):
            pass
        with pytest.raises(RuntimeError, match="replaying already"), tap.replaying(experts), tap.replaying(experts):
            pass
        assert torch.equal(model(token_ids()).logits, native)
    for wrong in (experts[:, :2], experts[..., :1], experts[0], experts.float()):
        with pytest.raises(ValueError, match=r"\(L, K\) = \(3, 2\)"), tap.replaying(wrong):
            pass
    with pytest.raises(ValueError, match="gate_probs are"), tap.replaying(experts, torch.ones(10, 3, 1)):
        pass


def make_sample(prompt: int, response: int, routed: bool = True) -> Sample:
    rng = np.random.default_rng(prompt)
    rows = prompt + response - 1
    return Sample(
        prompt_id="p",
        group_id="0/0",
        index=0,
        seed=0,
        prompt_ids=rng.integers(3, 60, prompt).astype(np.int32),
        response_ids=rng.integers(3, 60, response).astype(np.int32),
        behaviour_log_probs=np.zeros(response, np.float32),
        version_runs=[(0, response)],
        loss_mask=np.ones(response, bool),
        finish_reason="stop",
        text="",
        reward=0.0,
        routed_experts=rng.integers(0, EXPERTS, (rows, 3, TOP_K)).astype(np.int16) if routed else None,
        router_top_probs=rng.random((rows, 3, TOP_K)).astype(np.float16) if routed else None,
    )


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_recorded_rows_meet_their_tokens(layout: str) -> None:
    samples = [make_sample(3, 4), make_sample(2, 2, routed=False), make_sample(4, 1)]
    inputs = collate(samples, layout)
    first_predicting = np.cumsum([0] + [len(s.response_ids) for s in samples[:-1]])
    starts = [int(inputs.positions[t]) - len(s.prompt_ids) + 1 for t, s in zip(first_predicting, samples, strict=True)]
    assert starts == ([0, 7, 14] if layout == "padded" else [0, 7, 11])
    total = inputs.input_ids.numel()
    rows = replay_rows([s.routed_experts for s in samples], starts, total, [0, 2])
    assert rows.dtype == torch.int16
    assert rows.shape == (total, 2, TOP_K)
    expected = np.full((total, 2, TOP_K), -1)
    for sample, start in ((samples[0], starts[0]), (samples[2], starts[2])):
        expected[start : start + len(sample.routed_experts)] = sample.routed_experts[:, [0, 2]]
        tokens = np.concatenate([sample.prompt_ids, sample.response_ids])
        assert inputs.input_ids.flatten()[start : start + len(tokens)].tolist() == tokens.tolist()
    assert rows.tolist() == expected.tolist()
    assert (rows[6] == -1).all()  # the last token of the first sample leads nowhere
    probs = replay_rows([s.router_top_probs for s in samples], starts, total, [0, 2])
    assert probs.dtype == torch.float32
    assert probs[1].tolist() == samples[0].router_top_probs[1, [0, 2]].astype(np.float32).tolist()
    assert probs[6].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_nothing_recorded_gives_no_rows() -> None:
    assert replay_rows([None, None], [0, 4], 8, [0, 2]) is None
