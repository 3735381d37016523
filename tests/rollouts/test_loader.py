"""The loader: lazy, sized, in step with training, and a state from which it goes on as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Callable

import lightning as L
import numpy as np
import pytest
import torch
from fake_parts import FakePolicy, FakeTask, make_producer, same_samples
from pieces import make_trainer

from vespo_lightning.callbacks.staleness_scheduler import StalenessScheduler
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.advantages import GroupMean, GroupMeanStd, LeaveOneOut
from vespo_lightning.objectives.kl import KlPenalty
from vespo_lightning.rollouts.loader import RolloutLoader
from vespo_lightning.rollouts.sample import MiniBatch
from vespo_lightning.tasks.base import Verdict

UPDATES = 10


class Sizes:
    """Another size for every rollout."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def rollout_size(self, rollout: int) -> int:
        return self.sizes[min(rollout, len(self.sizes) - 1)]


def make_loader(
    folder, sizes=None, policy=None, task=None, updates=UPDATES, passes=1, kl=None, advantage=None, **options
) -> RolloutLoader:
    producer = make_producer(folder, task, policy, **options)
    return RolloutLoader(
        producer,
        sizes or Sizes(4),
        advantage or GroupMean(),
        updates=updates,
        mini_batch_size=8,
        passes=passes,
        kl=kl,
    )


def run(loader: RolloutLoader, policy: FakePolicy, stop: int | None = None) -> list[MiniBatch]:
    """The batches of the remaining updates; the policy moves after each."""
    seen = []
    for batch in loader:
        seen.append(batch)
        policy.update()
        if batch.update + 1 == stop:
            break
    return seen


def same_batches(a: list[MiniBatch], b: list[MiniBatch]) -> bool:
    return len(a) == len(b) and all(
        (x.update, x.rollout, x.position, x.rollout_size, x.in_loss, x.pass_number)
        == (y.update, y.rollout, y.position, y.rollout_size, y.in_loss, y.pass_number)
        and torch.equal(x.advantages, y.advantages)
        and same_samples(x.samples, y.samples)
        for x, y in zip(a, b, strict=True)
    )


def test_nothing_happens_before_the_first_item(tmp_path):
    loader = make_loader(tmp_path)
    iterator = iter(loader)
    assert len(loader) == UPDATES
    assert loader.producer.engine.calls == [] and loader.state_dict()["update"] == 0
    next(iterator)
    assert len(loader.producer.engine.calls) == 4  # one rollout of 8 groups, two groups per call


def test_rollouts_are_cut_into_mini_batches(tmp_path):
    policy = FakePolicy()
    loader = make_loader(tmp_path, policy=policy)
    batches = run(loader, policy)
    assert [b.update for b in batches] == list(range(10))
    assert [b.rollout for b in batches] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert [b.position for b in batches] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert [b.rollout_size for b in batches] == [4, 4, 4, 4, 4, 4, 4, 4, 2, 2]  # the last one is shorter
    assert [bool(b.rollout_metrics) for b in batches] == [b.position == 0 for b in batches]
    samples = [s for b in batches for s in b.samples]
    assert [s.prompt_id for s in samples[::4]] == [f"{i}+{i}" for i in range(20)]
    assert [s.version_runs[0][0] for s in samples] == [0] * 32 + [4] * 32 + [8] * 16
    for batch in batches:
        assert len({s.group_id for s in batch.samples}) == 2
        wanted = GroupMean()(batch.rewards, batch.group_index())
        assert batch.advantages.dtype == torch.float32 and torch.equal(batch.advantages, wanted)
        assert batch.advantages.abs().sum() > 0
    assert list(loader) == []


def test_on_policy(tmp_path):
    """N = 1: a rollout, and new weights, for every update."""
    policy = FakePolicy()
    batches = run(make_loader(tmp_path, Sizes(1), policy), policy)
    assert [(b.rollout, b.position, b.rollout_size) for b in batches] == [(i, 0, 1) for i in range(10)]
    assert [b.samples[0].version_runs[0][0] for b in batches] == list(range(10))
    assert all(b.rollout_metrics for b in batches)


