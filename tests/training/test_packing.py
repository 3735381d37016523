"""Packed rows only where a model keeps their sequences apart."""

from __future__ import annotations

import warnings

import pytest
import torch
from pieces import fit, make_mini_batch, make_samples, tiny_policy
from routing.moe_families import family_model

from vespo_lightning.objectives.vespo import Vespo
from vespo_lightning.training.module import PolicyModule
from vespo_lightning.training.packing import packed_rows_are_separate
from vespo_lightning.training.policy import Policy

LEAKS = "batching.layout=packed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "separate"),
    [("qwen3_moe", True), ("deepseek_v3", True), ("gpt_oss", False), ("qwen3_next", False), ("lfm2_moe", False)],
)
def test_leaks_are_found(family, separate, dtype):
    assert packed_rows_are_separate(Policy(family_model(family).to(dtype))) is separate


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("autocast", [True, False])
def test_rounding_is_no_leak(seed, autocast):
    """In bfloat16 a tie between two experts may fall the other way in a packed row."""
    model = tiny_policy(seed)
    policy = Policy(model if autocast else model.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert packed_rows_are_separate(policy)


def packed_fit(model, layout="packed") -> tuple[PolicyModule, list[str]]:
    module = PolicyModule(model, Vespo(), lr=0.0, max_grad_norm=None, layout=layout)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, [make_mini_batch(make_samples(model))])
    return module, [str(w.message) for w in caught if LEAKS in str(w.message)]


def test_a_leaking_family_trains_on_padded_rows_with_one_warning():
    model = family_model("gpt_oss")
    module, said = packed_fit(model)
    assert module.layout == "padded"
    assert len(said) == 1 and "GptOssForCausalLM" in said[0]
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    _, said = packed_fit(model, "padded")
    assert said == []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, packed[name]), name


def test_a_separate_family_stays_packed_without_a_word():
    module, said = packed_fit(tiny_policy())
    assert module.layout == "packed"
    assert said == []
