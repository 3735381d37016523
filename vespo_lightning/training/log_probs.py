"""Log-probs and entropy from hidden states, in chunks, float32 whatever the model computes in.

Memory is proportional to ``chunk x vocabulary`` instead of ``tokens x vocabulary``: the forward keeps one number per
token (log-sum-exp), the backward rebuilds each chunk's probabilities. The head leaves autocast, because an importance
weight is a sum over thousands of tokens of differences that bfloat16 cannot resolve.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogProbs(NamedTuple):
    """T tokens, K extra ids."""

    log_prob: Tensor
    """[T] of the target tokens"""
    entropy: Tensor
    """[T] of the whole distribution, nats; differentiable"""
    extra: Tensor | None
    """[T, K] of the extra token ids, if any were asked for"""
    squared_norm: Tensor | None = None
    """[S] squared norms of gradients of the output embedding by sequence, if they were asked for; detached"""


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 1024,
    extra_ids: Tensor | None = None,
) -> LogProbs:
    """Log-probs of ``targets`` under ``softmax((hidden @ weight.T + bias) / temperature)``.

    Args:
        hidden: [T, H] final hidden states, any floating dtype; float64 is kept, everything else computes in float32.
        weight: [V, H] of the output embedding.
        targets: int64 [T].
        bias: [V].
        chunk: tokens per chunk; peak extra memory is about ``3 * chunk * V`` floats.
        extra_ids: int64 [T, K], further token ids whose log-probs are wanted.
    """
    gathered = targets.unsqueeze(1) if extra_ids is None else torch.cat([targets.unsqueeze(1), extra_ids], dim=1)
    log_probs, entropy = _ChunkedLogProbs.apply(hidden, weight, bias, gathered, temperature, chunk)
    return LogProbs(log_probs[:, 0], entropy, None if extra_ids is None else log_probs[:, 1:])


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, temperature, chunk):  # type: ignore[no-untyped-def]
        dtype = _compute_dtype(hidden)
        log_probs = torch.empty(ids.shape, dtype=dtype, device=hidden.device)
        entropy = torch.empty(len(ids), dtype=dtype, device=hidden.device)
        log_sum = torch.empty(len(ids), dtype=dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            weight_c = weight.to(dtype)
            for start in range(0, len(ids), chunk):
                rows = slice(start, start + chunk)
                logits = _logits(hidden[rows], weight_c, bias, temperature)
                log_sum[rows] = torch.logsumexp(logits, dim=-1)
                log_probs[rows] = logits.gather(1, ids[rows]) - log_sum[rows, None]
                probs = torch.exp(logits - log_sum[rows, None])
                # p * logits is 0 where p underflows, also for logits of -inf (masked vocabulary)
                entropy[rows] = log_sum[rows] - torch.where(probs > 0, probs * logits, 0.0).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, ids, log_sum, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        return log_probs, entropy

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy):  # type: ignore[no-untyped-def]
        hidden, weight, bias, ids, log_sum, entropy = ctx.saved_tensors
        dtype = _compute_dtype(hidden)
        grad_hidden = torch.empty_like(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            weight_c = weight.to(dtype)
            grad_weight = torch.zeros_like(weight_c)
            grad_bias = None if bias is None else torch.zeros_like(bias, dtype=dtype)
            for start in range(0, len(ids), ctx.chunk):
                rows = slice(start, start + ctx.chunk)
                logits = _logits(hidden[rows], weight_c, bias, ctx.temperature)
                log_p = logits - log_sum[rows, None]
                probs = torch.exp(log_p)
                # d log p_i / d logit_j = [i = j] - p_j ;  d H / d logit_j = -p_j (log p_j + H)
                outer = grad_log_probs[rows].sum(1, keepdim=True)
                surprise = torch.where(probs > 0, log_p, 0.0) + entropy[rows, None]
                grad_logits = -probs * (outer + grad_entropy[rows, None] * surprise)
                grad_logits.scatter_add_(1, ids[rows], grad_log_probs[rows])
                grad_logits /= ctx.temperature
                grad_hidden[rows] = (grad_logits @ weight_c).to(hidden.dtype)
                grad_weight.addmm_(grad_logits.t(), hidden[rows].to(dtype))
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
        return (
            grad_hidden,
            grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = hidden.to(weight.dtype) @ weight.t()
    if bias is not None:
        logits += bias.to(weight.dtype)
    return logits if temperature == 1.0 else logits / temperature
