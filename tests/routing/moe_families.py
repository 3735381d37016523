"""Tiny random models of many MoE families, dense layers beside MoE layers where the family allows it."""

import torch
import transformers
from torch import Tensor, nn

VOCAB = 64
EXPERTS, TOP_K = 8, 2
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "head_dim": 8,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}

#: family -> (config class, its own settings, decoder layers that are MoE, scoring)
FAMILIES = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": EXPERTS, "moe_intermediate_size": 32, "head_dim": 8, "mlp_only_layers": [1]},
        [0, 2],
        "softmax",
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": EXPERTS}, [0, 1, 2], "softmax"),
    "deepseek_v3": ("DeepseekV3Config", GROUPED | LATENT, [1, 2], "sigmoid"),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": EXPERTS}, [0, 1, 2], "softmax"),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "decoder_sparse_step": 2,
        },
        [1],
        "softmax",
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": EXPERTS}, [0, 1, 2], "softmax"),
    "deepseek_v2": ("DeepseekV2Config", GROUPED | LATENT, [1, 2], "softmax"),
    "deepseek_v2_grouped": (
        "DeepseekV2Config",
        GROUPED | LATENT | {"topk_method": "group_limited_greedy"},
        [1, 2],
        "softmax",
    ),
    "glm4_moe": ("Glm4MoeConfig", GROUPED, [1, 2], "sigmoid"),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": EXPERTS, "head_dim": 8}, [0, 1, 2], "softmax"),
    "minimax_m2": ("MiniMaxM2Config", {"num_local_experts": EXPERTS, "head_dim": 8}, [0, 1, 2], "sigmoid"),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_intermediate_size": 32,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
            "head_dim": 8,
        },
        [1, 2],
        "softmax",
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
            "layer_types": ["full_attention", "conv", "full_attention"],
        },
        [1, 2],
        "sigmoid",
    ),
    "dots1": ("Dots1Config", GROUPED, [1, 2], "sigmoid"),
    "afmoe": (
        "AfmoeConfig",
        {"num_experts": EXPERTS, "moe_intermediate_size": 32, "num_dense_layers": 1, "head_dim": 8},
        [1, 2],
        "sigmoid",
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1Config",
        {"num_experts": EXPERTS, "moe_topk": TOP_K, "head_dim": 8},
        [0, 1, 2],
        "softmax",
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "full_attention"],
        },
        [0, 1, 2],
        "softmax",
    ),
    "cohere2_moe": (
        "Cohere2MoeConfig",
        {"num_experts": EXPERTS, "expert_selection_fn": "sigmoid", "head_dim": 8},
        [0, 1, 2],
        "sigmoid",
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            "enable_moe_block": True,
            "num_experts": EXPERTS,
            "top_k_experts": TOP_K,
            "moe_intermediate_size": 32,
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCAB,
        },
        [0, 1, 2],
        "softmax",
    ),
}
FAST = ["qwen3_moe", "mixtral", "deepseek_v3", "granitemoe"]


def tiny_model(config_class: str, **settings: object) -> nn.Module:
    """A model whose weights are large enough for routing far from uniform, with steering biases not 0."""
    config = getattr(transformers, config_class)(**COMMON | settings)
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name and value.dim() == 1:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            elif value.dim() >= 2 and value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) / value.shape[-1] ** 0.5)
    return model.eval()


def family_model(family: str) -> nn.Module:
    config_class, settings, _, _ = FAMILIES[family]
    return tiny_model(config_class, **settings)


def token_ids(batch: int = 2, length: int = 5, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def watch_experts(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What the experts modules are really given, in the order in which they run: (experts [R, K], weights [R, K])."""
    seen: list[tuple[Tensor, Tensor]] = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda _, args: seen.append((args[1].clone(), args[2].detach().clone())))
    return seen


def routers(model: nn.Module) -> list[nn.Module]:
    """In layer order."""
    return [module for module in model.modules() if type(module).__name__.endswith(("Router", "MoEV1Gate"))]


def router_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the routers' own projections."""
    return {
        f"{place}.{name}": value.grad
        for place, router in enumerate(routers(model))
        for name, value in router.named_parameters()
        if value.dim() == 2 and value.shape[0] == EXPERTS
    }


def other_experts(experts: Tensor) -> Tensor:
    """Distinct experts, none of them where it was; in the same group of two in group-limited families."""
    half = EXPERTS // 2
    return experts // half * half + (experts % half + 1) % half
