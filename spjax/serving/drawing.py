"""HTML of the page's results: predictions, units, attributions. It works in light and dark mode and at any width.

Text from outside (labels, task names) is escaped. `STYLE` is the CSS.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from spjax import vocab
from spjax.evaluation.inside import Attribution, Similarity, symbol, top_tokens
from spjax.speech2unit.audio import SAMPLE_RATE
from spjax.tasks import Task

TOP = 5  # labels shown for each slot
_FRAME = 10  # pixels a frame: a unit's number, upright, just fits into one
_PIECE = 24  # frames drawn as one SVG, so that a long silence wraps too
_MOST_PIECES = 2500  # 25 s or more: browsers get slow beyond
_MOST_ROWS = 2000  # of a table: browsers get slow beyond
_NAME = 60  # characters of a file's name that are shown
_WAVE, _STRIP, _AXIS = 64, 30, 14  # heights of the waveform, units and time axis, pixels
_FOR, _AGAINST = "217, 95, 2", "31, 120, 210"  # orange and blue, which the colour-blind can distinguish

STYLE = """
.spj { color: var(--body-text-color); line-height: 1.4; overflow-wrap: anywhere; }
.spj h3 { margin: 0 0 .4rem; font-size: 1rem; font-weight: 600; }
.spj p { margin: 0 0 .7rem; }
.spj .quiet { color: var(--body-text-color-subdued); font-size: .85rem; }
.spj .wrong { padding: .6rem .8rem; border-left: 3px solid var(--error-border-color); }
.spj .cards { columns: 17rem; column-gap: .8rem; }
.spj .card { break-inside: avoid; margin-bottom: .8rem; padding: .8rem 1rem;
  border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--block-background-fill); }
.spj .slot + .slot { margin-top: .7rem; }
.spj .bar { display: grid; grid-template-columns: minmax(4rem, 1fr) 1fr 3.8rem; gap: .6rem; align-items: center;
  font-size: .9rem; padding: .1rem 0; }
