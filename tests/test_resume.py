"""A run that is killed at any moment and resumed ends as one that was not: weights, metrics, samples, to the bit."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from run_entry_point import Sabotage, run_entry_point

from vespo_lightning.callbacks.event_files import read_scalars

#: 3 rollouts of 4 mini-batches, each rollout in 4 chunks; checkpoints inside and between rollouts.
SMALL_RUN = [
    "updates=10",
    "staleness.n=4",
    "mini_batch_size=16",
    "rollout.group_size=4",
    "rollout.chunk_groups=4",
    "callbacks.checkpoint.every=3",
    "callbacks.evaluation.every=5",
    "callbacks.evaluation.problems=16",
    "callbacks.sample_table.every=2",
    "callbacks.weight_variance.histogram_every=4",
    "callbacks.router_monitor.heatmap_every=5",
    "optim.lr=1e-3",
]
#: Whatever else has a state or makes rollouts in another way.
EVERYTHING = [
    *SMALL_RUN,
    "callbacks=vcpo",
    "rollout.dynamic_sampling=true",
    "rollout.passes=2",
    "rollout.top_p=0.95",
    "rollout.top_log_probs=4",
    "advantage=leave_one_out",
    "denominator=recomputed",
    "correction=[mis,opsm]",
    "kl=reward_k1",
    "routing=r2",
]
KILLED = -signal.SIGKILL


def run_train(folder: Path, argv: list[str], sabotage: Sabotage | None = None, kill_after: float = 0.0) -> int:
    ended = run_entry_point("train.py", argv, folder.parent, sabotage, kill_after)
    print(ended.err)  # shown when the test fails
    return ended.code


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_at_call(owner: object, name: str, number: int, after: bool = False) -> Sabotage:
    """Kill the process at the ``number``-th call of ``owner.name``, before or after it did its work."""

    def sabotage() -> None:
        original, calls = getattr(owner, name), [0]

        def wrapper(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if calls[0] == number and not after:
                die()
            result = original(*args, **kwargs)
            if calls[0] == number:
                die()
            return result

        setattr(owner, name, wrapper)

    return sabotage


def outcome(folder: Path) -> dict[str, object]:
    """Everything that must not depend on an interruption."""
    newest = sorted((folder / "checkpoints").glob("update-*.ckpt"))[-1]
    checkpoint = torch.load(newest, weights_only=True)
    with open(folder / "metrics.csv", newline="") as file:
        rows = [
            {name: value for name, value in row.items() if not name.startswith("performance/")}
            for row in csv.DictReader(file)
        ]
    scalars = {
        tag: values
        for tag, values in read_scalars(folder / "tensorboard").items()
        if not tag.startswith("performance/")
    }
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "newest": newest.name,
        "weights": checkpoint["state_dict"],
        "optimizer": checkpoint["optimizer_states"],
        "policy": checkpoint["policy_state"],
        "metrics": rows,
        "scalars": scalars,
        "samples": (folder / "samples.jsonl").read_text(),
        "accuracy": summary["held_out_accuracy"],
        "updates": summary["updates"],
        "reward": summary["reward"],
    }


def assert_same(found: dict[str, object], expected: dict[str, object]) -> None:
    for key, value in found.items():
        if key in ("weights", "optimizer"):
            assert_same_tensors(value, expected[key])
        else:
            assert value == expected[key], key


def assert_same_tensors(found: object, expected: object) -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor) and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert isinstance(found, dict) and found.keys() == expected.keys()
        for key in expected:
            assert_same_tensors(found[key], expected[key])
    elif isinstance(expected, list):
        assert isinstance(found, list) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_tensors(one, other)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    began = time.perf_counter()
    assert run_train(folder, [*SMALL_RUN, f"hydra.run.dir={folder}"]) == 0
    return {**outcome(folder), "seconds": time.perf_counter() - began}


def kill_points() -> dict[str, Sabotage]:
    from vespo_lightning.callbacks import metric_writer, run_checkpoint
    from vespo_lightning.rollouts.producer import RolloutProducer
    from vespo_lightning.rollouts.store import RolloutStore
    from vespo_lightning.training.module import PolicyModule

    return {
        "before the first chunk": dies_at_call(RolloutStore, "write", 1),
        "between chunks of the first rollout": dies_at_call(RolloutStore, "write", 2, after=True),
        "between chunks of a later rollout": dies_at_call(RolloutStore, "write", 7),
        "while syncing weights": dies_at_call(RolloutProducer, "sync", 2),
        "before an optimizer step": dies_at_call(PolicyModule, "_finish", 6),
        "after an optimizer step": dies_at_call(PolicyModule, "_finish", 6, after=True),
        "before a row is written": dies_at_call(metric_writer, "write_row", 6),
        "before a checkpoint gets its name": dies_at_call(run_checkpoint.os, "fsync", 12),
        "after a checkpoint got its name": dies_at_call(run_checkpoint.RunCheckpoint, "_prune", 2),
        "right after a checkpoint": dies_at_call(run_checkpoint.RunCheckpoint, "save", 1, after=True),
        "in the last evaluation": dies_at_call(RolloutProducer, "evaluate", 3),
    }


@pytest.mark.parametrize("moment", list(kill_points()))
def test_killed_at_a_named_point(moment: str, tmp_path: Path, uninterrupted: dict[str, object]) -> None:
    folder = tmp_path / "run"
    assert run_train(folder, [*SMALL_RUN, f"hydra.run.dir={folder}"], kill_points()[moment]) == KILLED
    assert run_train(folder, [f"resume={folder}"]) == 0
    assert_same(outcome(folder), uninterrupted)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("everything") / "run"
    assert run_train(folder, [*EVERYTHING, f"hydra.run.dir={folder}"]) == 0
    return outcome(folder)


@pytest.mark.parametrize("moment", ["between chunks of a later rollout", "before an optimizer step"])
def test_killed_with_everything_on(moment: str, tmp_path: Path, everything: dict[str, object]) -> None:
    folder = tmp_path / "run"
    assert run_train(folder, [*EVERYTHING, f"hydra.run.dir={folder}"], kill_points()[moment]) == KILLED
    assert run_train(folder, [f"resume={folder}"]) == 0
    assert_same(outcome(folder), everything)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
def test_killed_again_and_again_at_random_moments(seed: int, tmp_path: Path, uninterrupted: dict[str, object]) -> None:
    folder, draw = tmp_path / "run", random.Random(seed)
    # What is known of the length of a run is how long another one took; a faster one ends before its moment comes.
    whole = float(str(uninterrupted["seconds"]))
    kills, code = 0, KILLED
    while code == KILLED or kills == 0:
        if code == 0:
            shutil.rmtree(folder)
            whole /= 2
        resumable = (folder / "config.yaml").exists()
        argv = [f"resume={folder}"] if resumable else [*SMALL_RUN, f"hydra.run.dir={folder}"]
        code = run_train(folder, argv, kill_after=draw.uniform(0.2, 0.8) * whole if kills < 6 else 0.0)
        kills += code == KILLED
    assert code == 0
    assert_same(outcome(folder), uninterrupted)


def test_a_run_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run_train(folder, [*SMALL_RUN, "updates=1", f"hydra.run.dir={folder}"]) == 0
    stored = OmegaConf.load(folder / "config.yaml")
    del stored["routing"], stored["rollout"]["passes"]
    OmegaConf.save(stored, folder / "config.yaml")
    ended = run_entry_point("train.py", [f"resume={folder}"], tmp_path)
    assert ended.code == 1
    assert re.fullmatch(
        r"error: resume=\S+ was made by an earlier version, whose configuration lacks routing, rollout\.passes; start "
        r"a new run from its weights with model\.path=\S+/export\n",
        ended.err,
    )
