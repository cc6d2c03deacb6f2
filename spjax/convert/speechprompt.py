"""Import prompt checkpoints of SpeechPrompt v2 (fairseq). Every tensor must be known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from spjax import vocab
from spjax.convert import ConvertError, why
from spjax.convert.checkpoint import Checkpoint, check_kind, check_leftover, load
from spjax.convert.fairseq import SIZES, as_checkpoint, check_architecture
from spjax.convert.safe_pickle import shown
from spjax.data.records import read_unit_records
from spjax.data.tfrecords import RecordError
from spjax.io.kinds import load_json
from spjax.io.pack_card import PackCard, make_card
from spjax.models.config import UnitLMConfig
from spjax.models.decode import MOST_COMBINATIONS
from spjax.tasks import TASKS, Slot, Task
from spjax.types import Params

_VERBALIZER = "decoder.prompt_linear_verbalizer.weight"


def read_task(name: str) -> Task:
    """A known task by name, or one from a JSON file `{"name", "slots": [{"name", "labels"}], "metric"}`.

    Raises:
      ConvertError: neither a known task nor such a file.
    """
    if name in TASKS:
        return TASKS[name]
    path = Path(name)
    if path.suffix != ".json":
        raise ConvertError(
            f"--task={name} is none of {', '.join(TASKS)}; give one of these, or a .json file that describes yours."
        )
    shape = '{"name": "mine", "slots": [{"name": "word", "labels": ["yes", "no"]}], "metric": "accuracy"}'
    try:
        described = load_json(path)
        slots = tuple(Slot(str(slot["name"]), tuple(map(str, slot["labels"]))) for slot in described["slots"])
        return Task(str(described.get("name", path.stem)), slots, str(described.get("metric", "accuracy")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConvertError(f"{path} does not describe a task ({why(error)}). Example: {shape}.") from error


def read_verbalizer(path: str | Path) -> dict[str, int]:
    """Read SpeechPrompt's verbalizer.json: label → unit (rules) or class number (learnable).

    Raises:
      ConvertError: unreadable, or values that are not numbers.
    """
    path = Path(path)
    shape = 'Example: {"yes": "6", "no": "74"}.'
    try:
        mapping = load_json(path)
        numbers = {label: int(number) for label, number in mapping.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConvertError(f"{path} is not a verbalizer ({why(error)}). {shape}") from error
    if not numbers or min(numbers.values()) < 0:
        raise ConvertError(f"{path} is empty or holds negative numbers. {shape}")
    return numbers


def _numbers(task: Task, mapping: Mapping[str, int], where: str) -> list[int]:
    """The number of each class: by label (underscores for spaces) or, if the mapping's keys are 0..C-1, by class id."""
    if set(mapping) == {str(c) for c in range(task.num_classes)}:
        return [mapping[str(c)] for c in range(task.num_classes)]
    names = [label if label in mapping else label.replace(" ", "_") for _, label in task.classes]
    absent, unused = sorted(set(names) - set(mapping)), sorted(set(mapping) - set(names))
    if absent or unused:
        parts = [f"lacks {', '.join(absent)}"] if absent else []
        parts += [f"has {', '.join(unused)}, which the task does not"] if unused else []
        raise ConvertError(
            f"{where} {' and '.join(parts)}: not the labels of task {task.name!r}. Give the verbalizer.json of the "
            "task, describe the task in a .json file, or leave out --task."
        )
    return [mapping[label] for label in names]


def _check_collisions(task: Task, numbers: list[int], where: str) -> None:
    for slot, start in zip(task.slots, task.slot_offsets, strict=False):
        taken: dict[int, str] = {}
        for label, number in zip(slot.labels, numbers[start:], strict=False):
            twin = taken.setdefault(number, label)
            if twin != label:
                raise ConvertError(
                    f"{where}: labels {twin!r} and {label!r} share the number {number} (SpeechPrompt's random "
                    "verbalizer can draw a unit twice), so the prompt cannot distinguish them. Keep one of the two in "
                    "the file and in the task to import them as one; or train a prompt with a verbalizer of spjax."
                )


