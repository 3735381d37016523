"""``summary.json``: what a run was, what it learned and where its time went."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from vespo_lightning.callbacks.evaluation import HeldOutEvaluation
from vespo_lightning.callbacks.metric_writer import Row
from vespo_lightning.callbacks.provenance import git_commit, package_versions
from vespo_lightning.callbacks.run_files import write_atomically

FILE_NAME = "summary.json"
REWARD = "reward/mean"
#: Updates whose mean reward is called the first and the last.
REWARD_WINDOW = 8
#: Label in the table -> metric.
MISMATCH = {
    "k3 KL": "mismatch/k3_kl",
    "max |dlogp|": "mismatch/log_prob_diff_max",
    "canary, max |dlogp|": "mismatch/canary_max",
}


class RunSummary(L.Callback):
    """Adds up a run and writes ``summary.json`` into the trainer's ``default_root_dir`` when it ends.

    The status is ``finished``, ``interrupted`` (Ctrl-C, SIGTERM) or ``failed`` (any other exception, whose
    message is kept). All sums are part of the checkpoint, so that the summary of a resumed run is that of the
    whole run. Samples are rank 0's times the number of ranks.

    Args:
        config_hash: hash of the resolved configuration.
    """

    def __init__(self, config_hash: str = "") -> None:
        self.config_hash = config_hash
        self._totals: dict[str, float] = {
            "updates": 0,
            "skipped_updates": 0,
            "samples": 0,
            "wall_seconds": 0.0,
        }
        self._first_rewards: list[float] = []
        self._last_rewards: list[float] = []
        self._mismatch: Row = {}
        self._seconds_by_phase: Row = {}
        self._clock = time.perf_counter()

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        self._clock = time.perf_counter()

    def on_row(self, trainer: L.Trainer, module: Any, update: int, row: Row) -> None:
        for name, value in row.items():
            group, _, rest = name.partition("/")
            if group == "mismatch":
                self._mismatch[name] = value
            elif group == "performance" and rest.endswith("_seconds") and rest != "pre_pass_seconds":  # part of update
                phase = rest.removesuffix("_seconds")
                self._seconds_by_phase[phase] = self._seconds_by_phase.get(phase, 0.0) + value
        if REWARD in row:
            if len(self._first_rewards) < REWARD_WINDOW:
                self._first_rewards.append(row[REWARD])
            self._last_rewards = [*self._last_rewards, row[REWARD]][-REWARD_WINDOW:]

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        result = module.last_update
        self._totals["updates"] = module.update
        self._totals["skipped_updates"] += int(result.skipped)
        self._totals["samples"] += len(result.mini_batch.samples) * trainer.world_size
        self._add_time()

    def on_fit_end(self, trainer: L.Trainer, module: Any) -> None:
        self._write(trainer, "finished")

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        interrupted = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        self._write(trainer, "interrupted" if interrupted else "failed", error=str(exception) or repr(exception))

    def state_dict(self) -> dict[str, Any]:
        return {
            "totals": dict(self._totals),
            "first_rewards": list(self._first_rewards),
            "last_rewards": list(self._last_rewards),
            "mismatch": dict(self._mismatch),
            "seconds_by_phase": dict(self._seconds_by_phase),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._totals = dict(state["totals"])
        self._first_rewards = list(state["first_rewards"])
        self._last_rewards = list(state["last_rewards"])
        self._mismatch = dict(state["mismatch"])
        self._seconds_by_phase = dict(state["seconds_by_phase"])

    def summary(self, trainer: L.Trainer, status: str, error: str | None = None) -> dict[str, Any]:
        """The content of ``summary.json``; figures that the run does not have are None."""
        seconds = self._totals["wall_seconds"]
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        held_out = next((c for c in callbacks if isinstance(c, HeldOutEvaluation)), None)
        return {
            "status": status,
            "error": error,
            "versions": package_versions(),
            "git_commit": git_commit(),
            "config_hash": self.config_hash,
            **self._totals,
            "samples_per_second": self._totals["samples"] / seconds if seconds else None,
            "reward": {"first": _mean(self._first_rewards), "last": _mean(self._last_rewards)},
            "held_out_accuracy": held_out.state_dict() if held_out else None,
            "mismatch": dict(sorted(self._mismatch.items())),
            "seconds_by_phase": dict(sorted(self._seconds_by_phase.items())),
        }

    def _add_time(self) -> None:
        now = time.perf_counter()
        self._totals["wall_seconds"] += now - self._clock
        self._clock = now

    def _write(self, trainer: L.Trainer, status: str, error: str | None = None) -> None:
        if trainer.is_global_zero:
            self._add_time()
            content = _without_nan(self.summary(trainer, status, error))
            write_atomically(Path(trainer.default_root_dir) / FILE_NAME, json.dumps(content, indent=2) + "\n")


def format_table(summary: dict[str, Any]) -> str:
    """The table at the end of a run: what was learned, at what price, and how well the engine agreed."""
    reward, held_out, mismatch = summary["reward"], summary["held_out_accuracy"] or {}, summary["mismatch"]
    rows = [
        ("status", summary["status"]),
        ("updates", f"{summary['updates']}, {summary['skipped_updates']} of them skipped"),
        ("samples", _samples(summary["samples"], summary["samples_per_second"])),
        ("reward", _rewards(reward["first"], reward["last"])),
        *((f"held-out accuracy, {name}", _accuracy(held_out.get(name))) for name in ("first", "last", "best")),
        *((f"mismatch, {label}", _number(mismatch.get(name))) for label, name in MISMATCH.items()),
        ("time", _times(summary["wall_seconds"], summary["seconds_by_phase"])),
    ]
    rows = [(label, text) for label, text in rows if text]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _samples(count: int, per_second: float | None) -> str:
    return f"{count} at {per_second:.4g} per second" if per_second else str(count)


def _rewards(first: float | None, last: float | None) -> str:
    if first is None or last is None:
        return ""
    return f"{first:.4g} -> {last:.4g} (mean of the first and the last {REWARD_WINDOW} updates)"


def _accuracy(figure: dict[str, float] | None) -> str:
    if figure is None:
        return ""
    interval = f"95 % interval {figure['ci_low']:.3f} .. {figure['ci_high']:.3f}"
    return f"{figure['accuracy']:.3f} at update {figure['update']} ({interval})"


def _times(total: float, by_phase: dict[str, float]) -> str:
    phases = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in by_phase.items())
    return f"{total:.0f} s" + (f" ({phases})" if phases else "")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity; they become null."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
