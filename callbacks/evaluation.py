"""Accuracy on problems that are never trained on, during training."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from vespo_lightning.callbacks.metric_writer import write_row
from vespo_lightning.diagnostics.evaluation import evaluation_metrics
from vespo_lightning.errors import UserError

Figure = dict[str, float]


class HeldOutEvaluation(L.Callback):
    """Records ``eval/*`` with the current policy and remembers the first, the last and the best accuracy.

    It asks the module for two things: ``held_out_problems``, a sequence of problems, and ``evaluator``, an
    :class:`~vespo_lightning.diagnostics.evaluation.Evaluator`. Both are called on every rank.

    Args:
        every: updates between two evaluations; 0 means only at the start and the end.
        problems: how many held-out problems, the first ones of the task.
        samples_per_problem: responses to each problem, the k of avg@k and of the largest pass@k.
        temperature: 0 is greedy decoding, which makes sense for one sample per problem only.
        at_start: evaluate before the first update, as update 0.
        at_end: evaluate after the last update, when it was not done anyway.
    """

    def __init__(
        self,
        every: int,
        problems: int,
        samples_per_problem: int = 1,
        temperature: float = 0.0,
        at_start: bool = True,
        at_end: bool = True,
    ) -> None:
        for key, value, least in (
            ("every", every, 0),
            ("problems", problems, 1),
            ("samples_per_problem", samples_per_problem, 1),
            ("temperature", temperature, 0),
        ):
            if value < least:
                raise UserError(f"callbacks.evaluation.{key}={value} is too small: give at least {least}.")
        if temperature == 0 and samples_per_problem > 1:
            raise UserError(
                f"callbacks.evaluation.samples_per_problem={samples_per_problem} with temperature=0 would "
                "write the same response again and again: give 1 sample, or a temperature above 0."
            )
        self.every = every
        self.problems = problems
        self.samples_per_problem = samples_per_problem
        self.temperature = temperature
        self.at_start = at_start
        self.at_end = at_end
        self.first: Figure | None = None
        self.last: Figure | None = None
        self.best: Figure | None = None

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        available = len(module.held_out_problems)
        if self.problems > available:
            raise UserError(
                f"callbacks.evaluation.problems={self.problems} is more than the {available} problems that "
                f"the task holds out: give {available} or fewer."
            )

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        if self.at_start and module.update == 0:
            write_row(trainer, module, 0, self._evaluate(module))

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        regular = self.every > 0 and module.update % self.every == 0
        if regular or (self.at_end and trainer.is_last_batch):
            module.record(self._evaluate(module))

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        # A run that stops early has no last batch that could be known beforehand.
        if self.at_end and (self.last is None or self.last["update"] != module.update):
            write_row(trainer, module, module.update, self._evaluate(module))

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "last": self.last, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first, self.last, self.best = state["first"], state["last"], state["best"]

    def _evaluate(self, module: Any) -> dict[str, float]:
        start = time.perf_counter()
        problems = module.held_out_problems[: self.problems]
        result = module.evaluator(problems, self.samples_per_problem, self.temperature)
        metrics = evaluation_metrics(result)
        self._remember(module.update, metrics)
        return metrics | {"performance/evaluate_seconds": time.perf_counter() - start}

    def _remember(self, update: int, metrics: dict[str, float]) -> None:
        figure: Figure = {
            "update": update,
            "accuracy": metrics["eval/accuracy"],
            "ci_low": metrics["eval/ci_low"],
            "ci_high": metrics["eval/ci_high"],
        }
        self.first = self.first or figure
        self.last = figure
        if self.best is None or figure["accuracy"] > self.best["accuracy"]:
            self.best = figure
