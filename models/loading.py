"""Policies and tokenizers from Hugging Face folders or hub ids, with errors before anything expensive starts."""

from __future__ import annotations

import contextlib
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vespo_lightning.errors import UserError
from vespo_lightning.models.experts import check_experts_backend
from vespo_lightning.models.routers import compute_routers_in_float32, freeze_routers, routers_loaded_in_float32

#: ``model.path=builtin:<name>`` means a folder that ships inside the package.
BUILTIN = "builtin:"

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def resolve_model_path(path: str) -> str:
    """Folder (absolute) or hub id that ``model.path`` means.

    Raises:
        UserError: an unknown built-in name, or a local folder that lacks configuration, weights or tokenizer.
    """
    if path.startswith(BUILTIN):
        assets = Path(str(files("vespo_lightning.models") / "assets"))
        names = sorted(p.name for p in assets.iterdir() if p.is_dir()) if assets.is_dir() else []
        name = path.removeprefix(BUILTIN)
        if name not in names:
            raise UserError(f"model.path={path} is unknown; built-in models: {', '.join(names) or 'none'}")
        folder = assets / name
        return str(folder)
    folder = Path(path).expanduser()
    if folder.exists():
        _check_folder(folder)
        return str(folder.resolve())
    if os.sep in path and (path.startswith((os.sep, ".", "~")) or path.count("/") != 1):
        raise UserError(f"model.path={path}: no such folder; give a Hugging Face model folder or a hub id (owner/name)")
    return path


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={folder} has no config.json; give a folder written by save_pretrained()")
    if not any((folder / name).is_file() for name in _WEIGHT_FILES):
        raise UserError(f"model.path={folder} has no weights (model.safetensors); save the model there first")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        raise UserError(
            f"model.path={folder} has no tokenizer (tokenizer.json); save it there with tokenizer.save_pretrained()"
        )


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id; a missing pad token becomes the end token."""
    path = resolve_model_path(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path={path}: the tokenizer does not load ({_first_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path={path}: the tokenizer has no end-of-sequence token; set one and save it again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    path: str,
    dtype: str = "float32",
    experts: str = "grouped_mm",
    gradient_checkpointing: bool = False,
    freeze_router: bool = False,
    router_dtype: str | None = None,
) -> PreTrainedModel:
    """A causal LM, dense or MoE.

    Args:
        path: folder, hub id or ``builtin:<name>``.
        dtype: of the parameters, a name such as ``float32``.
        experts: how MoE blocks compute, see :mod:`vespo_lightning.models.experts`; dense models ignore it.
        gradient_checkpointing: recompute activations in the backward pass (non-reentrant).
        freeze_router: leave the parameters of routers out of training.
        router_dtype: ``float32`` keeps and computes routers in float32 whatever ``dtype`` and autocast say; None
            treats them like the rest.

    Raises:
        UserError: the folder is incomplete or damaged, ``experts`` or ``router_dtype`` is unknown or cannot run, or
            options of routers are given for a dense model.
    """
    path = resolve_model_path(path)
    moe = is_moe_config(path)
    _check_router_options(path, moe, freeze_router, router_dtype)
    if moe:
        check_experts_backend(experts, getattr(torch, dtype))
    options = {"experts_implementation": experts} if moe else {}
    try:
        with routers_loaded_in_float32(path) if router_dtype else contextlib.nullcontext():
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.path={path}: the model does not load ({_first_line(error)})") from error
    model, found = loaded
    if found["missing_keys"]:
        # transformers draws them at random and goes on
        names = sorted(found["missing_keys"])
        raise UserError(
            f"model.path={path} lacks {len(names)} weights of {type(model).__name__} ({names[0]}, ...); "
            "give the folder that the model was saved in"
        )
    if router_dtype:
        compute_routers_in_float32(model)
    if freeze_router:
        freeze_routers(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _check_router_options(path: str, moe: bool, freeze_router: bool, router_dtype: str | None) -> None:
    if router_dtype not in (None, "float32"):
        raise UserError(f"model.router_dtype={router_dtype} is not supported; use null or float32")
    for wrong, way_out in (
        ("model.freeze_router=true" if freeze_router else None, "model.freeze_router=false"),
        (f"model.router_dtype={router_dtype}" if router_dtype else None, "model.router_dtype=null"),
    ):
        if wrong and not moe:
            raise UserError(f"{wrong}: model.path={path} is a dense model and has no routers; use {way_out}")


def is_moe_config(path: str) -> bool:
    """Whether the configuration at ``path`` (resolved) names a number of experts."""
    config = _text_config(path)
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)


def context_length(model: PreTrainedModel | str) -> int:
    """Longest sequence, prompt and response, that the configuration of a model or at a (resolved) path allows."""
    config = _text_config(model) if isinstance(model, str) else model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**31 - 1)


def _text_config(path: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path).get_text_config()
    except (OSError, ValueError) as error:
        raise UserError(f"model.path={path}: the configuration does not load ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
