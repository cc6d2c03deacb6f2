"""Helpers for Markdown reports."""

from __future__ import annotations

from collections.abc import Sequence


def percent(share: float | None) -> str:
    """Format a share in per cent with two decimals; a dash for None."""
    return "–" if share is None else f"{100 * share:.2f}"


def cell(text: object) -> str:
    """Escape text for a table cell (bars and line breaks)."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def shown(value: object) -> str:
    """Format a setting's value: numbers in their shortest form, others with str."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
