"""Pieces of the Markdown pages that reports are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def percent(share: float | None) -> str:
    """A share as per cent, two decimals; a dash for none."""
    return "–" if share is None else f"{100 * share:.2f}"


def cell(text: Any) -> str:
    """What may stand in a cell of a table: no bar, no line break."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def shown(value: Any) -> str:
    """A setting's value: a number in its shortest form, anything else as it is."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
