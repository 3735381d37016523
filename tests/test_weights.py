"""Weights under checkpoint names, out of a model and into another one, for several families."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from pieces import tokenizer as tiny_tokenizer
from routing.moe_families import family_model, tiny_model
from safetensors import safe_open

from vespo_lightning.rollouts.transformers_engine import TransformersEngine
from vespo_lightning.rollouts.weight_check import fingerprint
from vespo_lightning.weights import InPlaceLoader, checkpoint_tensors

DENSE = {
    "qwen3_tied": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3_untied": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": False}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama_untied": ("LlamaConfig", {"tie_word_embeddings": False}),
}
MOE = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe"]

STEERED = ["deepseek_v3", "glm4_moe", "dots1", "minimax_m2", "lfm2_moe", "ernie4_5_moe", "afmoe"]


def steering_biases(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Buffers in most families, parameters without gradients in ERNIE 4.5 and AFMoE."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if name.endswith(("score_correction_bias", "expert_bias"))}


def make(family: str) -> transformers.PreTrainedModel:
    if family in DENSE:
        config_class, settings = DENSE[family]
        return tiny_model(config_class, **{k: v for k, v in settings.items() if k != "x"})
    return family_model(family)


def scrambled(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Every parameter and persistent buffer replaced by other numbers."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape))
    return model


@pytest.mark.parametrize("family", [*MOE, *DENSE])
def test_round_trip(family):
    """All weights of one model arrive in another: same state, same logits, bit for bit."""
    source, target = make(family), scrambled(make(family))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        wanted = source(ids).logits
        assert not torch.allclose(target(ids).logits, wanted, atol=0.1)
        InPlaceLoader(target).load(checkpoint_tensors(source))
        assert torch.equal(target(ids).logits, wanted)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name


@pytest.mark.parametrize("family", [*MOE, *DENSE])
def test_names_and_tensors_are_those_of_a_saved_folder(family, tmp_path: Path):
    model = make(family)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    streamed = dict(checkpoint_tensors(model))
    assert streamed.keys() == saved.keys() == set(InPlaceLoader(model).names)
    for name, tensor in saved.items():
        assert not streamed[name].requires_grad
        assert torch.equal(streamed[name], tensor), name


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3"])
def test_experts_come_one_by_one(family):
    names = [name for name, _ in checkpoint_tensors(family_model(family))]
    assert any(re.search(r"experts\.7\.(gate_proj|w1)\.weight$", name) for name in names)
    assert not any("gate_up_proj" in name for name in names)


def test_tied_weights_come_once():
    names = [name for name, _ in checkpoint_tensors(make("llama_tied"))]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert "lm_head.weight" in [name for name, _ in checkpoint_tensors(make("llama_untied"))]


def test_loading_is_in_place_and_follows_the_source():
    """No tensor of the target is replaced, so optimizers, hooks and compiled code keep what they hold."""
    source, target = family_model("qwen3_moe"), scrambled(family_model("qwen3_moe"))
    pointers = {name: tensor.data_ptr() for name, tensor in target.state_dict().items()}
    loader = InPlaceLoader(target)
    for _ in range(2):
        with torch.no_grad():
            source.model.layers[0].mlp.experts.gate_up_proj.normal_()
        loader.load(checkpoint_tensors(source))
        got, wanted = target.model.layers[0].mlp.experts.gate_up_proj, source.model.layers[0].mlp.experts.gate_up_proj
        assert torch.equal(got, wanted)
    assert {name: tensor.data_ptr() for name, tensor in target.state_dict().items()} == pointers


def test_other_precision_and_transposed_memory():
    """A bfloat16 copy takes float32 weights rounded; sources need not be contiguous."""
    source, target = family_model("mixtral"), scrambled(family_model("mixtral").bfloat16())
    strided = (
        (name, tensor.t().contiguous().t() if tensor.ndim == 2 else tensor)
        for name, tensor in checkpoint_tensors(source)
    )
    InPlaceLoader(target).load(strided)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor.bfloat16()), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", STEERED)
def test_steering_biases_reach_the_engine(family, dtype, tmp_path: Path):
    """Biases that steer the choice of experts are no trained parameters, and engines must have them all the same."""
    trainer = family_model(family)
    tiny_tokenizer().save_pretrained(tmp_path)
    trainer.save_pretrained(tmp_path)
    engine = TransformersEngine(dtype=dtype, device="cpu")
    engine.start(str(tmp_path))
    before = engine.fingerprint()
    sent = steering_biases(trainer)
    assert len(sent) >= 2 and not any(tensor.requires_grad for tensor in sent.values())
    with torch.no_grad():
        for place, tensor in enumerate(sent.values()):
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(place)))
    names = [name for name, _ in checkpoint_tensors(trainer)]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(names) == set(file.keys())
    assert sum("correction_bias" in name or "expert_bias" in name for name in names) == len(sent)
    engine.load_weights(checkpoint_tensors(trainer), 1)
    got = steering_biases(engine.model)
    assert got.keys() == sent.keys()
    for name, tensor in sent.items():
        assert torch.equal(got[name], tensor.to(got[name].dtype)), name
        assert not torch.equal(got[name], torch.zeros_like(got[name]))
    expected = fingerprint((tensor for _, tensor in checkpoint_tensors(trainer)), getattr(torch, dtype))
    assert engine.fingerprint() == expected != before


@pytest.mark.parametrize("fault", ["missing", "unknown", "twice", "shape"])
def test_faults(fault):
    model = family_model("qwen3_moe")
    tensors = list(checkpoint_tensors(model))
    victim = next(i for i, (name, _) in enumerate(tensors) if "experts.3.down_proj" in name)
    name, tensor = tensors[victim]
    if fault == "missing":
        del tensors[victim]
        sentence = f"1 weights did not arrive, among them ['{name}']"
    elif fault == "unknown":
        tensors.append(("model.layers.9.nonsense", tensor))
        sentence = "weight 'model.layers.9.nonsense' is unknown to the model, or came twice"
    elif fault == "twice":
        tensors.append((name, tensor))
        sentence = f"weight '{name}' is unknown to the model, or came twice"
    else:
        tensors[victim] = (name, tensor[:-1])
        sentence = f"weight '{name}' has shape {(31, 32)}, expected {(32, 32)}"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        InPlaceLoader(model).load(tensors)


def test_fused_names_of_memory_are_refused():
    """An engine is handed checkpoint names, never those of the model in memory."""
    model = family_model("qwen3_moe")
    with pytest.raises(ValueError, match=r"gate_up_proj' is unknown to the model"):
        InPlaceLoader(model).load(model.state_dict().items())
