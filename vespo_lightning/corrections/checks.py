"""Validation of the numbers that corrections take from the configuration."""

from __future__ import annotations

from functools import partial

from vespo_lightning.objectives import checks
from vespo_lightning.objectives.token_ratio import MAX_RATIO

#: :func:`~vespo_lightning.objectives.checks.require_number` for keys of the section ``correction``.
require_number = partial(checks.require_number, section="correction")


def require_range(name: str, low: object, high: object) -> tuple[float, float]:
    """Bounds of a ratio with 1 between them, so that nothing is cut where nothing differs.

    Raises:
        UserError: ``low`` is not in [0, 1] or ``high`` not in [1, 1e8]; the message names ``correction.<name>``.
    """
    return require_number(f"{name}.low", low, 0.0, 1.0), require_number(f"{name}.high", high, 1.0, MAX_RATIO)
