"""What other methods would have done with the mini-batches of a run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import lightning as L

from vespo_lightning.diagnostics.shadow import missing_parts, shadow_statistics
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import Need, Objective
from vespo_lightning.objectives.options import default_objective, option_names

#: What to say about a missing part of the batch.
REMEDIES: dict[Need, str] = {
    "recomputed_log_prob": "the trainer's log-probs at generation time; type denominator=recomputed",
    "top_log_probs": "the log-probs of the likeliest tokens; type rollout.top_log_probs=20",
    "router_shift": "the routing at generation time, which only a Mixture-of-Experts policy has",
}


class ShadowObjectives(L.Callback):
    """Records ``shadow/NAME/...`` for other objectives, and ``shadow/run/...`` for the run's own to compare with.

    The other objectives see the same mini-batch, after the same corrections, with the same advantages; their
    constants are the defaults of ``conf/objective/NAME.yaml``. Nothing here changes the training.
    Formulas: :func:`~vespo_lightning.diagnostics.shadow.shadow_statistics`.

    Args:
        objectives: names, as ``objective=`` takes them; an empty list records nothing.
        every: updates between two comparisons.

    Raises:
        UserError: ``objectives`` is not a list of different names that exist, or ``every`` is not a whole number of
            at least 1. In ``setup``, or at the first update where only the data can tell: an objective needs what
            the run does not have.
    """

    def __init__(self, objectives: Sequence[str] = (), every: int = 1) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise UserError(
                f"callbacks.shadow_objectives.every={every} is not allowed; give a whole number of updates, at least 1"
            )
        self.objectives = _built(objectives)
        self.every = every

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        for name, objective in self.objectives.items():
            recomputed = (
                module.denominator == "recomputed"
                or "recomputed_log_prob" in module.loss.needs
                or module.routing == "r2"
            )
            if "recomputed_log_prob" in objective.needs and not recomputed:
                raise _lacks(name, "recomputed_log_prob")
            if "router_shift" in objective.needs and not module.is_moe:
                raise _lacks(name, "router_shift")

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        update = module.last_update
        if update is None or not self.objectives or module.update % self.every:
            return
        for name, objective in self.objectives.items():
            for need in missing_parts(objective, update.corrected):
                raise _lacks(name, need)
        module.record(shadow_statistics(self.objectives, update.corrected, update.coefficient))


def _built(names: Any) -> dict[str, Objective]:
    """Objectives by name."""
    key = "callbacks.shadow_objectives.objectives"
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UserError(f"{key}={names} is not a list; type the names of objectives in brackets, such as [grpo,gspo]")
    valid = option_names()
    built: dict[str, Objective] = {}
    for name in names:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=2, cutoff=0.5)
            hint = f" (nearest: {', '.join(near)})" if near else ""
            raise UserError(f"{key}: {name} is no objective; valid: {', '.join(valid)}{hint}")
        if name in built:
            raise UserError(f"{key}: {name} is there twice; leave one out")
        built[name] = default_objective(name)
    return built


def _lacks(name: str, need: Need) -> UserError:
    return UserError(
        f"callbacks.shadow_objectives.objectives: {name} needs {REMEDIES[need]}, or leave {name} out of the list"
    )
