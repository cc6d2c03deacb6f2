"""Log of a training run: `log.jsonl` and TensorBoard events.

`clu.metric_writers` is not used: it imports TensorFlow, and cannot drop lines after the resumed step.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spjax.extras import needs
from spjax.io import files, places
from spjax.types import Json

COPY_EVERY = 60.0  # minimum seconds between copies of the log to a bucket
_log = logging.getLogger(__name__)


class Log:
    """Write `log.jsonl` and TensorBoard events on process 0; lines after the resumed step are removed.

    Objects in a bucket cannot be appended to. For a workdir in a bucket, both files are written to a local folder and
    copied from time to time (at most 5 % of the time) and at the end.
    """

    def __init__(self, workdir: str, step: int) -> None:
        self._file: Any = None
        self._writer: Any = None
        if jax.process_index() > 0:
            return
        self._workdir = places.at(workdir)
        self._folder = tempfile.TemporaryDirectory(prefix="spjax-log-") if places.is_remote(workdir) else None
        self._here = Path(self._folder.name) if self._folder else self._workdir
        self._next = time.monotonic() + COPY_EVERY
        kept = [line for line in _lines(self._workdir / "log.jsonl") if line["step"] <= step]
        path = self._here / "log.jsonl"
        files.write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a")
        with needs("data", "a training log"):
            from tensorboardX import SummaryWriter  # tensorboard's writer imports TensorFlow

        # Events after the resumed step are from a killed run that went further than its last checkpoint.
        purge = {"purge_step": step + 1} if step else {}
        self._writer = SummaryWriter(os.fspath(self._here / "tensorboard"), **purge)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, _: object, leaving: BaseException | None, __: object) -> None:
        if self._file is None:
            return
        try:
            self._file.close()
            self._writer.close()
            self.copy()
        except OSError as error:
            if leaving is None:
                raise
            # Not raised: the error that ended the run is more important.
            _log.warning("the last lines of the log could not be copied to %s: %s", self._workdir, error)
        finally:
            if self._folder:
                self._folder.cleanup()

    def write(self, step: int, values: Json, **extra: float) -> None:
        """Log scalars, or lists with a number per member, at a step."""
        if self._file is None:
            return
        line = {"step": step, "time": time.time(), **values, **extra}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in {**values, **extra}.items():
            for n, number in enumerate(np.atleast_1d(value).tolist()):
                tag = f"{name}/{n}" if isinstance(value, list) else name
                if isinstance(number, int | float):
                    self._writer.add_scalar(tag, number, step)
        if time.monotonic() >= self._next:
            self.copy()

    def copy(self) -> None:
        """Copy the log to a workdir in a bucket; does nothing for a local workdir.

        Raises:
          OSError: the bucket cannot be written to.
        """
        if self._file is None or not self._folder:
            return
        start = time.monotonic()
        if not self._file.closed:
            self._writer.flush()
        with places.translate_bucket_errors():
            for path in self._here.rglob("*"):
                if path.is_file():
                    places.copy(path, self._workdir / path.relative_to(self._here).as_posix())
        now = time.monotonic()
        self._next = now + max(COPY_EVERY, 20 * (now - start))


def _lines(path: Path) -> Iterator[Json]:
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            return  # a killed run may leave an incomplete last line
