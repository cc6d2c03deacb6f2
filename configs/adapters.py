"""A table of methods: SpeechPrompt's protocol, prompts, LoRA, both, full fine-tuning, two baselines, on five tasks.

    python -m spjax.main --config=configs/adapters.py --workdir=runs/adapters

WORKDIR/summary.md is the table; docs/adapters.md has ours, says what each column is, and where records and LMs come
from. Records and LM of a task are looked for where its config has them, or where you say; what is absent is named as
missing. The table has whatever the work directory holds, so parts of it may be run one after another, for instance

    python -m spjax.main --config=configs/adapters.py --workdir=runs/adapters --config.task=fsc \\
      --config.method=lora,prompts --config.train.seeds="(0,)" --config.tasks.fsc.lm=runs/pretrain_ulm/lm
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs import defaults, esd_emotion, fsc, gsc, lt_sc

# A learning rate a method, the same on every task: that of LoRA was chosen on the valid split of fsc, the others are
# those of earlier experiments.
METHODS: dict[str, dict[str, Any]] = {
    "speechprompt": {"reference": True},
    "prompts": {
        "prompt": {"length": 48, "rank": 0, "separators": 8, "steer": True},
        "optim": {"lr": 1e-2},
    },
    "lora": {
        "prompt": {"length": 0, "rank": 4, "separators": 1, "steer": False},
        "optim": {"lr": 2e-3},
    },
    "prompts_and_lora": {
        "prompt": {"length": 16, "rank": 4, "separators": 1, "steer": False},
        "optim": {"lr": 2e-3},
    },
    "finetune": {
        "prompt": {"length": 1, "rank": 0, "separators": 1, "steer": False},
        "optim": {"lr": 5e-4},
        "train": {"trainable": ".*"},
    },
}


def _task(config: ConfigDict) -> ConfigDict:
    """What a task's config says of records, LM, noise and length of training."""
    own = {name: config[name] for name in ("data", "lm", "pretraining", "loss")}
    train = {name: config.train[name] for name in ("epochs", "max_rows", "buckets", "select")}
    return ConfigDict({**own, "train": train})


def get_config(options: str = "") -> ConfigDict:
    """The experiment."""
    config = defaults.with_backbone(defaults.prompt_tuning(""), options)
    intents = defaults.with_backbone(defaults.on_tiny("intents"), options)
    intents.data = "runs/demo/units/intents"
    config.job = "methods"
    config.tasks = ConfigDict(
        {
            "fsc": _task(fsc.get_config(options)),
            "gsc": _task(gsc.get_config(options)),
            "esd_emotion": _task(esd_emotion.get_config(options)),
            "lt_sc": _task(lt_sc.get_config(options)),
            "intents": _task(intents),
        }
    )
    config.methods = ConfigDict(METHODS)
    config.task = ",".join(config.tasks)  # those that are run now; the table has all
    config.method = ",".join(METHODS)
    return config
