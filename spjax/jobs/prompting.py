"""Prompt tuning job: train prompts on unit records with a frozen LM, evaluate them, and write report and packs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from spjax import process
from spjax.data import loader
from spjax.data import plan as planning
from spjax.data.records import CARD, Card, load_card
from spjax.data.unit_set import UnitSet
from spjax.evaluation import decode, metrics, outcome, report
from spjax.evaluation.published import published
from spjax.jobs import sweeping
from spjax.jobs.inputs import ImportUnits, backbone, made_by, read_split
from spjax.jobs.workdirs import claim, read_json, refuse_another, say, there, write_json
from spjax.models import prompts, unit_lm, verbalizers
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.prompts import REAL_STARTS, PromptConfig, member, shape_of
from spjax.storage import assets, pack_card, packs, unit_lms
from spjax.tasks import BASELINES, LOWER_IS_BETTER, Task
from spjax.training import loop, losses, masks, optim, pooling, reference, sharding, starts, train
from spjax.types import Params


class Settings(NamedTuple):
    """Validated settings of a prompt job."""

    compute: Compute
    prompt: PromptConfig
    loss: losses.LossConfig
    optimizer: optim.OptimConfig
    run: train.TrainConfig
    sweep: sweeping.SweepConfig


def prompt_settings(config: ConfigDict) -> Settings:
    """Parse and validate the settings of a prompt job.

    Settings that `config.reference` or `config.start_from` determine are written to the config, in place.

    Raises:
      ValueError: a value is invalid.
    """
    if config.reference:
        parts: Any = reference.protocol(train.TrainConfig(**config.train))
        for name, part in zip(("prompt", "loss", "optim", "train"), parts, strict=True):
            config[name].update(dataclasses.asdict(part))
    if config.start_from:  # the pack determines the shape
        start = packs.load_pack(config.start_from)
        config.prompt.update({**shape_of(start.params), **start.card.get("lora", {})})
    sweep = sweeping.SweepConfig(**config.sweep)
    for name in ("length", "rank", "alpha", "init"):
        if getattr(sweep, name) and config.start_from:
            raise ValueError(
                f"sweep.{name} {getattr(sweep, name)} has no effect, since start_from={config.start_from} sets it: "
                f"leave out sweep.{name} or start_from"
            )
    no_prompt = not (config.prompt.length or sweep.length) and "where prompt.length is 0"
    no_adapters = not (config.prompt.rank or sweep.rank) and "where prompt.rank is 0"
    for name, why in {
        "init": no_prompt,
        "dropout": no_prompt or (not config.prompt.deep and "with prompt.deep=False"),
        "lora_dropout": no_adapters,
        "alpha": no_adapters,
        "verbalizer_dropout": config.verbalizer != "learnable" and f"with verbalizer={config.verbalizer}",
    }.items():
        if getattr(sweep, name) and why:
            raise ValueError(f"sweep.{name} {getattr(sweep, name)} has no effect {why}: leave it out, or change that")
    if not (config.prompt.length or config.prompt.rank or sweep.length or sweep.rank):
        raise ValueError(
            "prompt.length and prompt.rank are 0, so nothing would be trained: give prompt positions "
            "(--config.prompt.length), or a rank of LoRA adapters (--config.prompt.rank)"
        )
    if config.combinations not in ("seen", "all"):
        raise ValueError(f"combinations is {config.combinations!r}, must be seen or all")
    if config.few_shot < 0:
        raise ValueError(f"few_shot is {config.few_shot}, must be positive, or 0 for all utterances")
    if config.verbalizer not in verbalizers.KINDS:
        raise ValueError(f"verbalizer is {config.verbalizer!r}, must be one of {', '.join(verbalizers.KINDS)}")
    found = Settings(
        Compute(**config.compute),
        PromptConfig(**config.prompt),
        losses.LossConfig(**config.loss),
        optim.OptimConfig(**config.optim),
        train.TrainConfig(**config.train),
        sweep,
    )
    for tried in sweep.tried:
        for part in found.prompt, found.loss, found.optimizer:
            sweeping.with_values(part, tried)  # raises for invalid values
    return found


def check(config: ConfigDict) -> None:
    """Raise ValueError if a config is invalid; writes nothing."""
    names = config.task.split(",")
    if len(set(names)) < len(names) or not all(name and name == name.strip() for name in names):
        raise ValueError(f"task is {config.task!r}, must be one or more different names, with commas and no spaces")
    settings = prompt_settings(config)
    mesh = sharding.make_mesh(config.model_parallel, config.weight_shards)
    members = len(names) * len(settings.sweep.tried) * len(settings.run.seeds)
    shards, most = sharding.batch_shards(mesh), settings.run.max_rows
    multiple = math.gcd(8, most)
    if all(rows * members % shards for rows in range(multiple, most + 1, multiple)):
        planning.check_rows(most, members, shards)


class Place(NamedTuple):
    """Directories of a task of a job.

    Attributes:
      data: directory of the unit records.
      report: directory of results.json, summary.md and packs.
    """

    data: str
    report: str


def places(config: ConfigDict, workdir: str) -> dict[str, Place]:
    """Directories of every task of a job; several tasks have subdirectories of `config.data` and of the workdir."""
    names = config.task.split(",")
    if len(names) == 1:
        return {names[0]: Place(config.data, workdir)}
    return {name: Place(os.path.join(config.data, name), os.path.join(workdir, name)) for name in names}


def read_splits(
    config: ConfigDict,
    run: train.TrainConfig,
    name: str,
    directory: str,
    lm: UnitLMConfig,
    import_units: ImportUnits | None,
) -> tuple[list[tuple[UnitSet, np.ndarray]], Card, list[str]]:
    """Read the train, valid and test splits of a task, and apply the length limit.

    The limit is `config.max_length` units (0: none) and what a training batch can hold; `config.overlength` determines
    the handling of longer utterances.

    Args:
      config: config of a prompt job.
      run: training settings.
      name, directory, lm, import_units: see `inputs.read_split`.

    Returns:
      The splits with the utterances to use, the card of the records, and a note for every split with long utterances.

    Raises:
      ValueError: there are long utterances and `overlength` is "error"; or as `loader.fit_length` and
        `inputs.read_split`.
    """
    held = planning.longest(run.max_tokens, run.max_rows, run.multiple)
    limit = min(config.max_length or held, held)
    read = {split: read_split(directory, name, split, lm, import_units) for split in ("train", "valid", "test")}
    longest = math.ceil(max(units.lengths.max() for units, _ in read.values()) / run.multiple) * run.multiple
    splits, notes = [], []
    for split, (units, card) in read.items():
        try:
            fitted, ids, note = loader.fit_length(units, limit, config.overlength)
        except ValueError as error:
            flags = []
            if 0 < config.max_length < longest:
                flags.append(f"--config.max_length={longest}")
            if held < longest:
                flags.append(f"--config.train.max_tokens={longest * math.gcd(8, run.max_rows)}")
            advice = f"; if memory allows, use all of them with {' and '.join(flags)}" if flags else ""
            raise ValueError(f"{directory}, {split}: {error}{advice}") from error
        lost = np.setdiff1d(units.classes, units.classes[ids])
        if split == "train" and lost.size:
            slot, label = card.task.classes[lost[0]]
            raise ValueError(
                f"{directory}, train: {note}; no utterance is left for {len(lost)} labels, the first is {label!r} "
                f"({slot}): use --config.overlength=cut"
            )
        splits.append((fitted, ids))
        notes += [f"{split}: {note}"] if note else []
    return splits, card, notes


def check_lengths(config: ConfigDict, lm: UnitLMConfig, import_units: ImportUnits | None) -> None:
    """Raise ValueError if the records of a prompt job are invalid, before its LM is pretrained."""
    run = prompt_settings(config).run
    for name, place in places(config, "").items():
        read_splits(config, run, name, place.data, lm, import_units)


def pack_place(place: Place, seed: int) -> str:
    """Directory of the prompt pack of a seed."""
    return os.path.join(place.report, "packs", f"seed_{seed}")


def kept_seeds(config: ConfigDict, lm: UnitLMConfig) -> tuple[int, ...]:
    """Seeds whose packs are saved: none if the LM is random or trained, since packs need the original LM."""
    trains_lm = any(re.fullmatch(config.train.trainable, f"lm/{path}") for path in unit_lms.unit_lm_shapes(lm))
    return () if config.random_lm or trains_lm else tuple(config.train.seeds)


def inputs_of(lm_hash: str, cards: Iterable[Card]) -> dict[str, Any]:
    """Identity of the LM and the records, for the config.json of a prompt job."""
    shards = [shard.sha256 for card in cards for shard in itertools.chain(*card.shards.values())]
    return {"lm_hash": lm_hash, "units": shards}


def finished(config: ConfigDict, workdir: str) -> bool:
    """Whether a job has all reports and packs.

    Raises:
      ValueError: they are from other records or another LM.
    """
    tasks = places(config, workdir).values()
    needed = [assets.find(config.lm, "lm"), os.path.join(workdir, "summary.md")]
    needed += [os.path.join(place.data, CARD) for place in tasks]
    needed += [os.path.join(place.report, "results.json") for place in tasks]
    if not all(map(there, needed)):
        return False
    lm, _, info = unit_lms.read_unit_lm(config.lm)
    if not all(there(pack_place(place, seed)) for place in tasks for seed in kept_seeds(config, lm)):
        return False
    cards = [load_card(place.data) for place in tasks]
    if not config.random_lm:
        refuse_another(workdir, config, inputs_of(info["hash"], cards))
    return True


class TaskData(NamedTuple):
    """Data and settings of a task of a job.

    Attributes:
      task_run: training data and settings.
      test_set: the test split.
      test_ids: int32 [n], utterances of it to score.
      card: card of the records.
      combinations: int [M, slots], label combinations among which decoding chooses; None: all.
      place: directories of records and report.
      notes: number of utterances cut or dropped, for each split that has some.
    """

    task_run: train.TaskRun
    test_set: UnitSet
    test_ids: np.ndarray
    card: Card
    combinations: np.ndarray | None
    place: Place
    notes: tuple[str, ...]


class LM(NamedTuple):
    """The frozen LM of a job."""

    config: UnitLMConfig
    params: Any
    hash: str
    units: dict[str, Any] | None  # identity of the units that it was trained on, if known


def _read_lm(config: ConfigDict) -> LM:
    lm_config, lm, info = unit_lms.read_unit_lm(config.lm)
    sharding.check_lm(sharding.make_mesh(config.model_parallel, config.weight_shards), lm_config)
    identity = info["hash"]
    if config.random_lm:
        lm = jax.device_get(unit_lm.init(jax.random.key(0), lm_config))
        identity = unit_lms.unit_lm_hash(lm, lm_config.prosody)
    return LM(lm_config, lm, identity, info.get("provenance", {}).get("units"))


def _start(config: ConfigDict, lm: LM, task: Task) -> tuple[Any, verbalizers.Verbalizer | None]:
    """Prompt and verbalizer of `config.start_from`: (None, None) if it is not set, no verbalizer for other labels."""
    if not config.start_from:
        return None, None
    pack = packs.load_pack(config.start_from)
    packs.check_pack(pack, lm.hash, lm.config)
    if pack.task.slots == task.slots:
        return pack.params, verbalizers.from_card(pack.card["verbalizer"], task)
    # the verbalizer of another task does not fit
    return {name: leaf for name, leaf in pack.params.items() if name != "verbalizer"}, None


def _load_task(
    config: ConfigDict, settings: Settings, lm: LM, name: str, place: Place, import_units: ImportUnits | None
) -> tuple[TaskData, Any]:
    """Load a task of the config, and the prompt from which its members start (None: a new one)."""
    directory = place.data
    splits, card, notes = read_splits(config, settings.run, name, directory, lm.config, import_units)
    for note in notes:
        say(f"{name}, {note}")
    (train_set, train_ids), (valid_set, valid_ids), (test_set, test_ids) = splits
    if config.few_shot:
        train_ids = train_ids[planning.few_shot(train_set.classes[train_ids], config.few_shot, config.few_shot_seed)]
    if lm.config.num_units != card.vocabulary:
        raise ValueError(
            f"{config.lm} has {lm.config.num_units} units, {directory} has {card.vocabulary}: use units of the LM"
        )
    if lm.units not in (None, made_by(card)):
        ours = made_by(card)
        differing = "; ".join(
            f"{key} {lm.units.get(key)} in the LM, {ours[key]} in the records"
            for key in ours
            if lm.units.get(key) != ours[key]
        )
        raise ValueError(
            f"{config.lm} was trained on other units than those of {directory} ({differing}): extract units with the "
            "LM's encoder and k-means, or pretrain an LM on these units at another --config.lm"
        )
    task = card.task
    start, verbalizer = _start(config, lm, task)
    if verbalizer is None:
        verbalizer = verbalizers.make(
            config.verbalizer, task, lm.config.vocab_size,
            units=np.concatenate([train_set.units_of(i) for i in train_ids]),
            classes=train_set.classes[train_ids], seed=config.verbalizer_seed,
        )  # fmt: skip
    seen = np.unique(train_set.classes[train_ids], axis=0) if config.combinations == "seen" else None
    setting = train.Setting(
        lm.config, settings.compute, settings.prompt, settings.loss, verbalizer, decode.label_tree(verbalizer, seen)
    )
    task_run = train.TaskRun(
        setting, train_set, train_ids, valid_set, valid_ids,
        metric=functools.partial(_headline, task), lower_is_better=task.metric in LOWER_IS_BETTER,
    )  # fmt: skip
    say(f"{name}: {len(train_ids):,} train, {len(valid_ids):,} valid, {len(test_ids):,} test utterances")
    return TaskData(task_run, test_set, test_ids, card, seen, place, tuple(notes)), start


def run_prompt_tuning(
    config: ConfigDict, workdir: str, import_units: ImportUnits | None, command: str
) -> dict[str, dict[str, Any]]:
    """Train a bank of prompts, evaluate the best epochs on test, and write reports and packs.

    Reports of one task are written to WORKDIR; of several, which share a bank, to WORKDIR/TASK, with an overview in
    WORKDIR/summary.md.

    Returns:
      The content of every task's results.json.
    """
    settings = prompt_settings(config)
    run = settings.run
    if config.reference:
        say("reference=True: prompt, loss, optim and train settings of the config are replaced by the published ones")
    lm = _read_lm(config)
    where = places(config, workdir)
    names = list(where)
    pairs = [_load_task(config, settings, lm, name, place, import_units) for name, place in where.items()]
    tasks = [data for data, _ in pairs]
    kinds = {data.task_run.setting.verbalizer.kind for data in tasks}
    if len(kinds) > 1:
        raise ValueError(
            f"start_from={config.start_from} gives the tasks {' and '.join(kinds)} verbalizers: train them separately"
        )
    (config.verbalizer,) = kinds
    swept = [sweeping.task_runs_of(data.task_run, settings.sweep, settings.optimizer) for data in tasks]
    banks = _first_banks(config, settings, lm, swept, [start for _, start in pairs])
    params = {"lm": lm.params, "prompt": prompts.join([bank["prompt"] for bank in banks])}
    counts = [_counts(bank, run) for bank in banks]
    trained = ", ".join(dict.fromkeys(f"{count['trained']:,}" for count in counts))
    frozen = counts[0]["frozen"]
    say(f"{trained} trained, {frozen:,} frozen parameters; seeds {', '.join(map(str, run.seeds))}")

    claim(workdir, config, inputs_of(lm.hash, [data.card for data in tasks]))
    task_runs = list(itertools.chain(*swept))
    result = train.train(
        params, task_runs, run, settings.optimizer, workdir=workdir,
        model_parallel=config.model_parallel, weight_shards=config.weight_shards,
    )  # fmt: skip
    if config.baselines:
        _make_baselines(config, settings, lm, tasks)
    found, diverged = {}, []
    for name, data, indices in zip(names, tasks, sweeping.index_ranges(swept), strict=True):
        chosen = sweeping.choose(task_runs, result, run, indices)
        if len(indices) > 1 and jax.process_index() == 0:
            line = sweeping.write_table(data.place.report, task_runs, result, run, indices, chosen, settings.optimizer)
            say(f"{name}: {line}")
        members = slice(chosen * len(run.seeds), (chosen + 1) * len(run.seeds))
        lost = [seed for seed, best in zip(run.seeds, result.best_epoch[members], strict=True) if best < 0]
        if lost:
            diverged.append(f"{name} (seeds {', '.join(map(str, lost))})")
            continue
        params = train.task_run_params(result.params, task_runs, run, chosen)
        best = data._replace(task_run=task_runs[chosen])
        found[name] = _report(
            config, settings, lm, best, params, result, members, counts[chosen], len(indices), command
        )  # fmt: skip
    if jax.process_index() == 0 and len(names) > 1 and found:
        path = report.write_overview(workdir, list(found.values()))
        say(f"report: {path}")
    if diverged:
        raise loop.DivergedError(
            f"training diverged before the first evaluation, with every setting: {'; '.join(diverged)}. There is no "
            "report of these tasks. Lower the learning rate, increase the warm-up or leave these seeds out, and use "
            "another --workdir"
        )
    return found


def _placed(config: ConfigDict, settings: Settings, lm: LM) -> tuple[Any, Any]:
    """Mesh, and LM weights placed on it."""
    mesh = sharding.make_mesh(config.model_parallel, config.weight_shards)
    flat = sharding.place_frozen(mesh, masks.flatten({"lm": lm.params}), settings.compute.operand)
    return mesh, masks.unflatten(sharding.layerwise(mesh, flat))["lm"]


def _first_banks(
    config: ConfigDict, settings: Settings, lm: LM, swept: Sequence[Sequence[train.TaskRun]], given: Sequence[Any]
) -> list[Params]:
    """Initial {"lm", "prompt"} of every task run, task by task; `given`: start prompt of each task, or None."""
    placed = functools.cache(lambda: _placed(config, settings, lm))
    banks = []
    for task_runs, start in zip(swept, given, strict=True):
        made: dict[tuple[str, int], list[Params]] = {}  # task runs of a sweep may share an init
        for task_run in task_runs:
            prompt = task_run.setting.prompt
            key = (prompt.init, prompt.length)
            if start is None and prompt.init in REAL_STARTS and prompt.length and key not in made:
                mesh, weights = placed()
                made[key] = starts.from_utterances(weights, task_run, settings.run, mesh)
            banks.append(train.first_params(lm.params, task_run.setting, settings.run.seeds, start, made.get(key)))
    return banks


def _counts(params: Any, run: train.TrainConfig) -> dict[str, int]:
    """Number of trained and frozen parameters of one member."""
    trained, frozen = masks.split(masks.flatten(params), run.trainable)
    size_of = lambda path, leaf: leaf.size // (len(run.seeds) if path.startswith("prompt/") else 1)  # noqa: E731
    return {
        "trained": int(sum(size_of(path, leaf) for path, leaf in trained.items())),
        "frozen": int(sum(size_of(path, leaf) for path, leaf in frozen.items())),
    }


def _report(
    config: ConfigDict,
    settings: Settings,
    lm: LM,
    data: TaskData,
    params: Any,
    result: train.Trained,
    rows: slice,
    counts: dict[str, int],
    tried: int,
    command: str,
) -> dict[str, Any]:
    """Evaluate a task's members on test; write its report and packs.

    Args:
      config, settings, lm, command: of the job.
      data: the task.
      params: {"lm", "prompt"} of its members.
      result: result of training.
      rows: range of its members in the bank.
      counts: number of parameters.
      tried: number of settings among which this one was chosen.
    """
    task_run, run, card = data.task_run, settings.run, data.card
    setting, task, test_set, test_ids = task_run.setting, card.task, data.test_set, data.test_ids
    mesh = sharding.make_mesh(config.model_parallel, config.weight_shards)
    flat = sharding.place_frozen(mesh, masks.flatten(params), setting.compute.operand)
    evaluator = train.evaluator_for(task_run, run, test_set, test_ids, mesh)
    log_probs = evaluator.log_probs(flat)[:, test_ids]
    if jax.process_index() > 0:
        return {}
    baselines = read_json(_baselines_path(data)) if config.baselines else None

    def answers(log_probs: np.ndarray) -> outcome.Predictions:
        return outcome.Predictions(
            ids=[test_set.ids[i] for i in test_ids],
            true=test_set.classes[test_ids],
            predicted=setting.tree.combinations[log_probs.argmax(axis=1)],
            probabilities=decode.slot_probabilities(log_probs, setting.tree, task.slot_offsets),
        )

    members = []
    for n, seed in enumerate(run.seeds):
        row = rows.start + n
        members.append(
            outcome.Member(
                seed=seed,
                best_epoch=result.best_epoch[row] + 1,
                best_valid=float(result.history[result.best_epoch[row]]["metric"][row]),
                curve=[
                    outcome.CurvePoint(line["epoch"] + 1, line["train_loss"][row], line["metric"][row])
                    for line in result.history
                    if line["metric"][row] is not None  # None: it had stopped
                ],
                predictions=answers(log_probs[n]),
            )
        )
    results = report.write_report(
        data.place.report, task=task, members=members, baselines=baselines,
        ensemble=answers(_together(log_probs)) if len(members) > 1 else None,
        parameters=counts, config=config.to_dict(),
        setting=task_run.described(settings.optimizer),
        tried=tried,
        provenance={
            "backbone": backbone(lm.config), "lm": config.lm, "lm_hash": lm.hash, "data": data.place.data,
            "notes": [*card.notes, *data.notes],
        },
        comparisons=published(task.name), command=command,
    )  # fmt: skip
    verbalizer = setting.verbalizer
    for n, seed in enumerate(kept_seeds(config, lm.config)):
        ours = results["members"][n]
        scored = {
            "valid": {"headline": members[n].best_valid},
            "test": {**ours["metrics"], "interval_95": ours["interval_95"]},
            "baselines": {
                kind: {split: baseline[split] for split in ("valid", "test")}
                for kind, baseline in results["baselines"].items()
            },
        }
        described = pack_card.make_card(
            task, kind=verbalizer.kind, codes=verbalizer.codes, feeds=verbalizer.fed_back, outputs=verbalizer.outputs,
            config=lm.config, lm_hash=lm.hash, encoder=card.encoder, layer=card.layer, kmeans=card.kmeans,
            merged=card.merged, combinations=data.combinations, results=scored,
            provenance={"seed": seed, "reference": bool(config.reference)}, lora=setting.prompt.lora,
        )  # fmt: skip
        packs.save_pack(pack_place(data.place, seed), member(params["prompt"], n), described)
    _print_headline(task, results, data.place.report)
    return results


def _together(log_probs: np.ndarray) -> np.ndarray:
    """Log probabilities [n, M] of the ensemble: mean over members [N, n, M], renormalised."""
    mean = log_probs.mean(axis=0, dtype=np.float64)
    normalised: np.ndarray = mean - np.logaddexp.reduce(mean, axis=1, keepdims=True)
    return normalised


def _headline(task: Task, log_probs: np.ndarray, tree: decode.LabelTree, classes: np.ndarray) -> float:
    """Metric of the task on a split."""
    predicted = tree.combinations[log_probs.argmax(axis=1)]
    return metrics.score(task, classes, predicted, decode.slot_probabilities(log_probs, tree, task.slot_offsets))[
        "headline"
    ]


def _baselines_path(data: TaskData) -> str:
    return os.path.join(data.place.report, "baselines.json")


def _make_baselines(config: ConfigDict, settings: Settings, lm: LM, tasks: Sequence[TaskData]) -> None:
    """Fit absent baselines of all tasks, in parallel on process 0."""
    missing = [data for data in tasks if not there(_baselines_path(data))]
    if not missing:
        return
    cores = os.cpu_count() or 1
    # Worker processes are not worth starting for one task, which is usually small.
    parallel = len(missing) > 1 and jax.process_index() == 0
    with process.worker_pool(min(2 * len(missing), cores)) if parallel else contextlib.nullcontext() as pool:
        begin = (lambda fit: pool.submit(fit).result) if pool else (lambda fit: fit)
        fits = [(data, kind, begin(fit)) for data, kind, fit in _baseline_fits(config, settings, lm, missing)]
        if jax.process_index() > 0:
            return
        found: dict[str, dict[str, Any]] = {_baselines_path(data): {} for data in missing}
        for data, kind, result in tqdm(fits, desc="baselines", unit="fit", disable=not parallel):
            found[_baselines_path(data)][kind] = result()
    for path, baselines in found.items():
        write_json(path, {kind: baselines[kind] for kind in BASELINES})


def _baseline_fits(
    config: ConfigDict, settings: Settings, lm: LM, tasks: Sequence[TaskData]
) -> Iterator[tuple[TaskData, str, Callable[[], dict[str, Any]]]]:
    """Yield (task, kind, fit function) of every baseline; n-gram first, since the probe needs hidden states."""
    from spjax.evaluation.ngram import ngram_baseline
    from spjax.evaluation.probe import probe_baseline

    splits = [
        {
            "train": (data.task_run.train_set, data.task_run.train_ids),
            "valid": (data.task_run.valid_set, data.task_run.valid_ids),
            "test": (data.test_set, data.test_ids),
        }
        for data in tasks
    ]
    for data, parts in zip(tasks, splits, strict=True):
        units = [some.take(ids) for some, ids in parts.values()]
        yield data, "ngram", functools.partial(ngram_baseline, data.card.task, *units, progress=False)
    mesh, weights = _placed(config, settings, lm)
    for data, parts in zip(tasks, splits, strict=True):
        states, classes = {}, {}
        for split, (some, ids) in parts.items():
            plan = train.evaluation_plan(data.task_run, settings.run, some, ids, mesh)
            states[split] = pooling.pooled_states(weights, lm.config, some, plan, mesh, settings.compute)[:, ids]
            classes[split] = some.classes[ids]
        yield data, "probe", functools.partial(probe_baseline, data.card.task, states, classes)


def _print_headline(task: Task, results: dict[str, Any], workdir: str) -> None:
    head = results["headline"]
    spread = "" if head["half_width_95"] is None else f" ± {100 * head['half_width_95']:.2f} (95 % over seeds)"
    say(
        f"{task.name}: test {task.metric}: {100 * head['mean']:.2f} %{spread}; seeds "
        + " ".join(f"{100 * v:.2f}" for v in head["values"])
    )
    for kind, baseline in results["baselines"].items():
        say(f"{task.name}: {BASELINES[kind]}: {100 * baseline['test']:.2f} %")
    say(f"{task.name}: report: {os.path.join(workdir, 'summary.md')}")
