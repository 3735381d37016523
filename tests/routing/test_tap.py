import copy

import pytest
import torch
from moe_families import EXPERTS, FAMILIES, TOP_K, family_model, routers, tiny_model, token_ids, watch_experts
from torch import Tensor, nn

from vespo_lightning.errors import UserError
from vespo_lightning.routing.tap import RouterTap


@pytest.mark.parametrize("family", FAMILIES)
def test_record_is_what_the_experts_are_given(family: str) -> None:
    model = family_model(family)
    given = watch_experts(model)
    tap = RouterTap.attach(model)
    assert tap is not None
    with tap.recording() as record, torch.no_grad():
        model(token_ids())

    _, _, layers, scoring = FAMILIES[family]
    assert (tap.layers, tap.scoring, tap.num_experts, tap.top_k) == (layers, scoring, EXPERTS, TOP_K)
    assert tap.num_decoder_layers == 3
    assert torch.equal(record.experts, torch.stack([experts for experts, _ in given], dim=1))
    assert record.experts.dtype == torch.int64
    assert record.logits.dtype == record.probs.dtype == torch.float32
    assert record.logits.shape == record.probs.shape == (10, len(layers), EXPERTS)
    torch.testing.assert_close(record.probs.sum(-1), torch.ones(10, len(layers)))
    # The expert weights are the chosen probabilities up to scaling in every family: wrong scores would show.
    weights = torch.stack([weights for _, weights in given], dim=1)
    shares = weights / weights.sum(-1, keepdim=True)
    chosen = record.probs.gather(-1, record.experts)
    torch.testing.assert_close(chosen / chosen.sum(-1, keepdim=True), shares, atol=1e-5, rtol=0)
    torch.testing.assert_close(record.top_probs, chosen)
    assert shares.max() > 0.55  # far enough from 1/2, or softmax and sigmoid would look alike


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_logits_are_those_that_the_model_reports(family: str) -> None:
    model = family_model(family)
    tap = RouterTap.attach(model)
    with tap.recording() as record, torch.no_grad():
        reported = model(token_ids(), output_router_logits=True).router_logits
    assert torch.equal(record.logits, torch.stack(reported, dim=1))


def test_logits_are_told_from_weights_where_every_expert_is_chosen() -> None:
    model = tiny_model("MixtralConfig", num_local_experts=TOP_K)
    tap = RouterTap.attach(model)
    with tap.recording() as record, torch.no_grad():
        reported = model(token_ids(), output_router_logits=True).router_logits
    assert torch.equal(record.logits, torch.stack(reported, dim=1))


def test_probabilities_returned_as_logits_are_turned_back() -> None:
    model = family_model("gemma4")
    tap = RouterTap.attach(model)
    with tap.recording() as record, torch.no_grad():
        hidden: list[Tensor] = []
        for router in routers(model):
            router.proj.register_forward_hook(lambda _, args, output: hidden.append(output))
        model(token_ids())
    expected = torch.stack(hidden, dim=1)
    torch.testing.assert_close(record.probs, expected.softmax(-1))
    torch.testing.assert_close(record.logits, expected.log_softmax(-1))


def test_rows_are_batch_times_sequence_row_major() -> None:
    model = family_model("qwen3_moe")
    tap = RouterTap.attach(model)
    ids = token_ids(batch=3, length=4)
    with tap.recording() as whole, torch.no_grad():
        model(ids)
    for row in range(3):
        with tap.recording() as alone, torch.no_grad():
            model(ids[row : row + 1])
        assert torch.equal(whole.experts[4 * row : 4 * row + 4], alone.experts)
        torch.testing.assert_close(whole.logits[4 * row : 4 * row + 4], alone.logits, atol=1e-5, rtol=0)


