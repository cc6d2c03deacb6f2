"""Import fairseq checkpoints: GSLM unit LMs and SpeechPrompt v2 prompts. Every tensor must be known."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from spjax import vocab
from spjax.convert import ConvertError, why
from spjax.convert.checkpoint import Checkpoint, check_kind, check_leftover, load, read_checkpoint
from spjax.convert.safe_pickle import shown
from spjax.data.records import read_unit_records
from spjax.data.tfrecords import RecordError
from spjax.io import places
from spjax.io.kinds import MAX_JSON, load_json
from spjax.io.pack_card import PackCard, make_card
from spjax.models.config import UnitLMConfig
from spjax.models.decode import MOST_COMBINATIONS
from spjax.tasks import TASKS, Slot, Task
from spjax.types import Params

# Our name ← fairseq's, inside a layer. Weights of fairseq's linear layers are [out, in].
_LAYER_PARTS = {
    "attn_norm": "self_attn_layer_norm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn_in": "fc1",
    "ffn_out": "fc2",
}
_EMBED = "decoder.embed_tokens.weight"
OUTPUT = "decoder.output_projection.weight"
_VERBALIZER = "decoder.prompt_linear_verbalizer.weight"
STREAMS_HEAD = "decoder.project_out_dim.weight"  # outputs for units, durations and f0: only pGSLM has it

_SIZES = {  # UnitLMConfig field ← option
    "dim": "decoder_embed_dim",
    "layers": "decoder_layers",
    "ffn_dim": "decoder_ffn_embed_dim",
    "heads": "decoder_attention_heads",
}
_ARCHITECTURE = {  # options that spjax computes for one value only
    "activation_fn": "relu",
    "decoder_normalize_before": True,
    "no_decoder_final_norm": False,
    "no_token_positional_embeddings": False,
    "decoder_learned_pos": False,
    "share_decoder_input_output_embed": True,
    "no_scale_embedding": False,
    "layernorm_embedding": False,
    "adaptive_input": False,
    "character_embeddings": False,
    "adaptive_softmax_cutoff": None,
    "base_layers": 0,
    "scale_fc": False,
    "scale_attn": False,
    "scale_heads": False,
    "scale_resids": False,
    "decoder_xformers_att_config": None,
    "add_bos_token": False,
    "fine_tune": False,  # SpeechPrompt: the LM's weights are trained too
    "use_sep_token": True,  # SpeechPrompt: `<s>` is trained
}

# Options that cannot be inferred from the tensors, with the flag value that spjax computes.
_UNSEEN = {
    "decoder_attention_heads": "16",
    "activation_fn": "relu",
    "decoder_normalize_before": "true",
    "share_decoder_input_output_embed": "true",  # unless the file has an output tensor
    "no_token_positional_embeddings": "false",
    "decoder_learned_pos": "false",
    "no_scale_embedding": "false",
    "add_bos_token": "false",
}
# Behaviour of fairseq versions without the option. Without any options, only the last is certain, a later addition.
_DEFAULTS = {"no_scale_embedding": False, "add_bos_token": False, "decoder_xformers_att_config": None}


def check_architecture(checkpoint: Checkpoint, free: Collection[str] = (), *, whole: bool = True) -> None:
    """Refuse a decoder that differs from GSLM's, or that lacks options that decide what it computes.

    Args:
      checkpoint: its options are checked; options that tensors reveal may be absent.
      free: options that may have any value.
      whole: False for a prompt, whose LM has the options.

    Raises:
      ConvertError: the first option that differs, by name; or all that are missing.
    """
    options = checkpoint.options
    for name, needed in _ARCHITECTURE.items():
        value = options.get(name)
        if value not in (needed, None) and name not in free:  # None: required or assumed below, or shown by tensors
            given = "was given as" if name in options.given else "was trained with"
            raise ConvertError(
                f"{checkpoint.path} {given} {name}={shown(value)}; spjax computes only {name}={needed!r}. "
                "Such a model cannot be imported."
            )
    if not whole:
        return
    needed_here = {name: value for name, value in _UNSEEN.items() if name not in free}
    if OUTPUT in checkpoint.tensors:
        needed_here.pop("share_decoder_input_output_embed", None)
    for name, default in _DEFAULTS.items():
        if options.found or name not in needed_here:
            options.assume(name, default)
            needed_here.pop(name, None)
    options.require(needed_here)


def check_dictionary(path: str | Path, vocab_size: int) -> None:
    """Check that dict.txt lists units 0, 1, 2 ... in numeric order, since unit u is token 4 + u in spjax.

    Lines `madeupword0000 0` at the end, with which fairseq pads a vocabulary to a multiple of 8, are accepted.

    Args:
      path: fairseq's dictionary, a line "<unit> <count>" each.
      vocab_size: V of the model, specials included.

    Raises:
      ConvertError: absent, another order, or another number of symbols than the model has.
    """
    path = Path(path)
    try:
        lines = places.read_limited(path, MAX_JSON).decode("utf-8-sig").splitlines()
        symbols = [line.rsplit(" ", 1)[0] for line in lines]
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(
            f"{path} cannot be read ({why(error)}). Give the model's dictionary with --dict=dict.txt."
        ) from error
    units = len(symbols)
    while units and re.fullmatch(r"madeupword\d{4}", symbols[units - 1]):
        units -= 1
    for number, symbol in enumerate(symbols[:units]):
        if symbol != str(number):
            raise ConvertError(
                f"{path}, line {number + 1}: the symbol is {symbol!r:.40}, must be {str(number)!r}. Units must be in "
                "numeric order; a model with another order must be trained again on a sorted dictionary."
            )
    if len(symbols) + vocab.UNIT_OFFSET != vocab_size:
        raise ConvertError(
            f"{path} has {len(symbols)} symbols, but the model has {vocab_size} with {vocab.UNIT_OFFSET} specials. "
            "Give the dictionary that the model was trained with, --dict=dict.txt."
        )


def decoder_config(checkpoint: Checkpoint) -> UnitLMConfig:
    """Sizes from the tensors; the number of heads from the options.

    Raises:
      ConvertError: no decoder, or options that contradict the tensors.
    """
    tensors, options = checkpoint.tensors, checkpoint.options
    embed, inner = tensors.get(_EMBED), tensors.get("decoder.layers.0.fc1.weight")
    if embed is None or inner is None or len(embed.shape) != 2 or len(inner.shape) != 2:
        raise ConvertError(f"{checkpoint.path} is not a unit LM: it lacks {_EMBED} or decoder.layers.0.fc1.weight.")
    numbers = [int(found[1]) for name in tensors if (found := re.match(r"decoder\.layers\.(\d{1,6})\.", name))]
    sizes: dict[str, Any] = {
        "dim": embed.shape[1],
        "layers": max(numbers) + 1,
        "ffn_dim": inner.shape[0],
        "heads": options.get(_SIZES["heads"]),
    }
    expected = {option: sizes[field] for field, option in _SIZES.items()}
    expected |= dict.fromkeys(("decoder_input_dim", "decoder_output_dim"), sizes["dim"])
    for option, size in expected.items():
        value = options.get(option, size)
        if value is not None and type(value) is not int:
            raise ConvertError(f"{checkpoint.path}: {option} is {shown(value)}, must be an integer.")
        if value != size:
            raise ConvertError(f"{checkpoint.path}: {option} is {shown(value)}, but its tensors say {shown(size)}.")
    try:
        return UnitLMConfig(vocab_size=embed.shape[0], **sizes)
    except ValueError as error:
        raise ConvertError(f"{checkpoint.path}: {error}.") from error


def as_checkpoint(source: str | Path | Checkpoint, heads: int | None) -> Checkpoint:
    """Read `source` unless it is a Checkpoint; `heads` overrides the option."""
    if isinstance(source, Checkpoint):
        return source
    return read_checkpoint(source, None if heads is None else {_SIZES["heads"]: heads})


def import_decoder(checkpoint: Checkpoint, config: UnitLMConfig) -> Params:
    """The layers that GSLM and pGSLM share: "embed" (rows as in the file), "layers", "final_norm" (docs/design.md).

    Raises:
      ConvertError: a missing tensor, or one of another shape.
    """
    d, f = config.dim, config.ffn_dim
    sizes = {"ffn_in": (f, d), "ffn_out": (d, f)}

    def stack(part: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        names = [f"decoder.layers.{layer}.{part}.{kind}" for layer in range(config.layers)]
        return np.stack([np.ascontiguousarray(load(checkpoint, name, shape).T) for name in names])

    layers: Params = {}
    for ours, theirs in tqdm(_LAYER_PARTS.items(), desc="tensors", unit="part", leave=False, delay=2):
        if ours.endswith("_norm"):
            layers[ours] = {"scale": stack(theirs, "weight", (d,)), "bias": stack(theirs, "bias", (d,))}
        else:
            shape = sizes.get(ours, (d, d))
            layers[ours] = {"kernel": stack(theirs, "weight", shape), "bias": stack(theirs, "bias", shape[:1])}
    return {
        "embed": load(checkpoint, _EMBED, (config.vocab_size, d)),
        "layers": layers,
        "final_norm": {
            "scale": load(checkpoint, "decoder.layer_norm.weight", (d,)),
            "bias": load(checkpoint, "decoder.layer_norm.bias", (d,)),
        },
    }


def import_unit_lm(
    source: str | Path | Checkpoint, dictionary: str | Path | None = None, heads: int | None = None
) -> tuple[UnitLMConfig, Params]:
    """Import a fairseq `transformer_lm` checkpoint of GSLM's architecture.

    Args:
      source: checkpoint_best.pt, in float32 or half precision; or a Checkpoint.
      dictionary: dict.txt; None for the one beside `source`.
      heads: attention heads, for a path to a checkpoint without that option.

    Returns:
      Config; the `lm` tree of docs/design.md in float32, kernels [in, out], layers stacked.

    Raises:
      ConvertError: another architecture, a missing or unknown tensor, a wrong shape, an untied output projection, a
        dictionary out of order.
    """
    checkpoint = as_checkpoint(source, heads)
    check_kind(checkpoint, "unit_lm")
    check_architecture(checkpoint)
    config = decoder_config(checkpoint)
    check_dictionary(dictionary or checkpoint.path.with_name("dict.txt"), config.vocab_size)
    params = import_decoder(checkpoint, config)
    embed = params["embed"]
    if OUTPUT in checkpoint.tensors and not np.array_equal(load(checkpoint, OUTPUT, embed.shape), embed):
        raise ConvertError(
            f"{checkpoint.path}: {OUTPUT} differs from {_EMBED}; spjax supports only tied output embeddings. "
            "Such a model cannot be imported."
        )
    check_leftover(checkpoint, "Only GSLM's architecture is imported; for prompts use `spjax.convert prompt`.")
    return config, params


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

    found |= {option: getattr(config, field) for field, option in _SIZES.items()}
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
    mapping = {str(number): number for number in range(limit)} if verbalizer is None else read_verbalizer(verbalizer)
    if max(mapping.values()) >= limit or (learnable and sorted(mapping.values()) != list(range(limit))):
        wanted = f"number its labels 0 to {limit - 1}, once each" if learnable else f"use units 0 to {limit - 1}"
        raise ConvertError(f"{where} must {wanted}, to fit {path}. Give the verbalizer.json of that run.")

    if task is None:
        labels = tuple(sorted(mapping, key=mapping.__getitem__)) if learnable else tuple(mapping)
        names = ["label"] if slots == 1 else [f"label{number + 1}" for number in range(slots)]
        metric = "accuracy" if slots == 1 else "exact_match"
        described = Task(path.stem, tuple(Slot(name, labels) for name in names), metric)
        numbers = [mapping[label] for label in labels] * slots
        if verbalizer is None:
            what = "class numbers" if learnable else "units"
            notes.append(f"No --task and no --verbalizer given: the labels are the {what} 0 to {limit - 1}.")
    else:
        described = read_task(task)
        if verbalizer is None and not learnable:
            raise ConvertError(
                f"{path} has a rule verbalizer, which maps labels to units, but the mapping is not in the file. "
                "Give the one that it was trained with, --verbalizer=verbalizer.json."
            )
        if verbalizer is None and limit != described.num_classes:
            raise ConvertError(
                f"{path} has {limit} classes, task {described.name!r} has {described.num_classes}. Give another "
                "--task, or --verbalizer=verbalizer.json if labels of different slots share a class."
            )
        numbers = _numbers(described, mapping, where)
        if verbalizer is None:
            notes.append(
                f"Took row {vocab.UNIT_OFFSET} + c of the verbalizer for class c of task {described.name!r}; "
                "if training numbered the labels differently, give its --verbalizer=verbalizer.json."
            )
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
