"""Whether the values of a section fit what it builds, asked before anything is built."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from hydra._internal.utils import _locate  # get_method() of hydra.utils logs lines of its own
from omegaconf import DictConfig

from vespo_lightning.config_check import one_line
from vespo_lightning.errors import UserError

_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}


def check_arguments(cfg: DictConfig) -> None:
    """Raises UserError for a value that is not of the type that the section's ``_target_`` declares for it.

    Declarations of plain types and their unions are understood; values with any other are the target's own business.
    """
    for section, node in _sections(cfg):
        try:
            parameters = inspect.signature(_locate(node._target_)).parameters
        except (ImportError, TypeError, ValueError) as error:
            raise UserError(f"{section}._target_={node._target_} cannot be used ({one_line(error)})") from error
        values = {str(name): value for name, value in node.items()}
        for name in values.keys() & parameters.keys():
            declared = _declared(parameters[name])
            if declared <= _NAMES.keys() and not any(_fits(values[name], kind) for kind in declared):
                wanted = " or ".join(_NAMES[kind] for kind in _NAMES if kind in declared)
                raise UserError(f"{section}.{name}={values[name]} must be {wanted}")


def _sections(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for name, child in node.items():
            yield from _sections(child, f"{path}.{name!s}".lstrip("."))


def _declared(parameter: inspect.Parameter) -> set[str]:
    """``int | None`` -> int and None, whether the annotation is a type or its text."""
    annotation = parameter.annotation
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return {word.strip() for word in text.split("|")}


def _fits(value: Any, kind: str) -> bool:
    if kind == "None" or isinstance(value, bool):
        return value is None if kind == "None" else kind == "bool"
    return isinstance(value, {"int": int, "float": int | float, "bool": bool, "str": str}[kind])
