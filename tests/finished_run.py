"""One small finished run for the tests of what a run leaves behind: made once per session."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from run_entry_point import Ended, run_entry_point

#: 2 rollouts of 4 mini-batches of 64 responses.
SMALL = [
    "updates=8",
    "staleness.n=4",
    "optim.lr=3e-4",
    "callbacks.evaluation.every=4",
    "callbacks.evaluation.problems=32",
    "callbacks.checkpoint.every=4",
    "callbacks.sample_table.every=4",
    "callbacks.weight_variance.histogram_every=4",
    "callbacks.router_monitor.heatmap_every=4",
]


@dataclass(frozen=True)
class Run:
    folder: Path
    ended: Ended

    def metrics(self) -> pd.DataFrame:
        """One row per update, by its number."""
        return read_metrics(self.folder)


def read_metrics(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "metrics.csv", index_col="update")


def train(folder: Path, *argv: str, base: Sequence[str] = SMALL) -> Run:
    """A small run in ``folder``, which must end well."""
    ended = run_entry_point("train.py", [*base, *argv, f"hydra.run.dir={folder}"], folder.parent)
    assert ended.code == 0, ended.err
    return Run(folder, ended)


def finished_run(factory: pytest.TempPathFactory) -> Run:
    return _finished_run(factory.getbasetemp())


@functools.cache
def _finished_run(base: Path) -> Run:
    return train(base / "finished" / "run")
