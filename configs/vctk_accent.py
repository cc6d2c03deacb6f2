"""VCTK: which of six accents of English is spoken; accuracy on 1,471 utterances of 19 speakers not in train.

    python -m spjax.main --config=configs/vctk_accent.py --units=UNITS --workdir=runs/vctk_accent

UNITS holds vctk, vctk_v1, esd and ljspeech as lines `id|speaker|frames`, with their tables: data_pipelines/frames.py.
Splits: data_pipelines/builders/vctk.py. The unit LM has seen the train units of this task and of other speech.

N-gram baseline: 47.1 % (most frequent label: 36.6 %).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults


def get_config(options: str = "") -> ConfigDict:
    """The experiment."""
    return defaults.with_backbone(defaults.speech("vctk_accent", ("esd_speaker", "ljspeech")), options)
