"""Plots of an utterance and of the results of `spjax.evaluation.inside`, as PNG bytes."""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from spjax.encoders.audio import SAMPLE_RATE
from spjax.evaluation.inside import Attribution, Similarity, symbol
from spjax.evaluation.plots import png
from spjax.tasks import Task

_MOST_CLASSES = 60  # maximum rows of a heat map; further classes are not drawn
_UNITS_A_LINE = 60
UTTERANCE_FRAMES = 3000  # frames of an utterance that are drawn
_LINE = 50  # frames of a line: a second, if they are 20 ms apart
_GREY = "#808890"  # legible on light and on dark


def verbalizer(title: str, task: Task, weights: np.ndarray) -> bytes:
    """Plot verbalizer weights [C, V] of labels (rows) and tokens (columns) as a heat map. Returns a PNG.

    Only the first 60 labels are drawn.
    """
    from matplotlib.figure import Figure

    shown = weights[:_MOST_CLASSES]
    names = [label if len(task.slots) == 1 else f"{slot}: {label}" for slot, label in task.classes[:_MOST_CLASSES]]
    figure = Figure(figsize=(13, 1.8 + 0.2 * len(shown)), dpi=130, layout="constrained")
    axes = figure.subplots()
    most = float(np.abs(shown).max()) or 1.0
    image = axes.imshow(shown, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(shown)))
    axes.set_yticklabels([_short(name) for name in names], fontsize=7, parse_math=False)
    every = max(1, weights.shape[1] // 52)
    places = range(0, weights.shape[1], every)
    axes.set_xticks(places)
    axes.set_xticklabels([symbol(v) for v in places], rotation=90, fontsize=6, parse_math=False)
    for start in task.slot_offsets[1:-1]:
        axes.axhline(start - 0.5, color="black", linewidth=0.6)
    left = "" if len(shown) == len(weights) else f" (the first {len(shown)} of {len(weights)} labels)"
    axes.set_title(f"{title}: verbalizer weight of each unit for each label{left}", fontsize=10, parse_math=False)
    axes.set_xlabel("unit")
    figure.colorbar(image, ax=axes, shrink=0.7, label="weight of its logit")
    return png(figure)


def similarity(names: Sequence[str], found: Similarity) -> bytes:
    """Plot the similarity of N prompts: for each pair (mean over layers), and for each layer (mean over pairs)."""
    from matplotlib.figure import Figure

    size, layers = len(names), len(found.key)
    side = max(3.2, 0.42 * size + 1.6)
    figure = Figure(figsize=(2 * side + 4.2, side), dpi=130, layout="constrained")
    grids = figure.subplots(1, 3)
    for axes, part, values in zip(grids, ("keys", "values"), (found.key, found.value), strict=False):
        mean = values.mean(axis=0)
        image = axes.imshow(mean, cmap="viridis", vmin=0, vmax=1)
        axes.set_xticks(range(size))
        axes.set_xticklabels([_short(name) for name in names], rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(size))
        axes.set_yticklabels([_short(name) for name in names], fontsize=8, parse_math=False)
        axes.set_title(f"{part}, mean over layers", fontsize=10)
        for i, j in np.ndindex(size, size) if size <= 12 else ():
            colour = "black" if mean[i, j] > 0.6 else "white"
            axes.text(j, i, f"{mean[i, j]:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=grids[1], shrink=0.7, label="linear CKA")
    others = ~np.eye(size, dtype=bool)
    for n, (part, values) in enumerate((("keys", found.key), ("values", found.value))):
        if size > 1:
            grids[2].plot(range(1, layers + 1), values[:, others].mean(axis=1), "o-", color=f"C{n}", label=part)
        grids[2].plot(range(1, layers + 1), found.chance[n], ":", color=f"C{n}", label=f"{part}, random prompts")
    grids[2].set(xlabel="layer", ylabel="mean over pairs", ylim=(0, None))
    grids[2].set_xticks(range(1, layers + 1))
    grids[2].legend(frameon=False, fontsize=8)
    grids[2].spines[["top", "right"]].set_visible(False)
    return png(figure)


def attribution(title: str, task: Task, found: Attribution) -> bytes:
    """Plot the attribution of each unit of an utterance, a row for each slot; long utterances are wrapped."""
    from matplotlib.figure import Figure

    slots, count = found.values.shape
    lines = -(-count // _UNITS_A_LINE)
    width = -(-count // lines)
    figure = Figure(figsize=(2.6 + 0.17 * width, 1.3 + lines * (0.45 + 0.3 * slots)), dpi=130, layout="constrained")
    rows = figure.subplots(lines, 1, squeeze=False)[:, 0]
    most = float(np.abs(found.values).max()) or 1.0
    answers = [
        f"{slot}: {_short(label)} ({score:+.1f})"
        for (slot, label), score in zip((task.classes[c] for c in found.classes), found.score, strict=True)
    ]
    for line, axes in enumerate(rows):
        at = slice(line * width, (line + 1) * width)
        part = np.full((slots, width), np.nan)
        part[:, : len(found.units[at])] = found.values[:, at]
        image = axes.imshow(part, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
        axes.set_xticks(range(len(found.units[at])))
        axes.set_xticklabels(found.units[at], rotation=90, fontsize=6)
        axes.set_yticks(range(slots))
        axes.set_yticklabels(answers, fontsize=8, parse_math=False)
    figure.colorbar(image, ax=list(rows), shrink=0.8, label="log odds")
    figure.suptitle(title, fontsize=10, parse_math=False)
    return png(figure)


def utterance(wave: np.ndarray, units: Sequence[int], durations: Sequence[int], hop: int, center: int = 200) -> bytes:
    """Plot an utterance's waveform and, under it, its units, each as wide as its duration; lines wrap like text.

    Only the first `UTTERANCE_FRAMES` frames are drawn.

    Args:
      wave: float32 [n] at 16 kHz.
      units: [U] units.
      durations: [U] frames of each.
      hop, center: samples between frames, and the sample on which the first frame is centred (see `Encoder`).

    Returns:
      A PNG with a transparent background.
    """
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.figure import Figure

    frames = min(sum(durations), UTTERANCE_FRAMES)
    lines = max(1, -(-frames // _LINE))
    figure = Figure(figsize=(7.2, 0.9 * lines), dpi=160, facecolor="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, _LINE), ylim=(lines, 0))  # line n is between y = n and n + 1
    axes.set_axis_off()
    lows, tops = _envelope(wave, frames, hop, center - hop // 2)
    x, line = np.arange(4 * frames) / 4 % _LINE, np.arange(4 * frames) // (4 * _LINE)
    strokes = np.stack([np.stack([x, line + 0.3 - 0.28 * y], axis=1) for y in (tops + 0.01, lows - 0.01)], axis=1)
    axes.add_collection(LineCollection(list(strokes), colors=_GREY, linewidths=2))
    boxes, colours = [], []
    text: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7, "color": "#16181d"}
    starts = [0, *itertools.accumulate(durations)]
    for unit, first, end in zip(units, starts, starts[1:], strict=False):
        for begin in (first, *range(-(-(first + 1) // _LINE) * _LINE, min(end, frames), _LINE)):
            row, left = divmod(begin, _LINE)
            width = min(end, frames, (row + 1) * _LINE) - begin
            if width <= 0:
                break
            right, top, bottom = left + width - 0.08, row + 0.61, row + 0.87
            boxes.append([(left, top), (right, top), (right, bottom), (left, bottom)])
            colours.append(_colour(unit))
            if begin == first:
                turned = 90 if width < 0.6 * len(str(unit)) else 0
                axes.text(left + width / 2, row + 0.745, str(unit), rotation=turned, **text)
    axes.add_collection(PolyCollection(boxes, facecolors=colours))
    for frame in range(0, frames, _LINE // 2):
        place = (frame % _LINE, frame // _LINE + 0.89)
        axes.text(*place, f"{frame * hop / SAMPLE_RATE:g} s", va="top", fontsize=6, color=_GREY)
    return png(figure)


def _envelope(wave: np.ndarray, frames: int, hop: int, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest amplitudes of the quarters of each frame, [4 * frames] each, -1 to 1; frame 0 is at `start`."""
    wave = np.pad(wave, (max(0, -start), 0))[max(0, start) :][: frames * hop]
    loud = float(np.quantile(np.abs(wave), 0.998)) if len(wave) else 0.0  # robust against single clicks
    framed = np.pad(np.clip(wave / (loud or 1.0), -1, 1), (0, frames * hop - len(wave))).reshape(frames, hop)
    quarters = np.array_split(framed, 4, axis=1)
    return tuple(np.stack([f(one, axis=1) for one in quarters], axis=1).ravel() for f in (np.min, np.max))  # type: ignore[return-value]


def _colour(unit: int) -> tuple[float, float, float]:
    """A light colour for a unit; the golden angle keeps neighbouring numbers apart."""
    return colorsys.hls_to_rgb(unit * 137.508 % 360 / 360, 0.72 if unit % 2 else 0.8, 0.62)


def _short(name: str) -> str:
    return name if len(name) <= 32 else name[:31] + "…"
