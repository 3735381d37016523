"""Groups that teach nothing are exchanged for others, and a killed run exchanges the same ones."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from fake_parts import FakePolicy, FakeTask, UnevenTask, make_producer, same_samples
from safetensors import safe_open

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.advantages import GroupMean
from vespo_lightning.rollouts.gathering import Rollout
from vespo_lightning.rollouts.loader import RolloutLoader
from vespo_lightning.rollouts.producer import RolloutProducer
from vespo_lightning.rollouts.sample import MiniBatch, Sample
from vespo_lightning.tasks.base import Verdict
from vespo_lightning.tasks.prompts import PromptStream

GROUPS = 7


class Hopeless(FakeTask):
    def verify(self, problems, responses):
        return [Verdict(0.0)] * len(responses)


def dynamic(folder, task: FakeTask | None = None, **options) -> RolloutProducer:
    return make_producer(folder, task or UnevenTask(), **{"dynamic_sampling": True} | options)


def produce(producer: RolloutProducer, rollout: int = 0, first: int = 0) -> tuple[Rollout, PromptStream]:
    stream = PromptStream(producer.task, producer.seed)
    stream.cursor = first
    return producer.produce(rollout, stream.take(GROUPS), stream.take), stream


def groups_of(samples: list[Sample], size: int = 4) -> list[list[Sample]]:
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def is_uniform(group: list[Sample]) -> bool:
    return len({s.reward for s in group}) == 1


def by_brute_force(folder, max_refills: int) -> tuple[list[list[Sample]], int, int]:
    """The rollout, how many prompts it took and in how many rounds: each prompt's group is made on its own."""
    producer = make_producer(folder, UnevenTask(), chunk_groups=1)

    def group(place: int) -> list[Sample]:
        return producer.produce(place, [(place, producer.task.train_problem(3, place))]).samples

    held, taken, rounds = [group(place) for place in range(GROUPS)], GROUPS, 0
    while rounds < max_refills and any(map(is_uniform, held)):
        for place, current in enumerate(held):
            if is_uniform(current):
                held[place] = group(taken)
                taken += 1
        rounds += 1
    return held, taken, rounds


@pytest.mark.parametrize("max_refills", [0, 1, 2, 8])
@pytest.mark.parametrize("chunk_groups", [1, 2, 64])
def test_equals_brute_force(tmp_path, max_refills, chunk_groups):
    made, stream = produce(dynamic(tmp_path / "a", max_refills=max_refills, chunk_groups=chunk_groups))
    held, taken, rounds = by_brute_force(tmp_path / "b", max_refills)
    assert stream.cursor == taken
    for ours, theirs in zip(groups_of(made.samples), held, strict=True):
        assert {s.group_id for s in ours} == {f"0/{theirs[0].group_id.split('/')[0]}"}  # numbered as generated
        for a, b in zip(ours, theirs, strict=True):
            b.group_id = a.group_id
        assert same_samples(ours, theirs)
    assert made.metrics["reward/refill_rounds"] == rounds
    assert made.metrics["reward/dropped_groups"] == taken - GROUPS
    assert made.metrics["reward/refill_shortfall"] == sum(map(is_uniform, held))
    if max_refills == 8:
        assert rounds > 1 and not any(map(is_uniform, held))


def test_metrics_are_of_everything_generated(tmp_path):
    """Those of what is kept would be biased: hopeless and mastered problems are gone from it."""
    producer = dynamic(tmp_path)
    made, stream = produce(producer)
    rewards = [
        s.reward
        for chunk in range(100)
        for s in (producer.store.read(0, chunk, stored_identity(tmp_path, chunk)) or ([],))[0]
    ]
    assert len(rewards) == 4 * stream.cursor
    uniform = [len(set(rewards[i : i + 4])) == 1 for i in range(0, len(rewards), 4)]
    assert made.metrics["reward/rollout_mean"] == pytest.approx(sum(rewards) / len(rewards))
    assert made.metrics["reward/uniform_group_share"] == pytest.approx(sum(uniform) / len(uniform))
    assert sum(uniform) > 0 and not any(map(is_uniform, groups_of(made.samples)))


def stored_identity(folder, chunk: int) -> dict[str, object]:
    path = folder / "rollout-000000" / f"chunk-{chunk:03d}.safetensors"
    if not path.exists():
        return {}
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["identity"])


def test_without_it_nothing_changes(tmp_path):
    plain, stream = produce(make_producer(tmp_path / "a", UnevenTask()))
    assert stream.cursor == GROUPS
    assert not {name for name in plain.metrics if "refill" in name or "dropped" in name}
    assert any(map(is_uniform, groups_of(plain.samples)))
    first, _ = produce(dynamic(tmp_path / "b", max_refills=0))
    assert same_samples(plain.samples, first.samples)


def test_nothing_but_uniform_groups_ends(tmp_path):
    """The rollout is full all the same, with whole groups of different prompts."""
    made, stream = produce(dynamic(tmp_path, Hopeless(), max_refills=3))
    assert stream.cursor == 4 * GROUPS
    assert made.metrics["reward/refill_shortfall"] == GROUPS and made.metrics["reward/refill_rounds"] == 3
    assert made.metrics["reward/uniform_group_share"] == 1
    assert set(Counter(s.group_id for s in made.samples).values()) == {4} and len(made.samples) == 4 * GROUPS


