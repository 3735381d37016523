"""What routing capture and replay cost: ``python benchmarks/routing_cost.py [OVERRIDES OF train.py]``.

Trains the tiny MoE on real rollouts. Before each update the gradient of its mini-batch is computed in every way below,
in an order that rotates, so that all see the same tokens and the same state of the machine.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose
from real_rollouts import train

from vespo_lightning.callbacks.router_monitor import RouterMonitor
from vespo_lightning.config_check import CONFIG_PATH, config_source
from vespo_lightning.training.routing_batches import Replayed

SETTINGS = ("name=routing_cost", "updates=48", "staleness.n=8")
#: Mini-batches at the beginning that are not counted: first calls allocate and compile.
WARM_UP = 4
#: Name -> whose routing is replayed, and whether it is captured and measured.
WAYS: dict[str, tuple[Replayed, bool]] = {
    "neither": ("none", False),
    "capture, router/* metrics": ("none", True),
    "replay (R3)": ("engine", False),
    "both": ("engine", True),
}


class Clock(L.Callback):
    """Seconds of the gradient of each mini-batch, by way."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in WAYS}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        names = list(WAYS)
        turn = batch_idx % len(names)
        for name in names[turn:] + names[:turn]:
            started = _now()
            self._gradient(trainer, module, batch, *WAYS[name])
            self.seconds[name].append(_now() - started)
        module.zero_grad(set_to_none=True)

    @staticmethod
    def _gradient(trainer: L.Trainer, module: Any, batch: Any, replayed: Replayed, capture: bool) -> None:
        monitor = RouterMonitor()
        passes = module._passes(batch, replayed, routing=capture, gate_weights=False)
        totals = module.loss.router_totals(passes.tokens, None)
        for done in passes.run():
            module.loss(passes.tokens, done, module.loss.multiplier(done.tokens), totals).backward()
            if capture:
                monitor.on_micro_batch_end(trainer, module, done.observed)
        if capture:
            monitor._statistics.metrics()


def _now() -> float:
    """Seconds. On a CPU those that this process computed, so that other programs on the machine do not count."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    with config_source(CONFIG_PATH):
        cfg = compose("train", [*SETTINGS, *sys.argv[1:]])
    torch.set_num_threads(cfg.threads)
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        train(cfg, Path(folder), clock, lambda loader: loader)
    seconds = {name: values[WARM_UP:] for name, values in clock.seconds.items()}
    plain = seconds["neither"]
    print(f"gradient of {cfg.mini_batch_size} responses, {len(plain)} mini-batches; median [quartiles]")
    for name, values in seconds.items():
        low, middle, high = (1000 * value for value in statistics.quantiles(values, n=4))
        more = [100 * (a / b - 1) for a, b in zip(values, plain, strict=True)]
        print(f"{name:26s} {middle:7.1f} ms [{low:.1f}, {high:.1f}]   {statistics.median(more):+5.1f} %")


if __name__ == "__main__":
    main()
