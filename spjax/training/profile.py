"""A profiler trace of some updates, in WORKDIR/profile; docs/profiling.md says how to read it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import jax

from spjax.storage import places

SKIPPED = 10  # updates before the trace, in which most programs are compiled


class Trace:
    """Traces `steps` updates of this process, once the first are done; less where the run ends before."""

    def __init__(self, workdir: str, steps: int) -> None:
        alone = jax.process_count() == 1  # others may be on the same host, whose name files have
        own = "profile" if alone else os.path.join("profile", f"process_{jax.process_index()}")
        self._place, self._left, self._seen = os.path.join(workdir, own), steps, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def step(self) -> contextlib.AbstractContextManager[Any]:
        """What an update is made in; the trace shows it as a step."""
        self._seen += 1
        if self._left and self._seen == SKIPPED + 1:
            # Written here and then copied: the profiler knows no buckets.
            self._folder = tempfile.TemporaryDirectory(prefix="spjax-profile-")
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call would be an event, and too many of them cut the trace
            jax.profiler.start_trace(self._folder.name, profiler_options=options)
        if self._folder is None:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("update", step_num=self._seen)

    def done(self, result: Any) -> None:
        """End the trace if that was its last update, once `result` of it is there."""
        if self._folder is not None and self._seen == SKIPPED + self._left:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._folder is None:
            return
        folder, self._folder = self._folder, None
        jax.profiler.stop_trace()
        with folder:
            for path in sorted(Path(folder.name).rglob("*")):
                if path.is_file():
                    target = places.at(self._place) / path.relative_to(folder.name).as_posix()
                    target.parent.mkdir(parents=True, exist_ok=True)
                    places.copy(path, target)
