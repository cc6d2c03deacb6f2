"""What every experiment starts from; a config file changes what it is about. Values: found on valid, never on test."""

from __future__ import annotations

import dataclasses
import os

from ml_collections import ConfigDict

from spjax.models.config import Compute, ProsodyConfig
from spjax.models.prompts import PromptConfig
from spjax.training.losses import LossConfig
from spjax.training.optim import OptimConfig
from spjax.training.pretrain import PretrainConfig
from spjax.training.sweep import SweepConfig
from spjax.training.train import TrainConfig


def _fields(config: object) -> ConfigDict:
    return ConfigDict(dataclasses.asdict(config))  # type: ignore[call-overload]


def prompt_tuning(task: str) -> ConfigDict:
    """Low-rank adapters on the records of a task, or of several with commas between: one bank for all of them."""
    config = ConfigDict()
    config.job = "prompt"
    config.task = task
    # Unit records (of several tasks a directory each in it); imported from --units where absent.
    config.data = f"runs/units/{task}"
    config.lm = "runs/pretrain_ulm/lm"  # unit LM
    config.pretraining = pretraining()  # how it is made where it is absent, in its directory's parent
    config.random_lm = False  # control: an LM of these sizes with random weights
    config.start_from = ""  # a prompt pack that every member starts as a copy of
    config.verbalizer = "learnable"  # learnable | frequency | random | identity
    config.verbalizer_seed = 0
    config.combinations = "seen"  # decode among the label combinations "seen" in train, or "all"
    config.few_shot = 0  # train on this many utterances of every label combination; 0: on all
    config.few_shot_seed = 0
    config.max_length = 0  # units; 0: what a batch holds, train.max_tokens / 8 where train.max_rows is a multiple of 8
    config.overlength = "error"  # longer utterances, in any split: error | cut | drop
    config.reference = False  # the original's whole protocol instead of what stands below
    config.baselines = True  # an n-gram model and a linear probe of the LM beside our number
    config.model_parallel = 1  # devices that compute a layer together
    config.weight_shards = 1  # devices among which the LM is divided, gathered layer by layer; 0: all
    config.compute = _fields(Compute(dtype="bfloat16"))
    # Separators start as large as a unit's embedding: 32 times that, as in the reference, drowns what they attend to.
    config.prompt = _fields(
        PromptConfig(length=0, rank=4, separators=1, dropout=0.0, verbalizer_dropout=0.0, sep_scale=0.0625)
    )
    config.loss = _fields(LossConfig(noise=0.1))
    config.optim = _fields(OptimConfig(lr=2e-3))
    config.sweep = _fields(SweepConfig())  # values of prompt, loss and optim that are tried in the same bank
    config.train = _fields(TrainConfig(seeds=(0, 1, 2), epochs=6))
    return config


def with_prompts(config: ConfigDict) -> ConfigDict:
    """The config with prompts instead of low-rank adapters, in place."""
    config.prompt.update({"length": 48, "rank": 0, "separators": 8, "steer": True})
    config.optim.lr = 1e-2
    return config


def small(task: str) -> ConfigDict:
    """A task of some hundred clips with a unit LM of its own train units: five seeds, for one says little."""
    config = prompt_tuning(task)
    config.lm = f"runs/{task}_ulm/lm"
    config.pretraining.tasks = (task,)
    config.pretraining.lm.update({"dim": 128, "layers": 4, "heads": 4, "ffn_dim": 512})
    config.pretraining.pretrain.update({"rows": 16, "epochs": 12})
    config.optim.lr = 1e-3
    # Some tens of valid clips are soon all classified correctly; from then on the loss alone distinguishes epochs.
    config.train.update({"seeds": (0, 1, 2, 3, 4), "epochs": 20, "max_rows": 8, "buckets": 2, "select": "loss"})
    return config


def on_tiny(task: str) -> ConfigDict:
    """Low-rank adapters of the LM that goes with spjax, on MFCC units: nothing to pretrain, nothing to download."""
    config = prompt_tuning(task)
    config.lm = "tiny"
    config.loss.noise = 0.0
    config.train.update({"seeds": (0,), "epochs": 10, "max_rows": 16, "buckets": 2})
    return config


