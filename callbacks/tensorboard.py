"""Access to TensorBoard for what is not a scalar: images, histograms, text."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.tensorboard import SummaryWriter

_MAX_ROW_LABELS = 24


def summary_writer(trainer: L.Trainer) -> SummaryWriter | None:
    """The writer of the run's TensorBoard logger; None without such a logger or on ranks that do not log."""
    if not trainer.is_global_zero:
        return None
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            return logger.experiment
    return None


def draw_heat_map(
    values: np.ndarray,
    row_labels: Sequence[str],
    *,
    title: str,
    x_label: str,
    y_label: str,
    value_label: str,
    value_range: tuple[float, float],
) -> np.ndarray:
    """Draw a matrix with labelled axes and a colour bar.

    The map (cividis) reads the same with and without red-green colour blindness. The range is fixed by the
    caller so that images of different updates can be compared; values beyond it take the end colours.

    Args:
        values: [rows, columns]
        row_labels: one for each row; thinned out where there are too many to read.

    Returns:
        uint8 [height, width, 3]
    """
    num_rows, num_columns = values.shape
    figure = Figure(
        figsize=(min(4 + 0.12 * num_columns, 16), min(1.6 + 0.25 * num_rows, 12)),
        dpi=100,
        layout="constrained",
    )
    canvas = FigureCanvasAgg(figure)  # no pyplot: it keeps global state and may look for a display
    axes = figure.add_subplot()
    low, high = value_range
    image = axes.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    shown = range(0, num_rows, -(-num_rows // _MAX_ROW_LABELS))
    axes.set_yticks(list(shown), [row_labels[row] for row in shown])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    figure.colorbar(image, ax=axes, label=value_label, extend="max" if values.max() > high else "neither")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
