"""What prosody adds to units, on speech made on the spot: one prompt job on five LMs, paired seed by seed.

    python -m spjax.main --config=configs/demo_prosody.py --workdir=runs/prosody

Needs espeakng-loader (the extra demo). Three tasks whose label lies in prosody (question or statement, the word
with the emphasis, the style by rate and range; words and voices are balanced, but slow speech has more units), and two
of content (commands, intents in three slots). The LMs have the same blocks and see the same recordings: "units" has
units only, "none" also predicts durations and f0 without taking them as input, "duration", "f0" and "both" take them.
WORKDIR/summary.md has every score, and each variant's gain over "units" with its 95 % intervals. A single backbone, as
an ordinary prompt job:

    python -m spjax.main --config=configs/demo_prosody.py:backbone=pgslm
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults

TASKS = ("melody", "emphasis", "style", "commands", "intents")


def _variant(**inputs: bool) -> ConfigDict:
    return ConfigDict({"pretraining": {"lm": {"prosody": defaults.prosody(**inputs)}}})


def get_config(options: str = "") -> ConfigDict:
    """The experiment. `data`, `lm` and `pretraining.data` are relative to the work directory."""
    config = defaults.with_prompts(defaults.prompt_tuning(",".join(TASKS)))
    config.synthesis = ConfigDict({"train": 600, "valid": 150, "test": 300, "seed": 0})
    config.data = config.pretraining.data = "records"
    config.lm = "ulm/lm"
    config.pretraining.tasks = TASKS
    config.pretraining.lm = ConfigDict({"vocab_size": 104, "dim": 128, "layers": 4, "heads": 4, "ffn_dim": 512})
    # Little data: small batches take more steps. At 5 epochs of the LM, prompts find little of f0 in it.
    config.pretraining.pretrain.update({"rows": 16, "epochs": 12})
    config.prompt.length = 24
    config.loss.noise = 0.0
    config.optim.lr = 2e-2
    config.train.update({"seeds": (0, 1, 2, 3, 4), "epochs": 6, "max_rows": 8, "buckets": 2})
    if options:
        return defaults.with_backbone(config, options)
    config.job = "compare"
    config.baseline = "units"
    config.variants = ConfigDict(
        {
            "units": {},
            "none": _variant(duration_input=False, f0_input=False),
            "duration": _variant(f0_input=False),
            "f0": _variant(duration_input=False),
            "both": _variant(),
        }
    )
    return config
