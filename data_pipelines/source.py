"""How a job gets its unit records: what `demo`, `recordings` and others return, and `sources` chooses among."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from spjax.config import Job
from spjax.jobs import ImportUnits, workdirs

OWN = "own"  # the task of a config for recordings of your own, until they name it


def _nothing() -> None:
    return None


class Source(NamedTuple):
    """How a job gets its unit records.

    Attributes:
      job: the settings, with those that follow from the source.
      make: makes those of a task that are absent.
      finish: is called when the job is done.
    """

    job: Job
    make: ImportUnits
    finish: Callable[[], None] = _nothing


def best_pack(report: str) -> str:
    """The pack of the seed that was best on valid, in the directory of a task's report."""
    results = workdirs.read_json(os.path.join(report, "results.json"))
    sign = -1 if results["lower_is_better"] else 1
    best = max(results["members"], key=lambda member: sign * member["best_valid"])
    return os.path.join(report, "packs", f"seed_{best['seed']}")
