"""Chunked log-probs and entropy against a brute force in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vespo_lightning.training.log_probs import LogProbs, chunked_log_probs

T, H, V, K = 13, 7, 29, 3


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden": draw(T, H).requires_grad_(),
        "weight": draw(V, H).requires_grad_(),
        "bias": draw(V).requires_grad_(),
        "targets": torch.randint(V, (T,), generator=generator),
        "extra_ids": torch.randint(V, (T, K), generator=generator),
    }


def brute_force(hidden, weight, bias, targets, extra_ids=None, temperature=1.0) -> LogProbs:
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    extra = None if extra_ids is None else log_p.gather(1, extra_ids)
    return LogProbs(log_p.gather(1, targets[:, None])[:, 0], entropy, extra)


def mixed_scalar(out: LogProbs) -> torch.Tensor:
    """Different weights for every output, so that no gradient can be mistaken for another."""
    total = (out.log_prob * torch.linspace(-1, 2, T, dtype=out.log_prob.dtype)).sum()
    total = total + (out.entropy * torch.linspace(0.5, -1.5, T, dtype=out.entropy.dtype)).sum()
    if out.extra is not None:
        total = total + (out.extra * torch.linspace(-2, 1, T * K, dtype=out.extra.dtype).view(T, K)).sum()
    return total


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("parts", ["plain", "bias", "extra", "bias+extra"])
def test_values_and_gradients(chunk, temperature, parts):
    given = inputs()
    bias = given["bias"] if "bias" in parts else None
    extra_ids = given["extra_ids"] if "extra" in parts else None
    leaves = [given["hidden"], given["weight"], *([] if bias is None else [bias])]

    expected = brute_force(given["hidden"], given["weight"], bias, given["targets"], extra_ids, temperature)
    expected_gradients = torch.autograd.grad(mixed_scalar(expected), leaves)
    out = chunked_log_probs(
        given["hidden"],
        given["weight"],
        given["targets"],
        bias=bias,
        temperature=temperature,
        chunk=chunk,
        extra_ids=extra_ids,
    )
    gradients = torch.autograd.grad(mixed_scalar(out), leaves)

    torch.testing.assert_close(out.log_prob, expected.log_prob, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.entropy, expected.entropy, rtol=1e-12, atol=1e-12)
    assert (out.extra is None) == (extra_ids is None)
    if extra_ids is not None:
        torch.testing.assert_close(out.extra, expected.extra, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("output", ["log_prob", "entropy", "extra"])
def test_gradcheck(output):
    given = inputs()

    def function(hidden, weight, bias):
        out = chunked_log_probs(
            hidden,
            weight,
            given["targets"],
            bias=bias,
            temperature=1.3,
            chunk=4,
            extra_ids=given["extra_ids"],
        )
        return getattr(out, output)

    assert torch.autograd.gradcheck(function, (given["hidden"], given["weight"], given["bias"]))


def test_extra_ids_equal_to_the_target_and_to_each_other():
    """Gradients of repeated ids add up."""
    given = inputs()
    same = given["targets"][:, None].expand(T, K)
    out = chunked_log_probs(given["hidden"], given["weight"], given["targets"], chunk=4, extra_ids=same)
    torch.testing.assert_close(out.extra, out.log_prob[:, None].expand(T, K))
    (all_four,) = torch.autograd.grad(out.extra.sum() + out.log_prob.sum(), given["hidden"], retain_graph=True)
    (one,) = torch.autograd.grad(out.log_prob.sum(), given["hidden"])
    torch.testing.assert_close(all_four, 4 * one)


def test_masked_vocabulary():
    """A bias of -inf takes a token out: finite log-probs, entropy and gradients for all the others."""
    given = inputs()
    bias = given["bias"].detach().clone()
    bias[[2, 5]] = -torch.inf
    targets = given["targets"].clone()
    targets[(targets == 2) | (targets == 5)] = 0
    out = chunked_log_probs(given["hidden"], given["weight"], targets, bias=bias, chunk=4)
    gradients = torch.autograd.grad(mixed_scalar(out), [given["hidden"], given["weight"]])

    kept = [v for v in range(V) if v not in (2, 5)]
    place = torch.tensor([kept.index(v) if v in kept else -1 for v in range(V)])
    expected = brute_force(given["hidden"], given["weight"][kept], bias[kept], place[targets])
    expected_gradients = torch.autograd.grad(mixed_scalar(expected), [given["hidden"], given["weight"]])
    torch.testing.assert_close(out.log_prob, expected.log_prob)
    torch.testing.assert_close(out.entropy, expected.entropy)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, wanted)


def test_a_masked_target_is_impossible():
    given = inputs()
    bias = given["bias"].detach().clone()
    bias[given["targets"][0]] = -torch.inf
    out = chunked_log_probs(given["hidden"], given["weight"], given["targets"], bias=bias, chunk=4)
    assert out.log_prob[0] == -torch.inf
    assert out.entropy.isfinite().all()


def test_extreme_logits_stay_finite():
    given = inputs(torch.float32)
    hidden = (1e4 * given["hidden"]).detach().requires_grad_()
    out = chunked_log_probs(hidden, given["weight"], given["targets"], chunk=4)
    assert out.log_prob.isfinite().all() and out.log_prob.min() < -1e3
    assert out.entropy.isfinite().all() and out.entropy.abs().max() < 1e-2
    for gradient in torch.autograd.grad(mixed_scalar(out), [hidden, given["weight"]]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_inputs_give_float32_results(autocast):
    given = inputs(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = chunked_log_probs(
            given["hidden"], given["weight"], given["targets"], bias=given["bias"], chunk=4, temperature=0.7
        )
    expected = brute_force(
        given["hidden"].double(),
        given["weight"].double(),
        given["bias"].double(),
        given["targets"],
        temperature=0.7,
    )
    assert out.log_prob.dtype == out.entropy.dtype == torch.float32
    torch.testing.assert_close(out.log_prob.double(), expected.log_prob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy.double(), expected.entropy, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(mixed_scalar(out), [given["hidden"], given["weight"], given["bias"]])
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 3


def test_float32_under_autocast_is_not_rounded():
    """Autocast would make the head's logits bfloat16; values and gradients equal those outside, bit for bit."""
    given = inputs(torch.float32)

    def run():
        out = chunked_log_probs(given["hidden"], given["weight"], given["targets"], bias=given["bias"], chunk=4)
        return [
            *out[:2],
            *torch.autograd.grad(mixed_scalar(out), [given["hidden"], given["weight"], given["bias"]]),
        ]

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run()
    for a, b in zip(plain, inside, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


class Sizes(TorchDispatchMode):
    """Remembers the largest storage that any operation made, in elements."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_proportional_to_the_chunk(dtype):
    """Neither forward nor backward makes a tensor of tokens x vocabulary."""
    tokens, width, vocabulary, chunk = 256, 4, 500, 16
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))

    def largest(chunk: int) -> int:
        with Sizes() as sizes:
            out = chunked_log_probs(hidden, weight, targets, chunk=chunk)
            (out.log_prob.sum() + out.entropy.sum()).backward()
        return sizes.largest

    assert largest(chunk) == chunk * vocabulary
    assert largest(tokens) == tokens * vocabulary  # the measurement sees a large tensor where there is one


def test_no_tokens():
    given = inputs()
    none = torch.zeros(0, dtype=torch.long)
    out = chunked_log_probs(given["hidden"][:0], given["weight"], none)
    assert out.log_prob.shape == out.entropy.shape == (0,)
    (gradient,) = torch.autograd.grad(out.log_prob.sum(), given["weight"])
    assert gradient.abs().sum() == 0
