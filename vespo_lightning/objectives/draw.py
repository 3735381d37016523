"""A picture of every method's coefficient over log W: ``python -m vespo_lightning.objectives.draw FILE.png``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import Objective, TokenBatch
from vespo_lightning.objectives.options import default_objective, option_names
from vespo_lightning.objectives.sequence import SequenceObjective

LENGTH = 16
#: Probability of every token when it was sampled, which matters to methods that measure probabilities (DPPO).
PROBABILITY = 0.5
LOG_WEIGHT_LIMIT = 5.0
COEFFICIENT_LIMIT = 1.7
SUFFIXES = (".png", ".svg")
#: The method without importance weights, drawn as the reference of every panel.
REFERENCE = "reinforce"
#: Okabe and Ito's colours for colour-blind readers, without the yellow that paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
#: Lines that lie on each other are drawn thinner and thinner, so that all of them are seen.
WIDTHS = (3.6, 1.3)
#: A coefficient that changes by more than this from one point to the next is a mask, not a slope.
JUMP = 0.1


def coefficient_curve(objective: Objective, log_weight: Tensor, advantage: float, length: int = LENGTH) -> Tensor:
    """float64 [N]: the coefficient of a response, the mean over its tokens where they differ.

    Args:
        log_weight: float64 [N], one response of ``length`` tokens for each, all with the log-ratio
            ``log_weight / length``.
        advantage: of every response.
    """
    count = len(log_weight)
    log_ratio = (log_weight / length).repeat_interleave(length)
    sampled = torch.full_like(log_ratio, math.log(PROBABILITY))
    batch = TokenBatch(
        log_prob=sampled + log_ratio,
        behaviour_log_prob=sampled,
        recomputed_log_prob=sampled,
        sequence_index=torch.arange(count).repeat_interleave(length),
        loss_mask=torch.ones(count * length, dtype=torch.bool),
        advantage=torch.full((count,), advantage, dtype=log_weight.dtype),
        group=torch.arange(count),
        version_made=torch.zeros(count * length, dtype=torch.int32),
        policy_version=0,
    )
    return objective.coefficient(batch).reshape(count, length).mean(1)


def drawn_objectives() -> dict[str, dict[str, Objective]]:
    """Group -> name -> objective with the constants of its configuration file, the reference left out.

    A method has a curve when the importance ratios of a response decide its coefficient. One that looks at the whole
    mini-batch (M2PO) or at log-probs of other tokens has none.
    """
    groups: dict[str, dict[str, Objective]] = {"by W": {}, "by token": {}}
    for name in option_names():
        objective = default_objective(name)
        if name != REFERENCE and objective.scope != "mini-batch" and objective.needs <= {"recomputed_log_prob"}:
            on_weight = isinstance(objective, SequenceObjective) and objective.normalisation == "none"
            groups["by W" if on_weight else "by token"][name] = objective
    return groups


def draw(path: Path, length: int = LENGTH) -> None:
    """Write the picture; the suffix decides between PNG and SVG.

    Raises:
        UserError: another suffix, a length below 1, or a path that cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: the name must end in {' or '.join(SUFFIXES)}")
    if length < 1:
        raise UserError(f"--length {length} is not allowed; a response has at least 1 token")
    # The salt and the missing date make two SVG files of the same curves the same.
    options = {"metadata": {"Date": None}} if suffix == ".svg" else {"pil_kwargs": {"optimize": True}}
    with rc_context({"font.size": 9, "svg.hashsalt": "coefficients"}):
        try:
            picture(length).savefig(path, dpi=130, **options)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def picture(length: int) -> Figure:
    """Methods on W above, methods on token ratios below; positive advantages left, negative ones right."""
    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it keeps global state and may look for a display
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    titles = ("methods on the weight $W$ of the response", "methods on the ratios of its tokens")
    for row, title, methods in zip(panels, titles, drawn_objectives().values(), strict=True):
        lines = _styles(methods)
        for axes, advantage, sign in zip(row, (1.0, -1.0), (">", "<"), strict=True):
            _draw_panel(axes, methods, lines, advantage, length)
            axes.set_title(f"$A {sign} 0$: {title}", loc="left", fontsize=9)
        row[0].set_ylabel("coefficient")
        common = [Line2D([], [], color="0.85", linewidth=5.5, label=REFERENCE), _common_point([], [])]
        row[1].legend(
            handles=[*lines, *common], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, labelspacing=0.7
        )
    for axes in panels[1]:
        axes.set_xlabel(r"$\log W$")
    panels[0, 0].set(xlim=(-LOG_WEIGHT_LIMIT, LOG_WEIGHT_LIMIT), ylim=(-0.04, COEFFICIENT_LIMIT))
    figure.suptitle(
        rf"Coefficient of $A\,\nabla\log\pi$ in a response of {length} token{'s' * (length > 1)},"
        rf" each with log-ratio $\log W / {length}$, sampled with probability {PROBABILITY:g}",
        fontsize=10,
    )
    return figure