def test_selected_rows() -> None:
    model = family_model("mixtral")
    tap = RouterTap.attach(model)
    with tap.recording() as record, torch.no_grad():
        model(token_ids())
    rows = torch.tensor([7, 0, 3])
    assert torch.equal(record.select(rows).experts, record.experts[rows])
    assert torch.equal(record.select(rows).logits, record.logits[rows])
    assert torch.equal(record.select(rows).select(torch.tensor([2, 0])).probs, record.probs[[3, 7]])
    mask = torch.zeros(10, dtype=torch.bool)
    mask[[2, 9]] = True
    assert torch.equal(record.select(mask).experts, record.experts[[2, 9]])
    expected = record.probs.gather(-1, record.experts)[rows]
    torch.testing.assert_close(record.select(rows).top_probs, expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_recomputation_is_not_recorded_and_gradients_stay(family: str) -> None:
    ids = token_ids()
    model = family_model(family).train()
    model(ids).logits.logsumexp(-1).mean().backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()

    model.gradient_checkpointing_enable({"use_reentrant": False})
    given = watch_experts(model)
    tap = RouterTap.attach(model)
    with tap.recording() as record:  # around the backward pass too, where a second record would raise
        loss = model(ids).logits.logsumexp(-1).mean()
        before = record.experts
        loss.backward()
    assert len(given) == 2 * len(tap.layers)  # every router did run twice
    assert torch.equal(record.experts, before)
    assert not record.logits.requires_grad
    for name, value in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(value.grad, expected[name], rtol=1e-5, atol=1e-8)


def test_dense_model_has_no_tap() -> None:
    assert RouterTap.attach(tiny_model("LlamaConfig")) is None


@pytest.mark.parametrize(
    ("config_class", "settings", "router"),
    [
        ("PhimoeConfig", {"num_local_experts": EXPERTS}, "PhimoeTopKRouter"),
        ("JambaConfig", {"num_experts": EXPERTS, "use_mamba_kernels": False}, "Linear"),
    ],
)
def test_router_without_top_k_is_refused_by_name(config_class: str, settings: dict, router: str) -> None:
    model = tiny_model(config_class, **settings)
    with pytest.raises(UserError, match=rf"model\.path.*{router} of decoder layer \d.*top-k"):
        RouterTap.attach(model)


def test_layers_of_different_size_are_refused() -> None:
    model = tiny_model("HunYuanMoEV1Config", num_experts=EXPERTS, num_experts_per_tok=[2, 2, 1], head_dim=8)
    with pytest.raises(UserError, match="HunYuanMoEV1Gate of decoder layer 2 has another number"):
        RouterTap.attach(model)


def hooks(model: nn.Module) -> int:
    return sum(len(router._forward_hooks) + len(router._forward_pre_hooks) for router in routers(model))


def test_detach_removes_the_hooks() -> None:
    model = family_model("mixtral")
    assert hooks(model) == 0
    tap = RouterTap.attach(model)
    assert hooks(model) == 6
    tap.detach()
    tap.detach()
    assert hooks(model) == 0


def test_nothing_is_recorded_outside_a_recording() -> None:
    model = family_model("mixtral")
    tap = RouterTap.attach(model)
    with tap.recording() as record:
        pass
    with torch.no_grad():
        model(token_ids())
    with pytest.raises(RuntimeError, match=r"\[0, 1, 2\] did not run"):
        _ = record.experts


def test_one_forward_pass_per_recording() -> None:
    model = family_model("mixtral")
    tap = RouterTap.attach(model)
    with torch.no_grad(), tap.recording(), pytest.raises(RuntimeError, match="layer 0 ran twice"):
        model(token_ids())
        model(token_ids())
    with tap.recording(), pytest.raises(RuntimeError, match="recording already"), tap.recording():
        pass


def test_a_copy_of_the_model_does_not_report_to_the_tap() -> None:
    model = family_model("mixtral")
    tap = RouterTap.attach(model)
    other = copy.deepcopy(model)
    with torch.no_grad(), tap.recording() as record:
        other(token_ids(seed=2))
        model(token_ids())
    with torch.no_grad(), tap.recording() as expected:
        model(token_ids())
    assert torch.equal(record.logits, expected.logits)


def test_bfloat16_routers_give_float32() -> None:
    model = family_model("qwen3_moe").to(torch.bfloat16)
    given = watch_experts(model)
    tap = RouterTap.attach(model)
    with tap.recording() as record, torch.no_grad():
        model(token_ids())
    assert record.logits.dtype == torch.float32
    chosen = record.top_probs / record.top_probs.sum(-1, keepdim=True)
    weights = torch.stack([weights for _, weights in given], dim=1).float()
    torch.testing.assert_close(chosen, weights / weights.sum(-1, keepdim=True), atol=4e-3, rtol=0)
