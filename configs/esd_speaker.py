"""ESD, English: which of ten speakers speaks; accuracy on 500 utterances of sentences not in train.

    python -m spjax.main --config=configs/esd_speaker.py --units=UNITS --workdir=runs/esd_speaker

UNITS holds esd, vctk and ljspeech as lines `id|speaker|frames`, with their tables: data_pipelines/frames.py.
Splits: data_pipelines/builders/esd.py. The unit LM has seen the train units of this task and of other speech.

N-gram baseline: 67.2 % (most frequent label: 10.0 %).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults


def get_config(options: str = "") -> ConfigDict:
    """The experiment."""
    config = defaults.speech("esd_speaker", ("vctk_speaker", "ljspeech"))
    config.train.update({"epochs": 12, "max_rows": 8, "buckets": 2})  # few utterances, as in defaults.small
    return defaults.with_backbone(config, options)