def test_sizes_may_change_from_rollout_to_rollout(tmp_path):
    policy = FakePolicy()
    batches = run(make_loader(tmp_path, Sizes(1, 3, 2, 9), policy), policy)
    assert [b.rollout_size for b in batches] == [1, 3, 3, 3, 2, 2, 4, 4, 4, 4]
    assert [b.position for b in batches] == [0, 0, 1, 2, 0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize(("truncated", "masked"), [("keep", False), ("penalise", False), ("mask", True)])
def test_truncated_samples_leave_the_loss_when_masked(tmp_path, truncated, masked):
    batch = next(iter(make_loader(tmp_path, truncated=truncated)))
    assert any(s.truncated for s in batch.samples)
    assert batch.in_loss == [not (masked and s.truncated) for s in batch.samples]


@pytest.mark.parametrize(
    ("stop", "kept"), [*((stop, True) for stop in range(1, UPDATES)), *((stop, False) for stop in (4, 7))]
)
def test_going_on_from_any_update(tmp_path, stop, kept):
    """Mid-rollout too; where a rollout has just ended, without its chunks as well (``kept`` is False)."""
    policy = FakePolicy()
    whole = run(make_loader(tmp_path / "whole", Sizes(4, 3), policy), policy)

    policy = FakePolicy()
    first = make_loader(tmp_path / "a", Sizes(4, 3), policy)
    seen = run(first, policy, stop)
    state = json.loads(json.dumps(first.state_dict()))  # plain values only

    resumed = make_loader(tmp_path / ("a" if kept else "b"), Sizes(4, 3), policy)
    resumed.load_state_dict(state)
    rest = run(resumed, policy)
    assert same_batches(seen + rest, whole)
    made = sum(len(b.samples) for b in rest if b.rollout > seen[-1].rollout)
    assert sum(map(len, resumed.producer.engine.calls)) == made  # nothing is made twice


def test_a_state_is_of_the_moment_it_was_taken(tmp_path):
    loader = make_loader(tmp_path)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    frozen = json.dumps(state)
    next(iterator)
    assert json.dumps(state) == frozen


def test_a_rollout_in_use_that_is_gone(tmp_path):
    policy = FakePolicy()
    loader = make_loader(tmp_path / "a", policy=policy)
    run(loader, policy, stop=2)
    resumed = make_loader(tmp_path / "empty", policy=policy)
    resumed.load_state_dict(loader.state_dict())
    with pytest.raises(UserError, match="chunk 0 of rollout 0 is missing"):
        next(iter(resumed))


def test_reward_errors_are_part_of_the_state(tmp_path):
    policy = FakePolicy()
    loader = make_loader(tmp_path, policy=policy, task=FakeTask(errors_on="3"))
    run(loader, policy, stop=5)
    counted = loader.producer.reward_errors
    assert counted > 0
    resumed = make_loader(tmp_path, policy=policy, task=FakeTask(errors_on="3"))
    resumed.load_state_dict(loader.state_dict())
    next(iter(resumed))
    assert resumed.producer.reward_errors == counted


@pytest.mark.parametrize("size", [0, 2, 6, -4])
def test_mini_batches_hold_whole_groups(tmp_path, size):
    with pytest.raises(UserError, match=rf"^mini_batch_size={size} is not a multiple of rollout\.group_size=4"):
        RolloutLoader(make_producer(tmp_path), Sizes(1), GroupMean(), updates=1, mini_batch_size=size)


# ---- several passes --------------------------------------------------------------------------------------------


def test_passes_repeat_the_mini_batches_in_order(tmp_path):
    policy = FakePolicy()
    loader = make_loader(tmp_path, Sizes(3), policy, updates=14, passes=2)
    batches = run(loader, policy)
    assert [b.update for b in batches] == list(range(14))
    assert [b.rollout for b in batches] == [0] * 6 + [1] * 6 + [2] * 2
    assert [b.pass_number for b in batches] == [0, 0, 0, 1, 1, 1] * 2 + [0, 0]
    assert [b.position for b in batches] == [0, 1, 2, 3, 4, 5] * 2 + [0, 1]  # updates since the rollout was made
    assert [b.rollout_size for b in batches] == [3] * 12 + [2] * 2  # what two updates can use of the last rollout
    assert [bool(b.rollout_metrics) for b in batches] == [b.position == 0 for b in batches]
    for first, second in zip(batches[:3], batches[3:6], strict=True):
        assert same_samples(first.samples, second.samples) and torch.equal(first.advantages, second.advantages)
    made = [b.samples[0].version_runs[0][0] for b in batches]
    assert made == [0] * 6 + [6] * 6 + [12] * 2
    assert sum(map(len, loader.producer.engine.calls)) == 8 * (3 + 3 + 2)


def test_a_run_may_end_within_a_pass(tmp_path):
    """The rollout is cut to the updates that are left, not to those left over by its passes."""
    policy = FakePolicy()
    batches = run(make_loader(tmp_path, Sizes(3), policy, updates=5, passes=3), policy)
    assert [(b.pass_number, b.rollout_size) for b in batches] == [(0, 3)] * 3 + [(1, 3)] * 2


@pytest.mark.parametrize("stop", range(1, UPDATES))
def test_going_on_within_a_pass(tmp_path, stop):
    policy = FakePolicy()
    whole = run(make_loader(tmp_path / "whole", Sizes(2, 1), policy, passes=3), policy)
    assert {b.rollout for b in whole} == {0, 1, 2}
    policy = FakePolicy()
    first = make_loader(tmp_path / "a", Sizes(2, 1), policy, passes=3)
    seen = run(first, policy, stop)
    resumed = make_loader(tmp_path / "a", Sizes(2, 1), policy, passes=3)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = run(resumed, policy)
    assert same_batches(seen + rest, whole)
    made = {b.rollout for b in rest} - {seen[-1].rollout}
    assert sum(map(len, resumed.producer.engine.calls)) == sum(8 * (2, 1, 1)[rollout] for rollout in made)


@pytest.mark.parametrize("passes", [0, -1])
def test_no_pass_at_all_is_refused(tmp_path, passes):
    with pytest.raises(UserError, match=rf"^rollout\.passes={passes} "):
        make_loader(tmp_path, passes=passes)


# ---- KL penalty ------------------------------------------------------------------------------------------------


def reward_k1(coefficient: float) -> KlPenalty:
    return KlPenalty(coefficient, "k1", "reward")


@pytest.mark.parametrize("advantage", [GroupMean(), LeaveOneOut(), GroupMeanStd()], ids=lambda a: a.name)
def test_a_penalty_in_the_reward_moves_advantages(tmp_path, advantage):
    plain = next(iter(make_loader(tmp_path, advantage=advantage, reference=True)))
    batch = next(iter(make_loader(tmp_path, advantage=advantage, reference=True, kl=reward_k1(0.3))))
    assert same_samples(batch.samples, plain.samples) and torch.equal(batch.rewards, plain.rewards)  # task rewards
    penalised = [
        s.reward - 0.3 * sum((s.behaviour_log_probs.astype(float) - s.reference_log_probs.astype(float)).tolist())
        for s in batch.samples
    ]
    wanted = advantage(torch.tensor(penalised, dtype=torch.float64), batch.group_index())
    assert torch.allclose(batch.advantages, wanted, rtol=1e-6, atol=1e-6)
    assert (batch.advantages - plain.advantages).abs().max() > 0.05


def test_equal_rewards_far_from_the_reference_are_penalised(tmp_path):
    """A group that the task says nothing about still says who went astray."""

    class Constant(FakeTask):
        def verify(self, problems, responses):
            return [Verdict(1.0)] * len(responses)

    plain = next(iter(make_loader(tmp_path, task=Constant(), reference=True)))
    batch = next(iter(make_loader(tmp_path, task=Constant(), reference=True, kl=reward_k1(0.1))))
    assert plain.advantages.abs().max() == 0
    assert (batch.advantages != 0).all()
    for group in (slice(0, 4), slice(4, 8)):
        order = sorted(batch.reward_penalty[group].tolist(), reverse=True)
        assert [order.index(p) for p in batch.reward_penalty[group].tolist()] == [
            sorted(batch.advantages[group].tolist()).index(a) for a in batch.advantages[group].tolist()
        ]


@pytest.mark.parametrize("kl", [KlPenalty(0.5, "k3", "loss"), KlPenalty(0.5, "k2", "loss"), reward_k1(0.0)])
def test_a_penalty_in_the_loss_leaves_advantages(tmp_path, kl):
    plain = next(iter(make_loader(tmp_path, reference=True)))
    batch = next(iter(make_loader(tmp_path, reference=True, kl=kl)))
    assert torch.equal(batch.advantages, plain.advantages)


def test_tokens_not_written_by_the_policy_cost_nothing(tmp_path):
    loader = make_loader(tmp_path, reference=True, kl=reward_k1(0.3))
    batch = next(iter(loader))
    for sample in loader._current.samples:
        sample.loss_mask[0] = False
        sample.behaviour_log_probs[0] = np.nan
    loader._position = 0
    masked = loader._next()
    for i, sample in enumerate(masked.samples):
        rest = sample.behaviour_log_probs[1:].astype(float) - sample.reference_log_probs[1:].astype(float)
        assert masked.reward_penalty[i].item() == pytest.approx(0.3 * rest.sum())
    assert not torch.equal(masked.reward_penalty, batch.reward_penalty)


def test_a_penalty_needs_a_reference(tmp_path):
    with pytest.raises(UserError, match=r"needs a producer with reference=True"):
        make_loader(tmp_path, kl=reward_k1(0.1))


@pytest.mark.parametrize("stop", [2, 4])
def test_another_reference_is_refused_on_resume(tmp_path, stop):
    """Within a rollout and between two."""
    policy = FakePolicy()
    loader = make_loader(tmp_path, policy=policy, reference=True, kl=reward_k1(0.1))
    seen = run(loader, policy, stop)
    state = loader.state_dict()
    policy.reference = -3.0
    resumed = make_loader(tmp_path, policy=policy, reference=True, kl=reward_k1(0.1))
    resumed.load_state_dict(state)
    with pytest.raises(UserError, match=r"^kl\.reference .* \(checksum 3, it was 2\); put them back and resume"):
        next(iter(resumed))
    assert resumed.producer.engine.calls == []
    policy.reference = -2.0
    resumed.load_state_dict(state)
    assert [b.update for b in [*seen, *run(resumed, policy)]] == list(range(UPDATES))


# ---- under Lightning -------------------------------------------------------------------------------------------


class Stepping(L.LightningModule):
    """Updates a fake policy and notes what it was trained on."""

    def __init__(self, policy: FakePolicy, after: Callable[[int], None] = lambda update: None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy, self.after = policy, after
        self.seen: list[MiniBatch] = []

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def training_step(self, batch: MiniBatch, batch_idx: int) -> None:
        # lock step: the sample's version is the number of updates made before its rollout began
        assert batch.samples[0].version_runs[0][0] == self.policy.policy_version - batch.position
        self.seen.append(batch)
        self.policy.update()
        self.after(batch.update)

    def configure_optimizers(self):
        return None

    def on_save_checkpoint(self, checkpoint):
        checkpoint["fake"] = {"weight": self.policy.weight, "version": self.policy.policy_version}

    def on_load_checkpoint(self, checkpoint):
        self.policy.weight, self.policy.policy_version = checkpoint["fake"]["weight"], checkpoint["fake"]["version"]


@pytest.mark.parametrize("n", [1, 4])
def test_in_lock_step_under_lightning(tmp_path, n):
    """Lightning asks for an item only when the one before has been trained on."""
    policy = FakePolicy()
    loader = make_loader(tmp_path, StalenessScheduler(n), policy)
    module = Stepping(policy)
    make_trainer().fit(module, loader)
    assert [b.update for b in module.seen] == list(range(UPDATES))


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_lightning_saves_and_restores_the_position(tmp_path, stop):
    policy = FakePolicy()
    whole = run(make_loader(tmp_path / "whole", policy=policy), policy)

    class SaveAndDie(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch.update + 1 == stop:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")
            if batch.update == stop:  # one update after the checkpoint, which has to be made again
                raise RuntimeError("killed")

    policy = FakePolicy()
    module = Stepping(policy)
    with pytest.raises(RuntimeError, match="killed"):
        make_trainer([SaveAndDie()]).fit(module, make_loader(tmp_path / "run", policy=policy))
    policy = FakePolicy()
    resumed = Stepping(policy)
    make_trainer().fit(resumed, make_loader(tmp_path / "run", policy=policy), ckpt_path=tmp_path / "saved.ckpt")
    assert same_batches(module.seen[:stop] + resumed.seen, whole)
