"""Arabic Speech Commands: one of forty words; accuracy on 1,600 clips of four speakers not in train.

    python -m spjax.main --config=configs/ar40.py --raw=RAW --encoder=WHISPER --workdir=runs/ar40

From recordings to packs, on units of a Whisper encoder (docs/whisper.md); with --encoder=mfcc, nothing is needed.
Splits: data_pipelines/builders/ar40.py. The unit LM is pretrained on the 4,400 train clips alone.

Ours, whisper-tiny.en: 96.20 % ± 0.32 over 5 seeds, ensemble 96.75 % (n-gram 97.25 %, linear probe 95.75 %).
N-gram baseline on MFCC units: 71.6 %.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults


def get_config(options: str = "") -> ConfigDict:
    """The experiment."""
    config = defaults.small("ar40")
    # By valid, among learning rates of 0.001 to 0.004, ranks 4 and 12, noise of 0.1 to 0.3 and adapter dropout.
    config.prompt.rank = 4
    config.optim.lr = 4e-3
    config.train.update({"epochs": 12, "max_rows": 16, "select": "metric"})  # 1,200 valid clips rank epochs
    return defaults.with_backbone(config, options)
