"""The floor: a linear model on 1-3-grams of the units, which any claim for a language model has to clear.

TF-IDF of unit 1-, 2- and 3-grams, then multinomial logistic regression (scikit-learn), in two variants: a model
a slot, and one model over the combinations of labels seen in training (for a single slot they are the same). The
regularisation of a variant and the variant itself are chosen on valid; test is only scored. Valid may choose the
variant that is worse on test (few speakers), so both are reported: a claim should clear the better of the two.

    python -m spjax.evaluation.ngram --data=DIR [--few-shot=10,50,100] [--json=OUT]
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take their time
    from spjax import process

    process.run("spjax.evaluation.ngram")

import json
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath
from tqdm import tqdm

from spjax.command_line import Parser, output_file, place
from spjax.evaluation import metrics
from spjax.tasks import LOWER_IS_BETTER, METRICS, Task

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)  # scikit-learn's C: how little the weights are held back
_SPLITS = ("valid", "test")


class Units(Protocol):
    """What the floor needs of a split (spjax.data.records.UnitSet has it)."""

    @property
    def classes(self) -> np.ndarray:
        """Integers [n, slots], class ids over all slots."""

    def __len__(self) -> int: ...

    def units_of(self, i: int, /) -> np.ndarray:
        """Units of utterance i, [T]."""


def ngram_floor(
    task: Task,
    train: Units,
    valid: Units,
    test: Units,
    *,
    strengths: Sequence[float] = STRENGTHS,
    progress: bool = True,
) -> dict[str, Any]:
    """Train and score the floor.

    Args:
      task: K slots.
      train, valid, test: units and classes of the splits.
      strengths: values of C to choose from, on valid.
      progress: whether to show a progress bar.

    Returns:
      {"train_utterances", "chosen": name of the better variant on valid, "valid", "test": its headline scores,
      "variants": {"per_slot" and, with several slots, "joint": {"strength", "valid", "test": spjax.evaluation
      .metrics.score of the split}}}. Equal scores on valid go to the smaller strength, and to per_slot.

    Raises:
      ValueError: an empty split, or classes that do not fit the task.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    for name, size in (("train", len(train)), ("valid", len(valid)), ("test", len(test))):
        if not size:
            raise ValueError(f"n-gram floor of {task.name!r}: no {name} utterances")
    local = metrics.slot_classes(task, train.classes, "train classes")
    # The default token pattern drops tokens of one character, which would lose the units 0 to 9.
    vectorizer = TfidfVectorizer(ngram_range=(1, 3), token_pattern=r"\S+", lowercase=False, dtype=np.float32)
    features = vectorizer.fit_transform(_text(train))
    others = {name: vectorizer.transform(_text(split)) for name, split in zip(_SPLITS, (valid, test), strict=True)}
    truths = dict(zip(_SPLITS, (valid.classes, test.classes), strict=True))

    answers = {"per_slot": _per_slot} | ({"joint": _joint} if len(task.slots) > 1 else {})
    sign = -1 if task.metric in LOWER_IS_BETTER else 1
    variants: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(answers) * len(strengths), desc="n-gram floor", unit="fit", disable=not progress) as bar:
        for name, answer in answers.items():
            for strength in sorted(strengths):
                found = answer(task, features, local, list(others.values()), strength)
                scores = {
                    split: metrics.score(task, truths[split], predicted, probabilities)
                    for split, (predicted, probabilities) in zip(_SPLITS, found, strict=True)
                }
                best = variants.get(name)
                if best is None or sign * scores["valid"]["headline"] > sign * best["valid"]["headline"]:
                    variants[name] = {"strength": float(strength), **scores}
                bar.update()
    chosen = max(variants, key=lambda name: sign * variants[name]["valid"]["headline"])
    return {
        "train_utterances": len(train),
        "chosen": chosen,
        **{split: variants[chosen][split]["headline"] for split in _SPLITS},
        "variants": variants,
    }


_Answers = list[tuple[np.ndarray, list[np.ndarray]]]  # a split each: classes [n, K] over all slots, K times [n, C_k]


def _per_slot(task: Task, features: Any, local: np.ndarray, others: list[Any], strength: float) -> _Answers:
    fits = [
        _probabilities(features, local[:, k], others, len(slot.labels), strength) for k, slot in enumerate(task.slots)
    ]
    return [
        (np.stack([p.argmax(1) for p in slots], 1) + task.slot_offsets[:-1], list(slots))
        for slots in zip(*fits, strict=True)
    ]


