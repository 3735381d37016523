"""Fixtures for every test: one thread, no network, counted randomness, and the wheel installed elsewhere."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Before torch and the Hugging Face libraries are imported, which read them once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("vespo_lightning", "models", "callbacks", "conf", "pyproject.toml", "README.md")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same global random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder of pyproject.toml."""
    return ROOT


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy of the sources so that no old build product gets in."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(copy))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else; put it first on PYTHONPATH."""
    target = tmp_path_factory.mktemp("site")
    _pip("install", "--no-deps", "--target", str(target), str(wheel))
    return target


@pytest.fixture
def run_installed(installed_wheel: Path, tmp_path: Path) -> Callable[..., str]:
    """`run_installed(code, timeout=120)`: what Python code prints, run in an empty folder with the wheel."""

    def run(code: str, timeout: float = 120) -> str:
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        # The editable install would answer for sub-modules that the wheel lacks: it must be out of the way.
        no_editable = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in repr(f)]\n"
        done = subprocess.run(
            [sys.executable, "-c", no_editable + code],
            cwd=empty,
            env={**os.environ, "PYTHONPATH": str(installed_wheel)},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def _pip(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", words[0], "--quiet", "--disable-pip-version-check", *words[1:]],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
