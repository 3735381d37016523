"""Real vLLM takes the checkpoint names of each MoE family, and computes the same model with what they brought."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.engine import Generation, GenerationRequest, SamplingParams
from vespo_lightning.rollouts.vllm_engine import VllmEngine
from vespo_lightning.rollouts.weight_check import WeightCheck, canary_sequences
from vespo_lightning.routing.layout import expand_layers
from vespo_lightning.routing.tap import RouterTap
from vespo_lightning.scoring import score_sequences
from vespo_lightning.weights import checkpoint_tensors

# Looked for, not imported: the engine sets up its environment before the first import.
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed, `make test` installs it"),
]

VOCAB, EXPERTS, TOP_K = 64, 8, 2
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
SHARED = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
GROUPED = {
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "head_dim": 32,
}
#: family -> (config class, its own settings, a part of a checkpoint name that only this family's layout has)
FAMILIES = {
    "glm4_moe": ("Glm4MoeConfig", GROUPED, "mlp.gate.e_score_correction_bias"),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": EXPERTS, "decoder_sparse_step": 2} | SHARED,
        "mlp.shared_expert_gate.weight",
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": EXPERTS, "moe_intermediate_size": 32, "head_dim": 32, "mlp_only_layers": [1]},
        "mlp.experts.7.gate_proj.weight",
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": EXPERTS}, "block_sparse_moe.experts.7.w2.weight"),
    "olmoe": ("OlmoeConfig", {"num_experts": EXPERTS}, "self_attn.k_norm.weight"),
    "granitemoe": (
        "GraniteMoeConfig",
        {"num_local_experts": EXPERTS},
        "block_sparse_moe.input_linear.weight",
    ),
    # The last of the four layers has attention without a window, without which vLLM returns no experts.
    "afmoe": (
        "AfmoeConfig",
        {"num_experts": EXPERTS, "num_dense_layers": 1, "num_hidden_layers": 4, "head_dim": 32} | SHARED,
        "mlp.router.gate.weight",
    ),
    "cohere2_moe": (
        "Cohere2MoeConfig",
        {"num_experts": EXPERTS, "expert_selection_fn": "sigmoid", "num_hidden_layers": 4, "head_dim": 32},
        "mlp.experts.7.down_proj.weight",
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            "enable_moe_block": True,
            "num_experts": EXPERTS,
            "top_k_experts": TOP_K,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 6,
            "head_dim": 32,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCAB,
        },
        "layer_scalar",
    ),
}
#: Where embeddings are scaled up, so is rounding.
TOLERANCE = {"gemma4": 1e-4}
DEFAULT = "glm4_moe"
PROMPTS = [[3, 4], [5, 6, 7, 8], [9, 10, 11], [12] * 6] * 2


def _random_model(family: str, seed: int) -> PreTrainedModel:
    """Every parameter and buffer of a checkpoint is random, so that one which did not arrive shows."""
    config_class, settings, _ = FAMILIES[family]
    config = getattr(transformers, config_class)(**COMMON | settings)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            if value.dim() >= 2:
                value.copy_(noise / value.shape[-1] ** 0.5)
            elif "bias" in name:
                value.copy_(0.1 * noise)
            else:
                value.copy_(1 + 0.1 * noise)
    return model.eval().requires_grad_(False)


@pytest.fixture(
    params=[pytest.param(name, marks=() if name == DEFAULT else pytest.mark.long) for name in FAMILIES], scope="module"
)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    folder = tmp_path_factory.mktemp(family)
    _random_model(family, 0).save_pretrained(folder)
    engine = VllmEngine(max_num_seqs=32, kv_cache_gib=0.0625)
    engine.start(str(folder))
    yield engine
    engine.close()


def _requests(seed: int) -> list[GenerationRequest]:
    return [GenerationRequest(prompt, 100 * seed + i) for i, prompt in enumerate(PROMPTS)]


def _assert_agrees(
    family: str, model: PreTrainedModel, requests: list[GenerationRequest], generations: list[Generation]
) -> None:
    """Log-probs within 1e-5, and the same experts in every layer of every token but the last."""
    tap = RouterTap.attach(model)
    assert sum(len(g.token_ids) for g in generations) > 60
    for request, generation in zip(requests, generations, strict=True):
        ids = torch.tensor([*request.prompt_ids, *generation.token_ids.tolist()])
        with tap.recording() as record:
            log_probs = torch.log_softmax(model(ids[None, :-1]).logits[0].float(), -1)
        chosen = log_probs.gather(1, ids[1:, None])[len(request.prompt_ids) - 1 :, 0]
        np.testing.assert_allclose(generation.log_probs, chosen.numpy(), atol=TOLERANCE.get(family, 1e-5), rtol=0)
        experts = expand_layers(record.experts, tap.layers, tap.num_decoder_layers)
        assert np.array_equal(np.sort(generation.routed_experts, -1), np.sort(experts, -1))
    tap.detach()


def test_pushed_names_are_all_loaded_and_compute_the_same_model(family: str, engine: VllmEngine) -> None:
    """The checksum is that of all elements pushed, no more and no less: nothing was left out, nothing ignored."""
    check = WeightCheck(engine, canary_sequences(VOCAB))
    on_disk = _random_model(family, 0)
    check.calibrate(checkpoint_tensors(on_disk), score_sequences(on_disk, check.sequences))
    assert check.offset == 0
    _assert_agrees(family, on_disk, _requests(0), engine.generate(_requests(0), SamplingParams(1.0, 24)))
    for version in (1, 2):
        model = _random_model(family, version)
        pushed = dict(checkpoint_tensors(model))
        assert any(FAMILIES[family][2] in name for name in pushed)
        metrics = check.load(pushed.items(), version, score_sequences(model, check.sequences))
        assert metrics["mismatch/canary_max"] < TOLERANCE.get(family, 1e-5)
        _assert_agrees(family, model, _requests(version), engine.generate(_requests(version), SamplingParams(1.0, 24)))


def test_each_kind_of_weight_arrives(family: str, engine: VllmEngine) -> None:
    """One tensor at a time: a loader that takes another one twice instead would not be seen in the sum of all."""
    model = _random_model(family, 3)
    tensors = {name: tensor.clone() for name, tensor in checkpoint_tensors(model)}
    engine.load_weights(tensors.items(), 3)
    seen = {engine.fingerprint()}
    last = {_kind(name): name for name in tensors}
    for name in last.values():
        tensors[name].view(torch.int32).view(-1)[-1] ^= 1
        engine.load_weights(tensors.items(), 3)
        assert engine.fingerprint() not in seen, name
        seen.add(engine.fingerprint())


def _kind(name: str) -> str:
    """The name without its numbers."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


