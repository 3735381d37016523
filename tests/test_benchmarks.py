"""Every benchmark runs and prints its table; the figures are the business of whoever runs it on a quiet machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
#: Arguments that make it small, and something of its result.
RUNS = {
    "experts.py": ("--shape toy --tokens 64 --repeats 2 --backends grouped_mm eager loop", "loop"),
    "min_variance_cost.py": ("--responses 8 --group-size 4 --repeats 1", "proxy"),
    "routing_cost.py": ("updates=6 mini_batch_size=16 rollout.group_size=4", "replay (R3)"),
    "routing_replay.py": ("--engine transformers --sequences 8 --max-new-tokens 8 --updates 1", "r3"),
    "shadow_cost.py": ("updates=6 mini_batch_size=16 rollout.group_size=4", "cost:"),
}


def test_every_benchmark_is_here() -> None:
    commands = {file.name for file in BENCHMARKS.glob("*.py") if "__main__" in file.read_text()}
    assert commands == set(RUNS)
    assert all(f"benchmarks/{name}" in (BENCHMARKS / "README.md").read_text() for name in RUNS)


@pytest.mark.long
@pytest.mark.parametrize("name", list(RUNS))
def test_it_runs(name: str, tmp_path: Path) -> None:
    words, expected = RUNS[name]
    ended = subprocess.run(
        [sys.executable, BENCHMARKS / name, *words.split()],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert expected in ended.stdout
