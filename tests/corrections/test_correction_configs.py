"""Every file of conf/correction holds its own name as the one key, and builds that with the defaults of the class."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hydra.utils import instantiate

from vespo_lightning.corrections.base import Correction

FOLDER = Path(str(files("vespo_lightning.conf") / "correction"))
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "none")


def test_all_are_found():
    assert NAMES == ["geometric", "mis", "opsm", "router_shift", "sequence_rejection", "tis"]


@pytest.mark.parametrize("name", NAMES)
def test_correction(name):
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert list(config) == [name]
    correction = instantiate(config[name])
    assert isinstance(correction, Correction) and correction.name == name
    assert vars(correction) == vars(type(correction)())
    assert set(vars(correction)) == set(config[name]) - {"_target_"}
