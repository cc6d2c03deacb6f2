"""One bank for everything: two tasks, each with every seed, learning rate and rank, trained together.

    python -m spjax.main --config=configs/bank.py --units=UNIT_TEXT --workdir=runs/bank

36 members against one frozen unit LM, each of which learns what it would learn alone; the 18 of a task share its steps,
and the tasks take turns. gsc has twice the utterances of fsc: with train.sampling=1 each task makes its own passes;
with 0, fsc goes round again. What has stopped by its patience is not computed. Which setting is taken is chosen
on valid, task by task (WORKDIR/TASK/sweep.md); it alone is scored on test (WORKDIR/summary.md). A sweep of one task, or
of other values:

    python -m spjax.main --config=configs/bank.py --config.task=fsc --config.data=runs/units/fsc \\
      --config.sweep.rank="(1, 2, 4)"
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults


def get_config(options: str = "") -> ConfigDict:
    """The experiment."""
    config = defaults.prompt_tuning("fsc,gsc")
    config.data = "runs/units"
    config.sweep.update({"lr": (5e-4, 1e-3, 2e-3), "rank": (2, 4)})
    config.train.update({"seeds": (0, 1, 2), "epochs": 3, "patience": 1, "sampling": 1.0})
    return defaults.with_backbone(config, options)
