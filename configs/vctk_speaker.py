"""VCTK: which of 108 speakers speaks; accuracy on 1,759 utterances of sentences not in train.

    python -m spjax.main --config=configs/vctk_speaker.py --units=UNITS --workdir=runs/vctk_speaker

UNITS holds vctk, vctk_v1, esd and ljspeech as lines `id|speaker|frames`, with their tables: data_pipelines/frames.py.
Splits: data_pipelines/builders/vctk.py. The unit LM has seen the train units of this task and of other speech.

N-gram baseline: 20.1 % (most frequent label: 1.3 %).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults


def get_config(options: str = "") -> ConfigDict:
    """The experiment."""
    return defaults.with_backbone(defaults.speech("vctk_speaker", ("esd_speaker", "ljspeech")), options)