def _prompt_tree(checkpoint: Checkpoint, config: UnitLMConfig) -> tuple[Params, list[str]]:
    """The prompt tree of a checkpoint, and notes on what was left out."""
    path, tensors, d = checkpoint.path, checkpoint.tensors, config.dim
    notes = []

    def take(name: str, rows: int | None, columns: int) -> np.ndarray:
        if rows is None:
            rows = tensors[name].shape[0] if name in tensors and len(tensors[name].shape) == 2 else 0
        try:
            return load(checkpoint, name, (rows, columns))
        except ConvertError as error:
            raise ConvertError(f"{error} The LM given by --lm has dim {d} and {config.layers} layers.") from error

    deep = any(name.startswith("decoder.deep_") for name in tensors)
    shallow = take("decoder.prefix_embed_prompts.weight", None, d)
    length = shallow.shape[0]
    params: Params = {"sep": take("decoder.sep_embed.weight", 1, d)}
    found = {"deep_prompt": deep, "prompt_length": length, "linear_verbalizer": _VERBALIZER in tensors}
    if deep:
        for part in ("key", "value"):
            names = [f"decoder.deep_{part}_embed_prompts.{layer}.weight" for layer in range(config.layers)]
            params[part] = np.stack([take(name, length, d) for name in names])
        notes.append(f"Left out the {shallow.size} numbers of the input prompt, which deep prompts do not use.")
    else:
        params["input"] = shallow
    if _VERBALIZER in tensors:
        params["verbalizer"] = take(_VERBALIZER, None, config.vocab_size)
        found["num_classes"] = len(params["verbalizer"]) - vocab.UNIT_OFFSET
    check_leftover(checkpoint, "Give a prompt checkpoint of SpeechPrompt v2 and the LM it was trained with.")

    found |= {option: getattr(config, field) for field, option in SIZES.items()}
    for option, value in found.items():
        stated = checkpoint.options.get(option, value)
        if stated != value:
            raise ConvertError(
                f"{path}: {option} is {shown(stated)}, but its tensors and the LM given by --lm "
                f"have {value}. Give the LM that it was trained with."
            )
    return params, notes


def _check_kind(checkpoint: Checkpoint, kind: str | None, learnable: bool) -> None:
    if learnable and kind not in (None, "learnable"):
        raise ConvertError(f"{checkpoint.path} has a learnable verbalizer, not a {kind} one. Leave out --kind.")
    if kind == "learnable" and not learnable:
        raise ConvertError(f"{checkpoint.path} has no learnable verbalizer. Leave out --kind, or give its rule.")


def _combinations(task: Task, records: str | Path) -> np.ndarray:
    try:
        units, card = read_unit_records(records, "train")
    except RecordError as error:
        raise ConvertError(str(error)) from error
    if card.task.slots != task.slots:
        raise ConvertError(f"{records} holds task {card.task.name!r}, whose slots are not the prompt's. Give others.")
    return np.unique(units.classes, axis=0)


def _mapping(path: Path, verbalizer: str | Path | None, limit: int, learnable: bool) -> dict[str, int]:
    """Label → number below `limit`: of verbalizer.json, or the numbers themselves."""
    if verbalizer is None:
        return {str(number): number for number in range(limit)}
    mapping = read_verbalizer(verbalizer)
    if max(mapping.values()) >= limit or (learnable and sorted(mapping.values()) != list(range(limit))):
        wanted = f"number its labels 0 to {limit - 1}, once each" if learnable else f"use units 0 to {limit - 1}"
        raise ConvertError(f"{verbalizer} must {wanted}, to fit {path}. Give the verbalizer.json of that run.")
    return mapping


def _named_by_verbalizer(name: str, mapping: Mapping[str, int], slots: int, learnable: bool) -> tuple[Task, list[int]]:
    """A task whose slots all have the labels of a verbalizer, and the number of each class."""
    labels = tuple(sorted(mapping, key=mapping.__getitem__)) if learnable else tuple(mapping)
    names = ["label"] if slots == 1 else [f"label{number + 1}" for number in range(slots)]
    metric = "accuracy" if slots == 1 else "exact_match"
    task = Task(name, tuple(Slot(slot, labels) for slot in names), metric)
    return task, [mapping[label] for label in labels] * slots


