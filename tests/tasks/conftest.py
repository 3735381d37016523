from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Small question files, one per format."""
    return Path(__file__).parents[1] / "fixtures" / "tasks"
