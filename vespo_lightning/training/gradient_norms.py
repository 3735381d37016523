"""Norms of per-sequence gradients of the output embedding, without a backward pass."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def head_gradient_squared_norms(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_prob: Tensor,
    coefficient: Tensor,
    sequence_index: Tensor,
    sequences: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> Tensor:
    """[S] squared norm of the gradient of ``sum of c_t log pi(y_t)`` by the output embedding, for each sequence.

    That gradient is ``U^T H`` with rows ``u_t = c_t (onehot(y_t) - p_t) / temperature`` and h_t. Its squared norm is
    ``sum over t, s of <u_t, u_s> <h_t, h_s>`` (Gram form), or the sum over blocks of the vocabulary of the squared
    norms of ``U_block^T H``. The second is computed: linear in the length of the sequence, and a sum of squares, in
    which nothing cancels when the policy is sure of its tokens.

    Costs as much as the weight half of the head's backward pass. No tensor is larger than ``chunk * V``.

    Args:
        hidden: [T, H] final hidden states; float64 is kept, everything else computes in float32.
        weight: [V, H] of the output embedding. A tied input embedding does not count.
        targets: int64 [T].
        log_prob: [T] of the targets at ``temperature``, from :func:`~.log_probs.chunked_log_probs`.
        coefficient: [T] what multiplies ``grad log pi`` of each token, aggregation included. 0 leaves a token out.
        sequence_index: int64 [T], non-decreasing, below ``sequences``.
        sequences: S. Those without tokens have norm 0.
        bias: [V].
        chunk: as many floats as the logits of this many tokens may be in memory at once.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    result = torch.zeros(sequences, dtype=dtype, device=hidden.device)
    counts = torch.bincount(sequence_index, minlength=sequences).tolist()
    end = 0
    with torch.autocast(hidden.device.type, enabled=False):
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        for sequence, count in enumerate(counts):
            rows = torch.arange(end, end + count, device=hidden.device)
            rows = rows[coefficient[rows] != 0]
            end += count
            if len(rows):
                result[sequence] = _squared_norm(
                    hidden[rows].to(dtype),
                    weight,
                    bias,
                    targets[rows],
                    log_prob[rows].to(dtype),
                    coefficient[rows].to(dtype) / temperature,
                    temperature,
                    chunk,
                )
    return result


def _squared_norm(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_prob: Tensor,
    scale: Tensor,
    temperature: float,
    chunk: int,
) -> Tensor:
    """Of one sequence."""
    tokens, width = hidden.shape
    vocabulary = len(weight)
    block = max(1, chunk * vocabulary // max(tokens, width))
    own_logit = (hidden * weight[targets]).sum(1)
    if bias is not None:
        own_logit = own_logit + bias[targets]
    total = hidden.new_zeros(())
    for start in range(0, vocabulary, block):
        logits = hidden @ weight[start : start + block].t()
        if bias is not None:
            logits += bias[start : start + block]
        # onehot - p
        surplus = -torch.exp((logits - own_logit.unsqueeze(1)) / temperature + log_prob.unsqueeze(1))
        inside = ((targets >= start) & (targets < start + block)).nonzero()[:, 0]
        surplus[inside, targets[inside] - start] = -torch.expm1(log_prob[inside])
        total += ((surplus * scale.unsqueeze(1)).t() @ hidden).square().sum()
    return total
