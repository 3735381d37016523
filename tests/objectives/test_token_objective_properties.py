"""Properties of the token-level objectives that hold for any finite input."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_objective_properties import anything_finite, batches, on_policy, quick, usual, with_tokens

from vespo_lightning.objectives.cispo import Cispo
from vespo_lightning.objectives.dppo import Dppo
from vespo_lightning.objectives.m2po import M2po
from vespo_lightning.objectives.minirl import MiniRl
from vespo_lightning.objectives.minpro import Minpro
from vespo_lightning.objectives.reinforce import Reinforce
from vespo_lightning.objectives.sapo import Sapo

OBJECTIVES = {
    "sapo": Sapo(),
    "sapo, extreme": Sapo(1000.0, 1e-6),
    "cispo": Cispo(),
    "cispo, extreme": Cispo(1.0, 1e8),
    "dppo, tv": Dppo(),
    "dppo, tv, extreme": Dppo(threshold=0.0, cap=None),
    "dppo, kl": Dppo("binary_kl"),
    "dppo, kl, extreme": Dppo("binary_kl", threshold=1e30, cap=1e8),
    "dppo, top-k tv": Dppo("topk_tv"),
    "dppo, top-k tv, extreme": Dppo("topk_tv", threshold=0.0, cap=None),
    "dppo, top-k kl": Dppo("topk_kl"),
    "dppo, top-k kl, extreme": Dppo("topk_kl", threshold=1e30, cap=1e8),
    "m2po": M2po(),
    "m2po, extreme": M2po(1e-30),
    "m2po, adaptive clip": M2po(mode="adaptive_clip"),
    "m2po, adaptive clip, extreme": M2po(1e-30, "adaptive_clip", None, None),
    "m2po, adaptive clip, wide": M2po(1e-30, "adaptive_clip", 1.0, 1e30),
    "minirl": MiniRl(),
    "minirl, extreme": MiniRl(0.0, 0.0, None),
    "minpro": Minpro(),
    "minpro, extreme": Minpro(1.0, 1e8),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
masking = {key: o for key, o in OBJECTIVES.items() if isinstance(o, Dppo | M2po | MiniRl)}
every_masking = pytest.mark.parametrize("objective", masking.values(), ids=masking.keys())


@every_objective
@given(batch=batches(anything_finite))
@quick
def test_finite_inputs_give_finite_numbers(objective, batch):
    assert objective.coefficient(batch).isfinite().all()
    assert (objective.coefficient(batch) >= 0).all()
    assert objective.multiplier(batch).isfinite().all()
    assert all(torch.isfinite(torch.tensor(v)) for v in objective.statistics(batch).values())


@every_objective
@given(batch=batches(anything_finite))
@quick
def test_no_advantage_or_no_mask_gives_exactly_zero(objective, batch):
    silent = ~batch.loss_mask | (batch.advantage[batch.sequence_index] == 0)
    assert (objective.multiplier(batch)[silent] == 0).all()


@every_objective
@given(batch=batches(usual))
@quick
def test_masked_tokens_leave_the_loss_and_every_weight(objective, batch):
    """The others get what they get when the masked ones were never there."""
    kept = batch.loss_mask
    without = with_tokens(batch, kept, batch.sequence_index[kept], range(len(batch.advantage)))
    hidden = dataclasses.replace(batch, log_prob=torch.where(kept, batch.log_prob, float("nan")))
    assert torch.equal(objective.multiplier(hidden)[kept], objective.multiplier(without))


@every_objective
@given(batch=batches(usual), data=st.data())
@quick
def test_order_and_company_of_sequences_do_not_matter(objective, batch, data):
    """Of mini-batch scope only the order does not."""
    sequences = data.draw(st.permutations(range(len(batch.advantage))))
    if objective.scope != "mini-batch":
        sequences = sequences[: data.draw(st.integers(1, len(sequences)))]
    order = torch.cat([(batch.sequence_index == s).nonzero()[:, 0] for s in sequences])
    lengths = torch.tensor([int((batch.sequence_index == s).sum()) for s in sequences])
    chosen = with_tokens(batch, order, torch.repeat_interleave(torch.arange(len(sequences)), lengths), sequences)
    # rtol: the vectorised exponential rounds by its place in the tensor
    torch.testing.assert_close(objective.multiplier(chosen), objective.multiplier(batch)[order], rtol=1e-6, atol=1e-30)


@every_objective
@given(batch=batches(usual))
@quick
def test_on_policy_multiplier_is_that_of_reinforce(objective, batch):
    fresh = on_policy(batch)
    assert torch.equal(objective.multiplier(fresh), Reinforce().multiplier(fresh))


@every_masking
@given(batch=batches(anything_finite))
@quick
def test_masks_never_fire_when_the_ratio_moves_towards_one(objective, batch):
    """The ratio that the mask looks at: MiniRL's is the recomputed one."""
    seen = dataclasses.replace(batch, denominator="recomputed") if isinstance(objective, MiniRl) else batch
    advantage = batch.advantage[batch.sequence_index]
    towards = (advantage.sign() * seen.log_ratio <= 0) & batch.loss_mask
    if isinstance(objective, M2po):  # beyond the clamp of the log-ratio there is no gradient, masked or not
        towards &= seen.log_ratio.abs() <= 20
    assert (objective.coefficient(batch)[towards] > 0).all()


@pytest.mark.parametrize("bounds", [(0.0, 5.0), (0.8, 1.2)])
@given(batch=batches(anything_finite))
@quick
def test_minpro_is_cispo_for_the_first_token_in_the_loss(bounds, batch):
    first = [
        int(mine.nonzero()[0])
        for s in range(len(batch.advantage))
        if (mine := (batch.sequence_index == s) & batch.loss_mask).any()
    ]
    minpro, cispo = Minpro(*bounds).coefficient(batch), Cispo(*bounds).coefficient(batch)
    torch.testing.assert_close(minpro[first], cispo[first], rtol=1e-6, atol=0)
