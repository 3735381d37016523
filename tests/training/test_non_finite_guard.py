"""A non-finite loss or gradient: the update is left out and counted, everything else goes on."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from pieces import fit, make_mini_batch, make_samples, tiny_policy

from vespo_lightning.callbacks.engine_mismatch import EngineMismatch
from vespo_lightning.callbacks.router_monitor import RouterMonitor
from vespo_lightning.callbacks.staleness_scheduler import StalenessScheduler
from vespo_lightning.callbacks.weight_variance import WeightVariance
from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.objectives.reinforce import Reinforce
from vespo_lightning.objectives.vespo import Vespo
from vespo_lightning.training.module import NonFiniteStreak, PolicyModule

UPDATES = 4


class Watch(L.Callback):
    """What the module looked like after each update."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append(
            {
                "batch": batch.update,
                "update": module.update,
                "version": module.policy_version,
                "skipped": module.last_update.skipped,
                "lr": module.last_update.learning_rate,
                "state": copy.deepcopy(module.model.state_dict()),
                "row": module.take_record(),
            }
        )


def poisoned(update: int, how: str):
    """A mini-batch of samples whose loss or whose gradient is not finite."""
    samples = make_samples(tiny_policy())
    batch = make_mini_batch(samples, update=update)
    if how == "nan behaviour":
        samples[0].behaviour_log_probs[2] = np.nan
    elif how == "infinite advantage":
        batch.advantages[1] = torch.inf
    return batch


class BreakGradient:
    """Makes one parameter's gradient non-finite in chosen backward passes; the loss stays finite."""

    def __init__(self, parameter: torch.nn.Parameter, at: set[int]) -> None:
        self.count, self.at = 0, at
        parameter.register_hook(self)

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if self.count - 1 not in self.at:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[0] = torch.nan
        return gradient


@pytest.mark.parametrize("how", ["nan behaviour", "infinite advantage", "nan gradient"])
def test_the_update_is_left_out(how):
    model = tiny_policy()
    batches = [poisoned(update, how if update in (1, 2) else "") for update in range(UPDATES)]
    module = PolicyModule(
        model, Vespo(), lr=1e-3, schedule="linear", updates=UPDATES, weight_decay=0.1, max_skipped_streak=3
    )
    if how == "nan gradient":
        BreakGradient(model.model.norm.weight, {1, 2})
    start = copy.deepcopy(model.state_dict())
    watch = Watch()
    fit(module, batches, [watch])

    assert [row["skipped"] for row in watch.rows] == [False, True, True, False]
    assert [row["batch"] for row in watch.rows] == [0, 1, 2, 3]
    assert [row["update"] for row in watch.rows] == [1, 2, 3, 4]
    assert [row["version"] for row in watch.rows] == [1, 1, 1, 2]
    assert [row["lr"] for row in watch.rows] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert [row["row"]["train/skipped_updates"] for row in watch.rows] == [0, 1, 2, 2]
    states = [start, *(row["state"] for row in watch.rows)]

    def same(a, b):
        return all(torch.equal(a[name], b[name]) for name in a)

    assert [same(a, b) for a, b in itertools.pairwise(states)] == [False, True, True, False]
    assert all(tensor.isfinite().all() for tensor in states[-1].values())
    assert module.skipped_updates == 2 and module.skipped_streak == 0


def test_a_skipped_update_leaves_the_optimizer_as_it_was():
    """The last update moves as if the skipped one had not been, at the schedule's later learning rate."""

    def final(hows):
        model = tiny_policy()
        module = PolicyModule(model, Vespo(), lr=1e-3)
        fit(module, [poisoned(update, how) for update, how in enumerate(hows)])
        return model.state_dict()

    with_skip, without = final(["", "nan behaviour", ""]), final(["", ""])
    for name, tensor in without.items():
        assert torch.equal(tensor, with_skip[name]), name


@pytest.mark.parametrize("objective", [Vespo(), Grpo(), Reinforce()], ids=lambda o: o.name)
def test_callbacks_bear_a_policy_of_nan(objective):
    """Every log-prob, entropy and router probability is NaN; the numbers of such a row may be NaN as well."""
    model = tiny_policy()
    batches = [poisoned(update, "") for update in range(2)]
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.nan)
    module = PolicyModule(model, objective)
    watch = Watch()
    monitors = [StalenessScheduler(2), EngineMismatch(), WeightVariance(histogram_every=1), RouterMonitor(), watch]
    fit(module, batches, monitors)
    assert [row["skipped"] for row in watch.rows] == [True, True]
    assert np.isnan(watch.rows[1]["row"]["train/loss"])
    assert watch.rows[1]["row"]["staleness/lag_mean"] == 0


def test_a_mini_batch_of_masked_samples():
    """Every response truncated under ``rollout.truncated=mask``: nothing to learn, nothing to stop for."""
    batch = make_mini_batch(make_samples(tiny_policy()), in_loss=[False] * 6)
    model = tiny_policy()
    start = copy.deepcopy(model.state_dict())
    watch = Watch()
    module = PolicyModule(model, Vespo(), lr=1e-3, entropy_coefficient=0.1)
    fit(module, [batch], [StalenessScheduler(2), EngineMismatch(), WeightVariance(), RouterMonitor(), watch])
    row = watch.rows[0]["row"]
    assert not watch.rows[0]["skipped"] and row["train/loss"] == row["train/grad_norm"] == 0
    assert all(torch.equal(start[name], tensor) for name, tensor in model.state_dict().items())
    assert [name for name, value in row.items() if not np.isfinite(value)] == []


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_streak_stops_the_run(checkpoint, tmp_path: Path):
    batches = [poisoned(update, "nan behaviour" if update >= 2 else "") for update in range(8)]
    module = PolicyModule(tiny_policy(), Vespo(), lr=1e-3, max_skipped_streak=3)
    callbacks = [ModelCheckpoint(tmp_path, filename="kept", every_n_train_steps=1)] if checkpoint else []
    with pytest.raises(NonFiniteStreak) as caught:
        fit(module, batches, callbacks, enable_checkpointing=checkpoint)
    said = str(caught.value)
    assert said.startswith("3 updates in a row had a non-finite loss or gradient (optim.max_skipped_streak=3)")
    wanted = f"the last good checkpoint is {tmp_path / 'kept.ckpt'}" if checkpoint else "no checkpoint had been written"
    assert wanted in said
    assert module.update == 5 and module.policy_version == 2


def test_an_applied_update_ends_a_streak():
    hows = ["nan behaviour", "nan behaviour", "", "nan behaviour", "nan behaviour"]
    module = PolicyModule(tiny_policy(), Vespo(), lr=1e-3, max_skipped_streak=3)
    fit(module, [poisoned(update, how) for update, how in enumerate(hows)])
    assert module.skipped_updates == 4 and module.policy_version == 1


def test_a_streak_survives_a_checkpoint(tmp_path: Path):
    module = PolicyModule(tiny_policy(), Vespo(), max_skipped_streak=3)
    trainer = fit(module, [poisoned(update, "nan behaviour") for update in range(2)])
    trainer.save_checkpoint(tmp_path / "streak.ckpt")
    resumed = PolicyModule(tiny_policy(), Vespo(), max_skipped_streak=3)
    state = torch.load(tmp_path / "streak.ckpt", weights_only=True)
    resumed.on_load_checkpoint(state)
    assert (resumed.update, resumed.policy_version) == (2, 0)
    assert (resumed.skipped_updates, resumed.skipped_streak) == (2, 2)
