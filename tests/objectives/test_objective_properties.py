"""Properties that hold for every objective and any finite input."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vespo_lightning.objectives.base import TokenBatch, TopLogProbs
from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.objectives.gspo import Gspo
from vespo_lightning.objectives.kernel import Kernel
from vespo_lightning.objectives.reinforce import Reinforce
from vespo_lightning.objectives.respo import Respo
from vespo_lightning.objectives.sequence_is import SequenceIs
from vespo_lightning.objectives.topr import Topr
from vespo_lightning.objectives.vespo import Vespo

OBJECTIVES = {
    "vespo": Vespo(),
    "vespo, extreme constants": Vespo(4.0, 0.0, 0.0, 80.0, variance_bound=False),
    "grpo": Grpo(),
    "grpo, dual clip": Grpo(0.2, 0.28, 3.0),
    "reinforce": Reinforce(),
    "vespo, length": Vespo(normalisation="length"),
    "vespo, sqrt_length": Vespo(normalisation="sqrt_length"),
    "kernel": Kernel(),
    "kernel, extreme constants": Kernel(9.0, 0.001),
    "sequence_is": SequenceIs(),
    "sequence_is, truncated": SequenceIs(2.0),
    "gspo": Gspo(),
    "gspo, wide": Gspo(1.0, 9.0),
    "topr": Topr(),
    "respo": Respo(),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
quick = settings(max_examples=60, deadline=None, derandomize=True)


def tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@st.composite
def batches(draw, log_probs: st.SearchStrategy[float]) -> TokenBatch:
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    tokens, sequences = sum(lengths), len(lengths)

    def per_token(values: st.SearchStrategy) -> list:
        return draw(st.lists(values, min_size=tokens, max_size=tokens))

    def likeliest(count: int) -> torch.Tensor:
        return tensor([x for _ in range(count) for x in per_token(log_probs)]).reshape(count, tokens).T

    advantage = st.one_of(st.just(0.0), st.floats(-100, 100, width=32))
    count = draw(st.integers(0, 2))
    return TokenBatch(
        log_prob=tensor(per_token(log_probs)),
        behaviour_log_prob=tensor(per_token(log_probs)),
        recomputed_log_prob=tensor(per_token(log_probs)),
        top=TopLogProbs(
            likeliest(count), likeliest(count), torch.tensor(per_token(st.booleans()), dtype=torch.bool) & (count > 0)
        ),
        sequence_index=torch.repeat_interleave(torch.arange(sequences), torch.tensor(lengths)),
        loss_mask=torch.tensor(per_token(st.booleans()), dtype=torch.bool),
        advantage=tensor(draw(st.lists(advantage, min_size=sequences, max_size=sequences))),
        group=torch.zeros(sequences, dtype=torch.int64),
        version_made=torch.zeros(tokens, dtype=torch.int32),
        policy_version=0,
    )


def with_tokens(batch: TokenBatch, index: torch.Tensor, sequence_index: torch.Tensor, sequences) -> TokenBatch:
    """Tokens ``index`` of the batch, in sequences of theirs: numbered anew, with the advantages of ``sequences``."""
    assert batch.top is not None and batch.recomputed_log_prob is not None
    return dataclasses.replace(
        batch,
        log_prob=batch.log_prob[index],
        behaviour_log_prob=batch.behaviour_log_prob[index],
        recomputed_log_prob=batch.recomputed_log_prob[index],
        top=TopLogProbs(batch.top.behaviour[index], batch.top.current[index], batch.top.holds_sampled[index]),
        loss_mask=batch.loss_mask[index],
        version_made=batch.version_made[index],
        sequence_index=sequence_index,
        advantage=batch.advantage[sequences],
        group=batch.group[sequences],
    )


def on_policy(batch: TokenBatch) -> TokenBatch:
    assert batch.top is not None
    top = dataclasses.replace(batch.top, behaviour=batch.top.current)
    return dataclasses.replace(batch, behaviour_log_prob=batch.log_prob, recomputed_log_prob=batch.log_prob, top=top)


anything_finite = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.sampled_from([1e4, -1e4, 20.0, -20.0, -18.420681, 0.0]),
)
usual = st.floats(-3, 0, width=32)


@every_objective
@given(batch=batches(anything_finite))
@quick
def test_finite_inputs_give_finite_multipliers(objective, batch):
    assert objective.coefficient(batch).isfinite().all()
    assert objective.multiplier(batch).isfinite().all()
    assert all(torch.isfinite(torch.tensor(v)) for v in objective.statistics(batch).values())


@every_objective
@given(batch=batches(anything_finite))
@quick
def test_no_advantage_or_no_mask_gives_exactly_zero(objective, batch):
    silent = ~batch.loss_mask | (batch.advantage[batch.sequence_index] == 0)
    assert (objective.multiplier(batch)[silent] == 0).all()


@every_objective
@given(batch=batches(usual), data=st.data())
@quick
def test_order_of_sequences_and_tokens_does_not_matter(objective, batch, data):
    sequences = torch.tensor(data.draw(st.permutations(range(len(batch.advantage)))))
    place = torch.argsort(sequences)  # new number of each old sequence
    shuffled = torch.tensor(data.draw(st.permutations(range(len(batch.log_prob)))), dtype=torch.int64)
    order = shuffled[torch.argsort(place[batch.sequence_index][shuffled], stable=True)]
    permuted = with_tokens(batch, order, place[batch.sequence_index][order], sequences)
    torch.testing.assert_close(
        objective.multiplier(permuted), objective.multiplier(batch)[order], rtol=1e-6, atol=1e-30
    )


@every_objective
@given(batch=batches(usual))
@quick
def test_each_sequence_alone_gives_the_same(objective, batch):
    """Objectives of token and sequence scope do not see the split into micro-batches."""
    together = objective.multiplier(batch)
    for sequence in range(len(batch.advantage)):
        mine = batch.sequence_index == sequence
        alone = with_tokens(batch, mine, torch.zeros(int(mine.sum()), dtype=torch.int64), [sequence])
        assert torch.equal(objective.multiplier(alone), together[mine])


@every_objective
def test_all_coefficients_are_one_on_policy(objective, make_batch):
    """So that every method takes the same first step of a rollout."""
    batch = make_batch([[0.0] * 3, [0.0]], [1.0, -1.0], dtype=torch.float32)
    assert objective.coefficient(batch).tolist() == [1.0] * 4
