"""`python -m spjax.main --config=FILE`, or `spjax train`: from recordings, or units as text, to a test score."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take their time
    from spjax import process

    process.run("spjax.main", huge_pages=True)

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from data_pipelines import flag_table
from spjax import config_file, paths

config_file.define_flags(flag_table.FLAGS)


def main() -> None:
    """The command line (`--help`)."""
    app.run(_main, flags_parser=lambda argv: config_file.parse_flags(argv, __name__))


def _main(_: Sequence[str]) -> None:
    from spjax.compilation_cache import keep_programs
    from spjax.training import processes

    # What orbax logs it raises too, and it is printed once, in a line, where it is caught.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    absl_logging.use_absl_handler()
    logging.getLogger("spjax").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.NOTSET)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    given = flags.FLAGS
    try:
        if cache := given["compilation-cache"].value:
            keep_programs(cache)
        group = processes.check(given.coordinator, given.processes, given["process-id"].value)
    except ValueError as error:
        sys.exit(f"error: {error}")
    with processes.joined(*group) if group else contextlib.nullcontext():
        _run()


def _run() -> None:
    from data_pipelines.sources import source_of
    from spjax import config, jobs
    from spjax.jobs import methods
    from spjax.training.loop import DivergedError, Interrupted

    command = "python -m spjax.main " + shlex.join(sys.argv[1:])
    given = {name: flags.FLAGS[name].value for name in ("units", *flag_table.FLAGS)}
    try:
        workdir = flags.FLAGS.workdir or paths.to_write(config_file.default_workdir())
        overrides = config_flags.get_override_values(flags.FLAGS["config"])
        job = config.parse(flags.FLAGS.config)
        if isinstance(job, config.MethodsJob):
            methods.refuse_overrides_without_effect(flags.FLAGS.config, overrides)
        with paths.writing(workdir):
            source = source_of(job, workdir, given, overrides)
            jobs.run(source.job, workdir, source.make, command)
            source.finish()
    except (ValueError, OSError, DivergedError) as error:
        sys.exit(f"error: {error}")
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.number)
