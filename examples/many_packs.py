"""Several packs of one LM as a bank, which answers all tasks for all recordings in one batch.

    python examples/many_packs.py runs/demo BANK turn_on_the_lights.wav bonjour.wav

`runs/demo` has the packs of six tasks; any packs of the same LM can be merged.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import spjax
from spjax import io


def main(arguments: Sequence[str] | None = None) -> None:
    """Merge packs into a bank, load it, and classify recordings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", help="a directory of packs, at any depth")
    parser.add_argument("bank", help="directory to write")
    parser.add_argument("recordings", nargs="+")
    options = parser.parse_args(arguments)

    packs = io.load_packs(options.packs)  # by name, which is that of the task
    io.save_bank(options.bank, packs)  # one file for all; io.split_bank gives the packs back
    predictor = spjax.SpeechPrompt.load("tiny", "tiny", [options.bank])

    # Each recording is encoded once; every pair of a recording and a task is a row of a batch.
    for path, answers in zip(options.recordings, predictor.predict(options.recordings), strict=True):
        print(path, {task: answer["labels"] for task, answer in answers.items()})

    # A batch may ask each utterance for other tasks. Here the first is asked for all, the others for one.
    units = [spjax.encode(path, predictor.encoder) for path in options.recordings]
    tasks = [list(packs), *[list(packs)[:1]] * (len(units) - 1)]
    for path, answers in zip(options.recordings, predictor.predict_units(units, tasks), strict=True):
        print(path, sorted(answers))


if __name__ == "__main__":
    main()
