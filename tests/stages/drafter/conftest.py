"""Fixtures of tests about drafters."""

from pathlib import Path

import pytest
from support.checkpoints import make_drafter, save


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "drafter", make_drafter())
