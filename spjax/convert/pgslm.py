"""Import fairseq's multi-stream LMs (pGSLM, `transformer_ulm_big`): all four kinds, with f0 bins."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from spjax import vocab
from spjax.convert import ConvertError
from spjax.convert.checkpoint import Checkpoint, check_kind, check_leftover, load
from spjax.convert.fairseq import (
    OUTPUT,
    STREAMS_HEAD,
    as_checkpoint,
    check_architecture,
    decoder_config,
    import_decoder,
)
from spjax.convert.safe_pickle import PickledArray, shown
from spjax.convert.torch_file import Tensor, read_torch_file
from spjax.models.config import ProsodyConfig, UnitLMConfig
from spjax.types import Params

F0_BINS = "mean_norm_log_f0_seg_bin.th"  # file name as published, for all discrete models

_STREAMS = ("duration", "f0")  # in the order of their tensors
_TABLE, _MAP = "decoder.embed_other_list", "decoder.proj_other_list"
_TASK = {  # task options that spjax supports for one value only
    "stream_shifts": "1,1",
    "log_f0": True,
    "normalize_f0_mean": True,
    "normalize_f0_std": False,
}
_FLAGS = ("discrete_duration", "discrete_f0", "ignore_duration_input", "ignore_f0_input", "interpolate_f0")


def read_f0_edges(path: str | Path, bins: int) -> tuple[float, ...]:
    """Read pGSLM's f0 bin edges: a pickled `{bins: array of bins - 1 edges}`, read without running code.

    Args:
      path: the .th file.
      bins: number of bins; other entries are ignored.

    Returns:
      bins - 1 edges in ascending order, log f0 less the speaker's mean.

    Raises:
      ConvertError: unreadable, or without such edges.
    """
    path = Path(path)
    fix = f"Give the {F0_BINS} that the model was trained with, --f0-bins=FILE."
    found = read_torch_file(path)
    if not isinstance(found, dict):
        raise ConvertError(f"{path} is {shown(found)}, must map numbers of bins to arrays of edges. {fix}")
    if bins not in found:
        held = ", ".join(map(shown, list(found)[:8])) or "none"
        raise ConvertError(f"{path} holds edges of {held} bins, but not of {bins}. {fix}")
    value = found[bins]
    array = value.numpy() if isinstance(value, PickledArray | Tensor) else None
    if array is None or array.dtype.kind != "f" or array.shape != (bins - 1,):
        got = shown(value) if array is None else f"of shape {list(array.shape)} and type {array.dtype}"
        raise ConvertError(f"{path}: the edges of {bins} bins are {got}, must be {bins - 1} floats. {fix}")
    try:
        return ProsodyConfig(f0_edges=tuple(array.astype(np.float64).tolist())).f0_edges
    except ValueError as error:
        raise ConvertError(f"{path}: {error}. {fix}") from error


def _edges(checkpoint: Checkpoint, f0_bins: Path) -> tuple[float, ...]:
    """The edges for the f0 table of a discrete model."""
    table = checkpoint.tensors.get(f"{_TABLE}.1.weight")
    if table is None or not table.shape or table.shape[0] <= vocab.UNIT_OFFSET:
        raise ConvertError(f"{checkpoint.path} has no f0 table {_TABLE}.1.weight. Give the complete checkpoint.")
    bins = table.shape[0] - vocab.UNIT_OFFSET
    if not f0_bins.exists():
        raise ConvertError(
            f"{checkpoint.path} has {bins} bins of f0, but not their edges, and {f0_bins} does not exist. Put the "
            f"published {F0_BINS} beside the checkpoint, or give it with --f0-bins=FILE; `python -m spjax.fetch` "
            "downloads both."
        )
    return read_f0_edges(f0_bins, bins)


def _longest(checkpoint: Checkpoint, discrete: bool) -> object:
    """The longest duration with a symbol: from the options, or from the table of durations."""
    table = checkpoint.tensors.get(f"{_TABLE}.0.weight")
    from_table = table.shape[0] - vocab.UNIT_OFFSET - 1 if table is not None and table.shape else 0
    default = from_table if discrete else ProsodyConfig.max_duration  # a continuous model has no table
    return checkpoint.options.get("max_token_duration", default)


def _prosody(checkpoint: Checkpoint, f0_bins: Path) -> ProsodyConfig:
    """Kind and inputs from the task's options; refuses what spjax does not compute."""
    path, task = checkpoint.path, checkpoint.options
    task.require({name: str(value).lower() for name, value in _TASK.items()} | dict.fromkeys(_FLAGS, "false"))
    for name, needed in _TASK.items():
        value = task.get(name)
        if value != needed:
            raise ConvertError(
                f"{path} was trained with {name}={shown(value)}; spjax computes only {name}={needed}. "
                "Such a model cannot be imported."
            )
    flags = {}
    for name in _FLAGS:
        flags[name] = task.get(name)
        if not isinstance(flags[name], bool):
            raise ConvertError(f"{path}: {name} is {shown(flags[name])}, must be true or false.")
    discrete = flags["discrete_duration"]
    if flags["discrete_f0"] != discrete:
        raise ConvertError(
            f"{path} was trained with discrete_duration={discrete} and discrete_f0={not discrete}; spjax computes "
            "both streams discrete, or both continuous. Such a model cannot be imported."
        )
    longest = _longest(checkpoint, discrete)
    if type(longest) is not int or longest < 1:
        raise ConvertError(f"{path}: max_token_duration is {shown(longest)}, must be a positive integer.")
    return ProsodyConfig(
        discrete=discrete,
        duration_input=not flags["ignore_duration_input"],
        f0_input=not flags["ignore_f0_input"],
        max_duration=longest,
        f0_edges=_edges(checkpoint, f0_bins) if discrete else (),
        interpolate_f0=flags["interpolate_f0"],
    )


