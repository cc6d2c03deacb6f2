"""What a job starts from: splits of unit records as an LM takes them, and what an LM is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from spjax import paths
from spjax.data.records import CARD, Card, read_unit_records
from spjax.data.unit_set import UnitSet
from spjax.jobs.workdirs import whole
from spjax.models.config import UnitLMConfig
from spjax.training import sharding

ImportUnits = Callable[[str, str], object]  # (task, directory of records): make them from the reader's unit text


def read_split(
    directory: str, task: str, split: str, lm: UnitLMConfig, import_units: ImportUnits | None
) -> tuple[UnitSet, Card]:
    """A split of a task's unit records as an LM takes it; the records are imported first where they are absent.

    Args:
      directory: of the records.
      task: name of the task.
      split: its name.
      lm: with prosody, it takes durations and f0 too.
      import_units: how records that are absent are made.

    Raises:
      FileNotFoundError: no records, and no way to make them.
      ValueError: records of another task, or without the streams that the LM takes; RecordError (one of them) where
        they are damaged.
    """
    import_absent(directory, task, import_units)
    units, card = read_unit_records(directory, split)
    if card.task.name != task:
        raise ValueError(
            f"{directory} holds units of task {card.task.name!r}, the config is for {task!r}: name "
            f"{card.task.name} in the config, or give a --config.data that holds units of {task}"
        )
    if lm.prosody is None:
        return units.without_streams(), card
    absent = [name for name, there in (("durations", card.durations), ("f0", card.f0)) if not there]
    if absent:
        raise ValueError(
            f"{directory} holds no {' and no '.join(absent)}, which a multi-stream LM goes by: extract the recordings "
            "again with --f0 of data_pipelines.extract (imported unit text has no f0), or take a unit LM"
        )
    return units.with_interpolated_f0() if lm.prosody.interpolate_f0 else units, card


def import_absent(directory: str, task: str, import_units: ImportUnits | None) -> None:
    """Import unit records that are absent; arguments as of `read_split`.

    Raises:
      FileNotFoundError: there is no way to make them.
      ValueError: what they are imported from is wrong.
    """

    def imported() -> None:
        if whole(directory, CARD):
            return
        if import_units is None:
            raise FileNotFoundError(
                f"no unit records at {directory}: give --units=UNIT_TEXT (a folder holding {task}/train.txt ...), "
                f"or of recordings: python -m data_pipelines.extract --task={task} --raw=... --out={directory} ..."
            )
        import_units(task, directory)

    sharding.first_does(f"the records of {task}", imported)


def check_places(config: ConfigDict) -> None:
    """Replace paths in a config by what `paths.given` makes of them.

    Raises:
      ValueError: one is a URL; names the setting.
    """
    for part, name in [(config, "data"), (config, "lm"), (config, "start_from"), (config.get("pretraining"), "data")]:
        value = part.get(name) if part else None
        if isinstance(value, str) and (value or name != "start_from"):
            try:
                part[name] = paths.given(value)
            except ValueError as error:
                raise ValueError(f"--config.{'' if part is config else 'pretraining.'}{name}: {error}") from error


def made_by(card: Card) -> dict[str, Any]:
    """What units are, whatever was said: an LM knows no others."""
    return {name: getattr(card, name) for name in ("encoder", "layer", "kmeans", "merged", "vocabulary")}


def backbone(lm: UnitLMConfig) -> str:
    """What an LM is, for readers of a report."""
    if lm.prosody is None:
        return "GSLM (unit LM)"
    streams = [name for name, on in (("durations", lm.prosody.duration_input), ("f0", lm.prosody.f0_input)) if on]
    kind = "discrete" if lm.prosody.discrete else "continuous"
    return f"pGSLM (multi-stream LM), {kind}, told {' and '.join(['units', *streams])}"
