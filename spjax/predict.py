"""`python -m spjax.predict --lm=LM --encoder=ENC --kmeans=KM --packs=DIR file.wav ...`: labels for recordings.

Prints a table, or JSON lines (`--json`). Files that cannot be used are reported, the others are classified, and the
exit status is 1.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spjax import process

    process.run("spjax.predict", huge_pages=True)

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from spjax.command_line import Parser, local_output, place
from spjax.data.tfrecords import RecordError
from spjax.serving import comparing
from spjax.serving.comparing import Change, Split
from spjax.serving.flags import add_predictor_flags, load_predictor
from spjax.serving.load import load_unit_lm
from spjax.serving.predictor import SpeechPrompt


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m spjax.predict",
        description="""  %(prog)s --lm=tiny --encoder=tiny --packs=PACK FILE.wav
  %(prog)s --lm=LM --encoder=HUBERT --kmeans=KM100 --packs=PACKS *.wav --json
  %(prog)s --lm=LM --packs=PACKS --data=RECORDS

Classify recordings by every task of the given prompt packs, or score the packs on unit records.""",
    )
    parser.add_argument("files", metavar="FILE", nargs="*", type=place, help="recordings")
    add_predictor_flags(parser, speech=False)
    answers = parser.add_argument_group("what to do")
    answers.add_argument("--tasks", metavar="A,B", help="only these tasks")
    answers.add_argument("--json", action="store_true", help="print a JSON object per line")
    answers.add_argument("--compare", action="store_true", help="compare the predictions with those in float32")
    answers.add_argument(
        "--data",
        action="append",
        type=place,
        default=[],
        metavar="RECORDS",
        help="unit records of a task, to score it on; may be repeated",
    )
    answers.add_argument("--split", metavar="NAME", default="test", help="split of the records (%(default)s)")
    answers.add_argument("--ahead", action="store_true", help="compile every program, for the compilation cache")
    answers.add_argument(
        "--export", metavar="DIR", type=local_output, help="export the tasks to a directory that needs only jax"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
      arguments: command-line arguments; None for sys.argv.

    Raises:
      SystemExit: with a message, if nothing can be classified; with status 1, if a file cannot.
    """
    options = _parser().parse_args(arguments)
    try:
        failed = _run(options)
    except (ValueError, OSError, RecordError) as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if failed else 0)


def _run(options: argparse.Namespace) -> bool:
    """Returns whether a file could not be classified."""
    if not (options.files or options.data or options.export):
        raise ValueError("nothing to classify: give recordings, or unit records with --data=RECORDS")
    if options.files and not options.encoder:
        raise ValueError(
            "recordings need an encoder and its k-means: give --encoder=mfcc, log_mel or the directory of a "
            "HuBERT, wav2vec2, WavLM or Whisper, and --kmeans=DIR; or --encoder=tiny"
        )
    lm = load_unit_lm(options.lm)
    predictor = load_predictor(options, lm)
    if options.ahead:
        predictor.compile_ahead(progress=True)
    reference = None
    if options.compare:
        reference = SpeechPrompt.load(
            lm, None, predictor.packs, max_units=options.max_units, overlength=predictor.overlength
        )
    del lm  # frees the float32 weights if the predictor has others
    tasks = options.tasks.split(",") if options.tasks else None
    failed = _answer_files(options, predictor, reference, tasks) if options.files else False
    for records in options.data:
        _score(options, predictor, reference, comparing.read_split(records, options.split, predictor, tasks), records)
    if options.export:
        print(f"{predictor.export(options.export, progress=True)}: see its README.md", file=sys.stderr)
    return failed


def _answer_files(options: argparse.Namespace, predictor: SpeechPrompt, reference: Any, tasks: Any) -> bool:
    encoded = predictor.encode(options.files, progress=True)
    good = [(file, one) for file, one in zip(options.files, encoded, strict=True) if not isinstance(one, ValueError)]
    units = [one for _, one in good]
    predictor.compile_ahead(units, tasks, progress=True)
    answers = iter(predictor.predict_units(units, tasks, progress=True))
    rows = [("file", "task", "labels (probability)")]
    for file, one in zip(options.files, encoded, strict=True):
        if isinstance(one, ValueError):
            message = str(one) if file in str(one) else f"{file}: {one}"
            print(f"error: {message}", file=sys.stderr)
            line: dict[str, Any] = {"file": file, "error": message}
        else:
            line = {"file": file, "answers": next(answers)}
            if one.notes:
                print(f"note: {file}: {'; '.join(one.notes)}", file=sys.stderr)
                line["notes"] = list(one.notes)
            rows += [(file, name, _format_answer(answer)) for name, answer in line["answers"].items()]
        if options.json:
            print(json.dumps(line, ensure_ascii=False))
    if not options.json and good:
        _print_table(rows)
    if reference and good:
        changes = comparing.changes(predictor, reference, units, tasks, progress=True)
        _print_changes(options, changes, f"{len(good)} recordings")
    return len(good) < len(options.files)


def _format_answer(answer: dict[str, Any]) -> str:
    return ", ".join(
        f"{slot}: {label} ({answer['probabilities'][slot][label]:.2f})" for slot, label in answer["labels"].items()
    )


def _score(options: argparse.Namespace, predictor: SpeechPrompt, reference: Any, split: Split, place: str) -> None:
    count = len(split.units)
    if reference:
        classes = dict.fromkeys(split.tasks, split.classes)
        changes = comparing.changes(predictor, reference, split.units, split.tasks, classes, progress=True)
        _print_changes(options, changes, f"{place}, {options.split}")
        return
    for name, value in comparing.headlines(predictor, split, progress=True).items():
        metric = predictor.tasks[name].metric
        if options.json:
            line = {"data": place, "split": options.split, "task": name, "utterances": count}
            print(json.dumps({**line, "metric": metric, "value": value}))
        else:
            print(f"{place}, {options.split}: {name}, {metric} {100 * value:.2f} % of {count} utterances")


def _print_changes(options: argparse.Namespace, changes: dict[str, Change], where: str) -> None:
    """Print how predictions differ from those in float32."""
    if options.json:
        by_task = {name: {k: v for k, v in one._asdict().items() if v is not None} for name, one in changes.items()}
        print(json.dumps({"compare": options.compute, "on": where, "tasks": by_task}))
        return
    print(f"\n{options.compute} against float32 on {where}:")
    rows = [["task", "utterances", "same labels", "largest change of a probability", "float32", options.compute]]
    for name, one in changes.items():
        scores = ["", ""]
        if one.reference is not None and one.value is not None:
            scores = [f"{one.metric} {100 * one.reference:.2f} %", f"{100 * one.value:.2f} %"]
        rows.append([name, str(one.utterances), f"{100 * one.agreement:.2f} %", f"{one.largest:.4f}", *scores])
    _print_table(rows)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
