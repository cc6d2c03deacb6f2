"""Fixtures shared by every test: where the reference material lies, and skipping where it is absent."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _folder(*parts: str) -> Path:
    folder = SHARED.joinpath(*parts)
    if not folder.exists():
        pytest.skip(f"reference material {'/'.join(parts)} is not beside this checkout (../shared)")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of golden vectors produced by the original code."""
    return _folder("golden")


@pytest.fixture(scope="session")
def unit_text() -> Path:
    """Folder with the real HuBERT-100 units of fsc and gsc."""
    return _folder("units", "hubert100")
