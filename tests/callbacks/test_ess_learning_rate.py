from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from pieces import fit, make_mini_batch, make_samples, tiny_policy
from small_run import FakeModule, batches, trainer, update_result
from transformers import get_scheduler

from vespo_lightning.callbacks.ess_learning_rate import EssLearningRate
from vespo_lightning.diagnostics import importance
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.sequence_is import SequenceIs
from vespo_lightning.rollouts.sample import MiniBatch
from vespo_lightning.training.module import PolicyModule

#: log W of the four responses by position in the rollout, and the ESS ratio that they have.
LOG_WEIGHTS = {0: [0.1, 0.1, -0.1, -0.1], 1: [1.0, 0.0, 0.0, 0.0], 2: [3.0, 0.0, -2.0, 30.0]}
LR = 0.1


def ess(position: int) -> float:
    weights = [math.exp(w) for w in LOG_WEIGHTS[position]]
    return sum(weights) ** 2 / (4 * sum(w * w for w in weights))


class SteppingModule(FakeModule):
    """Takes one step of SGD on a constant gradient of 1 per update: the weight moves by the learning rate.

    Sets ``last_update`` before the step and the schedule after it, as the real module does. ``skip_at`` makes no step.
    """

    def __init__(self, schedule: str = "constant", **options) -> None:
        super().__init__(**options)
        self.schedule = schedule
        self.moves: list[float] = []
        self.rows: list[dict[str, float]] = []

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=LR)
        return {
            "optimizer": optimizer,
            "lr_scheduler": get_scheduler(self.schedule, optimizer, num_warmup_steps=0, num_training_steps=8),
        }

    def training_step(self, batch: MiniBatch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.weight.sum())
        self.last_update = weighted(batch, LOG_WEIGHTS[batch.position])
        before = self.weight.item()
        if batch.update != self.skip_at:
            optimizer.step()
        self.moves.append(before - self.weight.item())
        self.lr_schedulers().step()
        self.update += 1
        self.rows.append(self.take_record())


def weighted(batch: MiniBatch, log_weights: list[float]):
    """Two tokens per response; the first has all of log W."""
    result = update_result(batch, version=1)
    ratio = torch.tensor([[w, 0.0] for w in log_weights]).flatten()
    tokens = result.tokens
    object.__setattr__(tokens, "log_prob", tokens.behaviour_log_prob + ratio)
    return result


def run(folder: Path, callback: EssLearningRate, updates: int = 7, start: int = 0, **options) -> SteppingModule:
    module = SteppingModule(**options)
    trainer(folder, [callback]).fit(module, batches(updates, rollout_size=3, start=start))
    return module


@pytest.mark.parametrize(("rule", "exponent"), [("sqrt", 0.5), ("linear", 1.0)])
def test_each_step_has_its_own_factor_and_they_do_not_pile_up(tmp_path, rule, exponent):
    module = run(tmp_path, EssLearningRate(rule, reference=0.9))
    factors = [min(1.0, ess(update % 3) / 0.9) ** exponent for update in range(7)]
    assert factors[0] == 1.0 and factors[1] < 0.97 and factors[2] < 0.6
    assert module.moves == pytest.approx([LR * factor for factor in factors], rel=1e-5)
    assert [row["train/ess_lr_factor"] for row in module.rows] == pytest.approx(factors, rel=1e-5)
    assert module.optimizers().param_groups[0]["lr"] == LR


def test_a_schedule_keeps_its_course(tmp_path):
    module = run(tmp_path, EssLearningRate("linear", reference=1.0), schedule="linear")
    expected = [LR * (1 - update / 8) * ess(update % 3) for update in range(7)]
    assert module.moves == pytest.approx(expected, rel=1e-5)


def test_the_reference_is_measured_on_first_mini_batches_only(tmp_path, monkeypatch):
    """Their mean so far: the second rollout starts with other weights than the first."""
    callback = EssLearningRate("linear")
    first = run(tmp_path, callback, updates=3)
    monkeypatch.setitem(LOG_WEIGHTS, 0, [0.5, 0.0, 0.0, -0.5])
    earlier, later = math.cosh(0.1) ** 2 / math.cosh(0.2), ess(0)
    second = run(tmp_path, callback, updates=6, start=3)
    assert earlier > later + 0.05
    both = (earlier + later) / 2
    assert [row["train/ess_reference"] for row in first.rows] == pytest.approx([earlier] * 3, rel=1e-5)
    assert [row["train/ess_reference"] for row in second.rows] == pytest.approx([both] * 3, rel=1e-5)
    assert first.moves == pytest.approx([LR, LR * ess(1) / earlier, LR * ess(2) / earlier], rel=1e-5)
    assert second.moves == pytest.approx([LR * min(1, ess(p) / both) for p in range(3)], rel=1e-5)


def test_a_resumed_run_measures_on(tmp_path):
    whole = run(tmp_path, EssLearningRate(), updates=7)
    before = EssLearningRate()
    run(tmp_path, before, updates=4)
    after = EssLearningRate()
    after.load_state_dict(before.state_dict())
    resumed = run(tmp_path, after, updates=7, start=4)
    assert resumed.rows == whole.rows[4:]


