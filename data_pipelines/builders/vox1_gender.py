"""VoxCeleb1, gender: male or female speakers, from the data set's list.

Raw tree: that of `vox1_speaker`, with `vox1_meta.csv` at the root instead of iden_split.txt: tab-separated, columns
VoxCeleb1 ID, VGGFace1 ID, Gender (m or f), Nationality, Set. The source of a clip is its video.

The paper's split is not published. Ours shares no speaker between splits: 80/10/10 by utterances, with genders as
balanced as that allows (seed 0). Paper and honest protocol are the same.

Metric: accuracy; prior work reports F1, which differs little with 690 m and 561 f speakers.
"""

from __future__ import annotations

from etils import epath

from data_pipelines.builders import vox1_speaker
from data_pipelines.clips import Clip, Splits
from data_pipelines.splits import BuildError, by_speaker, check_protocol, checked
from data_pipelines.tables import read_table
from spjax.tasks import TASKS


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists every utterance under the root; see the module for the split.

    Raises:
      BuildError: the list or the utterances are missing, a gender is neither m nor f, or a speaker is not in the list.
    """
    check_protocol(protocol)
    raw = epath.Path(raw)
    table = raw / "vox1_meta.csv"
    gender_of = {}
    for where, row in read_table(table, ("VoxCeleb1 ID", "Gender"), delimiter="\t"):
        speaker, gender = row["VoxCeleb1 ID"].strip(), row["Gender"].strip()
        if gender not in ("m", "f"):
            raise BuildError(f"{where}: the gender of {speaker} is {gender!r}, not m or f: correct it")
        gender_of[speaker] = gender
    listed = []
    for short, (name, path) in vox1_speaker.recordings(raw).items():
        speaker, _, rest = short.partition("/")
        if speaker not in gender_of:
            raise BuildError(f"{raw / path}: speaker {speaker!r} is not in {table}: add a row, or remove the folder")
        listed.append(Clip(name, path, (gender_of[speaker],), speaker, rest.partition("/")[0]))
    return checked(by_speaker(listed, {"train": 0.8, "valid": 0.1, "test": 0.1}, seed=0), TASKS["vox1_gender"])
