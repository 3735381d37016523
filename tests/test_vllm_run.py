"""The main job with real vLLM: it agrees with the trainer, resumes to the bit, and stops on weights it cannot trust."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest
from run_entry_point import Ended, Sabotage, run_entry_point
from test_resume import KILLED, SMALL_RUN, assert_same, dies_at_call, outcome

from vespo_lightning.rollouts import vllm_weights
from vespo_lightning.rollouts.producer import RolloutProducer
from vespo_lightning.rollouts.store import RolloutStore
from vespo_lightning.rollouts.vllm_engine import VllmEngine

# Not imported here: the children of this process must import it themselves, after the engine set its environment.
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

RUN = [*SMALL_RUN, "engine=vllm"]


def train(folder: Path, argv: list[str], sabotage: Sabotage | None = None) -> Ended:
    return run_entry_point("train.py", argv, folder.parent, sabotage)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "run"
    ended = train(folder, [*RUN, f"hydra.run.dir={folder}"])
    assert ended.code == 0, ended.err
    return folder


def test_agrees_with_the_trainer_after_every_sync(uninterrupted: Path) -> None:
    with open(uninterrupted / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["mismatch/k3_kl"]]
    assert len(rows) == 3  # one for each rollout
    for row in rows:
        # What float32 leaves of this policy: against float64 either side is off by up to 5e-5, and by 4e-7 on average.
        assert float(row["mismatch/equal_routing_diff_max"]) < 1e-4
        assert float(row["mismatch/log_prob_diff_mean"]) < 2e-6
        assert float(row["mismatch/flipped_tokens"]) <= 2  # near-ties of the router, in float32
        assert float(row["mismatch/canary_relative"]) < 1e-4
    assert "router/js_divergence" not in rows[0]  # vLLM returns which experts, not their probabilities


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(lambda: dies_at_call(RolloutStore, "write", 6), id="between chunks of a later rollout"),
        pytest.param(lambda: dies_at_call(RolloutProducer, "sync", 3, after=True), id="after a weight load"),
    ],
)
def test_killed_and_resumed(moment, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train(folder, [*RUN, f"hydra.run.dir={folder}"], moment()).code == KILLED
    ended = train(folder, [f"resume={folder}"])
    assert ended.code == 0, ended.err
    assert_same(outcome(folder), outcome(uninterrupted))


def keeps_stale_weights() -> None:
    """Takes the version for the weights, as an engine does whose transfer was lost."""

    def load_weights(self, tensors, version) -> None:
        list(tensors)
        self.version = version

    VllmEngine.load_weights = load_weights


def leaves_experts_unpacked() -> None:
    """vLLM's own reload on a CPU, which packs expert weights on the first load only."""
    vllm_weights._repair_experts = lambda module: None


def test_stale_weights_stop_the_run(tmp_path: Path) -> None:
    ended = train(tmp_path / "run", [*RUN, f"hydra.run.dir={tmp_path / 'run'}"], keeps_stale_weights)
    assert ended.code == 1
    assert "error: the checksum read back from the engine is" in ended.err and "Traceback" not in ended.err


def test_corrupt_experts_stop_the_run(tmp_path: Path) -> None:
    ended = train(tmp_path / "run", [*RUN, f"hydra.run.dir={tmp_path / 'run'}"], leaves_experts_unpacked)
    assert ended.code == 1
    assert "wrong layout" in ended.err and "Traceback" not in ended.err
