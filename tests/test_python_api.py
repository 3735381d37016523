"""The program in the README, run from the installed wheel in an empty folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def program(repository: Path) -> str:
    """The first Python block after the heading, as it stands."""
    text = (repository / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^## From Python$.*?^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found, "README.md has no Python block after the heading 'From Python'"
    return found[1]


def test_the_program_is_short_and_without_hydra(program: str) -> None:
    lines = [line for line in program.splitlines() if line.strip() and not re.match(r"(from|import) ", line)]
    assert len(lines) <= 30
    assert not re.search(r"hydra|omegaconf|instantiate", program)


def test_the_program_trains_from_the_wheel_alone(
    program: str, run_installed: Callable[..., str], tmp_path: Path
) -> None:
    three = re.sub(r"\bupdates\b(.*)= (.*)\b8$", r"updates\1= \g<2>3", program, count=1, flags=re.MULTILINE)
    assert three != program
    run_installed(three, timeout=120)
    folder = tmp_path / "empty" / "runs" / "from_python"
    metrics = pd.read_csv(folder / "metrics.csv", index_col="update")
    assert metrics.index.tolist() == [0, 1, 2, 3]
    assert metrics["staleness/lag_mean"][1:].tolist() == [0, 1, 2]
    assert metrics["train/grad_norm"][1:].notna().all() and metrics["eval/accuracy"][[0, 3]].notna().all()
    assert AutoModelForCausalLM.from_pretrained(folder / "export").config.model_type == "qwen3_moe"
