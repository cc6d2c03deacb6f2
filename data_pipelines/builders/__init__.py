"""Data set builders, one module each: raw directory → clips with labels, in splits. `CLIPS` maps task names to them.

`UNIT_TEXT` does the same for tasks published as units instead of recordings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from etils import epath

from data_pipelines.builders import (
    accentdb,
    ar40,
    ar_sc,
    asvspoof,
    dm_sc,
    easycall,
    esc50,
    esd,
    fsc,
    grabo,
    gsc,
    iemocap,
    lt_sc,
    mustard,
    mustardpp,
    vad,
    vctk,
    vox1_gender,
    vox1_speaker,
    voxforge,
)
from data_pipelines.clips import Splits
from data_pipelines.frames import UnitSplits

CLIPS: dict[str, Callable[[epath.Path, str], Splits]] = {
    "gsc": gsc.clips,
    "grabo": grabo.clips,
    "lt_sc": lt_sc.clips,
    "ar_sc": ar_sc.clips,
    "ar40": ar40.clips,
    "dm_sc": dm_sc.clips,
    "dm_sc19": dm_sc.clips19,
    "fsc": fsc.clips,
    "voxforge": voxforge.clips,
    "asvspoof": asvspoof.clips,
    "iemocap": iemocap.clips,
    "accentdb": accentdb.clips,
    "easycall": easycall.clips,
    "mustard": mustard.clips,
    "mustardpp": mustardpp.clips,
    "vox1_gender": vox1_gender.clips,
    "vox1_speaker": vox1_speaker.clips,
    "vad": vad.clips,
    "esc50": esc50.clips,
}


class UnitText(NamedTuple):
    """A task published as unit text: its sources (data_pipelines/frames.py) and the function that lists it."""

    sources: tuple[str, ...]
    list: Callable[[epath.PathLike, str], UnitSplits]


UNIT_TEXT: dict[str, UnitText] = {
    "esd_emotion": UnitText(("esd",), esd.emotion),
    "esd_speaker": UnitText(("esd",), esd.speaker),
    "vctk_gender": UnitText(vctk.SOURCES, vctk.gender),
    "vctk_accent": UnitText(vctk.SOURCES, vctk.accent),
    "vctk_speaker": UnitText(vctk.SOURCES, vctk.speaker),
}
