"""Plots of the report, as PNG files in memory."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from spjax.evaluation import metrics
from spjax.evaluation.outcome import Member
from spjax.tasks import BASELINES, METRICS, Task
from spjax.types import Json

TOP_CONFUSIONS = 25  # most frequent confusions in results.json and in the bar chart
_NUMBERED_CLASSES = 24  # up to this number of classes, counts are printed in the confusion matrix
_DRAWN_CLASSES = 60  # with more classes, a bar chart of the most frequent confusions is drawn instead
_LEGEND_MEMBERS = 10
_SIDES = {"above": "tab:green", "level": "dimgray", "below": "tab:red"}


def learning_curves(task: Task, members: Sequence[Member]) -> bytes:
    """Plot training loss and valid metric of every member by epoch, the best epoch marked. Returns a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=130, layout="constrained")
    loss_axes, valid_axes = figure.subplots(1, 2)
    for n, member in enumerate(members):
        epochs = [point.epoch for point in member.curve]
        line = {"color": f"C{n % 10}", "linewidth": 1.5, "label": f"seed {member.seed}"}
        line |= {"marker": "o", "markersize": 3} if len(epochs) <= 60 else {}
        loss_axes.plot(epochs, [point.train_loss for point in member.curve], **line)
        valid_axes.plot(epochs, [point.valid for point in member.curve], **line)
        star = {"marker": "*", "color": line["color"], "markersize": 11, "markeredgecolor": "black"}
        valid_axes.plot(member.best_epoch, member.best_valid, **star)
    losses = [p.train_loss for m in members for p in m.curve if math.isfinite(p.train_loss)]
    if losses and min(losses) > 0 and max(losses) > 20 * min(losses):
        loss_axes.set_yscale("log")
    loss_axes.set(xlabel="epoch", ylabel="training loss")
    valid_axes.set(xlabel="epoch", ylabel=f"valid {METRICS[task.metric]}", title="★ best epoch")
    loss_axes.set_title(task.name, parse_math=False)
    for axes in (loss_axes, valid_axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if len(members) <= _LEGEND_MEMBERS:
        loss_axes.legend(frameon=False, fontsize=8)
    return png(figure)


def overview(reports: Sequence[Json]) -> bytes:
    """Plot the score of every task (content of its results.json) with `interval`, and the baselines. Returns a PNG.

    A text states whether the score is above, level with or below the better baseline.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 1.5 * len(reports)), 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(reports))
    ours = [100 * results["headline"]["mean"] for results in reports]
    ends = [interval(results) or (results["headline"]["mean"],) * 2 for results in reports]
    errors = np.abs([[100 * low - mean, 100 * high - mean] for (low, high), mean in zip(ends, ours, strict=True)]).T
    kinds = [name for name in BASELINES if any(name in results["baselines"] for results in reports)]
    width = 0.8 / (1 + len(kinds))
    first = places - 0.4 + width / 2
    axes.bar(first, ours, 0.95 * width, yerr=errors, capsize=3, color="C0", label="ours")
    for n, name in enumerate(kinds):
        heights = [100 * r["baselines"].get(name, {}).get(r["split"], math.nan) for r in reports]
        axes.bar(first + (n + 1) * width, heights, 0.95 * width, color=f"{0.75 - 0.25 * n}", label=BASELINES[name])
    for place, results in zip(places, reports, strict=True):
        if found := against_baselines(results):
            text = f"{found[1]} ({100 * found[0]:+.1f})"
            axes.text(float(place), 104, text, ha="center", fontsize=8, color=_SIDES[found[1]], fontweight="bold")
    axes.set_xticks(places, [f"{r['task']}\n{METRICS[r['metric']]}" for r in reports], parse_math=False, fontsize=8)
    axes.set(ylabel=f"{reports[0]['split']}, %", ylim=(0, 110), yticks=range(0, 101, 20))
    axes.legend(frameon=False, fontsize=8, ncols=1 + len(kinds), loc="upper center", bbox_to_anchor=(0.5, 1.12))
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def against_baselines(results: Json) -> tuple[float, str] | None:
    """Gain over the better baseline (positive is better), and "above", "level" or "below"; None without baselines.

    "level": the baseline is within the score's `interval`.
    """
    scores = [baseline[results["split"]] for baseline in results["baselines"].values()]
    if not scores:
        return None
    sign = -1 if results["lower_is_better"] else 1
    best = max(scores, key=lambda score: sign * score)
    mean = results["headline"]["mean"]
    low, high = interval(results) or (mean, mean)
    ahead = sign * (mean - best)
    return ahead, "level" if low <= best <= high else "above" if ahead > 0 else "below"


def interval(results: Json) -> tuple[float, float] | None:
    """95 % interval of a results.json's score: over seeds, or for one seed over utterances; None if unavailable."""
    head = results["headline"]
    if head["half_width_95"] is not None:
        return head["mean"] - head["half_width_95"], head["mean"] + head["half_width_95"]
    found = results["members"][0]["interval_95"]
    return tuple(found) if found else None


def confusion(title: str, labels: Sequence[str], matrix: np.ndarray) -> bytes:
    """Plot a confusion matrix [C, C] of counts (rows: true classes), coloured by row share. Returns a PNG.

    Counts are printed for up to 24 classes; for more than 60 classes the most frequent confusions are plotted as bars.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    matrix = np.asarray(matrix)
    size = len(labels)
    correct = f"{matrix.trace():,} of {matrix.sum():,} correct"
    if size > _DRAWN_CLASSES:
        top = metrics.top_confusions(matrix, TOP_CONFUSIONS)
        figure = Figure(figsize=(8, 1.2 + 0.26 * max(len(top), 3)), dpi=130, layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(top)), [count for *_, count, _ in top], color="#4477aa")
        axes.set_yticks(range(len(top)))
        axes.set_yticklabels([f"{labels[t]} → {labels[p]}" for t, p, *_ in top], fontsize=8, parse_math=False)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.set_xlabel("utterances (true → predicted)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{title}: most frequent confusions ({correct})", fontsize=10, parse_math=False)
        return png(figure)

    side = max(4.0, (0.46 if size <= _NUMBERED_CLASSES else 0.22) * size + 1.6)
    figure = Figure(figsize=(side + 0.8, side), dpi=130, layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    # Square root, so that a confusion of 1 % is visible next to a diagonal of 99 %.
    image = axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    small = 9 if size <= 14 else 7 if size <= 32 else 6
    names = [label if len(label) <= 24 else label[:23] + "…" for label in labels]
    axes.set_xticks(range(size))
    axes.set_xticklabels(names, rotation=90 if size > 8 else 40, ha="center" if size > 8 else "right", fontsize=small,
                         rotation_mode="default" if size > 8 else "anchor", parse_math=False)  # fmt: skip
    axes.set_yticks(range(size))
    axes.set_yticklabels(names, fontsize=small, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(f"{title}\n{correct}", fontsize=10, parse_math=False)
    if size <= _NUMBERED_CLASSES:
        for t, p in np.argwhere(matrix):
            colour = "white" if shares[t, p] > 0.4 else "black"
            axes.text(p, t, f"{matrix[t, p]}", ha="center", va="center", fontsize=small - 2, color=colour)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true label")
    percents = (0, 1, 10, 25, 50, 100)
    bar.set_ticks([math.sqrt(percent / 100) for percent in percents], labels=[f"{percent} %" for percent in percents])
    return png(figure)


def png(figure: Any) -> bytes:
    """Render a matplotlib figure as PNG, deterministically."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # label in a script that the font does not have
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
