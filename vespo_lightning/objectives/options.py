"""The methods that the package's configuration offers, with the constants of their files."""

from __future__ import annotations

from importlib.resources import files

from hydra.utils import instantiate
from omegaconf import OmegaConf

from vespo_lightning.objectives.base import Objective

_FOLDER = files("vespo_lightning.conf") / "objective"


def option_names() -> list[str]:
    """What ``objective=`` can be, in alphabetical order; a user's own files on Hydra's search path are not seen."""
    found = (file.name for file in _FOLDER.iterdir())
    return sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))


def default_objective(name: str) -> Objective:
    """The objective that ``objective=name`` builds when nothing else is typed."""
    return instantiate(OmegaConf.create((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))
