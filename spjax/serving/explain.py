"""What the page's tab "Inside" shows: units of each label, units that decided a prediction, similarity of prompts."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from spjax.data.unit_set import UnitSet
from spjax.evaluation import inside
from spjax.serving.batcher import QueueFullError
from spjax.serving.frozen import KINDS
from spjax.serving.predictor import SpeechPrompt
from spjax.serving.scoring import unit_set
from spjax.types import Encoded, Params

_MOST_EXPLAINED = 256  # units: an attribution takes about 20 forward and backward passes over them
_STEPS = 16  # points of integrated gradients
_MOST_WAITING = 4  # calls


class OneAtATime:
    """Runs slow work in a thread, one call at a time, so that predictions are not slowed down."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0

    async def __call__(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run the work; raises QueueFullError if too many calls are waiting."""
        if self.waiting >= _MOST_WAITING:
            raise QueueFullError(f"{self.waiting} attributions are waiting already: try again in a minute.")
        self.waiting += 1
        try:
            async with self.lock:
                return await asyncio.to_thread(work, *arguments)
        finally:
            self.waiting -= 1


class Explained(NamedTuple):
    """Attribution of a prediction to units.

    Attributes:
      slots: for each slot its title and, for every unit, its number and its share (-1 to 1) of the largest attribution.
      note: how to read them.
    """

    slots: list[tuple[str, list[tuple[str, float]]]]
    note: str


def label_units(predictor: SpeechPrompt, task: str) -> list[list[str]]:
    """Rows (slot, label, units with the largest weights) of a task."""
    pack = predictor.packs[task]
    tops = inside.top_tokens(inside.verbalizer_weights(pack))
    return [
        [slot, label, ", ".join(f"{inside.symbol(token)} ({weight:+.2f})" for token, weight in top) or "–"]
        for (slot, label), top in zip(pack.task.classes, tops, strict=True)
    ]


def attribution(predictor: SpeechPrompt, task: str, prediction: Any) -> Explained:
    """Attribute a task's predicted labels to the units of a recording.

    Args:
      predictor: which made the prediction.
      task: the name of its pack.
      prediction: from `as_json`, or anything that a client sent in its place; falsy if there is none.

    Raises:
      ValueError: not a prediction, or units outside the LM's vocabulary.
    """
    if not prediction:
        return Explained([], "Classify a recording first.")
    utterance = _utterance(predictor, prediction)
    left = max(0, len(utterance.units) - _MOST_EXPLAINED)
    pack, compute = predictor.packs[task], KINDS[predictor.compute]
    kept = utterance.cut(_MOST_EXPLAINED)
    found = inside.attribute(_differentiable(predictor), predictor.config, pack, kept, steps=_STEPS, compute=compute)
    most = float(np.abs(found.values).max(initial=0)) or 1.0
    slots = []
    for c, values, score, empty in zip(found.classes, found.values, found.score, found.empty, strict=True):
        slot, label = pack.task.classes[c]
        units = [(str(unit), round(float(x) / most, 4)) for unit, x in zip(found.units, values, strict=True)]
        slots.append((f"{slot}: {label}, log odds {score:+z.2f}, without units {empty:+z.2f}", units))
    note = (
        f"From -1 (against the label) to 1 (for it), where 1 is {most:.2g} log odds. Their sum misses the units' "
        f"effect by {found.gap:.2g} log odds."
    )
    cut = f" Only the first {len(found.units)} units are explained; {left} after them are left out." if left else ""
    return Explained(slots, note + cut)


def _differentiable(predictor: SpeechPrompt) -> Params:
    """The LM's weights with int8 kernels dequantized, since they have no gradients."""
    if predictor.compute != "int8":
        return predictor.params
    dtype = KINDS["int8"].dtype
    layers = {
        name: {leaf: value.astype(dtype) if leaf == "kernel" else value for leaf, value in weights.items()}
        for name, weights in predictor.params["layers"].items()
    }
    return {**predictor.params, "layers": layers}


def _utterance(predictor: SpeechPrompt, shown: Any) -> UnitSet:
    """The utterance of a prediction (JSON)."""
    rows = {name: shown[name] for name in ("units", "durations", "f0") if isinstance(shown, dict) and name in shown}
    numbers = all(isinstance(row, list) and all(type(x) in (int, float) for x in row) for row in rows.values())
    if not numbers or not {"units", "durations"} <= set(rows) or len({len(row) for row in rows.values()}) != 1:
        raise ValueError("not a prediction of this page: give an object with units and durations, lists of one length")
    if any(type(x) is not int or not 0 <= x < 2**31 for name in ("units", "durations") for x in rows[name]):
        raise ValueError("units and durations must be integers, 0 or more")
    f0 = np.asarray(rows["f0"], np.float32) if "f0" in rows else None
    units, durations = (np.asarray(rows[name], np.int32) for name in ("units", "durations"))
    return unit_set([Encoded(units, durations, f0)], predictor.config)


@functools.lru_cache(maxsize=4)
def similarity(predictor: SpeechPrompt) -> tuple[list[str], list[list[Any]], str]:
    """Linear CKA of all deep prompts, mean over layers, keys and values.

    Returns:
      Headers and rows of a table, both empty if fewer than two tasks have deep prompts; and a note on it.
    """
    deep = {
        name: pack for name, pack in predictor.packs.items() if "key" in pack.params and pack.params["key"].shape[1]
    }
    if len(deep) < 2:
        return [], [], "This needs at least two tasks with deep prompts (in every layer)."
    layers = predictor.params["layers"]
    kernels = {name: {"kernel": layers[name]["kernel"].astype("float32")} for name in ("key", "value")}
    found = inside.prompt_similarity({"layers": kernels}, list(deep.values()))
    mean = (found.key.mean(axis=0) + found.value.mean(axis=0)) / 2
    rows = [[name, *(f"{x:.2f}" for x in row)] for name, row in zip(deep, mean, strict=True)]
    note = f"Linear CKA, mean over layers, keys and values. Random prompts: {found.chance.mean():.2f}."
    return ["", *deep], rows, note
