"""`python -m spjax.main --config=configs/fsc.py --units=UNIT_TEXT --workdir=runs/fsc`: from unit text to a test score.

Unit records and the unit LM that the config names are made first where they are absent. A work directory is continued.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import logging

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from spjax.huge_pages import with_huge_pages

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file in configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where everything is written; a run found there is continued. Default: runs/CONFIG or runs/CONFIG_BACKBONE.",
)
UNITS = flags.DEFINE_string(
    "units", None, "Folder of unit text, TASK/{train,valid,test}.txt, from which absent unit records are imported."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, where several processes train together; auto: as Cloud TPU, Slurm or MPI say.",
)
PROCESSES = flags.DEFINE_integer("processes", 1, "How many processes train together.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process's number among them, from 0 on.", lower_bound=0)
CACHE = flags.DEFINE_string(
    "compilation_cache", "~/.cache/spjax/xla", "Where compiled programs are kept; '' for nowhere."
)


def main(argv: Sequence[str]) -> None:
    """Run the job that the flags name."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected {argv[1]!r}: every argument is a --flag, see --help")
    import jax

    if CACHE.value:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(CACHE.value))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if PROCESSES.value > 1 and not COORDINATOR.value:
        sys.exit(f"error: --processes={PROCESSES.value} need --coordinator=HOST:PORT, where process 0 listens")
    if PROCESSES.value == 1 and COORDINATOR.value not in (None, "", "auto"):
        sys.exit(f"error: --coordinator={COORDINATOR.value} needs --processes, how many there are, and --process_id")
    if PROCESSES.value > 1 and PROCESS_ID.value is None and COORDINATOR.value != "auto":
        sys.exit(f"error: --processes={PROCESSES.value} need --process_id, another number from 0 on for each")
    if (PROCESS_ID.value or 0) >= PROCESSES.value:
        sys.exit(f"error: --process_id={PROCESS_ID.value} must lie below --processes={PROCESSES.value}")
    if COORDINATOR.value not in (None, "", "auto") and not re.fullmatch(r".+:[1-9]\d{0,4}", COORDINATOR.value):
        sys.exit(f"error: --coordinator={COORDINATOR.value} must be HOST:PORT, such as 10.0.0.2:8476, or auto")
    if not COORDINATOR.value:
        _run()
        return
    from spjax.training import processes

    auto = COORDINATOR.value == "auto"
    with processes.joined(*(None, None, None) if auto else (COORDINATOR.value, PROCESSES.value, PROCESS_ID.value)):
        _run()


def _run() -> None:
    import jax

    from data_pipelines.import_units import import_units
    from spjax import jobs
    from spjax.jobs import comparing
    from spjax.storage import places
    from spjax.training.loop import DivergedError, Interrupted

    # What orbax logs it raises too: told once, in a line, where it is caught.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    absl_logging.use_absl_handler()
    logging.getLogger("spjax").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.NOTSET)

    config = CONFIG.value
    file, _, options = str(config_flags.get_config_filename(flags.FLAGS["config"])).partition(":")
    name = "_".join((os.path.splitext(os.path.basename(file))[0], *re.findall(r"=(\w+)", options)))
    workdir = WORKDIR.value or os.path.join("runs", name)

    def from_text(task: str, directory: str) -> None:
        import_units(task, os.path.join(str(UNITS.value), task), directory)

    def from_nothing(task: str, directory: str) -> None:
        f0 = config.job == "compare" or "prosody" in config.pretraining.lm
        demo.records(workdir, os.path.dirname(directory), spoken, SynthesisConfig(**config.synthesis), f0=f0)

    importer = from_text if UNITS.value else None
    command = "python -m spjax.main " + shlex.join(sys.argv[1:])
    if "synthesis" in config and places.is_remote(workdir):
        sys.exit(f"error: --workdir={workdir} is in a bucket: speech is made and encoded here, give a local one")
    if UNITS.value and not places.at(UNITS.value).is_dir():
        sys.exit(f"error: --units={UNITS.value} is no folder: give the one that holds TASK/train.txt and so on")
    try:
        jobs.check(config)
        if "synthesis" in config:
            from data_pipelines import demo, synthesize
            from data_pipelines.synthesize import SynthesisConfig

            spoken = list(dict.fromkeys((*config.pretraining.tasks, *config.task.split(","))))
            synthesize.check(os.path.join(workdir, "speech"), SynthesisConfig(**config.synthesis), spoken)
            data, config.lm, config.pretraining.data = (
                os.path.join(workdir, place) for place in (config.data, config.lm, config.pretraining.data)
            )
            config.data = data if "," in config.task else os.path.join(data, config.task)
            importer = from_nothing
        jobs.run(config, workdir, importer, command)
        if "synthesis" in config and jax.process_index() == 0:
            heard = {"heard as": (config.lm, workdir)}
            if config.job == "compare":
                least, *_, most = comparing.in_order(config)
                heard = {name: (comparing.lm_place(workdir, name), f"{workdir}/{name}") for name in (least, most)}
            print("\n" + demo.show(workdir, heard, config.task.split(",")))
    except (ValueError, OSError, DivergedError) as error:
        sys.exit(f"error: {error}")
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:  # what a config file says of its options comes as the end of a traceback
        sys.exit(f"error: {str(error).strip().splitlines()[-1].removeprefix('ValueError: ')}")
    except (AttributeError, KeyError) as error:  # a --config.NAME that the config file does not have
        reason = error.args[0] if error.args else error
        text = reason.args[0] if isinstance(reason, KeyError) else str(reason)
        sys.exit(f"error: the config has no {': '.join(str(text).splitlines())}")


if __name__ == "__main__":
    with_huge_pages()
    flags.mark_flag_as_required("config")
    try:
        app.run(main, flags_parser=_parse)
    except KeyboardInterrupt:  # while something is imported
        sys.exit(130)
