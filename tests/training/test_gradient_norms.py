"""Norms of per-sequence gradients of the output embedding, against autograd and against the Gram form."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vespo_lightning.training.gradient_norms import head_gradient_squared_norms
from vespo_lightning.training.log_probs import chunked_log_probs

LENGTHS = [5, 0, 1, 9, 3]  # an empty response among them
T, H, V, S = sum(LENGTHS), 7, 29, len(LENGTHS)
INDEX = torch.repeat_interleave(torch.arange(S), torch.tensor(LENGTHS))


def given(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    numbers = {"hidden": draw(T, H), "weight": draw(V, H), "bias": draw(V), "coefficient": draw(T)}
    numbers["coefficient"][[2, 7]] = 0.0
    return numbers | {"targets": torch.randint(V, (T,), generator=generator)}


def norms(numbers: dict[str, torch.Tensor], temperature: float = 1.0, chunk: int = 1024) -> torch.Tensor:
    head = {name: numbers[name] for name in ("hidden", "weight", "targets")}
    options = {"bias": numbers.get("bias"), "temperature": temperature, "chunk": chunk}
    log_prob = chunked_log_probs(**head, **options).log_prob
    return head_gradient_squared_norms(
        **head, **options, log_prob=log_prob, coefficient=numbers["coefficient"], sequence_index=INDEX, sequences=S
    )


def by_autograd(numbers: dict[str, torch.Tensor], temperature: float) -> torch.Tensor:
    weight = numbers["weight"].clone().requires_grad_()
    logits = numbers["hidden"] @ weight.t() + numbers.get("bias", 0.0)
    log_p = torch.log_softmax(logits / temperature, -1).gather(1, numbers["targets"][:, None])[:, 0]
    result = []
    for sequence in range(S):
        loss = (numbers["coefficient"] * log_p)[sequence == INDEX].sum()
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        result.append(gradient.square().sum())
    return torch.stack(result)


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", [True, False])
def test_equal_to_autograd(chunk, temperature, bias):
    """Blocks of 3 tokens of the vocabulary up to all of it."""
    numbers = given()
    if not bias:
        del numbers["bias"]
    expected = by_autograd(numbers, temperature)
    torch.testing.assert_close(norms(numbers, temperature, chunk), expected, rtol=1e-10, atol=0)
    assert expected[1] == 0 and (expected[[0, 2, 3, 4]] > 0.1).all()


def test_equal_to_the_gram_form():
    numbers = given()
    logits = numbers["hidden"] @ numbers["weight"].t() + numbers["bias"]
    u = torch.nn.functional.one_hot(numbers["targets"], V) - torch.softmax(logits, -1)
    u = u * numbers["coefficient"][:, None]
    pairs = (u @ u.t()) * (numbers["hidden"] @ numbers["hidden"].t())
    expected = torch.stack([pairs[i == INDEX][:, i == INDEX].sum() for i in range(S)])
    torch.testing.assert_close(norms(numbers), expected, rtol=1e-10, atol=0)


def test_tokens_with_coefficient_zero_may_hold_anything():
    numbers = given()
    expected = norms(numbers)
    numbers["hidden"][[2, 7]] = float("nan")
    torch.testing.assert_close(norms(numbers), expected, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_float32_also_where_the_policy_is_sure(scale):
    """The larger scale has probabilities up to 0.9997, whose gradient is what float32 has left of 1 - p."""
    numbers = given()
    likeliest = (scale * numbers["hidden"] @ numbers["weight"].t()).argmax(-1)
    numbers |= {"hidden": scale * numbers["hidden"], "targets": likeliest}
    del numbers["bias"]
    single = {name: value.float() if value.is_floating_point() else value for name, value in numbers.items()}
    double = {name: value.double() if value.is_floating_point() else value for name, value in single.items()}
    found = norms(single)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), by_autograd(double, 1.0), rtol=1e-3, atol=1e-12)


def test_bfloat16_hidden_states_are_computed_in_float32_also_under_autocast():
    numbers = given()
    half = numbers | {name: numbers[name].bfloat16() for name in ("hidden", "weight", "bias")}
    half["coefficient"] = half["coefficient"].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norms(half)
    expected = by_autograd({n: v.double() if v.is_floating_point() else v for n, v in half.items()}, 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


class Sizes(TorchDispatchMode):
    """Remembers the largest storage that any operation made, in elements."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize(("tokens", "width"), [(256, 4), (40, 64)])
def test_memory_is_bounded_by_the_chunk(tokens, width):
    """Neither tokens x vocabulary nor vocabulary x width, for long responses and for wide models."""
    vocabulary, chunk = 500, 16
    hidden, weight = torch.randn(tokens, width), torch.randn(vocabulary, width)
    targets = torch.randint(vocabulary, (tokens,))
    log_prob = chunked_log_probs(hidden, weight, targets, chunk=chunk).log_prob

    def largest(chunk: int) -> int:
        with Sizes() as sizes:
            head_gradient_squared_norms(
                hidden, weight, targets, log_prob, torch.ones(tokens), torch.zeros(tokens, dtype=torch.long), 1,
                chunk=chunk,
            )  # fmt: skip
        return sizes.largest

    assert largest(chunk) <= max(chunk * vocabulary, weight.numel() if width > chunk else 0)
    assert largest(1000) == max(tokens, width) * vocabulary


def test_no_tokens():
    nothing = torch.zeros(0)
    index = torch.zeros(0, dtype=torch.long)
    found = head_gradient_squared_norms(torch.zeros(0, H), torch.randn(V, H), index, nothing, nothing, index, 3)
    assert found.tolist() == [0.0, 0.0, 0.0]
