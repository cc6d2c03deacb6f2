"""Generates a prompt pack's README.md from its card: a model card for readers and for the Hugging Face hub."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spjax.io.files import StorageError
from spjax.models.config import SIZES
from spjax.tasks import BASELINES, METRICS, Slot, Task
from spjax.vocab import UNIT_OFFSET

if TYPE_CHECKING:
    from spjax.io.pack_card import PackCard

FILE = "README.md"
_NO_LICENCE = "# license: add yours, e.g. cc-by-4.0; check the licence of the training data"
_MOST_LABELS = 60  # labels listed a slot
_SHARES = {*METRICS, "macro_f1"}  # results that are printed as percentages
_HUB_METRICS = {"weighted_f1": "f1"}  # our metric name → the hub's, where they differ

_TEXT = """\
{front}

# {title}: a prompt pack

A trained {what} of {parameters:,} parameters for a frozen speech-unit language model (spjax): {prompt}, {separators},
a {verbalizer} verbalizer. The language model is not included.

## Labels

{slots}

Allowed combinations of labels: {seen}.

## Requirements

{needs}

Any other unit LM is refused. Units of another encoder, layer or k-means are accepted, but predictions will be wrong.

## Results

{results}

## Use

```python
import spjax

lm = spjax.load_unit_lm("lm")  # the unit LM of the hash above
pack = spjax.load_prompt("pack")  # this directory
print(spjax.classify_units(lm, pack, [[{units}]]))  # an utterance as units
```

From the hub: `pack = PromptPack.from_hub("USER/NAME")`, with `from spjax.io import PromptPack`.

## Limits

- It always predicts one of its labels, whatever the audio, and its probabilities were evaluated on its own data only.
- Accuracy may be lower for other speakers, rooms, languages and microphones than those of the training data. Evaluate
  it on your data before you rely on it, and do not use it alone for decisions about people.
- Licence: set by its author, under `license` at the top. Check that the licences of the training data, the unit LM and
  the encoder allow your use.
"""


def readme(card: PackCard, *, deep: bool, positions: int, separators: int) -> str:
    """Returns README.md of a prompt pack: front matter for the hub, labels, requirements, results, use and limits.

    Args:
      card: of a saved pack (`parameters` and `hash` filled in).
      deep: whether every layer has its own virtual positions.
      positions: P, the number of virtual positions.
      separators: S, the number of separators.
    """
    task = Task(card["task"], tuple(Slot(s["name"], tuple(s["labels"])) for s in card["slots"]), card["metric"])
    lm = card["lm"]
    sizes = ", ".join(f"{name.replace('_', ' ')} {lm[name]:,}" for name in SIZES)  # type: ignore[literal-required]
    block = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in lm.get("block", {}).items())
    needs = {
        "unit LM (hash)": lm["hash"],
        "unit LM (sizes)": sizes,
        **({"unit LM (block)": block} if block else {}),
        "speech encoder": card["encoder"],
        "encoder layer": card["layer"],
        "k-means (id)": card["kmeans"],
        "runs of equal units": {True: "merged", False: "kept", None: None}[card["merged"]],
    }
    lora = card.get("lora")
    parts = [f"{positions} virtual positions {'in every layer' if deep else 'at the input'}"]
    if lora:
        added = f"low-rank adapters of {', '.join(lora['targets'])} (rank {lora['rank']}, alpha {lora['alpha']:g})"
        parts = [*parts[: positions > 0], added]
    return _TEXT.format(
        front="\n".join(_front_matter(task, card["results"], lora is not None)),
        title=_cell(task.name),
        parameters=card["parameters"],
        what="adapter" if lora else "prompt",
        prompt=", ".join(parts),
        separators=f"{separators} separator{'s' * (separators != 1)}",
        verbalizer=card["verbalizer"]["kind"],
        slots=_table(("slot", "labels", "number"), [(s.name, _labels(s.labels), len(s.labels)) for s in task.slots]),
        seen="all" if card["combinations"] is None else f"the {len(card['combinations']):,} of the training data",
        needs=_table(("part", "value"), [(name, "unknown" if v is None else v) for name, v in needs.items()]),
        results=_results(task, card["results"]),
        units=", ".join(str(unit) for unit in (71, 12, 4) if unit < lm["vocab_size"] - UNIT_OFFSET) or "0",
    )


def with_licence(text: str, licence: str) -> str:
    """Sets the licence (a hub identifier, such as "cc-by-4.0") in the front matter of a README.md.

    Raises:
      StorageError: not an identifier, or a file without front matter.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", licence):
        raise StorageError(f"{licence!r:.80} is not a licence identifier such as cc-by-4.0 or apache-2.0.")
    front = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    if not front:
        raise StorageError(
            f"{FILE} has no front matter (between two --- lines) to set a licence in. Save the pack again."
        )
    lines = [line for line in front[1].splitlines() if not re.match(r"(# )?license:", line)]
    return "\n".join(["---", *lines, f"license: {licence}", "---", text[front.end() :]])