def import_pgslm(
    source: str | Path | Checkpoint, f0_bins: str | Path | None = None, heads: int | None = None
) -> tuple[UnitLMConfig, Params, list[str]]:
    """Import a fairseq `transformer_ulm` checkpoint (pGSLM).

    Its symbols are the units, then `<s> <pad> </s> <unk>`: rows of the unit embedding and of the unit outputs are
    reordered so that the specials come first. Tables of durations and f0 keep their order.

    Args:
      source: checkpoint, discrete or continuous, with prosody input or without, in float32 or half precision.
      f0_bins: edges of a discrete model's f0 bins; None for `mean_norm_log_f0_seg_bin.th` beside `source`. Ignored for
        a continuous model.
      heads: attention heads, for a path to a checkpoint without that option.

    Returns:
      Config with `prosody`; the `lm` tree of docs/design.md, with "streams" and "heads", in float32; remarks for the
      user, a sentence each.

    Raises:
      ConvertError: another architecture, streams that are shifted or normalised differently, a missing or unknown
        tensor, a wrong shape, edges that are missing or do not match.
    """
    checkpoint = as_checkpoint(source, heads)
    check_kind(checkpoint, "pgslm")
    check_architecture(checkpoint, free=("share_decoder_input_output_embed",))
    prosody = _prosody(checkpoint, Path(f0_bins) if f0_bins is not None else checkpoint.path.with_name(F0_BINS))
    config = dataclasses.replace(decoder_config(checkpoint), prosody=prosody)
    params = import_decoder(checkpoint, config)
    d, sizes = config.dim, (config.vocab_size, *prosody.symbols)

    params["streams"] = {}
    for number, (name, symbols) in enumerate(zip(_STREAMS, prosody.symbols, strict=True)):
        if prosody.discrete:
            params["streams"][name] = {"embed": load(checkpoint, f"{_TABLE}.{number}.weight", (symbols, d))}
        else:
            kernel = load(checkpoint, f"{_MAP}.{number}.weight", (d, 1))
            params["streams"][name] = {"kernel": kernel.T, "bias": load(checkpoint, f"{_MAP}.{number}.bias", (d,))}
    head = load(checkpoint, STREAMS_HEAD, (sum(sizes), d))
    unit, duration, f0 = np.split(head, np.cumsum(sizes[:-1]))
    params["embed"], unit = (np.roll(rows, vocab.UNIT_OFFSET, axis=0) for rows in (params["embed"], unit))
    params["heads"] = {"unit": unit, "duration": duration, "f0": f0}

    notes = []
    if OUTPUT in checkpoint.tensors:
        checkpoint.taken.add(OUTPUT)
        notes.append(f"Left out {OUTPUT}, which is unused: the outputs are those of {STREAMS_HEAD}.")
    check_leftover(checkpoint, "Only pGSLM's architecture is imported.")
    return config, params, [*notes, *checkpoint.remarks()]
