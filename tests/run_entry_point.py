"""Runs train.py and evaluate.py as the command line would, in a forked child, so that imports are paid for once."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent

Sabotage = Callable[[], None]


@dataclass(frozen=True)
class Ended:
    code: int
    """exit code; minus the number of the signal where one ended it"""
    out: str
    err: str


def run_entry_point(
    script: str,
    argv: Sequence[str],
    folder: Path,
    sabotage: Sabotage | None = None,
    kill_after: float = 0.0,
) -> Ended:
    """``python script ARGV`` in ``folder``.

    Args:
        script: ``train.py`` or ``evaluate.py``.
        argv: the command line.
        folder: working directory, made where it is missing; relative paths and the user's own modules are found there.
        sabotage: called in the child before the script is loaded.
        kill_after: seconds after which the child is killed; 0 waits for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        arguments = (ROOT / script, list(argv), folder, sabotage, out, err)
        child = multiprocessing.get_context("fork").Process(target=_child, args=arguments)
        child.start()
        child.join(kill_after or None)
        if child.is_alive():
            child.kill()
            child.join()
        assert child.exitcode is not None
        return Ended(child.exitcode, _read(out), _read(err))


def _child(script: Path, argv: list[str], folder: Path, sabotage: Sabotage | None, out: IO[str], err: IO[str]) -> None:
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))  # pytest had put its own
    _show_warnings()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = [script.name, *argv]
    if sabotage is not None:
        sabotage()
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.run_entry(module.main, config_name=script.stem)


def _show_warnings() -> None:
    """On stderr and filtered as Python does it, where pytest would collect them."""

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    warnings.showwarning = show


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