def _front_matter(task: Task, results: Mapping[str, Any], lora: bool) -> Iterator[str]:
    metric = _HUB_METRICS.get(task.metric, task.metric)
    yield from ("---", "library_name: spjax", "pipeline_tag: audio-classification", "tags:")
    yield from (f"- {tag}" for tag in ("spjax", "audio-classification", "speech", "speech-units", "prompt-tuning"))
    yield from ("- lora",) * lora
    yield from ("metrics:", f"- {metric}", _NO_LICENCE)
    found = [(split, scores["headline"]) for split, scores in _splits(results) if "headline" in scores]
    if found:
        name = _quoted(task.name)
        yield from ("model-index:", f"- name: {name}", "  results:")
        for split, value in found:
            yield from ("  - task:", "      type: audio-classification", "    dataset:", f"      name: {name}")
            yield from (f"      type: {name}", f"      split: {_quoted(split)}", "    metrics:")
            yield from (
                f"    - type: {metric}",
                f"      name: {_quoted(METRICS[task.metric])}",
                f"      value: {value}",
            )
    yield "---"


def _splits(results: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Returns the numeric results of each split, by name."""
    found = {
        str(split): {name: score for name, score in scores.items() if type(score) in (int, float)}
        for split, scores in results.items()
        if isinstance(scores, Mapping)
    }
    return [(split, scores) for split, scores in found.items() if scores]


def _results(task: Task, results: Mapping[str, Any]) -> str:
    splits = _splits(results)
    if not splits:
        return "None are recorded in `card.json`."
    names = dict.fromkeys(itertools.chain.from_iterable(scores for _, scores in splits))
    names.pop("headline", None)  # equals the task's metric, which has a row
    rows = [(METRICS.get(name, name), *(_number(name, s.get(name)) for _, s in splits)) for name in names]
    if not rows:
        rows = [(METRICS[task.metric], *(_number(task.metric, s.get("headline")) for _, s in splits))]
    for split, interval in intervals(results).items():
        cells = [_range(interval) if name == split else "–" for name, _ in splits]
        rows.append((f"{METRICS[task.metric]}, 95 % interval over utterances", *cells))
    for name, scores in baselines(results).items():
        cells = [_number(task.metric, scores.get(split)) for split, _ in splits]
        rows.append((f"{METRICS[task.metric]} of the {name} baseline", *cells))
    return _table(("metric", *(f"{split} split" for split, _ in splits)), rows)


def intervals(results: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Returns, by split, the 95 % confidence interval over utterances, if the card has one."""
    found = {split: scores.get("interval_95") for split, scores in results.items() if isinstance(scores, Mapping)}
    return {
        split: (value[0], value[1])
        for split, value in found.items()
        if isinstance(value, list) and len(value) == 2 and all(type(end) in (int, float) for end in value)
    }


def baselines(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns the scores of each baseline on each split, by the baseline's display name, if the card has them."""
    found = results.get("baselines")
    return {BASELINES.get(name, name): scores for name, scores in _splits(found if isinstance(found, Mapping) else {})}


def _range(interval: tuple[float, float]) -> str:
    return " to ".join(f"{100 * end:.2f}" for end in interval) + " %"


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f} %" if name.split("/")[0] in _SHARES else f"{value:.4g}"


def _labels(labels: Sequence[str]) -> str:
    more = len(labels) - _MOST_LABELS
    return ", ".join(labels[:_MOST_LABELS]) + (f" … and {more:,} more (`card.json`)" if more > 0 else "")


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines)


def _quoted(text: str) -> str:
    """Returns a YAML string in double quotes, with special characters escaped."""
    escaped = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08X}" for c in text)
    return '"' + "".join(escaped) + '"'
