"""Read fairseq checkpoints: the model's tensors, their names, and the training options."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from spjax.convert import ConvertError
from spjax.convert.options import Options, read_options
from spjax.convert.safe_pickle import Inert, shown
from spjax.convert.torch_file import Tensor, read_torch_file
from spjax.io import places
from spjax.io.kinds import load_json

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))

_UNUSED = {"decoder.version", "decoder.embed_positions._float_tensor"}  # fairseq's bookkeeping
# A tensor that identifies each kind of model → its prefix in fairseq; other programs may add a prefix before that.
_ANCHORS = {
    "embed_tokens.weight": "decoder.",
    "prefix_embed_prompts.weight": "decoder.",
    "post_extract_proj.weight": "",
}
_PART = re.compile(r"-(model_part-\d+|shard\d+)$|-model_part-\d+-shard\d+$")
_AVERAGES = ("ema", "model_ema", "ema_state_dict", "ema_fp32_params")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The parts of a fairseq checkpoint that an import needs.

    Attributes:
      path: the file, for messages.
      tensors: the model's, by fairseq's names.
      options: of the model and the task.
      notes: remarks for the user, a sentence each.
      taken: names of the tensors that `load` has read.
    """

    path: Path
    tensors: dict[str, Tensor]
    options: Options
    notes: list[str] = dataclasses.field(default_factory=list)
    taken: set[str] = dataclasses.field(default_factory=set)

    def provenance(self, made_by: str) -> dict[str, Any]:
        """Provenance of the file, with the options that were given or assumed."""
        return {**provenance(self.path, made_by), **self.options.record()}

    def remarks(self) -> list[str]:
        """`notes` and assumptions, for the user."""
        return [*self.notes, *self.options.remarks("fairseq")]


def provenance(path: Path, made_by: str) -> dict[str, Any]:
    """Provenance of an import: name and sha256 of the file, and the code that wrote it.

    Of an index of shards, also the sha256 of each.
    """
    shards = set(load_json(path)["weight_map"].values()) if path.suffix == ".json" else ()
    more = {"shards_sha256": {name: _sha256(path.with_name(name)) for name in sorted(shards)}} if shards else {}
    return {"source": path.name, "sha256": _sha256(path), **more, "made_by": made_by}


def _sha256(path: Path) -> str:
    with places.open_regular(path) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(part, Tensor) for part in value.values())


