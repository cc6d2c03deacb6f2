"""`python -m spjax.main --config=configs/own.py --folders=DIR`: from recordings, or units as text, to a test score.

    python -m spjax.main --config=configs/own.py --folders=DIR    recordings of your own, a folder a class
    python -m spjax.main --config=configs/fsc.py --raw=DIR        a data set that spjax knows, unpacked in DIR
    python -m spjax.main --config=configs/fsc.py --units=DIR      its units as text

Unit records and the unit LM that the config names are made first where they are absent. A work directory is continued.
"""

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

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file in configs/.", lock_config=True)
WORKDIR = config_file.define_path(
    "workdir",
    paths.to_write,
    "Where everything is written; a run found there is continued. Default: runs/CONFIG or runs/CONFIG_BACKBONE.",
)
UNITS = config_file.define_path(
    "units",
    paths.given,
    "Folder of unit text to import absent unit records from: TASK/{train,valid,test}.txt or SOURCE.PART.frames.txt.",
)
for _name, (_kind, _text) in flag_table.FLAGS.items():
    if _kind == "path":
        config_file.define_path(_name, paths.given, _text)
    elif _kind == "switch":
        flags.DEFINE_boolean(_name, False, _text)
    else:
        flags.DEFINE_string(_name, None, _text)
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, where several processes train together; auto: as Cloud TPU, Slurm or MPI say.",
)
PROCESSES = flags.DEFINE_integer("processes", 1, "How many processes train together.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process's number among them, from 0 on.", lower_bound=0)
CACHE = config_file.define_path(
    "compilation_cache",
    lambda text: paths.given(text) if text else text,
    "Where compiled programs are kept; '' for nowhere.",
    default="~/.cache/spjax/xla",
)


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
    try:
        if CACHE.value:
            keep_programs(CACHE.value)
        group = processes.check(COORDINATOR.value, PROCESSES.value, PROCESS_ID.value)
    except ValueError as error:
        sys.exit(f"error: {error}")
    with processes.joined(*group) if group else contextlib.nullcontext():
        _run()


def _run() -> None:
    from data_pipelines.sources import source_of
    from spjax import jobs
    from spjax.training.loop import DivergedError, Interrupted

    config = CONFIG.value
    command = "python -m spjax.main " + shlex.join(sys.argv[1:])
    given = {name: flags.FLAGS[name].value for name in ("units", *flag_table.FLAGS)}
    try:
        workdir = WORKDIR.value or paths.to_write(config_file.default_workdir())
        jobs.check(config)
        with paths.writing(workdir):
            source = source_of(config, workdir, given, config_flags.get_override_values(flags.FLAGS["config"]))
            jobs.run(config, workdir, source.make, command)
            source.finish()
    except (ValueError, OSError, DivergedError) as error:
        sys.exit(f"error: {error}")
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.number)
