"""Predictions for several files as a table, and the table as CSV."""

from __future__ import annotations

import asyncio
import csv
import io
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spjax.serving.batcher import Batcher, Prediction, QueueFullError, timed_out

COLUMNS = ("file", "task", "slot", "label", "probability", "error")
REPORTED = (QueueFullError, ValueError, TimeoutError, RuntimeError)  # errors whose messages are shown to the client
_AT_ONCE = 16  # files of a table that are queued at a time, so that other clients get their turn
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # full-width ones too, as in spreadsheets
_BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # change the direction of the text that follows


async def ask(batcher: Batcher, audio: str, tasks: Sequence[str]) -> Prediction:
    """Submit a file and wait for its prediction without blocking a thread; raises as `Batcher.answer`."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(batcher.submit(audio, tasks)), batcher.limits.timeout)
    except TimeoutError:
        raise TimeoutError(timed_out(batcher.limits)) from None


async def answer_files(
    batcher: Batcher, files: Sequence[str], tasks: Sequence[str], progress: Callable[..., Any]
) -> list[list[Any]]:
    """Predict labels for several files.

    Args:
      batcher: computes the predictions; a file is submitted again while its queue is full.
      files: paths. Files of one name are numbered.
      tasks: task names.
      progress: called with (files done, all files) and unit="files".

    Returns:
      Rows of COLUMNS, in the order of the files; a file that fails has one row, with its error.
    """
    turn, done = asyncio.Semaphore(_AT_ONCE), 0
    progress((0, len(files)), unit="files")

    async def one(path: str, name: str) -> list[list[Any]]:
        nonlocal done
        async with turn:
            try:
                _, answers = await _ask_again(batcher, path, tasks)
            except REPORTED as error:
                rows: list[list[Any]] = [[name, "", "", "", None, _one_line(str(error))]]
            else:
                rows = [
                    [name, task, slot, label, round(answer["probabilities"][slot][label], 6), ""]
                    for task, answer in answers.items()
                    for slot, label in answer["labels"].items()
                ]
        done += 1
        progress((done, len(files)), unit="files")
        return rows

    return [row for rows in await asyncio.gather(*map(one, files, _names(files))) for row in rows]


async def _ask_again(batcher: Batcher, path: str, tasks: Sequence[str]) -> Prediction:
    """As `ask`, retried while the queue is full."""
    loop = asyncio.get_running_loop()
    until = loop.time() + batcher.limits.timeout
    while True:
        try:
            return await ask(batcher, path, tasks)
        except QueueFullError:
            if loop.time() > until:
                raise
            await asyncio.sleep(0.25)


def _names(files: Sequence[str]) -> list[str]:
    """Unique one-line names of files, in order, without bidirectional controls."""
    names: dict[str, None] = {}
    for path in files:
        plain = name = _one_line(Path(path).name)
        number = 1
        while name in names:
            number += 1
            name = f"{plain} ({number})"
        names[name] = None
    return list(names)


def _one_line(text: str) -> str:
    """The text in one line, without control characters and bidirectional controls."""
    kept = (sign for sign in " ".join(text.split()) if unicodedata.category(sign) != "Cc")
    return "".join(sign for sign in kept if unicodedata.bidirectional(sign) not in _BIDI)


def to_csv(rows: Sequence[Sequence[Any]]) -> bytes:
    """CSV of rows for spreadsheets: with a UTF-8 byte order mark, and nothing that would run as a formula.

    Every cell is quoted, since some programs split at semicolons, and a formula could follow one.
    """
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([COLUMNS, *([_harmless(cell) for cell in row] for row in rows)])
    return text.getvalue().encode("utf-8-sig")


def _harmless(cell: Any) -> Any:
    """Prefix text that a spreadsheet would run as a formula with an apostrophe; file names come from clients."""
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip().startswith(_FORMULA) else cell
