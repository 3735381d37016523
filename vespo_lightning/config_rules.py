"""Combinations of settings that cannot work, refused before anything expensive starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vespo_lightning.errors import UserError
from vespo_lightning.method_rules import method_rules

Rule = Callable[[Any], Iterator[str]]


def check_run(cfg: Any) -> None:
    """Raises UserError with the first broken rule of a reinforcement-learning run.

    Args:
        cfg: the composed configuration of ``train.py``.
    """
    for rule in (_numbers, _one_of, _router, _sampling, _groups, _trainer, _optimizer, _stage, method_rules):
        for sentence in rule(cfg):
            raise UserError(sentence)


#: Whole numbers and the least that each may be.
_WHOLE = {
    **dict.fromkeys(("updates", "mini_batch_size", "threads", "optim.max_skipped_streak"), 1),
    **{f"rollout.{name}": 1 for name in ("group_size", "max_new_tokens", "chunk_groups", "passes")},
    **dict.fromkeys(("rollout.top_log_probs", "rollout.max_refills"), 0),
    **{f"batching.{name}": 1 for name in ("token_budget", "head_chunk")},
    **{f"sft.{name}": 1 for name in ("updates", "batch_size")},
    **dict.fromkeys(("seed", "optim.warmup_updates", "sft.warmup_updates"), 0),
}
_ABOVE_ZERO = ("optim.lr", "optim.eps", "rollout.temperature", "sft.lr")
_NOT_NEGATIVE = ("optim.weight_decay", "sft.weight_decay")
_ANY_NUMBER = ("entropy_coefficient", "rollout.truncated_reward")
_SWITCHES = (
    "rollout.shuffle_rewards",
    "rollout.dynamic_sampling",
    "model.freeze_router",
    "model.gradient_checkpointing",
)


def _numbers(cfg: Any) -> Iterator[str]:
    for key, least in _WHOLE.items():
        value = _get(cfg, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            yield f"{key}={value} must be a whole number of at least {least}"
    for keys, fits, wanted in (
        (_ABOVE_ZERO, lambda value: value > 0, "a number above 0"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "a number of at least 0"),
        (_ANY_NUMBER, math.isfinite, "a number"),
    ):
        for key in keys:
            value = _get(cfg, key)
            if not _is_number(value) or not fits(value):
                yield f"{key}={value} must be {wanted}"
    for key in _SWITCHES:
        if not isinstance(_get(cfg, key), bool):
            yield f"{key}={_get(cfg, key)} must be true or false"


def _one_of(cfg: Any) -> Iterator[str]:
    choices = {
        "stage": ("rl", "sft"),
        "denominator": ("behaviour", "recomputed"),
        "aggregation": ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"),
        "rollout.truncated": ("keep", "mask", "penalise"),
        "batching.layout": ("padded", "packed"),
        "optim.schedule": ("constant", "constant_with_warmup", "linear", "cosine"),
        "sft.schedule": ("constant", "constant_with_warmup", "linear", "cosine"),
        "sft.init": ("tiny_moe", "model"),
        "trainer.precision": ("32-true", "bf16-mixed", "bf16-true", "64-true"),
    }
    for key, valid in choices.items():
        if str(_get(cfg, key)) not in valid:
            yield f"{key}={_get(cfg, key)} is unknown; valid: {', '.join(valid)}"


def _router(cfg: Any) -> Iterator[str]:
    if cfg.model.router_dtype not in (None, "float32"):
        yield f"model.router_dtype={cfg.model.router_dtype} is unknown; valid: null, float32"


def _sampling(cfg: Any) -> Iterator[str]:
    top_p, top_k = cfg.rollout.top_p, cfg.rollout.top_k
    if not _is_number(top_p) or not 0 < top_p <= 1:
        yield f"rollout.top_p={top_p} must be a number above 0 and at most 1 (1 samples from all tokens)"
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
        yield f"rollout.top_k={top_k} must be a whole number of at least 1, or null to sample from all tokens"


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

    if cfg.trainer.precision in ("bf16-mixed", "bf16-true") and cfg.engine.dtype != "bfloat16":
        yield (
            f"trainer.precision={cfg.trainer.precision} computes in bfloat16, which an engine of engine.dtype="
            f"{cfg.engine.dtype} would not agree with; set engine.dtype=bfloat16"
        )


def _optimizer(cfg: Any) -> Iterator[str]:
    betas = cfg.optim.betas
    if not (isinstance(betas, Sequence) and len(betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in betas)):
        yield f"optim.betas={betas} must be two numbers from 0 to below 1, such as [0.9,0.999]"
    clip = cfg.optim.max_grad_norm
    if clip is not None and not (_is_number(clip) and clip > 0):
        yield f"optim.max_grad_norm={clip} must be a number above 0, or null for no clipping"
    if cfg.rollout.truncated != "penalise" and cfg.rollout.truncated_reward != 0:
        yield (
            f"rollout.truncated_reward={cfg.rollout.truncated_reward} has no effect with rollout.truncated="
            f"{cfg.rollout.truncated}; set rollout.truncated=penalise"
        )


def _stage(cfg: Any) -> Iterator[str]:
    if cfg.stage == "sft" and cfg.resume:
        yield f"resume={cfg.resume} is a run with stage=sft, which keeps no checkpoints; start it again without resume"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _get(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg
