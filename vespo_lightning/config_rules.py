"""Combinations of settings that cannot work, refused before anything expensive starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from vespo_lightning.errors import UserError

Rule = Callable[[Any], Iterator[str]]


def check_run(cfg: Any) -> None:
    """Raises UserError with the first broken rule of a reinforcement-learning run.

    Args:
        cfg: the composed configuration of ``train.py``.
    """
    for rule in (_positive, _one_of, _groups, _trainer, _optimizer):
        for sentence in rule(cfg):
            raise UserError(sentence)


def _positive(cfg: Any) -> Iterator[str]:
    for key in ("updates", "mini_batch_size", "threads", "rollout.group_size", "rollout.max_new_tokens",
                "rollout.chunk_groups", "batching.token_budget", "batching.head_chunk",
                "optim.max_skipped_streak"):  # fmt: skip
        value = _get(cfg, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"{key}={value} must be a whole number of at least 1"
    for key in ("optim.lr", "rollout.temperature"):
        value = _get(cfg, key)
        if not isinstance(value, int | float) or not value > 0:
            yield f"{key}={value} must be a number above 0"


def _one_of(cfg: Any) -> Iterator[str]:
    choices = {
        "stage": ("rl", "sft"),
        "denominator": ("behaviour", "recomputed"),
        "aggregation": ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"),
        "rollout.truncated": ("keep", "mask", "penalise"),
        "batching.layout": ("padded", "packed"),
        "optim.schedule": ("constant", "constant_with_warmup", "linear", "cosine"),
        "sft.init": ("tiny_moe", "model"),
        "trainer.precision": ("32-true", "bf16-mixed", "bf16-true", "64-true"),
    }
    for key, valid in choices.items():
        if str(_get(cfg, key)) not in valid:
            yield f"{key}={_get(cfg, key)} is unknown; valid: {', '.join(valid)}"


def _groups(cfg: Any) -> Iterator[str]:
    size, batch = cfg.rollout.group_size, cfg.mini_batch_size
    if batch % size:
        below, above = batch // size * size, (batch // size + 1) * size
        near = f"{below} or {above}" if below else f"{above}"
        yield f"mini_batch_size={batch} is not a multiple of rollout.group_size={size}; use {near}"
    if size == 1:
        yield ("rollout.group_size=1 with a group baseline makes every advantage 0; use rollout.group_size=2 or more")


def _trainer(cfg: Any) -> Iterator[str]:
    if cfg.trainer.devices != 1:
        yield (
            f"trainer.devices={cfg.trainer.devices} is not supported yet; this version trains in one process: "
            "use trainer.devices=1"
        )


def _optimizer(cfg: Any) -> Iterator[str]:
    clip = cfg.optim.max_grad_norm
    if clip is not None and not clip > 0:
        yield f"optim.max_grad_norm={clip} must be above 0, or null for no clipping"
    if cfg.rollout.truncated != "penalise" and cfg.rollout.truncated_reward != 0:
        yield (
            f"rollout.truncated_reward={cfg.rollout.truncated_reward} has no effect with rollout.truncated="
            f"{cfg.rollout.truncated}; set rollout.truncated=penalise"
        )


def _get(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg
