"""fairseq checkpoints into our trees: GSLM unit LMs and SpeechPrompt v2 prompts, every tensor accounted for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from spjax import vocab
from spjax.convert import ConvertError
from spjax.convert.safe_pickle import Inert, shown
from spjax.convert.torch_file import Tensor, read_torch_file
from spjax.data.records import read_unit_records
from spjax.data.tfrecords import RecordError
from spjax.evaluation.decode import MOST_COMBINATIONS
from spjax.models.config import UnitLMConfig
from spjax.storage.packs import PackCard, make_card
from spjax.tasks import TASKS, Slot, Task
from spjax.types import Params

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))

# Ours ← theirs, inside a layer. Weights of their linear layers are [out, in].
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
_UNUSED = {"decoder.version", "decoder.embed_positions._float_tensor"}  # fairseq's own bookkeeping
STREAMS_HEAD = "decoder.project_out_dim.weight"  # of units, durations and f0: what tells pGSLM from GSLM

_SIZES = {  # UnitLMConfig field ← option
    "dim": "decoder_embed_dim",
    "layers": "decoder_layers",
    "ffn_dim": "decoder_ffn_embed_dim",
    "heads": "decoder_attention_heads",
}
_ARCHITECTURE = {  # what a unit LM of ours always is; options that are absent had these values
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
    "fine_tune": False,  # SpeechPrompt: the LM's weights moved too
    "use_sep_token": True,  # SpeechPrompt: `<s>` is trained
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What an import needs of a fairseq checkpoint.

    Attributes:
      path: the file, for messages.
      tensors: of the model, by their names.
      options: of the model, from `cfg` or `args`.
      task: options of the task, likewise.
      taken: names of the tensors that `load` has read.
    """

    path: Path
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    task: dict[str, Any]
    taken: set[str] = dataclasses.field(default_factory=set)


def provenance(path: Path, made_by: str) -> dict[str, str]:
    """Where an import comes from: name and sha256 of the file, and the code that wrote it."""
    with path.open("rb") as file:
        return {"source": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest(), "made_by": made_by}


def _fields(value: Any) -> dict[str, Any]:
    """A dict, or what an argparse.Namespace held."""
    if isinstance(value, Inert):
        value = value.state
    return {k: v for k, v in value.items() if isinstance(k, str)} if isinstance(value, dict) else {}


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a fairseq checkpoint (its model only) without running what it names.

    Raises:
      ConvertError: unreadable, or without a dict of tensors under "model".
    """
    path = Path(path)
    contents = _fields(read_torch_file(path))
    model = contents.get("model")
    if not isinstance(model, dict) or not model:
        raise ConvertError(
            f"{path} holds no model weights (it has {', '.join(list(contents)[:8]) or 'nothing'}). Give a checkpoint."
        )
    for name, value in model.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConvertError(
                f"{path}: {shown(name)} of the model is {shown(value)}, not a tensor. Give a checkpoint."
            )
    config, arguments = _fields(contents.get("cfg")), _fields(contents.get("args"))
    options, task = (_fields(config.get(part)) or arguments for part in ("model", "task"))
    return Checkpoint(path, dict(model), options, task)


def check_architecture(checkpoint: Checkpoint, free: Collection[str] = ()) -> None:
    """Refuses a decoder that computes otherwise than GSLM's.

    Args:
      checkpoint: its options are looked at.
      free: options that may be anything.

    Raises:
      ConvertError: the first option that differs, by name.
    """
    for name, needed in _ARCHITECTURE.items():
        value = checkpoint.options.get(name, needed)
        if value != needed and name not in free:
            raise ConvertError(
                f"{checkpoint.path} was trained with {name}={shown(value)}; spjax computes only {name}={needed!r}. "
                "Such a model cannot be imported."
            )


def load(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Reads a tensor as float32, and notes that it was taken.

    Raises:
      ConvertError: missing, of another shape, not of floats, or not finite.
    """
    checkpoint.taken.add(name)
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise ConvertError(
            f"{checkpoint.path} lacks {name}. Give the whole checkpoint of a unit LM of this architecture."
        )
    if tensor.shape != shape:
        raise ConvertError(f"{checkpoint.path}: {name} has shape {list(tensor.shape)}, must be {list(shape)}.")
    if tensor.dtype not in _FLOATS:
        raise ConvertError(f"{checkpoint.path}: {name} is {tensor.dtype}, must be float32, float16 or bfloat16.")
    array = tensor.numpy().astype(np.float32)
    if not np.isfinite(array).all():
        raise ConvertError(f"{checkpoint.path}: {name} holds NaN or infinity, as a diverged training leaves it.")
    return array


