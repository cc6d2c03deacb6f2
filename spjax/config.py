"""Settings of a job: `parse` turns the ConfigDict of a file in configs/ into frozen dataclasses, once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from flax import traverse_util
from ml_collections import ConfigDict

from spjax import paths
from spjax.io import packs
from spjax.models import verbalizers
from spjax.models.config import Compute, ProsodyConfig, UnitLMConfig
from spjax.models.prompts import PromptConfig, shape_of
from spjax.training import reference
from spjax.training.losses import LossConfig
from spjax.training.optim import OptimConfig
from spjax.training.pretrain import PretrainConfig
from spjax.training.sweep import SweepConfig, with_values
from spjax.training.train import TrainConfig
from spjax.types import Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainJob:
    """Settings of a job that pretrains a unit LM.

    Attributes:
      tasks: the LM is trained on the train units of these tasks.
      data: directory that has a directory of unit records for each of them.
      lm: architecture.
      model_parallel, weight_shards, compute: as of `PromptJob`.
      pretrain, optim: of training.
      speech: settings of the speech that the records are made of (configs/pretrain_tiny.py); None: records are given.
    """

    tasks: tuple[str, ...]
    data: str
    lm: UnitLMConfig
    model_parallel: int
    weight_shards: int
    compute: Compute
    pretrain: PretrainConfig
    optim: OptimConfig
    speech: Json | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptJob:
    """Settings of a job that trains prompts or adapters, or both.

    Attributes:
      task: its name; of several, which share a bank, with commas between.
      data: directory of the unit records; of several tasks, a directory that has one for each.
      lm: directory of the unit LM, or the name of one in the package.
      pretraining: how the LM is made if it is absent.
      random_lm: a control: an LM of the same architecture with random weights.
      start_from: directory of a prompt pack that every member starts as a copy of; "" for a new start.
      verbalizer, verbalizer_seed: of `verbalizers.make`.
      combinations: decode among the label combinations "seen" in train, or among "all".
      few_shot: utterances of each label combination to train on; 0: all.
      few_shot_seed: of the choice of these.
      max_length: longest utterance, in units; 0: what a batch holds.
      overlength: what is done with longer ones: "error", "cut" or "drop".
      reference: use the published settings for `prompt`, `loss`, `optim` and `train`.
      baselines: fit an n-gram model and a linear probe as well.
      model_parallel: devices that compute a layer together.
      weight_shards: devices among which the LM is divided; 0: all.
      compute, prompt, loss, optim, sweep, train: of the model, the loss and training.
      synthesis: settings of the speech that the records are made of (configs/demo.py); None: records are given.
    """

    task: str
    data: str
    lm: str
    pretraining: PretrainJob
    random_lm: bool
    start_from: str
    verbalizer: str
    verbalizer_seed: int
    combinations: str
    few_shot: int
    few_shot_seed: int
    max_length: int
    overlength: Literal["error", "cut", "drop"]
    reference: bool
    baselines: bool
    model_parallel: int
    weight_shards: int
    compute: Compute
    prompt: PromptConfig
    loss: LossConfig
    optim: OptimConfig
    sweep: SweepConfig
    train: TrainConfig
    synthesis: Json | None = None

    def __post_init__(self) -> None:
        names = self.tasks
        if len(set(names)) < len(names) or not all(name and name == name.strip() for name in names):
            raise ValueError(f"task is {self.task!r}, must be one or more different names, with commas and no spaces")
        if self.combinations not in ("seen", "all"):
            raise ValueError(f"combinations is {self.combinations!r}, must be seen or all")
        if self.overlength not in ("error", "cut", "drop"):
            raise ValueError(f"overlength is {self.overlength!r}, must be error, cut or drop")
        if self.few_shot < 0:
            raise ValueError(f"few_shot is {self.few_shot}, must be positive, or 0 for all utterances")
        if self.verbalizer not in verbalizers.KINDS:
            raise ValueError(f"verbalizer is {self.verbalizer!r}, must be one of {', '.join(verbalizers.KINDS)}")
        if not (self.prompt.length or self.prompt.rank or self.sweep.length or self.sweep.rank):
            raise ValueError(
                "prompt.length and prompt.rank are 0, so nothing would be trained: give prompt positions "
                "(--config.prompt.length), or a rank of LoRA adapters (--config.prompt.rank)"
            )
        self._check_sweep()

    def _check_sweep(self) -> None:
        sweep, prompt = self.sweep, self.prompt
        for name in ("length", "rank", "alpha", "init"):
            if getattr(sweep, name) and self.start_from:
                raise ValueError(
                    f"sweep.{name} {getattr(sweep, name)} has no effect, since start_from={self.start_from} sets it: "
                    f"leave out sweep.{name} or start_from"
                )
        no_prompt = not (prompt.length or sweep.length) and "where prompt.length is 0"
        no_adapters = not (prompt.rank or sweep.rank) and "where prompt.rank is 0"
        for name, why in {
            "init": no_prompt,
            "dropout": no_prompt or (not prompt.deep and "with prompt.deep=False"),
            "lora_dropout": no_adapters,
            "alpha": no_adapters,
            "verbalizer_dropout": self.verbalizer != "learnable" and f"with verbalizer={self.verbalizer}",
        }.items():
            if getattr(sweep, name) and why:
                raise ValueError(
                    f"sweep.{name} {getattr(sweep, name)} has no effect {why}: leave it out, or change that"
                )
        for tried in sweep.tried:
            for part in prompt, self.loss, self.optim:
                with_values(part, tried)  # raises for invalid values

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return self.task.split(",")


@dataclasses.dataclass(frozen=True)
class CompareJob:
    """Settings of a job that compares variants of a prompt job, each with its own LM.

    Attributes:
      common: what the variants have in common.
      baseline: the variant with which the others are compared.
      variants: by name; `data`, `lm` and `pretraining.data` are those of `common`.
      overrides: by name of the variant: its settings that differ, as in the config.
    """

    common: PromptJob
    baseline: str
    variants: dict[str, PromptJob]
    overrides: Json


@dataclasses.dataclass(frozen=True)
class MethodsJob:
    """Settings of a job that compares methods on several tasks.

    Attributes:
      task, method: those that are run now, with commas between.
      seeds: each is a run of its own.
      runs: by task and method; those that are run now.
      tasks, methods: of the table, in its order; also those that are not run now.
    """

    task: str
    method: str
    seeds: tuple[int, ...]
    runs: dict[str, dict[str, PromptJob]]
    tasks: tuple[str, ...]
    methods: tuple[str, ...]


Job = PromptJob | PretrainJob | CompareJob | MethodsJob


def parse(config: ConfigDict) -> Job:
    """Parse and validate the settings of a job; writes nothing.

    Args:
      config: from a file in configs/; not changed. Settings that `reference` or `start_from` determine are taken from
        the published code or from the pack.

    Raises:
      ValueError: a setting is invalid.
      OSError: the pack of `start_from` cannot be read.
    """
    parsers: dict[str, Callable[[ConfigDict], Job]] = {
        "prompt": _prompt,
        "pretrain": _pretrain,
        "compare": _compare,
        "methods": _methods,
    }
    if config.get("job") not in parsers:
        raise ValueError(f"config.job is {config.get('job')!r}, must be prompt, pretrain, compare or methods")
    return parsers[config.job](config)


def to_dict(job: Job) -> Json:
    """Settings as config.json has them, in the form of the config file."""
    if isinstance(job, CompareJob):
        return {**to_dict(job.common), "job": "compare", "baseline": job.baseline, "variants": job.overrides}
    kind = {PromptJob: "prompt", PretrainJob: "pretrain", MethodsJob: "methods"}[type(job)]
    return {"job": kind, **dataclasses.asdict(job)}


def _path(value: str, name: str) -> str:
    try:
        return paths.given(value)
    except ValueError as error:
        raise ValueError(f"--config.{name}: {error}") from error


def checked(kind: type, config: Json, part: str = "") -> Json:
    """The settings of a config except `job`, if they are those of the dataclass `kind`.

    Raises:
      ValueError: one is unknown or missing; `part` is the prefix of its name.
    """
    settings = {name: value for name, value in config.items() if name != "job"}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := settings.keys() - fields.keys():
        raise ValueError(f"the config has {part}{min(unknown)}, which is no setting of this job: remove it")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in settings]
    if missing:
        raise ValueError(f"the config has no {part}{missing[0]}: add it (configs/defaults.py has its usual value)")
    return settings


def _groups(kinds: Mapping[str, type], settings: Json, part: str = "") -> Json:
    """A dataclass for each group of settings."""
    return {name: kind(**checked(kind, settings[name], f"{part}{name}.")) for name, kind in kinds.items()}


def _pretrain(config: ConfigDict, part: str = "") -> PretrainJob:
    settings = checked(PretrainJob, config.to_dict(), part)
    settings["data"] = _path(settings["data"], f"{part}data")
    settings["tasks"] = tuple(settings["tasks"])
    kinds: dict[str, type] = {"lm": UnitLMConfig, "compute": Compute, "pretrain": PretrainConfig, "optim": OptimConfig}
    return PretrainJob(**settings | _groups(kinds, settings, part))


def _prompt(config: ConfigDict) -> PromptJob:
    settings = checked(PromptJob, config.to_dict())
    for name in ("data", "lm", "start_from"):
        settings[name] = settings[name] and _path(settings[name], name)
    kinds: dict[str, type] = {
        "compute": Compute, "prompt": PromptConfig, "loss": LossConfig, "optim": OptimConfig, "sweep": SweepConfig,
        "train": TrainConfig,
    }  # fmt: skip
    if settings["reference"]:
        published: Any = reference.protocol(TrainConfig(**checked(TrainConfig, settings["train"], "train.")))
        names = ("prompt", "loss", "optim", "train")
        settings |= {name: dataclasses.asdict(part) for name, part in zip(names, published, strict=True)}
    if settings["start_from"]:  # the pack determines the shape
        start = packs.load_pack(settings["start_from"])
        settings["prompt"] |= {**shape_of(start.params), **start.card.get("lora", {})}
    settings["pretraining"] = _pretrain(config.pretraining, "pretraining.")
    return PromptJob(**settings | _groups(kinds, settings))


# Settings that variants may not override.
_COMMON = ("job", "task", "data", "lm", "synthesis", "baselines", "few_shot_seed", "train.seeds", "pretraining.data")
_RESERVED = ("speech", "kmeans")  # directories of the demo in the workdir


def _compare(config: ConfigDict) -> CompareJob:
    names = list(config.variants)
    if len(names) < 2 or config.baseline not in names:
        raise ValueError(
            f"baseline is {config.baseline!r}, the variants are {', '.join(names) or 'none'}: give at least two "
            "variants, one of them the baseline"
        )
    common = _without(config, "variants", "baseline")
    variants = {}
    for name in names:
        if not re.fullmatch(r"\w+", name) or name in _RESERVED:
            raise ValueError(
                f"variant {name!r} is not a valid directory name: use letters, digits and _, and none of {_RESERVED}"
            )
        try:
            variants[name] = _variant(common, config.variants[name].to_dict())
        except (AttributeError, ValueError) as error:  # AttributeError: a number where a group of settings is expected
            raise ValueError(f"variants.{name}: {error}") from error
    return CompareJob(_prompt(common), config.baseline, variants, config.variants.to_dict())


def _variant(common: ConfigDict, overrides: Json) -> PromptJob:
    dotted = flat(overrides)
    if found := [key for key in dotted if any(key == c or key.startswith(f"{c}.") for c in _COMMON)]:
        raise ValueError(f"{', '.join(found)} must be the same for all variants")
    one = ConfigDict(common.to_dict())
    if "prosody" in overrides.get("pretraining", {}).get("lm", {}) and "prosody" not in one.pretraining.lm:
        one.pretraining.lm.prosody = ConfigDict(dataclasses.asdict(ProsodyConfig()))
    return _prompt(_overridden(one, overrides))


def _methods(config: ConfigDict) -> MethodsJob:
    for chosen, there_are in (("task", "tasks"), ("method", "methods")):
        names = config[chosen].split(",")
        unknown = [name for name in names if name not in config[there_are]]
        if unknown or len(set(names)) < len(names):
            raise ValueError(
                f"{chosen} is {config[chosen]!r}, must be one or more of {', '.join(config[there_are])}, each once, "
                "with commas and no spaces"
            )
        for name in config[there_are]:
            if not re.fullmatch(r"\w+", name):
                raise ValueError(f"{there_are}.{name} is not a valid directory name: use letters, digits and _")
    common = _without(config, "tasks", "methods", "method")
    runs: dict[str, dict[str, PromptJob]] = {}
    for task in config.task.split(","):
        runs[task] = {}
        for method in config.method.split(","):
            one = ConfigDict({**common.to_dict(), "task": task})
            for part, name in (("tasks", task), ("methods", method)):
                try:
                    one = _overridden(one, config[part][name].to_dict())
                except ValueError as error:
                    raise ValueError(f"{part}.{name}: {error}") from error
            try:
                runs[task][method] = _prompt(one)
            except ValueError as error:
                raise ValueError(f"{method} on {task}: {error}") from error
    named = tuple(config.tasks), tuple(config.methods)
    return MethodsJob(config.task, config.method, tuple(config.train.seeds), runs, *named)


def _without(config: ConfigDict, *names: str) -> ConfigDict:
    return ConfigDict({name: value for name, value in config.to_dict().items() if name not in names})


def _overridden(config: ConfigDict, settings: Json) -> ConfigDict:
    """The config with some settings changed, in place.

    Raises:
      ValueError: a setting does not exist, or the value has another type.
    """
    config.lock()
    try:
        config.update(settings)
    except (KeyError, TypeError, AttributeError) as error:
        # Without the list of all fields that ConfigDict adds to the name of an unknown one.
        raise ValueError(re.sub(r"Other fields present: .*\n", "", str(error.args[0]))) from error
    return config


def flat(tree: Json) -> Json:
    """Flatten nested settings to dotted names."""
    return traverse_util.flatten_dict(tree, sep=".")