def test_enough_at_once_takes_no_further_prompt(tmp_path):
    made, stream = produce(dynamic(tmp_path, FakeTask()))  # rewards in eighths
    assert stream.cursor == GROUPS and made.metrics["reward/refill_rounds"] == 0


def test_reward_errors_of_dropped_groups_count(tmp_path):
    producer = dynamic(tmp_path, UnevenTask(errors_on="3"))
    made, _ = produce(producer)
    everything = made.metrics["reward/errors"]
    assert producer.reward_errors == everything > sum(s.reward_error is not None for s in made.samples)
    with pytest.raises(UserError, match="max_reward_errors"):
        produce(dynamic(tmp_path / "b", UnevenTask(errors_on="3", max_reward_errors=int(everything) - 1)))


# ---- killed and resumed ----------------------------------------------------------------------------------------


def test_killed_after_any_chunk(tmp_path):
    """What is on the disk is not made again, what is not is made as it would have been."""
    whole, stream = produce(dynamic(tmp_path / "whole"))
    count = len(list((tmp_path / "whole").rglob("*.safetensors")))
    assert count > 5
    for after in range(count):
        folder = tmp_path / f"killed-{after}"
        killed = dynamic(folder)
        generate = killed.engine.generate

        def dies(requests, sampling, engine=killed.engine, generate=generate, after=after):
            if len(engine.calls) == after:
                raise KeyboardInterrupt
            return generate(requests, sampling)

        killed.engine.generate = dies
        with pytest.raises(KeyboardInterrupt):
            produce(killed)
        resumed = dynamic(folder)
        made, again = produce(resumed)
        assert same_samples(made.samples, whole.samples) and made.identity == whole.identity
        assert again.cursor == stream.cursor and len(resumed.engine.calls) == count - after
        assert resumed.reward_errors == 0


def test_reloading_generates_nothing(tmp_path):
    whole, _ = produce(dynamic(tmp_path))
    identity = json.loads(json.dumps(whole.identity))
    assert len(identity["refills"]) > 1
    reader = dynamic(tmp_path, Hopeless(), max_refills=0)  # neither asked again nor looked at
    assert same_samples(reader.reload(0, identity).samples, whole.samples)
    assert reader.engine.calls == []
    last = sorted(tmp_path.rglob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(UserError, match=r"^chunk \d+ of rollout 0 is missing"):
        reader.reload(0, identity)


def test_chunks_of_other_refills_are_not_used(tmp_path):
    """The same first prompts, other ones after them: the stream of the leftover went on differently."""
    produce(dynamic(tmp_path))
    producer = dynamic(tmp_path)
    stream, other = PromptStream(producer.task, 3), PromptStream(producer.task, 3)
    other.cursor = 100
    made = producer.produce(0, stream.take(GROUPS), other.take)
    assert len(producer.engine.calls) > 0
    apart = dynamic(tmp_path / "b")
    stream, other = PromptStream(apart.task, 3), PromptStream(apart.task, 3)
    other.cursor = 100
    assert same_samples(made.samples, apart.produce(0, stream.take(GROUPS), other.take).samples)


class Sizes:
    def rollout_size(self, rollout: int) -> int:
        return 3


def make_loader(folder, policy: FakePolicy) -> RolloutLoader:
    producer = dynamic(folder, policy=policy)
    return RolloutLoader(producer, Sizes(), GroupMean(), updates=10, mini_batch_size=8, passes=2)


def run(loader: RolloutLoader, policy: FakePolicy, stop: int | None = None) -> list[MiniBatch]:
    seen = []
    for batch in loader:
        seen.append(batch)
        policy.update()
        if batch.update + 1 == stop:
            break
    return seen


def test_prompts_dropped_are_not_posed_again(tmp_path):
    policy = FakePolicy()
    loader = make_loader(tmp_path, policy)
    batches = run(loader, policy)
    generated = sum(len(call) for call in loader.producer.engine.calls) // 4
    assert loader.state_dict()["prompts"]["cursor"] == generated > 2 * 6
    seeds = [request.seed for call in loader.producer.engine.calls for request in call]
    assert len(set(seeds)) == len(seeds)
    for batch in batches:
        assert not any(map(is_uniform, groups_of(batch.samples)))
        assert len(torch.unique(batch.group_index())) == 2


@pytest.mark.parametrize("stop", range(1, 10))
def test_a_run_goes_on_from_any_update(tmp_path, stop):
    """In the middle of a pass, between passes, between rollouts."""
    policy = FakePolicy()
    whole = make_loader(tmp_path / "whole", policy)
    wanted = run(whole, policy)
    policy = FakePolicy()
    first = make_loader(tmp_path / "a", policy)
    seen = run(first, policy, stop)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = make_loader(tmp_path / "a", policy)
    resumed.load_state_dict(state)
    seen += run(resumed, policy)
    for a, b in zip(seen, wanted, strict=True):
        assert (a.update, a.rollout, a.position, a.pass_number) == (b.update, b.rollout, b.position, b.pass_number)
        assert same_samples(a.samples, b.samples) and torch.equal(a.advantages, b.advantages)
    assert resumed.state_dict() == whole.state_dict()
