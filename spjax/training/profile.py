"""JAX profiler trace of some training updates, written to WORKDIR/profile (see docs/profiling.md)."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import jax

from spjax.io import places

SKIPPED = 10  # updates before the trace, in which most programs are compiled


class Trace:
    """Context manager that traces up to `steps` updates of this process, after the first `SKIPPED`."""

    def __init__(self, workdir: str, steps: int) -> None:
        alone = jax.process_count() == 1  # trace files are named by host, which processes may share
        own = "profile" if alone else os.path.join("profile", f"process_{jax.process_index()}")
        self._place, self._left, self._seen = os.path.join(workdir, own), steps, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def step(self) -> contextlib.AbstractContextManager[Any]:
        """Context manager for one update, which the trace shows as a step."""
        self._seen += 1
        if self._left and self._seen == SKIPPED + 1:
            # Written locally and then copied, since the profiler cannot write to buckets.
            self._folder = tempfile.TemporaryDirectory(prefix="spjax-profile-")
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # an event per Python call would exceed the limit of a trace
            jax.profiler.start_trace(self._folder.name, profiler_options=options)
        if self._folder is None:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("update", step_num=self._seen)

    def done(self, result: Any) -> None:
        """Stop the trace if that was its last update, after `result` is ready."""
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
