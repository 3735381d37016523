"""Sampling from the likeliest tokens only: top-k and top-p, and the log-probs of the likeliest tokens.

Engines apply the temperature first, then top-k, then top-p of what top-k left, as vLLM does. Greedy decoding truncates
nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vespo_lightning.errors import UserError

#: Log-prob of a token that truncation left out: the probability is 0 in float32, and arithmetic stays finite.
EXCLUDED_LOG_PROB = -1e4


def truncate(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """[B, V] logits at the sampling temperature, ``-inf`` where a token is not kept.

    Kept are the ``top_k`` likeliest tokens, and of those the fewest that hold ``top_p`` of their probability. Tokens
    as likely as the last one kept are kept too: which ones stay depends on the distribution alone, not on the order
    in which equal logits are sorted.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        logits = _keep_from(logits, logits.topk(top_k, dim=-1).values[:, -1:])
    if top_p < 1.0:
        descending = logits.sort(dim=-1, descending=True).values
        probs = torch.softmax(descending.double(), dim=-1)
        likelier = probs.cumsum(-1) - probs  # mass of the tokens before each one
        count = (likelier < top_p).sum(-1, keepdim=True).clamp(min=1)
        logits = _keep_from(logits, descending.gather(-1, count - 1))
    return logits


def _keep_from(logits: Tensor, smallest: Tensor) -> Tensor:
    """``logits`` [B, V] of at least ``smallest`` [B, 1]."""
    return logits.masked_fill(logits < smallest, float("-inf"))


def check_top_log_probs(count: int, limit: int, limit_name: str) -> None:
    """Raises UserError when more than ``limit`` log-probs per position are asked for."""
    if count > limit:
        raise UserError(
            f"rollout.top_log_probs={count} is more than {limit_name} ({limit}): set rollout.top_log_probs={limit} "
            "or less"
        )
