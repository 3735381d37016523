"""Validation of the numbers that objectives take from the configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from vespo_lightning.errors import UserError

Choice = TypeVar("Choice", bound=str)


def require_number(
    key: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    section: str = "objective",
) -> float:
    """``value`` as a float, when it is a finite number in [low, high], or (low, high] with ``open_low``.

    Raises:
        UserError: it is not; the message names ``<section>.<key>``.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        above = value > low if open_low else value >= low
        if above and value <= high:
            return float(value)
    bound = f"{'above' if open_low else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
    raise UserError(f"{section}.{key}={value} is not allowed; give a finite number {bound}")


def require_choice(key: str, value: Choice, choices: Sequence[str]) -> Choice:
    """``value``, when it is one of ``choices``.

    Raises:
        UserError: it is not; the message names ``objective.<key>`` and the choices.
    """
    if value in choices:
        return value
    raise UserError(f"objective.{key}={value} is unknown; valid: {', '.join(choices)}")