def _draw_panel(
    axes: Axes, methods: dict[str, Objective], lines: Sequence[Line2D], advantage: float, length: int
) -> None:
    axes.axhline(1.0, color="0.85", linewidth=5.5, zorder=0)
    axes.axvline(0.0, color="0.8", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    grid = torch.linspace(-LOG_WEIGHT_LIMIT, LOG_WEIGHT_LIMIT, 2001, dtype=torch.float64)
    for place, (line, objective) in enumerate(zip(lines, methods.values(), strict=True)):
        curve = coefficient_curve(objective, grid, advantage, length)
        seen = curve[1:].minimum(curve[:-1]) < COEFFICIENT_LIMIT
        jumps = (seen & (curve.diff().abs() > JUMP)).nonzero()[:, 0].tolist()
        for start, end in zip([0, *(i + 1 for i in jumps)], [*(i + 1 for i in jumps), len(grid)], strict=True):
            axes.plot(grid[start:end], curve[start:end], color=line.get_color(), linewidth=line.get_linewidth())
        for i in jumps:
            _draw_jump(axes, line, place, float(grid[i : i + 2].mean()), sorted(curve[i : i + 2].tolist()))
    axes.add_line(_common_point([0.0], [1.0]))


def _draw_jump(axes: Axes, line: Line2D, place: int, x: float, ends: list[float]) -> None:
    """A dotted line with the name of the method; ``place`` keeps those at the same x apart."""
    colour = line.get_color()
    axes.plot([x, x], ends, color=colour, linewidth=1.2, linestyle=(2 * place, (2, 4)))
    inwards = x > LOG_WEIGHT_LIMIT / 2
    axes.annotate(
        str(line.get_label()),
        (x, 0.1 + 0.12 * place),
        xytext=(-4 if inwards else 4, 0),
        textcoords="offset points",
        horizontalalignment="right" if inwards else "left",
        color=colour,
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
    )


def _styles(methods: dict[str, Objective]) -> list[Line2D]:
    """A legend entry for each method."""
    first, last = WIDTHS
    step = (first - last) / max(len(methods) - 1, 1)
    return [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=first - step * i, label=name)
        for i, name in enumerate(methods)
    ]


def _common_point(x: list[float], y: list[float]) -> Line2D:
    return Line2D(
        x, y, linestyle="", marker="o", color="white", markeredgecolor="black", zorder=5, label="$W = 1$: all are 1"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vespo_lightning.objectives.draw", description=__doc__)
    parser.add_argument("out", type=Path, help="file to write, .png or .svg")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of each response (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        draw(arguments.out, arguments.length)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shown = {REFERENCE}.union(*drawn_objectives().values())
    left_out = [name for name in option_names() if name not in shown]
    print(
        f"{arguments.out}: {len(shown)} methods" + (f"; no curve over W has {', '.join(left_out)}" if left_out else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
