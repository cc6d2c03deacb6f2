"""VCTK: is the speaker a woman or a man; accuracy on 1,661 utterances of 22 speakers not in train.

    python -m spjax.main --config=configs/vctk_gender.py --units=UNITS --workdir=runs/vctk_gender

UNITS holds vctk, vctk_v1, esd and ljspeech as lines `id|speaker|frames`, with their tables: data_pipelines/frames.py.
Splits: data_pipelines/builders/vctk.py. The unit LM has seen the train units of this task and of other speech.

N-gram baseline: 68.4 % (most frequent label: 57.9 %).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults


def get_config(options: str = "") -> ConfigDict:
    """The experiment."""
    return defaults.with_backbone(defaults.speech("vctk_gender", ("esd_speaker", "ljspeech")), options)