@pytest.mark.parametrize(
    ("config_class", "settings", "reason"),
    [
        ("GptOssConfig", {"num_local_experts": EXPERTS}, "model_type=gpt_oss.*wrong after the first weight update"),
        ("DeepseekV3Config", GROUPED, "model_type=deepseek_v3.*MLA.*takes no weight update"),
        ("DeepseekV2Config", GROUPED, "model_type=deepseek_v2.*MLA.*takes no weight update"),
        ("Ernie4_5_MoeConfig", {"moe_num_experts": EXPERTS}, "model_type=ernie4_5_moe.*correction bias"),
        ("MiniMaxM2Config", {"num_local_experts": EXPERTS}, "model_type=minimax_m2.*does not run"),
        ("Qwen3NextConfig", {"num_experts": EXPERTS}, "model_type=qwen3_next.*linear_attention.*seeded sampling"),
        ("Lfm2MoeConfig", {"layer_types": ["conv", "conv", "full_attention"]}, "model_type=lfm2_moe.*conv.*seeded"),
    ],
)
def test_what_goes_wrong_on_a_cpu_is_refused_before_vllm_starts(
    config_class: str, settings: dict[str, object], reason: str, tmp_path: Path
) -> None:
    engine = VllmEngine()
    if not engine.on_cpu:
        pytest.skip("known of the CPU build only")
    getattr(transformers, config_class)(**COMMON | settings).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"engine=vllm on a CPU cannot serve {reason}.*use engine=transformers"):
        engine.start(str(tmp_path))


@pytest.mark.parametrize(
    ("config_class", "settings"),
    [("HunYuanMoEV1Config", {"num_experts": EXPERTS, "moe_topk": TOP_K, "head_dim": 32}), ("Dots1Config", GROUPED)],
)
def test_a_family_without_a_model_in_vllm_is_refused_and_left_alone(
    config_class: str, settings: dict[str, object], tmp_path: Path
) -> None:
    """vLLM would run transformers' own class in its place, patched so that the trainer's model fails."""
    config = getattr(transformers, config_class)(**COMMON | settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^engine=vllm .*{type(model).__name__}"):
        VllmEngine(kv_cache_gib=0.0625).start(str(tmp_path))
    transformers.AutoModelForCausalLM.from_config(config)
    model(torch.tensor([[3, 4]]))
