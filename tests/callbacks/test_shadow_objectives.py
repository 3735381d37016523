from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pieces
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from small_run import LOG_RATIO, mini_batch, update_result

from vespo_lightning.callbacks.shadow_objectives import ShadowObjectives
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.objectives.gspo import Gspo
from vespo_lightning.objectives.options import default_objective, option_names
from vespo_lightning.objectives.vespo import Vespo
from vespo_lightning.training.module import PolicyModule

KEY = r"^callbacks\.shadow_objectives\."


def rows(callback: ShadowObjectives, updates: range, **changes) -> list[dict[str, float]]:
    """Rows of these updates, all on the same four responses of two tokens with log-ratio ``LOG_RATIO``."""
    found = []
    for number in updates:
        row: dict[str, float] = {}
        update = replace(update_result(mini_batch(0), version=number), **changes)
        module = SimpleNamespace(last_update=update, update=number, record=row.update)
        callback.on_train_batch_end(None, module, None, None, 0)
        found.append(row)
    return found


def test_records_each_method_and_the_run():
    (row,) = rows(ShadowObjectives(["grpo", "vespo"]), range(1, 2))
    assert {name.split("/")[1] for name in row} == {"run", "grpo", "vespo"}
    assert row["shadow/grpo/coefficient_positive_mean"] == 0.0  # exp(0.25) is above 1.2
    assert row["shadow/grpo/coefficient_negative_mean"] == pytest.approx(math.exp(LOG_RATIO), rel=1e-6)
    assert row["shadow/grpo/zero_share"] == 0.5
    weight = math.exp(2 * LOG_RATIO)
    positive, negative = weight**2 * math.exp(3 * (1 - weight)), weight**3 * math.exp(2 * (1 - weight))
    assert row["shadow/vespo/coefficient_positive_mean"] == pytest.approx(positive, rel=1e-6)
    assert row["shadow/vespo/coefficient_negative_mean"] == pytest.approx(negative, rel=1e-6)
    assert row["shadow/run/ess_ratio"] == 1.0
    assert row["shadow/run/cosine"] == pytest.approx(1.0, rel=1e-12)
    assert row["shadow/grpo/cosine"] == pytest.approx(math.sqrt(0.5), rel=1e-12)  # the negative half of the run's
    assert row["shadow/vespo/mass_0_1"] == 1.0


def test_the_batch_is_the_one_after_corrections():
    tokens = update_result(mini_batch(0), version=0).tokens
    only_first = replace(tokens, loss_mask=tokens.sequence_index == 0)
    (row,) = rows(ShadowObjectives(["grpo"]), range(1, 2), corrected=only_first)
    assert row["shadow/grpo/zero_share"] == 0.0
    assert "shadow/grpo/coefficient_positive_mean" not in row


def test_every():
    lengths = [len(row) for row in rows(ShadowObjectives(["grpo"], every=3), range(1, 8))]
    assert [number for number, length in enumerate(lengths, 1) if length] == [3, 6]


def test_no_objectives_no_rows():
    assert rows(ShadowObjectives(), range(1, 3)) == [{}, {}]


def test_constants_are_those_of_the_configuration():
    built = ShadowObjectives(OmegaConf.create(["gspo", "vespo"])).objectives
    assert vars(built["gspo"]) == vars(Gspo()) and vars(built["vespo"]) == vars(Vespo())
    assert {"vespo", "grpo", "reinforce", "gspo", "cispo"} <= set(option_names())
    assert all(default_objective(name).name == name for name in option_names())


def test_from_hydra():
    node = {"_target_": "vespo_lightning.callbacks.shadow_objectives.ShadowObjectives", "objectives": ["grpo"]}
    assert list(instantiate(OmegaConf.create(node)).objectives) == ["grpo"]


