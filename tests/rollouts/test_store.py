"""Rollout chunks on disk: whole or not at all, and only for the rollout that made them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_parts import same_samples
from safetensors.numpy import save_file

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts import store as store_module
from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.rollouts.store import RolloutStore

IDENTITY = {"weights": "00ff", "version": 3, "temperature": 0.7, "shuffle_rewards": False}
METRICS = {"performance/generate_seconds": 0.1 + 0.2}


def samples(count: int = 5, extras: bool = True) -> list[Sample]:
    """Ragged lengths, extreme numbers, text that needs escaping."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        p, t = int(rng.integers(1, 6)), int(rng.integers(1, 9))
        log_probs = rng.standard_normal(t).astype(np.float32)
        log_probs[0] = [np.float32(1e-45), np.nan, -np.inf, -0.0, np.float32(0.1)][i % 5]
        routing = rng.integers(-1, 8, (p + t - 1, 3, 2)).astype(np.int16)
        made.append(
            Sample(
                prompt_id=f"12+{i}",
                group_id=f"7/{i // 2}",
                index=i % 2,
                seed=2**63 - 1 - i,
                prompt_ids=rng.integers(0, 9, p).astype(np.int32),
                response_ids=rng.integers(0, 9, t).astype(np.int32),
                behaviour_log_probs=log_probs,
                version_runs=[(3, t)] if t == 1 else [(3, 1), (4, t - 1)],
                loss_mask=rng.random(t) < 0.5,
                finish_reason=["stop", "length"][i % 2],
                text='é"\n\x00\u2028 \U0001f600' * (i % 3),
                reward=0.1 * i,
                reward_error=None if i else "took longer than 5 s",
                recomputed_log_probs=log_probs[::-1].copy() if extras else None,
                reference_log_probs=2 * log_probs if extras else None,
                top_ids=rng.integers(0, 9, (t, 3)).astype(np.int32) if extras else None,
                top_log_probs=rng.standard_normal((t, 3)).astype(np.float32) if extras else None,
                routed_experts=routing if extras else None,
                router_top_probs=rng.random(routing.shape).astype(np.float16) if extras else None,
                trainer_experts=routing[::-1].copy() if extras else None,
            )
        )
    return made


@pytest.fixture
def store(tmp_path: Path) -> RolloutStore:
    return RolloutStore(tmp_path / "rollouts")


def chunk_path(store: RolloutStore) -> Path:
    (path,) = store.folder.rglob("*.safetensors")
    return path


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("extras", [True, False])
def test_round_trip_bit_for_bit(store, count, extras):
    store.write(7, 2, samples(count, extras), IDENTITY, METRICS)
    found, metrics = store.read(7, 2, IDENTITY)
    assert same_samples(found, samples(count, extras))
    assert metrics == METRICS
    found[0].reward = 9.0  # what is read can be changed
    found[0].behaviour_log_probs[0] = 1.0


@pytest.mark.parametrize("key", list(IDENTITY))
def test_another_identity_is_not_found(store, key):
    store.write(0, 0, samples(), IDENTITY, {})
    assert store.read(0, 0, {**IDENTITY, key: 1.5}) is None
    assert store.read(0, 0, {k: v for k, v in IDENTITY.items() if k != key}) is None
    assert store.read(0, 0, dict(reversed(IDENTITY.items()))) is not None


def test_another_chunk_is_not_found(store):
    assert store.read(0, 0, IDENTITY) is None
    store.write(0, 0, samples(), IDENTITY, {})
    assert store.read(0, 1, IDENTITY) is None
    assert store.read(1, 0, IDENTITY) is None


def test_writing_again_replaces(store):
    store.write(0, 0, samples(5), IDENTITY, {})
    store.write(0, 0, samples(2), {**IDENTITY, "version": 4}, {})
    assert store.read(0, 0, IDENTITY) is None
    assert len(store.read(0, 0, {**IDENTITY, "version": 4})[0]) == 2


def test_truncated_files_are_not_there(store):
    store.write(0, 0, samples(), IDENTITY, {})
    path = chunk_path(store)
    whole = path.read_bytes()
    for length in [*range(0, 64), *range(64, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert store.read(0, 0, IDENTITY) is None, length
    path.write_bytes(whole)
    assert store.read(0, 0, IDENTITY) is not None


def test_damaged_files_are_not_there(store):
    """One changed byte anywhere, in the header or in the numbers."""
    store.write(0, 0, samples(), IDENTITY, {})
    path = chunk_path(store)
    whole = path.read_bytes()
    for place in range(0, len(whole), 41):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        found = store.read(0, 0, IDENTITY)
        # a byte of white space in the header, for instance, may change without a loss
        assert found is None or same_samples(found[0], samples()), place
    path.write_bytes(b"\0" * len(whole))
    assert store.read(0, 0, IDENTITY) is None


def test_a_file_of_someone_else_is_not_there(store):
    store.write(0, 0, samples(), IDENTITY, {})
    save_file({"x": np.zeros(3)}, chunk_path(store))
    assert store.read(0, 0, IDENTITY) is None


def test_a_kill_while_writing_leaves_what_was_there(store, monkeypatch):
    """The file appears under its name only when it is whole."""
    store.write(0, 0, samples(2), IDENTITY, {})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    for rollout in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            store.write(rollout, 0, samples(5), IDENTITY, {})
    monkeypatch.undo()
    assert len(store.read(0, 0, IDENTITY)[0]) == 2
    assert store.read(1, 0, IDENTITY) is None
    store.write(1, 0, samples(5), IDENTITY, {})
    assert len(store.read(1, 0, IDENTITY)[0]) == 5


def test_a_full_disk_is_one_sentence(store, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    store.write(0, 0, samples(2), IDENTITY, {})
    monkeypatch.setattr(store_module, "save_file", full)
    with pytest.raises(UserError, match=r"could not be written.*No space left.*free disk space") as error:
        store.write(0, 0, samples(5), IDENTITY, {})
    assert str(chunk_path(store)) in str(error.value)
    assert len(store.read(0, 0, IDENTITY)[0]) == 2


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "rollouts").touch()
    with pytest.raises(UserError, match="could not be written"):
        RolloutStore(tmp_path / "rollouts").write(0, 0, samples(1), IDENTITY, {})


def test_prune_deletes_older_rollouts(store):
    for rollout in (0, 1, 2, 10):
        for chunk in (0, 1):
            store.write(rollout, chunk, samples(1), IDENTITY, {})
    store.prune(2)
    assert sorted(p.name for p in store.folder.iterdir()) == ["rollout-000002", "rollout-000010"]
    assert store.read(2, 1, IDENTITY) is not None
    RolloutStore(store.folder / "missing").prune(3)  # nothing written yet


def test_versions_of_tokens():
    sample = replace(samples(1)[0], version_runs=[(3, 2), (5, 1)], response_ids=np.zeros(3, dtype=np.int32))
    assert sample.versions().tolist() == [3, 3, 5] and sample.versions().dtype == np.int32
