"""Plots of the results of `spjax.evaluation.inside`, as PNG bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spjax.evaluation.inside import Attribution, Similarity, symbol
from spjax.evaluation.plots import png
from spjax.tasks import Task

_MOST_CLASSES = 60  # maximum rows of a heat map; further classes are not drawn
_UNITS_A_LINE = 60


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


def _short(name: str) -> str:
    return name if len(name) <= 32 else name[:31] + "…"