def test_training_is_the_same_with_every_method_watching():
    """A real update of the tiny model: same weights after it, and numbers for every method that can be."""
    model = pieces.tiny_policy()
    samples = pieces.make_samples(model, noise=0.3)
    names = [name for name in option_names() if not default_objective(name).needs]
    weights, recorded = [], {}

    class Keep(ShadowObjectives):
        def on_train_batch_end(self, trainer, module, *rest):
            super().on_train_batch_end(trainer, module, *rest)
            recorded.update(module.take_record())

    for callbacks in ([], [Keep(names)]):
        module = PolicyModule(pieces.tiny_policy(), Grpo(), lr=1e-2)
        pieces.fit(module, [pieces.make_mini_batch(samples)], callbacks)
        weights.append(torch.cat([p.detach().flatten() for p in module.model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert len(names) >= 12
    assert {f"shadow/{name}/cosine" for name in names} <= recorded.keys()
    assert recorded["shadow/grpo/cosine"] == pytest.approx(1.0, rel=1e-12)
    assert recorded["shadow/grpo/zero_share"] == recorded["objective/zero_share"] > 0
    for sign in ("positive", "negative"):
        name = f"coefficient_{sign}_mean"
        assert recorded[f"shadow/run/{name}"] == pytest.approx(recorded[f"objective/{name}"], rel=1e-9)


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 2.5, "often", True])
def test_invalid_interval_is_named(value):
    with pytest.raises(UserError, match=rf"{KEY}every={value} is not allowed; "):
        ShadowObjectives(["grpo"], every=value)


def test_unknown_names_are_refused_with_near_ones():
    with pytest.raises(UserError, match=rf"{KEY}objectives: gpso is no objective; valid: .*vespo.*\(nearest: gspo"):
        ShadowObjectives(["grpo", "gpso"])
    with pytest.raises(UserError, match=rf"{KEY}objectives: 7 is no objective; valid: [a-z0-9_, ]+$"):
        ShadowObjectives([7])


def test_a_name_given_twice_is_refused():
    with pytest.raises(UserError, match=rf"{KEY}objectives: grpo is there twice"):
        ShadowObjectives(["grpo", "vespo", "grpo"])


@pytest.mark.parametrize("value", ["grpo", None, 3])
def test_what_is_no_list_is_refused(value):
    with pytest.raises(UserError, match=rf"{KEY}objectives={value} is not a list; type .* \[grpo,gspo\]"):
        ShadowObjectives(value)


def watching(need: str) -> ShadowObjectives:
    class Demanding(Grpo):
        needs = frozenset({need})

    callback = ShadowObjectives(["grpo"])
    callback.objectives = {"grpo": Demanding()}
    return callback


def module(denominator: str = "behaviour", needs: frozenset[str] = frozenset(), is_moe: bool = True) -> SimpleNamespace:
    return SimpleNamespace(denominator=denominator, loss=SimpleNamespace(needs=needs), is_moe=is_moe, routing="native")


def test_missing_log_probs_of_the_trainer_are_refused_at_start():
    callback = watching("recomputed_log_prob")
    with pytest.raises(UserError, match=rf"{KEY}objectives: grpo needs .* denominator=recomputed"):
        callback.setup(None, module(), "fit")
    callback.setup(None, module(denominator="recomputed"), "fit")
    callback.setup(None, module(needs=frozenset({"recomputed_log_prob"})), "fit")  # another part of the run needs them


def test_missing_routing_is_refused_at_start():
    with pytest.raises(UserError, match=rf"{KEY}objectives: grpo needs the routing"):
        watching("router_shift").setup(None, module(is_moe=False), "fit")
    watching("router_shift").setup(None, module(), "fit")


@pytest.mark.parametrize("need", ["recomputed_log_prob", "top_log_probs", "router_shift"])
def test_what_only_the_data_can_tell_is_refused_at_the_first_update(need):
    with pytest.raises(UserError, match=rf"{KEY}objectives: grpo needs .*leave grpo out of the list"):
        rows(watching(need), range(1, 2))


def test_nothing_before_the_first_update():
    ShadowObjectives(["grpo"]).on_train_batch_end(None, SimpleNamespace(last_update=None), None, None, 0)
