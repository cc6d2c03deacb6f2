"""Arabic Speech Commands: one of forty words; accuracy on 1,600 clips of four speakers not in train.

    python -m spjax.main --config=configs/ar40.py --raw=RAW --encoder=WHISPER --workdir=runs/ar40

From recordings to packs, on units of a Whisper encoder (docs/whisper.md); with --encoder=mfcc, nothing is needed.
Splits: data_pipelines/builders/ar40.py. The unit LM is pretrained on the 4,400 train clips alone.

Ours, whisper-tiny.en, 16 rows, 10 epochs: 95.60 % ± 1.12 over 3 seeds, ensemble 96.12 % (n-gram 97.25 %, linear probe
95.75 %). N-gram baseline on MFCC units: 71.6 %.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults


def get_config(options: str = "") -> ConfigDict:
    """The experiment."""
    return defaults.with_backbone(defaults.small("ar40"), options)