def speech(task: str, others: tuple[str, ...]) -> ConfigDict:
    """A task on units of real speech, with a unit LM of its train units and those of other tasks or sources.

    For an LM of one of the two alone, name those in `--config.pretraining.tasks`, and another `--config.lm`.
    """
    config = prompt_tuning(task)
    config.lm = f"runs/{task}_ulm/lm"
    config.pretraining.tasks = (task, *others)
    return config


def pretraining() -> ConfigDict:
    """A unit LM pretraining job on the train units of some tasks."""
    config = ConfigDict()
    config.job = "pretrain"
    config.tasks = ("fsc", "gsc")
    config.data = "runs/units"  # holds the unit records of each task
    config.lm = ConfigDict({"vocab_size": 104, "dim": 256, "layers": 4, "heads": 4, "ffn_dim": 1024})
    config.model_parallel = 1  # as of a prompt tuning job; not taken from it
    config.weight_shards = 1
    config.compute = _fields(Compute(dtype="bfloat16"))
    config.pretrain = _fields(PretrainConfig(epochs=12, noise=0.1))
    config.optim = _fields(OptimConfig(lr=2e-3, weight_decay=0.1))
    return config


def prosody(duration_input: bool = True, f0_input: bool = True) -> ConfigDict:
    """Streams of a discrete multi-stream LM, for `pretraining.lm.prosody`, and which of them are inputs."""
    return _fields(ProsodyConfig(duration_input=duration_input, f0_input=f0_input))


# Blocks of unit LMs that are trained from scratch, beside GSLM's. A gated feed-forward has three kernels, so two thirds
# of the width; parameters are then about equal.
_LLAMA = {
    "norm": "rms", "norm_eps": 1e-6, "positions": "rotary", "qkv_bias": False, "out_bias": False, "ffn_bias": False,
    "activation": "swiglu", "scale_embedding": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, object]] = {
    "gslm": {},
    "llama": _LLAMA,
    "qwen2": {**_LLAMA, "qkv_bias": True},
    "opt": {"positions": "learned", "max_positions": 2048, "scale_embedding": False},
}


def of_family(lm: ConfigDict, family: str) -> ConfigDict:
    """The LM with the block of a family (docs/models.md), in place."""
    lm.update(FAMILIES[family])
    if lm.get("activation") == "swiglu":
        lm.ffn_dim = -(-2 * lm.ffn_dim // 3 // 8) * 8
    if family == "qwen2":
        lm.kv_heads = max(1, lm.heads // 2)
    return lm


def with_backbone(config: ConfigDict, options: str) -> ConfigDict:
    """The config for the LM that `--config=FILE:backbone=NAME` or `FILE:family=NAME` asks for, in place.

    Args:
      config: of a prompt tuning or pretraining job.
      options: what stands behind the colon: backbone=gslm (a unit LM, as without it); backbone=pgslm (a multi-stream
        LM; records must then hold durations and f0); or family=NAME (a unit LM with the block of one of `FAMILIES`).
        LMs other than GSLM's are in a directory of their own.

    Raises:
      ValueError: anything else.
    """
    known = {"": "", "backbone=gslm": "", "backbone=pgslm": "pgslm", **{f"family={name}": name for name in FAMILIES}}
    if options not in known:
        listed = ", ".join(filter(None, known))
        raise ValueError(f"{options!r} behind the config's colon is unknown: say one of {listed}")
    name = known[options]
    if name in ("", "gslm"):
        return config
    if config.lm == "tiny":
        raise ValueError(
            f"{options} is not the LM {config.lm!r}: take a config that pretrains, such as configs/demo_prosody.py"
        )
    if config.job != "pretrain":
        with_backbone(config.pretraining, options)
        folder, leaf = os.path.split(config.lm)
        config.lm = os.path.join(f"{folder}_{name}", leaf)
    elif name == "pgslm":
        config.lm.prosody = prosody()
    else:
        of_family(config.lm, name)
    return config