def check_leftover(checkpoint: Checkpoint, hint: str) -> None:
    """Refuses a checkpoint with tensors that no `load` has taken; fairseq's bookkeeping apart.

    Raises:
      ConvertError: with their names, and the hint.
    """
    unknown = sorted(checkpoint.tensors.keys() - checkpoint.taken - _UNUSED)
    if unknown:
        shown = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
        raise ConvertError(f"{checkpoint.path} has tensors that the import has no place for: {shown}. {hint}")


def check_dictionary(path: str | Path, vocab_size: int) -> None:
    """Checks that dict.txt lists units 0, 1, 2 ... in numeric order: unit u is token 4 + u everywhere in spjax.

    Lines `madeupword0000 0` at the end, with which fairseq rounds a vocabulary up to a multiple of 8, are accepted.

    Args:
      path: fairseq's dictionary, a line "<unit> <count>" each.
      vocab_size: V of the model, specials included.

    Raises:
      ConvertError: absent, another order, or another number of symbols than the model has.
    """
    path = Path(path)
    try:
        symbols = [line.rsplit(" ", 1)[0] for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(
            f"{path} cannot be read ({error}). Give the model's dictionary with --dict=dict.txt."
        ) from error
    units = len(symbols)
    while units and re.fullmatch(r"madeupword\d{4}", symbols[units - 1]):
        units -= 1
    for number, symbol in enumerate(symbols[:units]):
        if symbol != str(number):
            raise ConvertError(
                f"{path}, line {number + 1}: the symbol is {symbol!r:.40}, must be {str(number)!r}. Units have to "
                "stand in numeric order; a model with another order has to be trained again on a sorted dictionary."
            )
    if len(symbols) + vocab.UNIT_OFFSET != vocab_size:
        raise ConvertError(
            f"{path} has {len(symbols)} symbols, but the model has {vocab_size} with {vocab.UNIT_OFFSET} specials. "
            "Give the dictionary that the model was trained with, --dict=dict.txt."
        )


def decoder_config(checkpoint: Checkpoint, heads: int | None = None) -> UnitLMConfig:
    """Sizes as the tensors have them; heads, which no tensor shows, as the options say.

    Args:
      checkpoint: of a decoder.
      heads: attention heads, for a checkpoint that does not say.

    Raises:
      ConvertError: no decoder, options that contradict tensors, heads unknown or contradicted.
    """
    tensors, options = checkpoint.tensors, checkpoint.options
    embed, inner = tensors.get(_EMBED), tensors.get("decoder.layers.0.fc1.weight")
    if embed is None or inner is None or len(embed.shape) != 2 or len(inner.shape) != 2:
        raise ConvertError(f"{checkpoint.path} is no unit LM: it lacks {_EMBED} or decoder.layers.0.fc1.weight.")
    numbers = [int(found[1]) for name in tensors if (found := re.match(r"decoder\.layers\.(\d{1,6})\.", name))]
    written = options.get(_SIZES["heads"])
    if heads is None and written is None:
        raise ConvertError(f"{checkpoint.path} does not say how many attention heads it has. Say so: --heads=16.")
    if heads is not None and written not in (None, heads):
        raise ConvertError(
            f"{checkpoint.path} says it has {shown(written)} attention heads, not {heads}. Leave out --heads."
        )
    sizes: dict[str, Any] = {
        "dim": embed.shape[1],
        "layers": max(numbers) + 1,
        "ffn_dim": inner.shape[0],
        "heads": heads if written is None else written,
    }
    for field, option in _SIZES.items():
        value = options.get(option, sizes[field])
        if type(value) is not int or value != sizes[field]:
            raise ConvertError(f"{checkpoint.path}: {option} is {shown(value)}, but its tensors say {sizes[field]}.")
    try:
        return UnitLMConfig(vocab_size=embed.shape[0], **sizes)
    except ValueError as error:
        raise ConvertError(f"{checkpoint.path}: {error}.") from error


def import_decoder(checkpoint: Checkpoint, config: UnitLMConfig) -> Params:
    """What GSLM and pGSLM have alike: "embed" (rows as in the file), "layers" and "final_norm" of docs/design.md.

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
    source: str | Path, dictionary: str | Path | None = None, heads: int | None = None
) -> tuple[UnitLMConfig, Params]:
    """Turns a fairseq `transformer_lm` checkpoint of GSLM's architecture into our `lm` tree.

    Args:
      source: checkpoint_best.pt, in float32 or half precision.
      dictionary: dict.txt; the one beside `source` if None.
      heads: attention heads, for a checkpoint that does not say.

    Returns:
      Config; the `lm` tree of docs/design.md in float32, kernels [in, out], layers stacked.

    Raises:
      ConvertError: another architecture, a missing or unknown tensor, a wrong shape, an output projection of its own, a
        dictionary out of order.
    """
    checkpoint = read_checkpoint(source)
    if STREAMS_HEAD in checkpoint.tensors:
        raise ConvertError(
            f"{checkpoint.path} is a multi-stream LM: it has {STREAMS_HEAD}. Import it with `spjax.convert pgslm`."
        )
    check_architecture(checkpoint)
    config = decoder_config(checkpoint, heads)
    check_dictionary(dictionary or checkpoint.path.with_name("dict.txt"), config.vocab_size)
    params = import_decoder(checkpoint, config)
    embed = params["embed"]
    if OUTPUT in checkpoint.tensors and not np.array_equal(load(checkpoint, OUTPUT, embed.shape), embed):
        raise ConvertError(
            f"{checkpoint.path}: {OUTPUT} differs from {_EMBED}; spjax computes the output with the embedding. "
            "A model that was trained untied cannot be imported."
        )
    check_leftover(checkpoint, "Only GSLM's architecture is imported; for prompts use `spjax.convert prompt`.")
    return config, params


def read_task(name: str) -> Task:
    """A task by its name, or from a JSON file `{"name", "slots": [{"name", "labels"}], "metric"}`.

    Raises:
      ConvertError: neither a known task nor such a file.
    """
    if name in TASKS:
        return TASKS[name]
    path = Path(name)
    if path.suffix != ".json":
        raise ConvertError(
            f"--task={name} is none of {', '.join(TASKS)}; describe your own in a .json file and give that."
        )
    shape = '{"name": "mine", "slots": [{"name": "word", "labels": ["yes", "no"]}], "metric": "accuracy"}'
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        slots = tuple(Slot(str(slot["name"]), tuple(map(str, slot["labels"]))) for slot in described["slots"])
        return Task(str(described.get("name", path.stem)), slots, str(described.get("metric", "accuracy")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConvertError(f"{path} does not describe a task ({error}). It should read like {shape}.") from error


def read_verbalizer(path: str | Path) -> dict[str, int]:
    """The reference's verbalizer.json: label → unit (rules) or class number (learnable).

    Raises:
      ConvertError: unreadable, or values that are no numbers.
    """
    path = Path(path)
    shape = 'It should read like {"yes": "6", "no": "74"}.'
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
        numbers = {label: int(number) for label, number in mapping.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConvertError(f"{path} is no verbalizer ({error}). {shape}") from error
    if not numbers or min(numbers.values()) < 0:
        raise ConvertError(f"{path} is empty or holds negative numbers. {shape}")
    return numbers


def _numbers(task: Task, mapping: Mapping[str, int], where: str) -> list[int]:
    """The number of each class: by its label (underscores for spaces) or, if the mapping names 0..C-1, by its id."""
    if set(mapping) == {str(c) for c in range(task.num_classes)}:
        return [mapping[str(c)] for c in range(task.num_classes)]
    spelled = [label if label in mapping else label.replace(" ", "_") for _, label in task.classes]
    absent, unused = sorted(set(spelled) - set(mapping)), sorted(set(mapping) - set(spelled))
    if absent or unused:
        parts = [f"lacks {', '.join(absent)}"] if absent else []
        parts += [f"has {', '.join(unused)}, which the task does not"] if unused else []
        raise ConvertError(
            f"{where} {' and '.join(parts)}: not the labels of task {task.name!r}. Give the task's own "
            "verbalizer.json, describe the task in a .json file, or leave out --task."
        )
    return [mapping[label] for label in spelled]


def _check_collisions(task: Task, numbers: list[int], where: str) -> None:
    for slot, start in zip(task.slots, task.slot_offsets, strict=False):
        taken: dict[int, str] = {}
        for label, number in zip(slot.labels, numbers[start:], strict=False):
            twin = taken.setdefault(number, label)
            if twin != label:
                raise ConvertError(
                    f"{where}: labels {twin!r} and {label!r} share the number {number} (the reference's random "
                    "verbalizer draws without looking), so the prompt cannot tell them apart. Keep one of the two in "
                    "the file, and in the task, to import them as one; or train a prompt with a verbalizer of spjax."
                )


def _prompt_tree(checkpoint: Checkpoint, config: UnitLMConfig) -> tuple[Params, list[str]]:
    """The live prompts of a checkpoint, and what was left out."""
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
        notes.append(f"Left out the {shallow.size} numbers of the input prompt: with deep prompts nothing reads them.")
    else:
        params["input"] = shallow
    if _VERBALIZER in tensors:
        params["verbalizer"] = take(_VERBALIZER, None, config.vocab_size)
        found["num_classes"] = len(params["verbalizer"]) - vocab.UNIT_OFFSET
    check_leftover(checkpoint, "Give a prompt checkpoint of SpeechPrompt v2 and the LM it was trained with.")

    found |= {option: getattr(config, field) for field, option in _SIZES.items()}
    for option, value in found.items():
        if checkpoint.options.get(option, value) != value:
            raise ConvertError(
                f"{path}: {option} is {shown(checkpoint.options[option])}, but its tensors and the LM given by --lm "
                f"say {value}. Give the LM that it was trained with."
            )
    return params, notes


def _check_kind(checkpoint: Checkpoint, kind: str | None, learnable: bool) -> None:
    if learnable and kind not in (None, "learnable"):
        raise ConvertError(f"{checkpoint.path} has a learnable verbalizer, not a {kind} one. Leave out --kind.")
    if kind == "learnable" and not learnable:
        raise ConvertError(
            f"{checkpoint.path} has no learnable verbalizer. Leave out --kind, or say which rule it had."
        )


def _combinations(task: Task, records: str | Path) -> np.ndarray:
    try:
        units, card = read_unit_records(records, "train")
    except RecordError as error:
        raise ConvertError(str(error)) from error
    if card.task.slots != task.slots:
        raise ConvertError(f"{records} holds units of task {card.task.name!r}: its slots are not the prompt's.")
    return np.unique(units.classes, axis=0)


def import_prompt(
    source: str | Path,
    config: UnitLMConfig,
    lm_hash: str,
    *,
    task: str | None = None,
    verbalizer: str | Path | None = None,
    kind: str | None = None,
    slots: int = 1,
    records: str | Path | None = None,
) -> tuple[Params, PackCard, list[str]]:
    """Turns a prompt checkpoint of SpeechPrompt v2 into a prompt tree and its card.

    Args:
      source: the prompt checkpoint.
      config: of the unit LM that it was trained with.
      lm_hash: of that unit LM.
      task: name of a task, or a .json file that describes one; None: labels are those of `verbalizer`, or numbers.
      verbalizer: the reference's verbalizer.json; None: class c of a learnable verbalizer is its row 4 + c, and a rule
        verbalizer answers with the unit itself, as the reference's own decoding does.
      kind: what the rule was (frequency, random or identity); only a name, the units are the mapping's.
      slots: labels of an utterance where no task says; each may be any of the labels.
      records: unit records of the task; decoding then chooses among the label combinations of their train split.

    Returns:
      Prompt tree (float32) and card for `save_pack`; remarks for the user, a sentence each.

    Raises:
      ConvertError: missing or unknown tensors, sizes that are not the LM's, labels that do not fit or collide.
    """
    checkpoint = read_checkpoint(source)
    check_architecture(checkpoint)
    path = checkpoint.path
    params, notes = _prompt_tree(checkpoint, config)
    learnable = "verbalizer" in params
    _check_kind(checkpoint, kind, learnable)

    # Class numbers (learnable) or units (rule): either way output 4 + number, fed back as token 4 + number.
    outputs = len(params["verbalizer"]) if learnable else config.vocab_size
    limit = outputs - vocab.UNIT_OFFSET
    if not 0 < limit <= config.num_units:
        raise ConvertError(f"{path}: its verbalizer has {limit} classes; the reference has 1 to {config.num_units}.")
    where = str(path if verbalizer is None else verbalizer)
    mapping = {str(number): number for number in range(limit)} if verbalizer is None else read_verbalizer(verbalizer)
    if max(mapping.values()) >= limit or (learnable and sorted(mapping.values()) != list(range(limit))):
        wanted = f"number its labels 0 to {limit - 1}, once each" if learnable else f"name units from 0 to {limit - 1}"
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
                f"{path} has a rule verbalizer: it says labels with units, but not which. "
                "Give the file that it was trained with, --verbalizer=verbalizer.json."
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
                "if training numbered the labels otherwise, give its --verbalizer=verbalizer.json."
            )
    _check_collisions(described, numbers, where)
    combinations = None if records is None else _combinations(described, records)
    count = math.prod(len(slot.labels) for slot in described.slots)
    if combinations is None and count > MOST_COMBINATIONS:
        raise ConvertError(
            f"{path}: {len(described.slots)} slots have {count:,} combinations of labels, of which at most "
            f"{MOST_COMBINATIONS:,} can be scored. Name those that occur: --data=RECORDS of the task."
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
        encoder="hubert_base",  # the reference's only pipeline
        layer=6,
        kmeans=f"km{config.num_units}",
        merged=True,
        combinations=combinations,
        provenance=provenance(path, "SpeechPrompt v2 (fairseq)"),
    )
    return params, card, notes
