"""DPPO's top-K divergences against sums over a small vocabulary."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch
from test_multipliers import clamp, close
from test_token_multipliers import CASES, probable_batch

from vespo_lightning.objectives.base import TokenBatch, TopLogProbs
from vespo_lightning.objectives.dppo import Dppo

VOCABULARY = 6
LENGTHS = [5, 0, 1, 9, 0, 13, 4, 0]
ADVANTAGES = [1.0, 1.0, -0.5, -2.0, 0.3, 0.7, 0.0, -1.0]
every_k = pytest.mark.parametrize("k", [0, 1, 2, 5, 6])
every_divergence = pytest.mark.parametrize("name", ["topk_tv", "topk_kl"])


@dataclass
class Token:
    """Probabilities of the whole vocabulary when it was sampled and now."""

    old: list[float]
    new: list[float]
    sampled: int
    in_loss: bool

    def likeliest(self, k: int) -> list[int]:
        return sorted(range(len(self.old)), key=lambda v: -self.old[v])[:k]


def softmax(logits: list[float]) -> list[float]:
    total = math.fsum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def tokens(seed: int = 0) -> list[Token]:
    rng = random.Random(seed)
    found = []
    for _ in range(sum(LENGTHS)):
        logits = [rng.gauss(0, 2) for _ in range(VOCABULARY)]
        new = softmax([x + rng.gauss(0, 1) for x in logits])
        found.append(Token(softmax(logits), new, rng.randrange(VOCABULARY), rng.random() > 0.2))
    return found


def batch_of(made: list[Token], k: int, lengths=LENGTHS, advantages=ADVANTAGES) -> TokenBatch:
    """What the trainer gets of it: nothing but K + 1 log-probs on each side. NaN outside the loss."""

    def logs(pick) -> torch.Tensor:
        rows = [[math.log(p) if t.in_loss else math.nan for p in pick(t)] for t in made]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(made), -1)

    count = len(lengths)
    return TokenBatch(
        log_prob=logs(lambda t: [t.new[t.sampled]])[:, 0],
        behaviour_log_prob=logs(lambda t: [t.old[t.sampled]])[:, 0],
        top=TopLogProbs(
            behaviour=logs(lambda t: [t.old[v] for v in t.likeliest(k)]),
            current=logs(lambda t: [t.new[v] for v in t.likeliest(k)]),
            holds_sampled=torch.tensor([t.sampled in t.likeliest(k) for t in made]),
        ),
        sequence_index=torch.repeat_interleave(torch.arange(count), torch.tensor(lengths)),
        loss_mask=torch.tensor([t.in_loss for t in made]),
        advantage=torch.tensor(advantages, dtype=torch.float64),
        group=torch.arange(count),
        version_made=torch.zeros(len(made), dtype=torch.int32),
        policy_version=0,
    )


def divergence(name: str, token: Token, k: int) -> float:
    single = sorted({*token.likeliest(k), token.sampled})
    rest = [v for v in range(VOCABULARY) if v not in single]
    m, p = (math.fsum(side[v] for v in rest) for side in (token.old, token.new))
    if name == "topk_tv":
        return (math.fsum(abs(token.old[v] - token.new[v]) for v in single) + abs(m - p)) / 2
    bins = math.fsum(token.old[v] * math.log(token.old[v] / token.new[v]) for v in single)
    return bins + m * math.log((m + 1e-8) / (p + 1e-8))


@every_divergence
@every_k
@pytest.mark.parametrize(("threshold", "cap"), [(None, 5.0), (0.4, None), (0.0, 1.1)])
def test_multiplier_equals_formula(name, k, threshold, cap):
    limit = threshold if threshold is not None else {"topk_tv": 0.15, "topk_kl": 0.05}[name]
    made = tokens()
    owners = [a for a, length in zip(ADVANTAGES, LENGTHS, strict=True) for _ in range(length)]
    expected = []
    for token, advantage in zip(made, owners, strict=True):
        old, new = token.old[token.sampled], token.new[token.sampled]
        away = (advantage > 0 and new > old) or (advantage < 0 and new < old)
        masked = away and divergence(name, token, k) > limit
        ratio = min(math.exp(clamp(math.log(new / old), -20, 20)), cap or math.inf)
        expected.append(ratio * advantage if token.in_loss and not masked else 0.0)
    close(Dppo(name, threshold, cap).multiplier(batch_of(made, k)), expected)


@every_divergence
@every_k
def test_divergence_equals_the_sum_over_bins(name, k):
    for token in tokens(1):
        alone = batch_of([dataclasses.replace(token, in_loss=True)], k, [1], [1.0])
        found = Dppo(name).statistics(alone)["objective/divergence_mean"]
        assert found == pytest.approx(divergence(name, token, k), rel=1e-10, abs=1e-13)


@every_divergence
def test_without_likeliest_tokens_it_is_the_binary_divergence(make_batch, name):
    """K = 0. Also for the batches of log-ratios, where nothing sums to 1."""
    binary = Dppo(name.replace("topk", "binary"))
    made = [batch_of(tokens(2), 0)]
    for case in CASES:
        batch = probable_batch(make_batch, case)
        none = torch.empty(len(batch.log_prob), 0, dtype=torch.float64)
        made.append(dataclasses.replace(batch, top=TopLogProbs(none, none, torch.zeros_like(batch.loss_mask))))
    for batch in made:
        close(Dppo(name).multiplier(batch), binary.multiplier(batch))
        found, expected = Dppo(name).statistics(batch), binary.statistics(batch)
        assert found == pytest.approx(expected, rel=1e-9)


@every_divergence
def test_more_bins_see_more(name):
    """The binary divergence misses what the other tokens do among themselves; all tokens miss nothing."""
    for token in tokens(3):
        seen = [divergence(name, token, k) for k in range(VOCABULARY + 1)]
        alone = [
            Dppo(name).statistics(batch_of([dataclasses.replace(token, in_loss=True)], k, [1], [1.0]))
            for k in range(VOCABULARY + 1)
        ]
        found = [statistics["objective/divergence_mean"] for statistics in alone]
        assert all(few <= more + 1e-7 for few, more in itertools.pairwise(found))
        assert found == pytest.approx(seen, rel=1e-10, abs=1e-13)
    tail = [1e-9] * 3
    swapped = Token([0.5, 0.4, 0.1 - 3e-9, *tail], [0.1, 0.401, 0.499 - 3e-9, *tail], sampled=1, in_loss=True)
    assert Dppo(name.replace("topk", "binary")).coefficient(batch_of([swapped], 1, [1], [1.0])).item() > 1
    assert Dppo(name).coefficient(batch_of([swapped], 1, [1], [1.0])).item() == 0.0


def test_a_sampled_token_among_the_likeliest_is_counted_once():
    token = Token([0.7, 0.1, 0.1, 0.05, 0.03, 0.02], [0.6, 0.2, 0.1, 0.05, 0.03, 0.02], sampled=0, in_loss=True)
    found = Dppo("topk_tv").statistics(batch_of([token], 2, [1], [1.0]))
    assert found["objective/divergence_mean"] == pytest.approx(0.1, rel=1e-12)


@every_divergence
def test_log_probs_that_sum_to_more_than_one_leave_no_rest(name):
    """Engine and trainer round, each in its own way: the rest is 0, not negative."""
    batch = batch_of(tokens(4), 6)
    top = TopLogProbs(batch.top.behaviour + 1e-3, batch.top.current + 2e-3, batch.top.holds_sampled)
    found = Dppo(name).statistics(dataclasses.replace(batch, top=top))["objective/divergence_mean"]
    assert found == pytest.approx(Dppo(name).statistics(batch)["objective/divergence_mean"], abs=3e-3)
    both = TopLogProbs(batch.top.behaviour + 1e-3, batch.top.behaviour + 1e-3, batch.top.holds_sampled)
    assert Dppo(name).statistics(dataclasses.replace(batch, top=both))["objective/divergence_mean"] == 0.0


@every_divergence
def test_tokens_that_sampling_had_ruled_out_add_nothing(name):
    """Engines that report the distribution after top-p give -inf for what it cut off."""
    batch = batch_of([Token([0.6], [0.5], sampled=0, in_loss=True)], 0, [1], [1.0])
    top = TopLogProbs(
        torch.tensor([[0.6, 0.4, 0.0]], dtype=torch.float64).log(),
        torch.tensor([[0.5, 0.4, 0.1]], dtype=torch.float64).log(),
        torch.tensor([True]),
    )
    found = Dppo(name).statistics(dataclasses.replace(batch, top=top))["objective/divergence_mean"]
    assert found == pytest.approx(0.1 if name == "topk_tv" else 0.6 * math.log(0.6 / 0.5), rel=1e-9)


def test_old_side_is_the_policy_that_sampled():
    """Whatever the denominator of the ratio."""
    batch = batch_of(tokens(5), 2)
    other = dataclasses.replace(
        batch, denominator="recomputed", recomputed_log_prob=batch.behaviour_log_prob - 1e-3 * torch.rand(sum(LENGTHS))
    )
    name = "objective/divergence_mean"
    assert Dppo("topk_kl").statistics(other)[name] == Dppo("topk_kl").statistics(batch)[name]
    assert Dppo("binary_kl").statistics(other)[name] != Dppo("binary_kl").statistics(batch)[name]


def test_it_asks_for_the_likeliest_tokens():
    assert Dppo("topk_tv").needs == Dppo("topk_kl").needs == {"top_log_probs"}
    assert Dppo("binary_tv").needs == Dppo("binary_kl").needs == set()
    assert (Dppo("topk_tv").threshold, Dppo("topk_kl").threshold) == (0.15, 0.05)
    with pytest.raises(AssertionError, match="without top log-probs"):
        Dppo("topk_tv").coefficient(dataclasses.replace(batch_of(tokens(), 2), top=None))
