"""Fixtures of data sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import SHARED


@pytest.fixture(scope="session")
def audio() -> Path:
    """Folder of the real recordings of lt_sc and ar_sc."""
    folder = SHARED / "audio"
    if not folder.exists():
        pytest.skip("reference material audio is not beside this checkout (../shared)")
    return folder