def _joint(task: Task, features: Any, local: np.ndarray, others: list[Any], strength: float) -> _Answers:
    seen, combination = np.unique(local, axis=0, return_inverse=True)
    membership = [np.eye(len(slot.labels))[seen[:, k]] for k, slot in enumerate(task.slots)]  # [combinations, C_k]
    return [
        (seen[p.argmax(1)] + task.slot_offsets[:-1], [p @ member for member in membership])
        for p in _probabilities(features, combination.reshape(-1), others, len(seen), strength)
    ]


def _probabilities(
    features: Any, target: np.ndarray, others: list[Any], size: int, strength: float
) -> list[np.ndarray]:
    """Fit `target` [n] in 0..size-1 and answer [n', size] for each of `others`; classes never trained get 0."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    known = np.unique(target)
    if len(known) == 1:  # nothing to separate, which scikit-learn refuses
        fitted = [np.ones((other.shape[0], 1)) for other in others]
    else:
        with threadpool_limits(1):  # the vectors of lbfgs are short: more threads only wait for each other
            model = LogisticRegression(C=strength, max_iter=1000, tol=1e-5).fit(features, target)
        fitted = [model.predict_proba(other) for other in others]
    answers = [np.zeros((other.shape[0], size)) for other in others]
    for answer, probabilities in zip(answers, fitted, strict=True):
        answer[:, known] = probabilities
    return answers


def _text(split: Units) -> list[str]:
    return [" ".join(map(str, np.asarray(split.units_of(i)).tolist())) for i in range(len(split))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print (and with --json write) the floor of a directory of unit records."""
    from spjax.data.plan import few_shot
    from spjax.data.records import RecordError, read_unit_records

    parser = Parser(prog="python -m spjax.evaluation.ngram", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=place, required=True, help="directory of unit records")
    parser.add_argument("--few-shot", default="", help="utterances an intent, e.g. 10,50,100: these instead of all")
    parser.add_argument("--draws", type=int, default=3, help="random draws of each few-shot size")
    parser.add_argument("--json", type=output_file, help="file to write the result to")
    options = parser.parse_args(arguments)
    try:
        sizes = [int(size) for size in options.few_shot.split(",") if size]
    except ValueError:
        parser.error(f"--few-shot={options.few_shot}: expected whole numbers with commas, e.g. 10,50,100")
    if options.draws < 1 or min(sizes, default=1) < 1:
        parser.error("--few-shot and --draws take positive numbers")
    try:
        train, card = read_unit_records(options.data, "train")
        valid, test = (read_unit_records(options.data, split)[0] for split in _SPLITS)
    except (RecordError, OSError) as error:
        sys.exit(f"error: {error}")

    if not sizes:
        result = ngram_floor(card.task, train, valid, test)
        print(f"{card.task.name}, {result['train_utterances']} train utterances:\n{_table(card.task, [result])}")
    else:
        result = {"few_shot": {}}
        for size in sizes:
            drawn = [train.take(few_shot(train.classes, size, seed)) for seed in range(options.draws)]
            draws = [ngram_floor(card.task, some, valid, test) for some in drawn]
            result["few_shot"][str(size)] = draws
            print(f"{card.task.name}, {size} an intent, {len(draws)} draws:\n{_table(card.task, draws)}")
    if options.json:
        text = json.dumps({"task": card.task.name, "metric": card.task.metric, **result}, indent=1, allow_nan=False)
        epath.Path(options.json).write_text(text + "\n")


def _table(task: Task, draws: Sequence[dict[str, Any]]) -> str:
    """A line a variant: its headline scores, as mean and 95 % half width over the draws."""

    def shown(values: list[float]) -> str:
        mean, half_width = metrics.mean_interval(values)
        return f"{mean:.4f}" + (f" ± {half_width:.4f}" if half_width is not None else "")

    lines = [
        f"  {name:9s}"
        + "".join(
            f" {split} {METRICS[task.metric]} {shown([d['variants'][name][split]['headline'] for d in draws])}"
            for split in _SPLITS
        )
        + f" (C {', '.join(str(d['variants'][name]['strength']) for d in draws)})"
        for name in draws[0]["variants"]
    ]
    lines.append(f"  chosen on valid: test {shown([d['test'] for d in draws])}")
    return "\n".join(lines)
