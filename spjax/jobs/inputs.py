"""Inputs of a job: splits of unit records, and descriptions of units and LM."""

from __future__ import annotations

from collections.abc import Callable

from spjax.data.records import CARD, Card, read_unit_records
from spjax.data.unit_set import UnitSet
from spjax.jobs.workdirs import whole
from spjax.models.config import UnitLMConfig
from spjax.training import sharding
from spjax.types import Json

ImportUnits = Callable[[str, str], object]  # (task, directory of records); makes the records from unit text


def read_split(
    directory: str, task: str, split: str, lm: UnitLMConfig, import_units: ImportUnits | None
) -> tuple[UnitSet, Card]:
    """Read a split of unit records for an LM; absent records are imported first.

    Args:
      directory: directory of the records.
      task: name of the task.
      split: name of the split.
      lm: LM architecture; with prosody, the split must have durations and f0.
      import_units: function that makes absent records; None: absent records are an error.

    Raises:
      FileNotFoundError: no records, and no `import_units`.
      ValueError: records of another task, or without the streams of the LM; RecordError if they are damaged.
    """
    import_absent(directory, task, import_units)
    units, card = read_unit_records(directory, split)
    if card.task.name != task:
        raise ValueError(
            f"{directory} has units of task {card.task.name!r}, the config is for {task!r}: put "
            f"{card.task.name} in the config, or give a --config.data with units of {task}"
        )
    if lm.prosody is None:
        return units.without_streams(), card
    absent = [name for name, there in (("durations", card.durations), ("f0", card.f0)) if not there]
    if absent:
        raise ValueError(
            f"{directory} has no {' and no '.join(absent)}, which a multi-stream LM needs: extract the recordings "
            "again with --f0 of data_pipelines.extract (imported unit text has no f0), or use a unit LM"
        )
    return units.with_interpolated_f0() if lm.prosody.interpolate_f0 else units, card


def import_absent(directory: str, task: str, import_units: ImportUnits | None) -> None:
    """Import unit records if they are absent. Arguments: see `read_split`.

    Raises:
      FileNotFoundError: the records are absent, and there is no `import_units`.
      ValueError: their source is invalid.
    """

    def import_records() -> None:
        if whole(directory, CARD):
            return
        if import_units is None:
            raise FileNotFoundError(
                f"no unit records at {directory}: give --units=UNIT_TEXT (a folder with {task}/train.txt ...), "
                f"or extract recordings: python -m data_pipelines.extract --task={task} --raw=... --out={directory} ..."
            )
        import_units(task, directory)

    sharding.on_process_zero(f"the records of {task}", import_records)


def made_by(card: Card) -> Json:
    """Card fields that identify the units; an LM works only with the units it was trained on."""
    return {name: getattr(card, name) for name in ("encoder", "layer", "kmeans", "merged", "vocabulary")}


def backbone(lm: UnitLMConfig) -> str:
    """Description of an LM for reports."""
    if lm.prosody is None:
        described = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in lm.block.items())
        return f"unit LM ({described})" if described else "GSLM (unit LM)"
    streams = [name for name, on in (("durations", lm.prosody.duration_input), ("f0", lm.prosody.f0_input)) if on]
    kind = "discrete" if lm.prosody.discrete else "continuous"
    return f"pGSLM (multi-stream LM), {kind}, input {' and '.join(['units', *streams])}"