.spj .bar span:last-child { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.spj .bar i { display: block; height: .55rem; border-radius: .3rem; background: var(--border-color-primary);
  overflow: hidden; }
.spj .bar i b { display: block; height: 100%; border-radius: .3rem; background: var(--body-text-color-subdued); }
.spj .bar.best { font-weight: 600; }
.spj .bar.best i b { background: var(--color-accent); }
.spj .flow { display: flex; flex-wrap: wrap; row-gap: .7rem; }
.spj .flow svg { display: block; overflow: visible; flex: none; }
.spj .flow .wave { fill: var(--body-text-color-subdued); }
.spj .flow .edge { stroke: var(--background-fill-primary); stroke-width: 1; }
.spj .flow .number { fill: #16181d; font-size: 10px; text-anchor: middle; dominant-baseline: central; }
.spj .flow .time { fill: var(--body-text-color-subdued); font-size: 10px; }
.spj .flow .tick { stroke: var(--body-text-color-subdued); stroke-width: 1; }
.spj .scroll { overflow: auto; max-height: 30rem; margin-bottom: .7rem; }
.spj table { border-collapse: collapse; font-size: .9rem; overflow-wrap: break-word; }
.spj td { max-width: 24rem; }
.spj table, .spj thead, .spj tbody { border: 0; }
.spj tr { border: 0; border-bottom: 1px solid var(--border-color-primary); }
.spj th, .spj td { border: 0; padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; }
.spj th { font-weight: 600; }
.spj .chip { display: inline-block; border-radius: 4px; padding: 0 .35rem; margin: 0 .15rem .2rem 0; color: #16181d;
  font-variant-numeric: tabular-nums; }
.spj .chip small { color: inherit; opacity: .8; font-size: .75em; margin-left: .3em; }
.spj .sequence .chip { color: var(--body-text-color); min-width: 1.7em; text-align: center; margin: 0 1px 2px 0; }
.spj .files { width: 100%; }
.spj .files td.label { font-weight: 600; }
.spj .files td:last-child:not([colspan]) { white-space: nowrap; text-align: right; font-variant-numeric: tabular-nums; }
.spj .files thead th { position: sticky; top: 0; background: var(--background-fill-primary); white-space: nowrap; }
@media (max-width: 600px) {
  .spj .files, .spj .files tbody { display: block; }
  .spj .files thead { display: none; }
  .spj .files tr { display: grid; grid-template-columns: 1fr 1fr 3.8rem; padding: .2rem 0; }
  .spj .files th, .spj .files td[colspan] { grid-column: 1 / -1; }
  .spj .files th:empty { display: none; }
  .spj .alike { font-size: .75rem; }
  .spj .alike tbody th { max-width: 6rem; }
}
.spj .alike td { text-align: center; white-space: nowrap; padding: .3rem .5rem; font-variant-numeric: tabular-nums; }
.spj .alike thead th { writing-mode: vertical-rl; transform: rotate(180deg); padding: .3rem; vertical-align: middle; }
"""


def answers(predicted: Mapping[str, Mapping[str, Any]], top: int = TOP) -> str:
    """HTML: a card for each task, with bars for the most probable labels of every slot.

    Args:
      predicted: `{task: {"labels": {slot: label}, "probabilities": {slot: {label: p}}}}`, from a predictor.
      top: labels of a slot; the predicted one is always among them.
    """
    cards = []
    for task, answer in predicted.items():
        slots = []
        for slot, best in answer["labels"].items():
            shares = answer["probabilities"][slot]
            order = sorted(shares, key=lambda label: (label != best, -shares[label]))
            bars = "".join(_bar(label, shares[label], label == best) for label in order[:top])
            left = len(order) - top
            more = f'<div class="quiet">and {left} more</div>' if left > 0 else ""
            slots.append(f'<div class="slot"><div class="quiet">{_safe(slot)}</div>{bars}{more}</div>')
        cards.append(f'<div class="card"><h3>{_safe(task)}</h3>{"".join(slots)}</div>')
    return _framed(f'<div class="cards">{"".join(cards)}</div>')


def error(message: str) -> str:
    """HTML: an error message, shown in place of the result."""
    return _framed(f'<p class="wrong" role="alert">{_safe(message)}</p>')


def _bar(label: str, share: float, best: bool) -> str:
    return (
        f'<div class="bar{" best" if best else ""}"><span>{_safe(label)}</span>'
        f'<i><b style="width:{100 * share:.1f}%"></b></i><span>{100 * share:.1f} %</span></div>'
    )


def rows(table: Sequence[Sequence[Any]], most: int = _MOST_ROWS) -> str:
    """HTML: a table of predictions for several files, which stacks its columns on narrow screens.

    Args:
      table: rows (file, task, slot, label, probability, error); rows of one file are adjacent.
      most: rows that are shown.
    """
    lines, last = [], None
    for file, task, slot, label, share, error in table[:most]:
        name = f'<th title="{_safe(file)}">{_safe(_shortened(file))}</th>' if file != last else "<th></th>"
        answer = (
            f'<td>{_safe(task)} · <span class="quiet">{_safe(slot)}</span></td><td class="label">{_safe(label)}</td>'
        )
        answer += f"<td>{100 * share:.1f} %</td>" if share is not None else "<td></td>"
        lines.append(f"<tr>{name}{answer if not error else f'<td colspan=3>{_safe(error)}</td>'}</tr>")
        last = file
    head = "<thead><tr><th>file</th><th>task and slot</th><th>label</th><th>probability</th></tr></thead>"
    more = f'<p class="quiet">{most} of {len(table)} rows are shown, the CSV has all.</p>' if len(table) > most else ""
    return _framed(
        f'<div class="scroll"><table class="files">{head}<tbody>{"".join(lines)}</tbody></table></div>{more}'
    )


def _shortened(name: str) -> str:
    """A name with its middle replaced by … if it is too long for a table."""
    return name if len(name) <= _NAME else f"{name[: _NAME - 16]}…{name[-15:]}"


def utterance(wave: np.ndarray, units: Sequence[int], durations: Sequence[int], hop: int, center: int = 200) -> str:
    """HTML: an utterance's waveform and, under it, its units, each as wide as its duration. It wraps like text.

    Only the beginning of a long utterance is drawn.

    Args:
      wave: float32 [n] at 16 kHz.
      units: [U] units.
      durations: [U] frames of each.
      hop, center: samples between frames, and the sample on which the first frame is centred (see `Encoder`).
    """
    loud = float(np.quantile(np.abs(wave), 0.998)) if len(wave) else 0.0  # robust against single clicks
    wave = np.clip(wave / (loud or 1.0), -1, 1)
    origin = center - hop // 2  # frame t is centred on sample center + hop t, and extends half a hop to both sides
    tiles, shown = [], 0
    for unit, start, frames, total_frames in itertools.islice(_pieces(units, durations), _MOST_PIECES):
        piece = wave[max(0, origin + start * hop) : max(0, origin + (start + frames) * hop)]
        tiles.append(_tile(unit, piece, start, frames, total_frames, hop / SAMPLE_RATE))
        shown = start + frames
    total = sum(durations)
    caption = f"{len(units)} units, {total} frames of {1000 * hop / SAMPLE_RATE:g} ms"
    caption += f"; the first {shown * hop / SAMPLE_RATE:.1f} s are drawn" if shown < total else ""
    return _framed(f'<p class="quiet">{caption}</p><div class="flow">{"".join(tiles)}</div>')


def _pieces(units: Sequence[int], durations: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """(unit, first frame, frames, frames of the segment or 0 if the piece continues one)."""
    start = 0
    for unit, duration in zip(units, durations, strict=True):
        for first in range(0, duration, _PIECE):
            yield unit, start + first, min(_PIECE, duration - first), 0 if first else duration
        start += duration


def _tile(unit: int, wave: np.ndarray, start: int, frames: int, segment: int, seconds: float) -> str:
    """SVG of a piece: waveform, colour of the unit, and at the start of a segment the unit's number."""
    width, middle = frames * _FRAME, _WAVE / 2
    bins = np.array_split(wave, width // 2) if len(wave) >= width else [wave] if len(wave) else []
    across = width / max(1, len(bins))
    tops = [f"{i * across:.4g},{middle - 0.48 * _WAVE * float(part.max()) - 0.5:.1f}" for i, part in enumerate(bins)]
    tops += [f"{width},{top.partition(',')[2]}" for top in tops[-1:]]
    lows = [f"{i * across:.4g},{middle - 0.48 * _WAVE * float(part.min()) + 0.5:.1f}" for i, part in enumerate(bins)]
    lows += [f"{width},{low.partition(',')[2]}" for low in lows[-1:]]
    parts = [f'<polygon class="wave" points="{" ".join(tops + lows[::-1])}"/>'] if bins else []
    parts.append(f'<rect y="{_WAVE}" width="{width}" height="{_STRIP}" fill="{_colour(unit)}"/>')
    if segment:
        name, y = str(unit), _WAVE + _STRIP / 2
        upright = "" if width >= 6 * len(name) + 4 else f' transform="rotate(-90 {width / 2:g} {y:g})"'
        parts.append(f'<line class="edge" y1="{_WAVE}" y2="{_WAVE + _STRIP}"/>')
        parts.append(f'<text class="number" x="{width / 2:g}" y="{y:g}"{upright}>{name}</text>')
        parts.append(f"<title>unit {unit}: {start * seconds:.2f} to {(start + segment) * seconds:.2f} s</title>")
    each = round(0.5 / seconds) if seconds > 0.015 else round(0.25 / seconds)
    for frame in range(-(-start // each) * each, start + frames, each):
        x = (frame - start) * _FRAME
        parts.append(f'<line class="tick" x1="{x}" x2="{x}" y1="{_WAVE + _STRIP}" y2="{_WAVE + _STRIP + 4}"/>')
        parts.append(f'<text class="time" x="{x + 2}" y="{_WAVE + _STRIP + _AXIS - 1}">{frame * seconds:g} s</text>')
    return f'<svg width="{width}" height="{_WAVE + _STRIP + _AXIS}">{"".join(parts)}</svg>'


def verbalizer(task: Task, weights: np.ndarray) -> str:
    """HTML: the units with the largest weights for each label, float [C, V] from `inside.verbalizer_weights`."""
    rows = []
    for (slot, label), top in zip(task.classes, top_tokens(weights), strict=True):
        chips = [_chip(symbol(token), _colour(token - vocab.UNIT_OFFSET), f"{weight:+.2f}") for token, weight in top]
        rows.append(f"<tr><td>{_safe(slot)}</td><td>{_safe(label)}</td><td>{''.join(chips) or '–'}</td></tr>")
    head = "<thead><tr><th>slot</th><th>label</th><th>units with the largest weights</th></tr></thead>"
    return _framed(f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>')


def similarity(names: Sequence[str], found: Similarity) -> str:
    """HTML: similarity of N prompts, mean over layers, keys and values."""
    mean = (found.key.mean(axis=0) + found.value.mean(axis=0)) / 2
    head = "".join(f"<th>{_safe(name)}</th>" for name in names)
    rows = [
        f"<tr><th>{_safe(name)}</th>"
        + "".join(f'<td style="background: rgba({_FOR}, {0.75 * float(x):.2f})">{x:.2f}</td>' for x in row)
        + "</tr>"
        for name, row in zip(names, mean, strict=True)
    ]
    table = f"<table class='alike'><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    note = f"Linear CKA, mean over layers, keys and values. Random prompts: {found.chance.mean():.2f}."
    return _framed(f'<div class="scroll">{table}</div><p class="quiet">{note}</p>')


def attribution(task: Task, found: Attribution, left: int = 0) -> str:
    """HTML: for every slot the utterance's units in order, coloured by their attribution to the predicted label.

    Args:
      task: the task of the prediction.
      found: from `inside.attribute`.
      left: number of units at the end of the utterance that were left out.
    """
    most = float(np.abs(found.values).max(initial=0)) or 1.0
    parts = []
    for c, values, score, empty in zip(found.classes, found.values, found.score, found.empty, strict=True):
        slot, label = task.classes[c]
        scores = f"log odds {score:+z.2f}, without units {empty:+z.2f}"
        parts.append(f'<h3>{_safe(slot)}: {_safe(label)}</h3><p class="quiet">{scores}</p>')
        chips = [
            _chip(str(unit), f"rgba({_FOR if x > 0 else _AGAINST}, {0.8 * abs(float(x)) / most:.2f})", "", f"{x:+z.3f}")
            for unit, x in zip(found.units, values, strict=True)
        ]
        parts.append(f'<p class="sequence">{"".join(chips)}</p>')
    key = (
        f'<span class="chip" style="background: rgba({_FOR}, .8)">for</span>'
        f'<span class="chip" style="background: rgba({_AGAINST}, .8)">against</span>'
        f" the predicted label, {most:.2g} log odds at most. Their sum misses the units' effect by {found.gap:.2g}."
    )
    cut = f" Only the first {len(found.units)} units are explained; {left} after them are left out." if left else ""
    return _framed(f'{"".join(parts)}<p class="quiet sequence">{key}{cut}</p>')


def _chip(text: str, colour: str, small: str = "", title: str = "") -> str:
    tooltip = f' title="{title}"' if title else ""
    more = f"<small>{small}</small>" if small else ""
    return f'<span class="chip" style="background: {colour}"{tooltip}>{_safe(text)}{more}</span>'


def _colour(unit: int) -> str:
    """A light colour for a unit; the golden angle keeps neighbouring numbers apart."""
    return "#c8ccd4" if unit < 0 else f"hsl({unit * 137.508 % 360:.2f} 62% {72 if unit % 2 else 80}%)"


def _safe(text: Any) -> str:
    return html.escape(str(text))


def _framed(inner: str) -> str:
    return f'<div class="spj">{inner}</div>'
