"""Tables of data sets: delimited text files with a header."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from etils import epath

from data_pipelines.splits import BuildError, read_text


class Row(NamedTuple):
    """A row of a table: its position ("FILE, line N", for messages) and its values by column."""

    where: str
    values: dict[str, str]


def find_table(raw: epath.PathLike, name: str) -> epath.Path:
    """Returns the path of a split's table, at the root of the data set or in its folder `csv`.

    Raises:
      BuildError: the table is in neither.
    """
    places = [epath.Path(raw) / "csv" / name, epath.Path(raw) / name]
    for place in places:
        if place.is_file():
            return place
    raise BuildError(f"neither {places[0]} nor {places[1]} exists: put the table of the split there")


def read_table(
    path: epath.PathLike, columns: Collection[str], delimiter: str = ",", multiline: Collection[str] | None = None
) -> list[Row]:
    """Reads the rows of a delimited text file with a header; blank lines are skipped.

    Trailing columns with neither a name nor values, as Excel writes them, are dropped. Excel's line `sep=,` may precede
    the header. Fields may be quoted; a quote inside a quoted field is doubled.

    Args:
      path: local or gs://.
      columns: required columns.
      delimiter: between fields.
      multiline: columns whose quoted fields may have line breaks, and whose unquoted fields may have quotes; None: all.

    Raises:
      BuildError: a missing file, invalid UTF-8, a missing or duplicate column, a row with more or fewer fields than the
        header, or a quote that is not closed, is in an unquoted field, or closes in another line.
    """
    text = read_text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # the default is 131,072 characters
    lines = list(io.StringIO(text, newline=""))
    start = int(bool(lines) and lines[0].strip().lower() == f"sep={delimiter}")
    reader = csv.reader(lines[start:], delimiter=delimiter, strict=True, skipinitialspace=True)
    header: list[str] = []
    rows, width = [], 0
    last = start
    try:
        for fields in reader:
            first, last = last + 1, start + reader.line_num
            where = f"{path}, line {first}"
            if not any(field.strip() for field in fields):
                continue
            if not header:
                width = len(fields)
                while not fields[-1].strip():
                    fields.pop()
                header = _header(path, [name.strip() for name in fields], columns, delimiter)
                _check_quotes(where, header, header, lines[first - 1 : last], ())
                continue
            if len(fields) != width:
                raise BuildError(f"{where} has {len(fields)} fields where the header has {width}: correct it")
            while len(fields) > len(header):
                if fields.pop().strip():
                    column = f"line {start + 1}, column {len(fields) + 1}"
                    raise BuildError(f"{path}, {column} has no name, and {where} a value in it: name it, or remove it")
            if multiline is not None:
                _check_quotes(where, header, fields, lines[first - 1 : last], multiline)
            rows.append(Row(where, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise BuildError(
            f"{path}, line {last + 1}: a quote that opens in this line is not closed correctly ({error}); close "
            "it before the end of the field, and double a quote that is part of the text"
        ) from error
    if not header:
        _header(path, [], columns, delimiter)
    if not rows:
        raise BuildError(f"{path} has no rows below its header: add them, or take it from its source again")
    return rows


def _header(path: epath.PathLike, names: list[str], columns: Collection[str], delimiter: str) -> list[str]:
    lacking = [name for name in columns if name not in names]
    if lacking:
        raise BuildError(
            f"{path} has the columns {names} but lacks {', '.join(lacking)}: its first line must have the names, "
            f"separated by {delimiter!r}"
        )
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise BuildError(f"{path} has two columns {twice[0]!r}: rename or remove one of them")
    return names


def _check_quotes(
    where: str, header: Sequence[str], fields: Sequence[str], lines: Sequence[str], multiline: Collection[str]
) -> None:
    """Refuses quotes outside the columns `multiline` that csv parses differently from how a reader would."""
    raw = "".join(lines)
    if '"' not in raw:
        return
    for name, field in zip(header, fields, strict=True):
        if name in multiline:
            continue
        if len(lines) > 1 and ("\n" in field or "\r" in field):
            raise BuildError(
                f"{where}, column {name}: a quoted field continues on a later line; close its quote on the same line, "
                f"or, if it is free text that may have line breaks, give --text={name}"
            )
        if '"' in field and '"{}"'.format(field.replace('"', '""')) not in raw:
            raise BuildError(
                f"{where}, column {name}: the field {field!r} contains a quote but is not quoted; remove the quote, or "
                f"quote the field and double the quote in it, or, if it is free text, give --text={name}"
            )
