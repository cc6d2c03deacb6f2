"""Builds the Beam pipeline that makes parts."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines import parts

LOCAL = "DirectRunner"
FOREVER = 10**9  # seconds


class ExtractError(ValueError):
    """Extraction failed; the message names the file or flag and suggests a fix."""


def build_pipeline(
    todo: Sequence[tuple[str, int]],
    runner: str = LOCAL,
    workers: int = 1,
    options: Sequence[str] = (),
    *,
    pids: str = "",
) -> Any:
    """Builds the pipeline that makes parts of jobs, without running it; its output is files.

    Args:
      todo: job file and number of each part.
      runner: Beam runner. DirectRunner means local worker processes of one thread each, by Beam's FnApiRunner, since
        Beam's DirectRunner would first try to download a program.
      workers: processes of the DirectRunner.
      options: Beam flags.
      pids: a directory in which each process of the DirectRunner creates a file named by its process id.

    Returns:
      An `apache_beam.Pipeline`.

    Raises:
      ExtractError: an unknown runner or invalid option.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    # Beam's default, 300 s, applies to the whole job if states are streamed, and would end it early.
    flags = [f"--job_server_timeout={FOREVER}", *options]
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            if runner == LOCAL:
                settings = PipelineOptions([f"--direct_num_workers={workers}", *flags])
                pipeline = beam.Pipeline(runner=_local_runner(pids), options=settings)
            else:
                settings = PipelineOptions([f"--runner={runner}", *flags])
                pipeline = beam.Pipeline(options=settings)
            settings.get_all_options()  # validates all values now
    except (ValueError, ImportError) as error:
        raise ExtractError(f"--runner={runner} {' '.join(options)}: {error}") from error
    except SystemExit as error:  # from argparse, whose last line is the reason
        why = stderr.getvalue().strip().splitlines()[-1].rpartition("error: ")[2]
        raise ExtractError(f"--runner={runner} {' '.join(options)}: {why}") from error
    elements = pipeline | "parts" >> beam.Create(list(todo)) | "to all workers" >> beam.Reshuffle()
    _ = elements | "encode" >> beam.Map(parts.make_part)
    return pipeline


def unknown_options(options: Sequence[str]) -> list[str]:
    """Returns the names of flags that Beam does not know: those of a job server, or misspelt ones."""
    from apache_beam.options.pipeline_options import PipelineOptions

    settings = PipelineOptions(list(options))
    return sorted(settings.get_all_options(retain_unknown_options=True).keys() - settings.get_all_options().keys())


def _local_runner(pids: str) -> Any:
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    root = shlex.quote(str(Path(__file__).resolve().parents[1]))
    known = f": > {shlex.quote(pids)}/$$; " if pids else ""
    path = f"PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}"
    command = f"{known}{path} exec {shlex.quote(sys.executable)} -m data_pipelines.beam_worker {os.getpid()}"
    return FnApiRunner(default_environment=SubprocessSDKEnvironment.from_command_string(command))
