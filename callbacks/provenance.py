"""Which code made a run."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import vespo_lightning

PACKAGES = ("vespo-lightning", "torch", "lightning", "transformers")


def package_versions() -> dict[str, str]:
    """Versions of Python and the packages that numbers depend on; vLLM's where it was imported."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    if "vllm" in sys.modules:
        versions["vllm"] = str(sys.modules["vllm"].__version__)
    return versions


def git_commit() -> str | None:
    """Commit of the clone that the package runs from, ``-dirty`` where changed; None without a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    clone = Path(vespo_lightning.__file__).parents[1]
    if not (clone / ".git").exists():  # an installed wheel; a repository further up is somebody else's
        return None
    try:
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
