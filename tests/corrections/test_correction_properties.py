"""Properties that hold for every correction, any finite input, and stacks of them."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged_batches import batches

from vespo_lightning.corrections.base import corrected, correction_statistics
from vespo_lightning.corrections.masked_is import MaskedIs
from vespo_lightning.corrections.opsm import Opsm
from vespo_lightning.corrections.rejection import Geometric, SequenceRejection
from vespo_lightning.corrections.router_shift import RouterShift
from vespo_lightning.corrections.tis import TokenTis
from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.objectives.sequence_is import SequenceIs
from vespo_lightning.objectives.vespo import Vespo

STACKS = {
    "tis": [TokenTis()],
    "mis": [MaskedIs()],
    "geometric": [Geometric()],
    "sequence_rejection": [SequenceRejection()],
    "opsm": [Opsm()],
    "router_shift": [RouterShift()],
    "four": [MaskedIs(), SequenceRejection(), Opsm(), RouterShift()],
    "filter, then weight": [Geometric(0.5, 2.0), TokenTis(), RouterShift()],
}
every_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
quick = settings(max_examples=50, deadline=None, derandomize=True)
anything_finite = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, width=32), st.sampled_from([1e4, -1e4, 20.0, -20.0, 0.0])
)
usual = st.floats(-3, 0, width=32)


def suited(stack, batch: TokenBatch) -> TokenBatch:
    """TIS refuses ``denominator=behaviour``."""
    return replace(batch, denominator="recomputed") if any(isinstance(c, TokenTis) for c in stack) else batch


@every_stack
@given(batch=batches(anything_finite))
@quick
def test_finite_inputs_give_finite_multipliers(stack, batch):
    batch = suited(stack, batch)
    after = corrected(stack, batch)
    for objective in (Vespo(), SequenceIs(), Grpo()):
        assert objective.multiplier(after).isfinite().all()
    assert all(torch.tensor(value).isfinite() for value in correction_statistics(stack, batch).values())


@every_stack
@given(batch=batches(anything_finite))
@quick
def test_tokens_only_leave_the_loss_and_the_data_stay(stack, batch):
    batch = suited(stack, batch)
    after = corrected(stack, batch)
    assert (after.loss_mask <= batch.loss_mask).all()
    for field in fields(TokenBatch):
        if field.name not in ("loss_mask", "engine_log_weight", "final_weight"):
            assert getattr(after, field.name) is getattr(batch, field.name)


@every_stack
@given(batch=batches(usual))
@quick
def test_each_response_alone_gives_the_same(stack, batch):
    """The cut into micro-batches does not show."""
    batch = suited(stack, batch)
    together = Vespo().multiplier(corrected(stack, batch))
    for sequence in range(len(batch.advantage)):
        mine = batch.sequence_index == sequence
        tokens = ("log_prob", "behaviour_log_prob", "recomputed_log_prob", "router_shift", "loss_mask", "version_made")
        alone = replace(
            batch,
            **{name: getattr(batch, name)[mine] for name in tokens},
            sequence_index=torch.zeros(int(mine.sum()), dtype=torch.int64),
            advantage=batch.advantage[sequence : sequence + 1],
            group=batch.group[sequence : sequence + 1],
        )
        assert torch.equal(Vespo().multiplier(corrected(stack, alone)), together[mine])


@every_stack
@given(batch=batches(usual), data=st.data())
@quick
def test_order_of_tokens_does_not_matter(stack, batch, data):
    batch = suited(stack, batch)
    shuffled = torch.tensor(data.draw(st.permutations(range(len(batch.log_prob)))), dtype=torch.int64)
    order = shuffled[torch.argsort(batch.sequence_index[shuffled], stable=True)]
    tokens = ("log_prob", "behaviour_log_prob", "recomputed_log_prob", "router_shift", "loss_mask")
    permuted = replace(batch, **{name: getattr(batch, name)[order] for name in tokens})
    found = Vespo().multiplier(corrected(stack, permuted))
    torch.testing.assert_close(found, Vespo().multiplier(corrected(stack, batch))[order], rtol=1e-6, atol=1e-30)


@every_stack
@given(batch=batches(usual))
@quick
def test_nothing_happens_where_nothing_differs(stack, batch):
    """Engine, trainer and policy agree, the router has not moved: every method takes its plain first step."""
    same = replace(
        suited(stack, batch),
        behaviour_log_prob=batch.log_prob,
        recomputed_log_prob=batch.log_prob,
        router_shift=torch.zeros_like(batch.log_prob),
    )
    after = corrected(stack, same)
    assert torch.equal(after.loss_mask, same.loss_mask)
    for objective in (Vespo(), Grpo()):
        assert torch.equal(objective.multiplier(after), objective.multiplier(same))


def test_statistics_see_what_earlier_corrections_left():
    batch = torch.tensor([3.0, 0.0, 0.9, 0.0])
    mismatch = TokenBatch(
        log_prob=batch,
        behaviour_log_prob=torch.zeros(4),
        recomputed_log_prob=batch,
        sequence_index=torch.tensor([0, 0, 1, 1]),
        loss_mask=torch.ones(4, dtype=torch.bool),
        advantage=torch.ones(2),
        group=torch.zeros(2, dtype=torch.int64),
        version_made=torch.zeros(4, dtype=torch.int32),
        policy_version=0,
        denominator="recomputed",
    )
    alone = correction_statistics([TokenTis()], mismatch)
    after = correction_statistics([SequenceRejection(0.5, 3.0), TokenTis()], mismatch)
    assert alone["correction/tis_truncated_share"] == 0.5
    assert after["correction/sequence_rejected_share"] == 0.5 and after["correction/tis_truncated_share"] == 0.5
    assert after["correction/tis_weight_mean"] == pytest.approx(1.5)
