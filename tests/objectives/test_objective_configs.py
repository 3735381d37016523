"""Every file of conf/objective and conf/advantage builds what it names, with the defaults of the class."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hydra.utils import instantiate

from vespo_lightning.objectives.advantages import Advantage
from vespo_lightning.objectives.base import Objective

CONF = files("vespo_lightning.conf")


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(str(CONF / "objective")).glob("*.yaml")))
def test_objective(name):
    config = yaml.safe_load((CONF / "objective" / f"{name}.yaml").read_text())
    objective = instantiate(config)
    assert isinstance(objective, Objective) and objective.name == name
    assert vars(objective) == vars(type(objective)())
    assert set(vars(objective)) == set(config) - {"_target_"}


@pytest.mark.parametrize("name", ["group_mean", "group_mean_std", "leave_one_out"])
def test_advantage(name):
    advantage = instantiate(yaml.safe_load((CONF / "advantage" / f"{name}.yaml").read_text()))
    assert isinstance(advantage, Advantage) and advantage.name == name
