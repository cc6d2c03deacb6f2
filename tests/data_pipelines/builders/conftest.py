"""Fixtures of data sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import SHARED


@pytest.fixture(scope="session")
def audio() -> Path:
    """Folder of the published recordings of lt_sc and ar_sc."""
    folder = SHARED / "audio"
    if not folder.exists():
        pytest.skip("reference material audio is not beside this checkout (../shared)")
    return folder


@pytest.fixture(scope="session")
def more_units() -> Path:
    """Folder of published units of ESD, VCTK and LJSpeech, one a frame."""
    folder = SHARED / "units" / "hubert100_more"
    if not folder.exists():
        pytest.skip("reference material units/hubert100_more is not beside this checkout (../shared)")
    return folder
