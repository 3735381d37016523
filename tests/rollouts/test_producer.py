"""Rollouts of fake parts: who is asked what, what is stored, and what becomes of rewards."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from fake_parts import FakePolicy, FakeTask, make_producer, same_samples
from pieces import tokenizer

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.engine import SamplingParams
from vespo_lightning.rollouts.evaluation import EVALUATION_VERSION
from vespo_lightning.rollouts.producer import RolloutProducer
from vespo_lightning.rollouts.randomness import sample_seed
from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.rollouts.weight_check import StaleWeightsError
from vespo_lightning.tasks.base import Problem, Verdict


def prompts(first: int = 0, count: int = 5) -> list[tuple[int, Problem]]:
    task = FakeTask()
    return [(place, task.train_problem(3, place)) for place in range(first, first + count)]


def produce(producer: RolloutProducer, rollout: int = 0, first: int = 0, count: int = 5) -> list[Sample]:
    return producer.produce(rollout, prompts(first, count)).samples


def test_groups_in_the_order_of_the_prompts(tmp_path):
    producer = make_producer(tmp_path)
    samples = produce(producer, rollout=2, first=48)
    assert [s.prompt_id for s in samples[::4]] == ["48+48", "49+49", "0+0", "1+1", "2+2"]
    assert [s.group_id for s in samples] == [f"2/{g}" for g in range(5) for _ in range(4)]
    assert [s.index for s in samples] == [0, 1, 2, 3] * 5
    assert [len(call) for call in producer.engine.calls] == [8, 8, 4]  # chunks of two groups
    assert producer.engine.resets == 3  # no chunk profits from the prefixes of another
    assert set(producer.engine.sampling) == {SamplingParams(1.0, 6)}
    for sample in samples:
        assert tokenizer().decode(sample.prompt_ids.tolist()) == sample.prompt_id + "="
        assert sample.text == tokenizer().decode(sample.response_ids.tolist(), skip_special_tokens=True)
        assert sample.reward == sum(map(ord, sample.text)) % 8 / 8 and sample.reward_error is None
        assert sample.prompt_ids.dtype == sample.response_ids.dtype == np.int32
        assert sample.behaviour_log_probs.dtype == np.float32 and sample.recomputed_log_probs is None
        assert sample.loss_mask.all() and len(sample.loss_mask) == len(sample.response_ids)
        assert sample.version_runs == [(0, len(sample.response_ids))]
        assert sample.truncated == (sample.response_ids[-1] != 1)
    assert {s.truncated for s in samples} == {True, False}


def test_seeds_name_the_run_the_place_the_sample_and_the_version(tmp_path):
    policy = FakePolicy()
    producer = make_producer(tmp_path, policy=policy)
    first = produce(producer, first=48)
    policy.update()
    second = produce(producer, rollout=1, first=48)
    for version, samples in enumerate((first, second)):
        wanted = [
            sample_seed(3, 48 + g, s.prompt_id, s.index, version) for g in range(5) for s in samples[4 * g : 4 * g + 4]
        ]
        assert [s.seed for s in samples] == wanted
        assert [s.version_runs[0][0] for s in samples] == [version] * 20
    assert [r.seed for call in producer.engine.calls for r in call] == [s.seed for s in first + second]
    assert len({s.seed for s in first + second}) == 40
    again = produce(producer, rollout=2, first=98)  # the same problems, later in the stream
    assert not {s.seed for s in again} & {s.seed for s in first + second}


def test_a_rollout_is_made_with_the_weights_of_the_moment(tmp_path):
    policy = FakePolicy()
    producer = make_producer(tmp_path, policy=policy)
    for rollout in range(3):
        made = producer.produce(rollout, prompts())
        assert producer.engine.version == policy.policy_version == rollout
        assert producer.engine.weight.tolist() == [rollout + 1.0] * 3
        assert made.identity["version"] == rollout
        assert made.metrics["mismatch/canary_max"] == 0
        assert made.metrics["performance/sync_seconds"] > 0
        policy.update()


def test_an_engine_that_keeps_old_weights_stops_the_run(tmp_path):
    policy = FakePolicy()
    producer = make_producer(tmp_path, policy=policy)
    produce(producer)
    policy.update()
    load = producer.engine.load_weights

    def stale(tensors, version):
        load(((name, tensor - 1) for name, tensor in tensors), version)

    producer.engine.load_weights = stale
    with pytest.raises(StaleWeightsError):
        produce(producer, rollout=1)


@pytest.mark.parametrize("chunk_groups", [1, 2, 64])
def test_chunks_change_no_sample(tmp_path, chunk_groups):
    usual = produce(make_producer(tmp_path / "a"))
    assert same_samples(produce(make_producer(tmp_path / "b", chunk_groups=chunk_groups)), usual)


def test_what_is_on_the_disk_is_not_made_again(tmp_path):
    """A run killed between two chunks makes the others, and the rollout is the same."""
    whole = produce(make_producer(tmp_path))
    (tmp_path / "rollout-000000" / "chunk-001.safetensors").unlink()
    producer = make_producer(tmp_path)
    made = producer.produce(0, prompts())
    assert [len(call) for call in producer.engine.calls] == [8]
    assert same_samples(made.samples, whole)
    assert same_samples(producer.reload(0, made.identity).samples, whole)
    assert len(producer.engine.calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"temperature": 0.5},
        {"max_new_tokens": 5},
        {"group_size": 2},
        {"truncated": "penalise"},
        {"truncated_reward": -1.0},
        {"shuffle_rewards": True},
        {"recompute": True},
        {"top_p": 0.9},
        {"top_k": 3},
        {"top_log_probs": 2},
        {"reference": True},
    ],
)
def test_other_settings_make_a_rollout_anew(tmp_path, change):
    produce(make_producer(tmp_path))
    producer = make_producer(tmp_path, **change)
    produce(producer)
    assert len(producer.engine.calls) == 3


@pytest.mark.parametrize("chunk_groups", [1, 5])
def test_another_chunk_size_loses_no_group(tmp_path, chunk_groups):
    usual = produce(make_producer(tmp_path))
    assert same_samples(produce(make_producer(tmp_path, chunk_groups=chunk_groups)), usual)


@pytest.mark.parametrize("changed", [{"prompt": "1+2="}, {"reference": "3"}])
def test_other_problems_make_a_rollout_anew(tmp_path, changed):
    """In the same places of the stream and under the same names: the task was given other settings."""
    produce(make_producer(tmp_path))
    producer = make_producer(tmp_path)
    producer.produce(0, [(place, dataclasses.replace(problem, **changed)) for place, problem in prompts()])
    assert len(producer.engine.calls) == 3


def test_other_weights_make_a_rollout_anew(tmp_path):
    """Also under the same version: a leftover of another history."""
    produce(make_producer(tmp_path))
    policy = FakePolicy()
    producer = make_producer(tmp_path, policy=policy)
    policy.weight = policy.weight * 2
    samples = produce(producer)
    assert len(producer.engine.calls) == 3
    assert not same_samples(samples, produce(make_producer(tmp_path / "b")))


def test_a_missing_chunk_cannot_be_reloaded(tmp_path):
    producer = make_producer(tmp_path)
    identity = producer.produce(0, prompts()).identity
    (tmp_path / "rollout-000000" / "chunk-002.safetensors").unlink()
    with pytest.raises(UserError, match=r"^chunk 2 of rollout 0 is missing in .*put the folder back"):
        producer.reload(0, identity)


def test_truncated_responses(tmp_path):
    keep = produce(make_producer(tmp_path / "keep"))
    mask = produce(make_producer(tmp_path / "mask", truncated="mask"))
    penalise = produce(make_producer(tmp_path / "penalise", truncated="penalise", truncated_reward=-0.5))
    assert same_samples(keep, mask)  # masking is the loader's
    assert any(s.truncated for s in keep)
    for a, b in zip(keep, penalise, strict=True):
        assert b.reward == (-0.5 if a.truncated else a.reward)
    made = make_producer(tmp_path / "keep").produce(0, prompts())
    assert made.metrics["reward/truncated_share"] == pytest.approx(sum(s.truncated for s in keep) / 20)


def test_shuffled_rewards_are_the_same_rewards_elsewhere(tmp_path):
    """Only within a chunk, only rewards, and in the same order every time."""
    plain = produce(make_producer(tmp_path / "a"))
    shuffled = produce(make_producer(tmp_path / "b", shuffle_rewards=True))
    assert same_samples(shuffled, produce(make_producer(tmp_path / "c", shuffle_rewards=True)))
    moved = 0
    for start, stop in ((0, 8), (8, 16), (16, 20)):
        a, b = plain[start:stop], shuffled[start:stop]
        assert sorted(s.reward for s in a) == sorted(s.reward for s in b)
        moved += sum(x.reward != y.reward for x, y in zip(a, b, strict=True))
    assert moved > 8
    for a, b in zip(plain, shuffled, strict=True):
        b.reward = a.reward
    assert same_samples(plain, shuffled)


def test_recomputed_log_probs_are_the_trainers(tmp_path):
    made = make_producer(tmp_path, recompute=True).produce(0, prompts())
    for sample in made.samples:
        assert sample.recomputed_log_probs.tolist() == [-1.0] * len(sample.response_ids)
    assert made.metrics["performance/recompute_seconds"] >= 0


def test_what_is_asked_of_the_engine_is_kept(tmp_path):
    """Also by the store, and nothing of it changes the responses of this engine."""
    producer = make_producer(tmp_path, temperature=0.7, top_p=0.9, top_k=20, top_log_probs=3)
    made = producer.produce(0, prompts())
    assert set(producer.engine.sampling) == {SamplingParams(0.7, 6, 0.9, 20, 3)}
    for sample in made.samples:
        assert sample.top_ids.shape == sample.top_log_probs.shape == (len(sample.response_ids), 3)
        assert (sample.top_ids.dtype, sample.top_log_probs.dtype) == (np.int32, np.float32)
    assert same_samples(producer.reload(0, made.identity).samples, made.samples)
    plain = produce(make_producer(tmp_path / "plain"))
    assert all(sample.top_ids is None and sample.top_log_probs is None for sample in plain)
    assert [s.text for s in plain] == [s.text for s in made.samples]


def test_reference_log_probs_are_stored(tmp_path):
    producer = make_producer(tmp_path, reference=True)
    made = producer.produce(0, prompts())
    for sample in made.samples:
        assert sample.reference_log_probs.tolist() == (-2 * sample.response_ids.astype(np.float32) / 24).tolist()
    assert made.metrics["performance/reference_seconds"] >= 0
    assert same_samples(producer.reload(0, made.identity).samples, made.samples)
    plain = make_producer(tmp_path / "plain").produce(0, prompts())
    assert plain.samples[0].reference_log_probs is None and plain.identity["reference"] is None
    assert "performance/reference_seconds" not in plain.metrics


def test_another_reference_makes_a_rollout_anew(tmp_path):
    """Its chunks hold log-probs that are not those of the reference any more."""
    produce(make_producer(tmp_path, reference=True))
    producer = make_producer(tmp_path, policy=FakePolicy(reference=-3.0), reference=True)
    samples = produce(producer)
    assert len(producer.engine.calls) == 3
    assert samples[0].reference_log_probs.tolist() == (-3 * samples[0].response_ids.astype(np.float32) / 24).tolist()


def errors_in(samples: list[Sample]) -> int:
    return sum("3" in sample.text for sample in samples)


def test_reward_errors_are_counted(tmp_path):
    task = FakeTask(errors_on="3")
    producer = make_producer(tmp_path, task)
    first, second = producer.produce(0, prompts()), producer.produce(1, prompts(5))
    count = [errors_in(rollout.samples) for rollout in (first, second)]
    assert 0 < count[0] < 20
    assert [first.metrics["reward/errors"], second.metrics["reward/errors"]] == count
    assert producer.reward_errors == sum(count)
    for sample in first.samples:
        assert (sample.reward_error is not None) == ("3" in sample.text)


def test_the_limit_of_reward_errors(tmp_path):
    """Reaching it is allowed; the sentence names a problem and its error."""
    total = errors_in(make_producer(tmp_path / "a", FakeTask(errors_on="3")).produce(0, prompts()).samples)
    make_producer(tmp_path / "b", FakeTask(errors_on="3", max_reward_errors=total)).produce(0, prompts())
    producer = make_producer(tmp_path / "c", FakeTask(errors_on="3", max_reward_errors=total - 1))
    sentence = (
        rf"^task\.max_reward_errors={total - 1} is exceeded: {total} responses .* of prompt \d\+\d: the reward function"
    )
    with pytest.raises(UserError, match=sentence):
        producer.produce(0, prompts())


def test_the_limit_counts_earlier_rollouts(tmp_path):
    task = FakeTask(errors_on="3", max_reward_errors=10**6)
    producer = make_producer(tmp_path, task)
    first = errors_in(producer.produce(0, prompts()).samples)
    task.max_reward_errors = first
    with pytest.raises(UserError, match=f"max_reward_errors={first} is exceeded"):
        producer.produce(1, prompts(5))


def test_a_mended_reward_judges_again_what_stopped_the_run(tmp_path):
    producer = make_producer(tmp_path, FakeTask(errors_on="3", max_reward_errors=0))
    with pytest.raises(UserError):
        producer.produce(0, prompts())
    mended = make_producer(tmp_path, FakeTask(max_reward_errors=0))
    made = mended.produce(0, prompts())
    assert same_samples(made.samples, produce(make_producer(tmp_path / "other")))
    assert mended.reward_errors == 0


def test_a_prompt_beyond_the_context(tmp_path):
    """Prompts of up to 6 tokens and 6 new ones fit in 12."""
    produce(make_producer(tmp_path / "a", context=12), first=48)
    producer = make_producer(tmp_path / "b", context=11)
    with pytest.raises(UserError) as error:
        produce(producer, first=48)
    wanted = r"prompt 48\+48 has 6 tokens; .*rollout\.max_new_tokens=6 .*context of 11; lower rollout\.max_new_tokens"
    assert re.match(wanted, str(error.value))
    assert producer.engine.calls == []


def test_metrics_of_a_rollout(tmp_path):
    made = make_producer(tmp_path).produce(0, prompts())
    rewards = np.array([s.reward for s in made.samples]).reshape(5, 4)
    assert made.metrics["reward/rollout_mean"] == pytest.approx(rewards.mean())
    assert made.metrics["reward/uniform_group_share"] == np.mean([len(set(row)) == 1 for row in rewards.tolist()])
    lengths = [len(s.response_ids) for s in made.samples]
    assert made.metrics["reward/response_length"] == pytest.approx(np.mean(lengths))
    assert made.metrics["performance/generate_seconds"] >= 0 and made.metrics["performance/verify_seconds"] >= 0


def test_equal_rewards_are_seen(tmp_path):
    class Constant(FakeTask):
        def verify(self, problems, responses):
            return [Verdict(1.0)] * len(responses)

    assert make_producer(tmp_path, Constant()).produce(0, prompts()).metrics["reward/uniform_group_share"] == 1


def test_evaluation(tmp_path):
    """Current weights, seeds of their own that never change, results in the order of the problems."""
    policy = FakePolicy()
    producer = make_producer(tmp_path, policy=policy)
    problems = FakeTask().held_out()
    first = producer.evaluate(problems, 3, temperature=0.5)
    assert first.rewards.shape == first.truncated.shape == first.lengths.shape == (2, 3)
    asked = producer.engine.calls[-1]
    assert [r.seed for r in asked] == [
        sample_seed(3, i, p.id, k, EVALUATION_VERSION) for i, p in enumerate(problems) for k in range(3)
    ]
    assert producer.engine.sampling[-1] == SamplingParams(0.5, 6)
    generations = producer.engine.generate(asked, SamplingParams(0.5, 6))
    assert first.lengths.ravel().tolist() == [len(g.token_ids) for g in generations]
    assert first.truncated.ravel().tolist() == [g.finish_reason == "length" for g in generations]
    texts = [tokenizer().decode(g.token_ids.tolist(), skip_special_tokens=True) for g in generations]
    assert first.rewards.ravel().tolist() == [sum(map(ord, t)) % 8 / 8 for t in texts]
    assert np.array_equal(producer.evaluate(problems, 3, 0.5).rewards, first.rewards)
    policy.update()
    producer.evaluate(problems, 3, 0.5)
    assert producer.engine.version == 1


def test_evaluation_leaves_no_trace_in_rollouts(tmp_path):
    usual = produce(make_producer(tmp_path / "a"))
    producer = make_producer(tmp_path / "b")
    producer.evaluate(FakeTask().held_out(), 2, 1.0)
    assert same_samples(produce(producer), usual)


def test_closing_ends_engine_and_task(tmp_path):
    producer = make_producer(tmp_path)
    producer.close()
    assert producer.engine.closed and producer.task.closed
