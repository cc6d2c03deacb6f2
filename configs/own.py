"""Recordings of your own, a folder a class: adapters of the unit LM that goes with spjax. Nothing to download.

    python -m spjax.main --config=configs/own.py --folders=DIR --workdir=runs/own
    python -m spjax.main --config=configs/own.py --manifest=CSV --workdir=runs/own

A handful of recordings a class will do. Units, packs and the report are written to the work directory; the last line
printed is a command that answers for a recording. docs/own_data.md says what DIR and CSV may hold.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults


def get_config(options: str = "") -> ConfigDict:
    """The experiment. `data` is relative to the work directory; the task is named after the folder or CSV."""
    config = defaults.on_tiny("own")
    config.data = "units"
    config.prompt.rank = 4
    config.optim.lr = 2e-3
    return defaults.with_backbone(config, options)
