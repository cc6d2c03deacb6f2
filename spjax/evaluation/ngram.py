"""The n-gram baseline: a linear classifier on TF-IDF of unit 1- to 3-grams (`linear.fit_linear`), without an LM.

    python -m spjax.evaluation.ngram --data=DIR [--few-shot=10,50,100] [--json=OUT]

Jobs call `ngram_baseline`; this command fits it on a directory of unit records.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from spjax import process

    process.run("spjax.evaluation.ngram")

import json
import sys
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from etils import epath
from tqdm import tqdm

from spjax.command_line import Parser, output_file, place
from spjax.evaluation import linear, metrics
from spjax.tasks import METRICS, Task
from spjax.types import Json


class Units(Protocol):
    """Interface of a split (satisfied by spjax.data.unit_set.UnitSet)."""

    @property
    def classes(self) -> np.ndarray:
        """int [n, slots], class ids over all slots."""

    def __len__(self) -> int: ...

    def units_of(self, i: int, /) -> np.ndarray:
        """Units of utterance i, [T]."""


def ngram_baseline(
    task: Task,
    train: Units,
    valid: Units,
    test: Units,
    *,
    strengths: Sequence[float] = linear.STRENGTHS,
    progress: bool = True,
) -> Json:
    """Train and score the n-gram baseline.

    Args:
      task: K slots.
      train, valid, test: units and classes of the splits.
      strengths: values of C, chosen on valid.
      progress: whether to show a progress bar.

    Returns:
      As `linear.fit_linear`.

    Raises:
      ValueError: as `linear.fit_linear`.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    splits = {"train": train, "valid": valid, "test": test}
    classes = {name: split.classes for name, split in splits.items()}
    features: Json = {}
    if len(train):
        # The default token pattern drops one-character tokens, i.e. units 0 to 9.
        vectorizer = TfidfVectorizer(ngram_range=(1, 3), token_pattern=r"\S+", lowercase=False, dtype=np.float32)
        vectorizer.fit(_text(train))
        features = {name: vectorizer.transform(_text(split)) for name, split in splits.items() if len(split)}
    total = len(list(linear.fits(task, strengths)))
    with tqdm(total=total, desc="n-gram baseline", unit="fit", disable=not progress, leave=False) as bar:
        return linear.fit_linear(task, features, classes, strengths=strengths, done=bar.update)


def _text(split: Units) -> list[str]:
    return [" ".join(map(str, np.asarray(split.units_of(i)).tolist())) for i in range(len(split))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute and print the n-gram baseline of a directory of unit records."""
    from spjax.data.plan import few_shot
    from spjax.data.records import read_unit_records
    from spjax.data.tfrecords import RecordError

    parser = Parser(prog="python -m spjax.evaluation.ngram", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=place, required=True, help="directory of unit records")
    parser.add_argument("--few-shot", default="", help="utterances per label combination, e.g. 10,50,100; default: all")
    parser.add_argument("--draws", type=int, default=3, help="random subsets of each few-shot size")
    parser.add_argument("--json", type=output_file, help="file to write the result to")
    options = parser.parse_args(arguments)
    try:
        sizes = [int(size) for size in options.few_shot.split(",") if size]
    except ValueError:
        parser.error(f"--few-shot={options.few_shot}: expected integers with commas, e.g. 10,50,100")
    if options.draws < 1 or min(sizes, default=1) < 1:
        parser.error("--few-shot and --draws must be positive")
    try:
        train, card = read_unit_records(options.data, "train")
        valid, test = (read_unit_records(options.data, split)[0] for split in linear.HELD_OUT)
    except (RecordError, OSError) as error:
        sys.exit(f"error: {error}")

    if not sizes:
        result = ngram_baseline(card.task, train, valid, test)
        print(f"{card.task.name}, {result['train_utterances']} train utterances:\n{_table(card.task, [result])}")
    else:
        result = {"few_shot": {}}
        for size in sizes:
            drawn = [train.take(few_shot(train.classes, size, seed)) for seed in range(options.draws)]
            draws = [ngram_baseline(card.task, some, valid, test) for some in drawn]
            result["few_shot"][str(size)] = draws
            print(f"{card.task.name}, {size} per label combination, {len(draws)} draws:\n{_table(card.task, draws)}")
    if options.json:
        text = json.dumps({"task": card.task.name, "metric": card.task.metric, **result}, indent=1, allow_nan=False)
        epath.Path(options.json).write_text(text + "\n")


def _table(task: Task, draws: Sequence[Json]) -> str:
    """Format a line for each variant: headline scores as mean and 95 % half width over the draws."""

    def shown(values: list[float]) -> str:
        mean, half_width = metrics.mean_interval(values)
        return f"{mean:.4f}" + (f" ± {half_width:.4f}" if half_width is not None else "")

    lines = [
        f"  {name:9s}"
        + "".join(
            f" {split} {METRICS[task.metric]} {shown([d['variants'][name][split]['headline'] for d in draws])}"
            for split in linear.HELD_OUT
        )
        + f" (C {', '.join(str(d['variants'][name]['strength']) for d in draws)})"
        for name in draws[0]["variants"]
    ]
    lines.append(f"  chosen on valid: test {shown([d['test'] for d in draws])}")
    return "\n".join(lines)
