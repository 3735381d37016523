"""``metrics.csv``: one row per update, floats exact to the bit."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from vespo_lightning.callbacks.run_files import complete_lines, write_atomically

UPDATE = "update"

Rows = dict[int, dict[str, str]]


class MetricsCsv(Logger):
    """Appends the metrics of each update to a CSV file: the update in front, then the metrics by name.

    Lightning's own ``CSVLogger`` deletes an existing file when it opens its folder again, and keeps all rows
    in memory to write the file anew at every flush. A run that is resumed must keep what it has, hence this
    one.

    Values are written with ``repr``, the shortest text that reads back to the same double, because whether
    two runs are equal is decided on this file. A metric that an update did not report is an empty cell. A
    name not seen before rewrites the file, atomically, with one column more. A row is in the hands of the
    operating system when ``log_metrics`` returns, so that a kill costs at most the row being written.

    Args:
        path: the file, ``metrics.csv`` in the run folder; its folder is made where it is missing.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] | None = None
        self._last_update = -1

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved configuration has its own file in the run folder."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the row of update ``step``, or put the values into the row that it already has."""
        assert step is not None, "a row needs the number of its update"
        row = {name: repr(float(value)) for name, value in metrics.items()}
        if self._columns is None:
            self._write(self._read())
            assert self._columns is not None
        if step > self._last_update and row.keys() <= set(self._columns):
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                file.write(_line([str(step), *(row.get(column, "") for column in self._columns)]))
            self._last_update = step
        else:
            rows = self._read()
            rows.setdefault(step, {}).update(row)
            self._write(rows)

    @rank_zero_only
    def truncate(self, after_update: int) -> None:
        """Cut the rows of updates greater than ``after_update``, and columns that are empty without them."""
        if self.path.exists():
            self._write({update: row for update, row in self._read().items() if update <= after_update})

    def _read(self) -> Rows:
        """Rows of the file, in file order, without empty cells."""
        rows: Rows = {}
        for cells in csv.DictReader(complete_lines(self.path)):
            update = int(cells.pop(UPDATE))
            rows[update] = {name: text for name, text in cells.items() if text}
        return rows

    def _write(self, rows: Rows) -> None:
        self._columns = sorted({name for row in rows.values() for name in row})
        self._last_update = max(rows, default=-1)
        lines = [_line([UPDATE, *self._columns])]
        for update in sorted(rows):
            lines.append(_line([str(update), *(rows[update].get(column, "") for column in self._columns)]))
        write_atomically(self.path, "".join(lines))


def _line(cells: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()