def _by_class(path: Path, task: Task, limit: int, learnable: bool) -> str:
    """Check that classes can be taken in the order of a task, without a verbalizer.json; returns a remark."""
    if not learnable:
        raise ConvertError(
            f"{path} has a rule verbalizer, which maps labels to units, but the mapping is not in the file. "
            "Give the one that it was trained with, --verbalizer=verbalizer.json."
        )
    if limit != task.num_classes:
        raise ConvertError(
            f"{path} has {limit} classes, task {task.name!r} has {task.num_classes}. Give another "
            "--task, or --verbalizer=verbalizer.json if labels of different slots share a class."
        )
    return (
        f"Took row {vocab.UNIT_OFFSET} + c of the verbalizer for class c of task {task.name!r}; "
        "if training numbered the labels differently, give its --verbalizer=verbalizer.json."
    )


def import_prompt(
    source: str | Path | Checkpoint,
    config: UnitLMConfig,
    lm_hash: str,
    *,
    task: str | None = None,
    verbalizer: str | Path | None = None,
    kind: str | None = None,
    slots: int = 1,
    records: str | Path | None = None,
) -> tuple[Params, PackCard, list[str]]:
    """Import a prompt checkpoint of SpeechPrompt v2.

    Args:
      source: the prompt checkpoint; or a Checkpoint.
      config: of the unit LM that it was trained with.
      lm_hash: hash of that unit LM.
      task: name of a task, or a .json file that describes one; None: labels are those of `verbalizer`, or numbers.
      verbalizer: SpeechPrompt's verbalizer.json; None: class c of a learnable verbalizer is its row 4 + c, and with a
        rule verbalizer the labels are the units, as in SpeechPrompt's decoding.
      kind: name of the rule (frequency, random or identity); the units are those of the mapping.
      slots: number of labels of an utterance without `task`; each may be any of the labels.
      records: unit records of the task; decoding is limited to the label combinations of their train split.

    Returns:
      Prompt tree (float32) and card for `save_pack`; remarks for the user, a sentence each.

    Raises:
      ConvertError: missing or unknown tensors, sizes that are not the LM's, labels that do not match or collide.
    """
    checkpoint = as_checkpoint(source, None)
    check_kind(checkpoint, "prompt")
    check_architecture(checkpoint, whole=False)
    path = checkpoint.path
    params, notes = _prompt_tree(checkpoint, config)
    learnable = "verbalizer" in params
    _check_kind(checkpoint, kind, learnable)

    # Class numbers (learnable) or units (rule): in both cases output 4 + number, fed back as token 4 + number.
    outputs = len(params["verbalizer"]) if learnable else config.vocab_size
    limit = outputs - vocab.UNIT_OFFSET
    if not 0 < limit <= config.num_units:
        raise ConvertError(f"{path}: its verbalizer has {limit} classes; 1 to {config.num_units} are possible.")
    where = str(path if verbalizer is None else verbalizer)
    mapping = _mapping(path, verbalizer, limit, learnable)
    if task is None:
        described, numbers = _named_by_verbalizer(path.stem, mapping, slots, learnable)
        if verbalizer is None:
            what = "class numbers" if learnable else "units"
            notes.append(f"No --task and no --verbalizer given: the labels are the {what} 0 to {limit - 1}.")
    else:
        described = read_task(task)
        if verbalizer is None:
            notes.append(_by_class(path, described, limit, learnable))
        numbers = _numbers(described, mapping, where)
    _check_collisions(described, numbers, where)
    combinations = None if records is None else _combinations(described, records)
    count = math.prod(len(slot.labels) for slot in described.slots)
    if combinations is None and count > MOST_COMBINATIONS:
        raise ConvertError(
            f"{path}: {len(described.slots)} slots have {count:,} combinations of labels, of which at most "
            f"{MOST_COMBINATIONS:,} can be scored. List those that occur: --data=RECORDS of the task."
        )

    codes = np.asarray(numbers)[:, None] + vocab.UNIT_OFFSET
    card = make_card(
        described,
        kind="learnable" if learnable else kind or ("identity" if verbalizer is None else "frequency"),
        codes=codes,
        feeds=codes,
        outputs=outputs,
        config=config,
        lm_hash=lm_hash,
        encoder="hubert_base",  # SpeechPrompt's only pipeline
        layer=6,
        kmeans=f"km{config.num_units}",
        merged=True,
        combinations=combinations,
        provenance=checkpoint.provenance("SpeechPrompt v2 (fairseq)"),
    )
    return params, card, [*notes, *checkpoint.remarks()]
