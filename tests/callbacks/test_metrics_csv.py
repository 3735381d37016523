import csv
import math
import os

import numpy as np
import pytest

from vespo_lightning.callbacks import run_files
from vespo_lightning.callbacks.metrics_csv import MetricsCsv


def read(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_floats_come_back_bit_for_bit(tmp_path):
    values = [*np.random.default_rng(0).normal(size=50), 1e-320, 0.1 + 0.2, -0.0, math.inf, math.pi * 1e300]
    logger = MetricsCsv(tmp_path / "metrics.csv")
    for update, value in enumerate(values):
        logger.log_metrics({"reward/mean": value}, step=update)
    column = [float(row[1]) for row in read(logger.path)[1:]]
    assert np.array(column).tobytes() == np.array(values).tobytes()
    logger.log_metrics({"reward/mean": math.nan}, step=len(values))
    assert math.isnan(float(read(logger.path)[-1][1]))


def test_new_name_adds_a_column_and_absent_values_are_empty(tmp_path):
    logger = MetricsCsv(tmp_path / "metrics.csv")
    logger.log_metrics({"b": 1, "c": 2}, step=1)
    logger.log_metrics({"a": 3, "c": 4}, step=2)
    logger.log_metrics({"c": 5}, step=3)
    assert read(logger.path) == [
        ["update", "a", "b", "c"],
        ["1", "", "1.0", "2.0"],
        ["2", "3.0", "", "4.0"],
        ["3", "", "", "5.0"],
    ]


def test_rows_are_on_disk_at_once_and_the_file_is_not_rewritten(tmp_path):
    logger = MetricsCsv(tmp_path / "metrics.csv")
    logger.log_metrics({"a": 1}, step=1)
    inode = os.stat(logger.path).st_ino
    logger.log_metrics({"a": 2}, step=2)
    assert read(logger.path)[-1] == ["2", "2.0"]
    assert os.stat(logger.path).st_ino == inode


def test_values_for_an_update_with_a_row_join_it(tmp_path):
    logger = MetricsCsv(tmp_path / "metrics.csv")
    logger.log_metrics({"a": 1, "b": 1}, step=1)
    logger.log_metrics({"a": 2, "b": 2}, step=2)
    logger.log_metrics({"b": 9}, step=2)
    assert read(logger.path) == [["update", "a", "b"], ["1", "1.0", "1.0"], ["2", "2.0", "9.0"]]


def test_reopened_file_goes_on_where_it_was(tmp_path):
    whole, parts = tmp_path / "whole.csv", tmp_path / "parts.csv"
    rows = [{"a": update / 3} | ({"eval/x": update / 7} if update % 2 else {}) for update in range(6)]
    logger = MetricsCsv(whole)
    for update, row in enumerate(rows):
        logger.log_metrics(row, step=update)
    first = MetricsCsv(parts)
    for update, row in enumerate(rows[:5]):
        first.log_metrics(row | ({"late": 1.0} if update == 4 else {}), step=update)
    with open(parts, "a") as file:
        file.write("5,0.33")  # what a kill in the middle of a write leaves
    second = MetricsCsv(parts)
    second.truncate(after_update=3)
    for update, row in list(enumerate(rows))[4:]:
        second.log_metrics(row, step=update)
    assert parts.read_bytes() == whole.read_bytes()


def test_incomplete_last_row_is_dropped_when_the_file_is_opened_again(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("update,a\n1,1.0\n2,2.")
    MetricsCsv(path).log_metrics({"a": 3}, step=3)
    assert read(path) == [["update", "a"], ["1", "1.0"], ["3", "3.0"]]


def test_truncating_everything_and_nothing(tmp_path):
    logger = MetricsCsv(tmp_path / "metrics.csv")
    logger.truncate(after_update=3)
    assert not logger.path.exists()
    logger.log_metrics({"a": 1}, step=0)
    logger.truncate(after_update=-1)
    assert logger.path.read_text() == "update\n"


def test_failed_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    logger = MetricsCsv(tmp_path / "metrics.csv")
    logger.log_metrics({"a": 1}, step=1)
    before = logger.path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        logger.log_metrics({"b": 1}, step=2)
    assert logger.path.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.csv"]