def test_state_travels_in_the_checkpoint(tmp_path):
    callback = EssLearningRate()
    small = trainer(tmp_path, [callback])
    small.fit(SteppingModule(), batches(4, rollout_size=3))
    small.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)  # plain values
    assert saved["callbacks"]["EssLearningRate"] == {"fresh_sum": pytest.approx(2 * ess(0)), "fresh_count": 2}
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == LR


def test_a_skipped_update_is_not_measured(tmp_path):
    module = run(tmp_path, EssLearningRate(), skip_at=0, updates=3)
    assert module.moves[0] == 0.0 and module.rows[0] == {}
    assert module.rows[1]["train/ess_reference"] == 1.0  # nothing measured yet


def test_the_real_module_reports_the_learning_rate_that_it_used():
    """Three updates on data with noisy weights: each learning rate is the configured one times its own factor."""
    model = tiny_policy()
    found = []

    class Observer(L.Callback):
        def on_train_batch_end(self, trainer, module, *_) -> None:
            row = module.take_record()
            weights = importance.log_weights(module.last_update.tokens)
            found.append((module.last_update.learning_rate, row, importance.ess_ratio(weights)))

    module = PolicyModule(model, SequenceIs(cap=8.0), lr=1e-4)
    items = [make_mini_batch(make_samples(model, noise=0.5), update=i) for i in range(3)]
    fit(module, items, [EssLearningRate(reference=1.0), Observer()])
    assert len(found) == 3
    for learning_rate, row, ratio in found:
        assert ratio < 0.8
        assert learning_rate == row["train/learning_rate"] == pytest.approx(1e-4 * math.sqrt(ratio))
    assert module.optimizers().param_groups[0]["lr"] == 1e-4


class Optimizer:
    def __init__(self) -> None:
        self.param_groups = [{"lr": 1.0}, {"lr": 0.5}]


def one_step(callback: EssLearningRate, log_weights: list[float], in_loss: list[bool], gather=lambda t: t):
    """Learning rates of two parameter groups after the callback, and what it recorded."""
    batch = next(iter(batches(1)))
    result = weighted(batch, log_weights)
    object.__setattr__(result.tokens, "loss_mask", torch.tensor(in_loss).repeat_interleave(2))
    row: dict[str, float] = {}
    optimizer = Optimizer()
    callback.on_before_optimizer_step(
        SimpleNamespace(strategy=SimpleNamespace(all_gather=gather)),
        SimpleNamespace(last_update=result, record=row.update),
        optimizer,
    )
    return [group["lr"] for group in optimizer.param_groups], row


def test_every_parameter_group_is_scaled_and_masked_responses_do_not_count():
    rates, row = one_step(EssLearningRate("linear", 1.0), [1.0, 0.0, 50.0, 0.0], [True, True, False, True])
    weights = torch.tensor([math.e, 1.0, 1.0], dtype=torch.float64)
    factor = float(weights.sum() ** 2 / (3 * weights.square().sum()))
    assert rates == pytest.approx([factor, factor / 2], rel=1e-6)
    assert row["train/ess_lr_factor"] == pytest.approx(factor, rel=1e-6)


def test_weights_of_all_ranks_count():
    """A rank whose own weights are equal, with another one whose weights are larger."""

    def gather(mine):
        return torch.stack([mine, mine if mine.dtype == torch.bool else mine + 2.0])

    rates, _ = one_step(EssLearningRate("linear", 1.0), [0.0] * 4, [True] * 4, gather)
    w = math.exp(2.0)
    assert rates[0] == pytest.approx((1 + w) ** 2 / (2 * (1 + w * w)), rel=1e-5)


def test_nothing_happens_without_a_response_in_the_loss():
    assert one_step(EssLearningRate(), [0.0] * 4, [False] * 4) == ([1.0, 0.5], {})


def test_weights_that_are_not_finite_leave_the_learning_rate_finite():
    """An engine may report a probability of 0, and an objective with a cap goes on."""
    rates, _ = one_step(EssLearningRate("linear", 1.0), [math.inf, 0.0, 0.0, 0.0], [True] * 4)
    assert rates[0] == 0.25


def test_weights_beyond_the_clamps_of_objectives_count_in_full():
    rates, _ = one_step(EssLearningRate("linear", 1.0), [200.0, 199.0, 0.0, 0.0], [True] * 4)
    assert rates[0] == pytest.approx((1 + math.exp(-1)) ** 2 / (4 * (1 + math.exp(-2))), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"rule": "cubic"}, "rule=cubic"),
        ({"reference": 0}, "reference=0"),
        ({"reference": 1.2}, "reference=1.2"),
        ({"reference": float("nan")}, "reference=nan"),
        ({"reference": "auto"}, "reference=auto"),
        ({"reference": True}, "reference=True"),
    ],
)
def test_bad_options_are_refused(options, key):
    with pytest.raises(UserError, match=rf"^callbacks\.ess_learning_rate\.{key} is "):
        EssLearningRate(**options)