def _model_of(path: Path, contents: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Find the model's state dict."""
    model = contents.get("model")
    names = [name for name in model if isinstance(name, str)] if isinstance(model, dict) else []
    if "shard_metadata" in contents or any("flat_param" in name for name in names):
        raise ConvertError(f"{path} is one shard of a model trained with FSDP. {_MERGE}")
    extra = contents.get("extra_state")
    averages = {
        name: value
        for place in (contents, extra if isinstance(extra, dict) else {})
        for name, value in place.items()
        if name in _AVERAGES and _is_state(value)
    }
    for name in ("model", "state_dict", "model_state_dict"):
        model = contents.get(name)
        for inner in ("model", "state_dict"):
            if isinstance(model, dict) and isinstance(model.get(inner), dict):
                model = model[inner]
        if isinstance(model, dict) and model:
            if averages:
                notes.append(f"Took the weights under {name!r}; left out the averaged ones ({', '.join(averages)}).")
            return model
    if len(averages) == 1:
        ((name, model),) = averages.items()
        notes.append(f"Took the averaged weights ({name}): the checkpoint has no others.")
        return model
    if averages:
        raise ConvertError(
            f"{path} holds {len(averages)} averages of a model ({', '.join(averages)}), but not the model. Save one of "
            "them under 'model'."
        )
    if _is_state(contents):
        return contents
    held = ", ".join(map(str, list(contents)[:8])) or "nothing"
    raise ConvertError(f"{path} holds no model weights (it has {held:.200}). Give a checkpoint.")


_MERGE = "Merge all parts into one checkpoint with the code that wrote them, and import that."


def _renamed(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under fairseq's names, without a prefix added by another program (`models.0.`).

    Raises:
      ConvertError: several models.
    """
    for anchor, ours in _ANCHORS.items():
        heads = sorted(
            {name.removesuffix(anchor) for name in tensors if re.search(rf"(^|\.){re.escape(anchor)}$", name)}
        )
        heads = [head for head in heads if "encoder." not in head]
        if len(heads) > 1:
            raise ConvertError(f"{path} holds several models, under {', '.join(heads[:4])}. Give a checkpoint of one.")
        if not heads or heads[0] == ours:
            continue
        theirs, (outer, wanted) = heads[0], (heads[0].removesuffix(ours), "")
        if not theirs.endswith(ours):  # `decoder.` is missing
            outer, wanted = theirs, ours
        renamed = {
            f"{wanted}{name.removeprefix(outer)}" if name.startswith(outer) else name: tensor
            for name, tensor in tensors.items()
        }
        if len(renamed) < len(tensors):
            raise ConvertError(f"{path} has tensors twice, with {outer!r} before their names and without.")
        return renamed
    return tensors


def read_checkpoint(path: str | Path, given: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read a fairseq checkpoint (only its model) without running code that it names.

    Args:
      path: a file of torch.save: a fairseq checkpoint, or a bare state dict.
      given: options that the file lacks.

    Raises:
      ConvertError: unreadable, one part of several, no model tensors, or options of an unknown form.
    """
    path = Path(path)
    if _PART.search(path.stem):
        raise ConvertError(f"{path} is one part of a checkpoint that was saved in several ({path.stem}). {_MERGE}")
    contents = read_torch_file(path)
    if isinstance(contents, Inert) and isinstance(contents.state, dict):
        contents = contents.state
    if not isinstance(contents, dict):
        raise ConvertError(f"{path} holds {shown(contents)}, no model weights. Give a checkpoint.")
    notes: list[str] = []
    model = _model_of(path, contents, notes)
    for name, value in model.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConvertError(
                f"{path}: {shown(name)} of the model is {shown(value)}, not a tensor. Give a checkpoint."
            )
    options = read_options(path, {} if model is contents else contents, given)
    tensors = _renamed(path, model)
    query = tensors.get("decoder.layers.0.self_attn.q_proj.weight")
    if query is not None and len(query.shape) == 2 and query.shape[0] < query.shape[1]:
        raise ConvertError(
            f"{path} is one part of a model-parallel checkpoint: a projection has shape {list(query.shape)}. {_MERGE}"
        )
    return Checkpoint(path, tensors, options, notes)


# Kinds of models: pattern of a tensor name, description, subcommand that imports it. The first match counts.
_KINDS = (
    (r"(^|\.)w2v_encoder\.", "a fine-tuned HuBERT or wav2vec 2.0", None),
    (r"(^|\.)post_extract_proj\.weight", "a HuBERT of fairseq", "hubert"),
    (r"(^|\.)feature_projection\.", "a HuBERT of Hugging Face", None),
    (r"prefix_embed_prompts\.weight", "a prompt of SpeechPrompt", "prompt"),
    (r"(^|\.)encoder\.", "a model with an encoder", None),
    (r"decoder\.(embed|proj)_other_list\.", "a multi-stream LM", "pgslm"),
    (r"decoder\.embed_tokens\.weight", "a unit LM", "unit_lm"),
)


def check_kind(checkpoint: Checkpoint, job: str) -> None:
    """Refuse a checkpoint that belongs to another subcommand than `job`, by its tensors' names.

    Raises:
      ConvertError: it is of another known kind.
    """
    for pattern, what, right in _KINDS:
        if any(re.search(pattern, name) for name in checkpoint.tensors):
            if right == job:
                return
            wanted = next(what for _, what, there in _KINDS if there == job)
            todo = f"Import it with `python -m spjax.convert {right}`." if right else "It cannot be imported."
            if right is None and "Hugging Face" in what:
                todo = "Give the directory with its config.json and model.safetensors."
            raise ConvertError(f"{checkpoint.path} is {what}, not {wanted}. {todo}")


def read_tensor(path: Path, name: str, tensors: Mapping[str, Any], shape: tuple[int, ...], model: str) -> np.ndarray:
    """Read a tensor as float32.

    Args:
      path: the file, for messages.
      name, tensors: name of the tensor, and all tensors by name (`torch_file.Tensor` or similar).
      shape: the required shape.
      model: what the file should be, for messages.

    Raises:
      ConvertError: missing, of another shape, not floats, or not finite.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise ConvertError(f"{path} lacks {name}. Give the complete checkpoint of {model}.")
    if tensor.shape != shape:
        raise ConvertError(f"{path}: {name} has shape {list(tensor.shape)}, must be {list(shape)}.")
    if tensor.dtype not in _FLOATS:
        raise ConvertError(f"{path}: {name} is {tensor.dtype}, must be float32, float16 or bfloat16.")
    array = tensor.numpy().astype(np.float32)
    if not np.isfinite(array).all():
        raise ConvertError(f"{path}: {name} holds NaN or infinity; the training has diverged. Give another checkpoint.")
    return cast(np.ndarray, array)


def load(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """`read_tensor` of a checkpoint; records the name in `taken`."""
    checkpoint.taken.add(name)
    return read_tensor(checkpoint.path, name, checkpoint.tensors, shape, "a unit LM of this architecture")


def check_leftover(checkpoint: Checkpoint, hint: str) -> None:
    """Refuse a checkpoint with tensors that were not read by `load`, except fairseq's bookkeeping.

    Raises:
      ConvertError: with their names, and the hint.
    """
    checkpoint.options.check_given()
    unknown = sorted(checkpoint.tensors.keys() - checkpoint.taken - _UNUSED)
    if unknown:
        listed = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
        raise ConvertError(f"{checkpoint.path} has unknown tensors: {listed}. {hint}")
