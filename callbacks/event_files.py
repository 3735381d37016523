"""TensorBoard event files, read and cut record by record with TensorBoard's own reader and writer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

Scalars = dict[str, list[tuple[int, float]]]


def cut_event_files(folder: str | Path, last_step: int) -> None:
    """Remove every event after ``last_step`` from the event files in ``folder`` and below it.

    A resumed run writes the steps after its checkpoint again; without the cut TensorBoard would show both.
    Call it before a logger opens the folder. Records that stay are copied byte by byte, the file version in
    front included; a last record that a kill left incomplete is dropped. A file that holds nothing else any
    more is removed. Each file is replaced in one step.
    """
    for path in _event_files(folder):
        records = list(_records(path))
        kept = [record for record, event in records if event.HasField("file_version") or event.step <= last_step]
        if all(Event.FromString(record).HasField("file_version") for record in kept):
            path.unlink()
        else:
            _replace(path, kept)


def read_scalars(folder: str | Path) -> Scalars:
    """``tag -> [(step, value), ...]`` of the scalars in ``folder`` and below, in the order of writing.

    Values are float32, as TensorBoard stores them.
    """
    scalars: Scalars = {}
    for path in _event_files(folder):
        for _, event in _records(path):
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


def _event_files(folder: str | Path) -> list[Path]:
    """Sorted by name, which begins with the time of creation."""
    return sorted(Path(folder).rglob("events.out.tfevents.*"))


def _records(path: Path) -> Iterator[tuple[bytes, Event]]:
    for record in RawEventFileLoader(str(path)).Load():
        yield record, Event.FromString(record)


def _replace(path: Path, records: list[bytes]) -> None:
    # TensorBoard opens whatever has "tfevents" in its name, so the unfinished copy must not.
    unfinished = path.with_name(".cut.unfinished")
    with open(unfinished, "wb") as file:
        writer = RecordWriter(file)
        for record in records:
            writer.write(record)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
