"""Writing the small text files of a run folder so that a kill never leaves half of one."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step: who reads it, after a kill too, finds the old or the new.

    Raises:
        OSError: the disk is full or the folder not writable; ``path`` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def complete_lines(path: Path) -> list[str]:
    """Lines of ``path``, without a last one that a kill cut short. Empty where there is no file."""
    if not path.exists():
        return []
    text = path.read_bytes().decode("utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].split("\n")[:-1]
