"""One module a data set: its raw tree → clips, labels, splits. `CLIPS` finds the function by the task's name."""

from __future__ import annotations

from collections.abc import Callable

from etils import epath

from data_pipelines.builders import (
    accentdb,
    ar_sc,
    asvspoof,
    dm_sc,
    easycall,
    esc50,
    fsc,
    grabo,
    gsc,
    iemocap,
    lt_sc,
    mustard,
    mustardpp,
    vad,
    vox1_gender,
    vox1_speaker,
    voxforge,
)
from data_pipelines.clips import Splits

CLIPS: dict[str, Callable[[epath.Path, str], Splits]] = {
    "gsc": gsc.clips,
    "grabo": grabo.clips,
    "lt_sc": lt_sc.clips,
    "ar_sc": ar_sc.clips,
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
