"""What the shadow objectives cost: ``python benchmarks/shadow_cost.py [OVERRIDES OF train.py]``.

Trains the tiny MoE on real rollouts. Every mini-batch is trained on twice, once with all objectives watching and once
with none, in alternating order, so that both sides see the same tokens and the same state of the machine.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose
from real_rollouts import train

from vespo_lightning.callbacks.shadow_objectives import ShadowObjectives
from vespo_lightning.config_check import CONFIG_PATH, config_source
from vespo_lightning.objectives.options import default_objective, option_names
from vespo_lightning.rollouts.loader import RolloutLoader
from vespo_lightning.rollouts.sample import MiniBatch

#: denominator=recomputed, so that methods that need those log-probs take part; an odd number of mini-batches per
#: rollout, so that the first one after generation is not always watched first.
SETTINGS = ("name=shadow_cost", "updates=84", "staleness.n=7", "denominator=recomputed")
#: Pairs at the beginning that are not counted: first calls allocate and compile.
WARM_UP = 4


class Twice:
    """Every mini-batch of a loader two times in a row."""

    def __init__(self, loader: RolloutLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return 2 * len(self.loader)

    def __iter__(self) -> Iterator[MiniBatch]:
        for batch in self.loader:
            yield batch
            yield batch


class Clock(L.Callback):
    """Seconds of each update, the shadow objectives included where it lets them watch."""

    def __init__(self, shadow: ShadowObjectives) -> None:
        self.shadow = shadow
        self.plain: list[float] = []
        self.watched: list[float] = []
        self.shadow_alone: list[float] = []
        self._started = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self._started = _now()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = _now()
        pair, second = divmod(batch_idx, 2)
        if pair % 2 != second:
            self.plain.append(now - self._started)
            return
        self.shadow.on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        after = _now()
        self.shadow_alone.append(after - now)
        self.watched.append(after - self._started)


def _now() -> float:
    """Seconds. On a CPU those that this process computed, so that other programs on the machine do not count."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def spread(values: list[float], unit: float) -> str:
    """Median and quartiles."""
    low, middle, high = (value / unit for value in statistics.quantiles(values, n=4))
    return f"{middle:8.3f}  [{low:.3f}, {high:.3f}]"


def main() -> None:
    with config_source(CONFIG_PATH):
        cfg = compose("train", [*SETTINGS, *sys.argv[1:]])
    torch.set_num_threads(cfg.threads)
    names = [name for name in option_names() if default_objective(name).needs <= {"recomputed_log_prob"}]
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock(ShadowObjectives(names))
        train(cfg, Path(folder), clock, Twice)
    plain, watched, alone = (values[WARM_UP:] for values in (clock.plain, clock.watched, clock.shadow_alone))
    pairs = [with_ / without - 1 for with_, without in zip(watched, plain, strict=True)]
    print(f"{len(names)} objectives: {', '.join(names)}")
    print(f"{len(plain)} mini-batches of {cfg.mini_batch_size} responses; median [quartiles]")
    print(f"update without, s         {spread(plain, 1.0)}")
    print(f"update with, s            {spread(watched, 1.0)}")
    print(f"difference of a pair, %   {spread(pairs, 0.01)}")
    print(f"the callback itself, ms   {spread(alone, 0.001)}")
    share = statistics.median(alone) / statistics.median(plain)
    print(f"cost: {100 * share:.2f} % of an update (the callback's time; bound: 2 %)")


if __name__ == "__main__":
    main()
