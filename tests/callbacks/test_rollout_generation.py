import dataclasses
import warnings
from types import SimpleNamespace

import pytest
from small_run import mini_batch

from vespo_lightning.callbacks.rollout_generation import UNIFORM_ROLLOUTS, RolloutGeneration
from vespo_lightning.errors import UserError


class Producer:
    """Records what the callback asks of it."""

    def __init__(self, temperature: float = 1.0, recompute: bool = False, routing: str = "native") -> None:
        self.routing, self.reference = routing, False
        self.engine = SimpleNamespace(returns_routing=False)
        self.sampling = SimpleNamespace(temperature=temperature)
        self.recompute = recompute
        self.check = SimpleNamespace(calibration={"offset": 5, "tolerance": 0.25})
        self.task = SimpleNamespace(held_out=lambda: ["problem"])
        self.tokenizer, self.evaluate = object(), object()
        self.started: list[object] = []

    def start(self, model_path, source, calibration) -> None:
        self.started += [model_path, source, calibration]


def module(
    temperature: float = 1.0,
    denominator: str = "behaviour",
    routing: str = "native",
    needs: frozenset[str] = frozenset(),
    kl: object = None,
) -> SimpleNamespace:
    loss = SimpleNamespace(needs=needs, kl=kl)
    return SimpleNamespace(temperature=temperature, denominator=denominator, routing=routing, loss=loss)


def batch(uniform: float, position: int = 0):
    metrics = {"reward/uniform_group_share": uniform, "reward/rollout_mean": 0.5}
    return dataclasses.replace(mini_batch(position, rollout_size=2), rollout_metrics=metrics)


def test_starts_the_engine_and_gives_the_module_what_callbacks_ask_of_it():
    producer, policy = Producer(), module()
    RolloutGeneration(producer, "folder").on_fit_start(None, policy)
    assert producer.started == ["folder", policy, None]
    assert policy.held_out_problems == ["problem"]
    assert (policy.evaluator, policy.tokenizer) == (producer.evaluate, producer.tokenizer)


def test_a_resumed_run_keeps_the_calibration_of_its_first_start():
    state = RolloutGeneration(Producer(), "folder").state_dict()
    producer, policy = Producer(), module()
    callback = RolloutGeneration(producer, "folder")
    callback.load_state_dict(state)
    callback.on_fit_start(None, policy)
    assert producer.started[2] == {"offset": 5, "tolerance": 0.25}


@pytest.mark.parametrize(
    ("producer", "policy", "message"),
    [
        (Producer(temperature=0.7), module(), "temperature=0.7"),
        (Producer(), module(denominator="recomputed"), "recompute=True"),
        (Producer(), module(needs=frozenset({"recomputed_log_prob"})), "a correction needs a producer with recompute"),
        (Producer(), module(kl=object()), "reference=True"),
        (Producer(), module(routing="r2"), "routing=native, the module for routing=r2"),
    ],
)
def test_producer_and_module_must_mean_the_same_ratio(producer, policy, message):
    with pytest.raises(UserError, match=message):
        RolloutGeneration(producer, "folder").on_fit_start(None, policy)
    assert not producer.started


def test_warns_once_when_nothing_can_be_learned():
    callback = RolloutGeneration(Producer(), "folder")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for share in [1.0] * (UNIFORM_ROLLOUTS - 1) + [0.9] + [1.0] * (UNIFORM_ROLLOUTS + 2):
            callback.on_train_batch_end(None, None, None, batch(share), 0)
            callback.on_train_batch_end(None, None, None, mini_batch(1, rollout_size=2), 1)
    assert len(seen) == 1 and "every advantage is 0" in str(seen[0].message)


def test_an_engine_without_routing_has_nothing_to_replay():
    with pytest.raises(UserError, match=r"routing=r3 replays .* SimpleNamespace returns none"):
        RolloutGeneration(Producer(routing="r3"), "folder").on_fit_start(None, module(routing="r3"))
