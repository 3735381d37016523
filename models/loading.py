"""Policies and tokenizers from Hugging Face folders or hub ids, with errors before anything expensive starts."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

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
) -> PreTrainedModel:
    """A causal LM, dense or MoE.

    Args:
        path: folder, hub id or ``builtin:<name>``.
        dtype: of the parameters, a name such as ``float32``.
        experts: how MoE blocks compute, a name of transformers' experts interface (``grouped_mm``, ``eager``);
            dense models ignore it.
        gradient_checkpointing: recompute activations in the backward pass (non-reentrant).

    Raises:
        UserError: the folder is incomplete or damaged, or ``experts`` is unknown.
    """
    path = resolve_model_path(path)
    options = {"experts_implementation": experts} if is_moe_config(path) else {}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if "experts_implementation" in str(error):
            raise UserError(f"model.experts={experts} is unknown; use grouped_mm or eager") from error
        raise UserError(f"model.path={path}: the model does not load ({_first_line(error)})") from error
    model, found = loaded
    if found["missing_keys"]:
        # transformers draws them at random and goes on
        names = sorted(found["missing_keys"])
        raise UserError(
            f"model.path={path} lacks {len(names)} weights of {type(model).__name__} ({names[0]}, ...); "
            "give the folder that the model was saved in"
        )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


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
