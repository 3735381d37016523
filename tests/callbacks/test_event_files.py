import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from vespo_lightning.callbacks.event_files import cut_event_files, read_scalars


def write(folder, steps, suffix=""):
    writer = SummaryWriter(str(folder), filename_suffix=suffix)
    rng = np.random.default_rng(0)
    for step in steps:
        writer.add_scalar("reward/mean", step / 8, step)
        writer.add_histogram("importance/log_weight", rng.normal(size=100), step)
        writer.add_image("router/load", np.full((3, 2, 2), step / 10), step)
        writer.add_text("samples", f"table {step}", step)
    writer.close()


def load(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0, "histograms": 0}).Reload()


def test_cut_keeps_every_kind_up_to_the_step(tmp_path):
    write(tmp_path, range(6))
    before = load(tmp_path)
    cut_event_files(tmp_path, last_step=3)
    after = load(tmp_path)
    assert [(event.step, event.value) for event in after.Scalars("reward/mean")] == [
        (0, 0.0),
        (1, 0.125),
        (2, 0.25),
        (3, 0.375),
    ]
    assert after.Histograms("importance/log_weight") == before.Histograms("importance/log_weight")[:4]
    assert after.Images("router/load") == before.Images("router/load")[:4]
    assert after.Tensors("samples/text_summary") == before.Tensors("samples/text_summary")[:4]
    assert after.file_version == before.file_version == 2.0


def test_cut_is_byte_exact_and_idempotent(tmp_path):
    write(tmp_path, range(4))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    cut_event_files(tmp_path, last_step=10)
    assert path.read_bytes() == whole
    cut_event_files(tmp_path, last_step=1)
    short = path.read_bytes()
    assert whole.startswith(short) and len(short) < len(whole)
    cut_event_files(tmp_path, last_step=1)
    assert path.read_bytes() == short


def test_files_without_events_are_removed_and_folders_below_are_cut(tmp_path):
    write(tmp_path, range(4), suffix=".first")
    write(tmp_path, range(4, 8), suffix=".second")
    write(tmp_path / "below", range(8))
    cut_event_files(tmp_path, last_step=2)
    assert [path.suffix for path in tmp_path.iterdir() if path.is_file()] == [".first"]
    assert [step for step, _ in read_scalars(tmp_path / "below")["reward/mean"]] == [0, 1, 2]


def test_incomplete_record_of_a_killed_run_is_dropped(tmp_path):
    write(tmp_path, range(4))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    cut_event_files(tmp_path, last_step=3)
    write(tmp_path, [4])
    scalars = read_scalars(tmp_path)["reward/mean"]
    assert scalars == [(step, pytest.approx(step / 8)) for step in range(5)]
    assert [event.step for event in load(tmp_path).Tensors("samples/text_summary")] == [0, 1, 2, 4]


def test_folder_without_event_files(tmp_path):
    cut_event_files(tmp_path / "missing", last_step=3)
    assert read_scalars(tmp_path / "missing") == {}
