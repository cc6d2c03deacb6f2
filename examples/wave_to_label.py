"""From a recording to labels, in one call and step by step.

    python examples/wave_to_label.py PACK turn_on_the_lights.wav

PACK is a prompt pack of the LM `tiny`, such as runs/demo/intents/packs/seed_0 or what train_on_folder.py makes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import spjax


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the labels of recordings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack")
    parser.add_argument("recordings", nargs="+")
    options = parser.parse_args(arguments)

    # In one call: any number of recordings and packs. Names of models are those in the package, or directories.
    predictor = spjax.SpeechPrompt.load(lm="tiny", encoder="tiny", packs=[options.pack])
    for path, answers in zip(options.recordings, predictor.predict(options.recordings), strict=True):
        for task, answer in answers.items():
            print(path, task, answer["labels"])

    # Step by step: the encoder maps a wave to units, the LM and the pack map units to labels.
    encoder = spjax.load_encoder("tiny")
    lm = spjax.load_unit_lm("tiny")
    pack = spjax.load_prompt(options.pack)
    encoded = [spjax.encode(path, encoder) for path in options.recordings]
    print("units", encoded[0].units.tolist(), "of", encoded[0].durations.tolist(), "frames")
    for path, answer in zip(options.recordings, spjax.classify_units(lm, pack, encoded), strict=True):
        for slot, probabilities in answer["probabilities"].items():
            print(path, slot, {label: round(value, 3) for label, value in probabilities.items()})


if __name__ == "__main__":
    main()
