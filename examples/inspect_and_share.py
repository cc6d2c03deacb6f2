"""Look into a pack, describe it, and share it as a directory or on the Hugging Face hub.

python examples/inspect_and_share.py runs/mine/packs/seed_0 shared/mine recordings/yes/1.wav
python examples/inspect_and_share.py ... --push USER/NAME     # after `hf auth login`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

import spjax
from spjax.data.unit_set import UnitSet
from spjax.evaluation import inside


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what a pack has learnt, and write a copy with a description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack")
    parser.add_argument("copy", help="directory to write")
    parser.add_argument("recording")
    parser.add_argument("--push", metavar="USER/NAME")
    options = parser.parse_args(arguments)

    lm, pack = spjax.load_unit_lm("tiny"), spjax.load_prompt(options.pack)
    print(f"{pack.card['task']}: {pack.card['parameters']:,} numbers, of the LM {lm.hash[:12]}")

    # The units whose logits count most for each label.
    tops = inside.top_tokens(inside.verbalizer_weights(pack))
    for (slot, label), top in zip(pack.task.classes, tops, strict=True):
        print(slot, label, [inside.symbol(token) for token, _ in top])

    # How much each unit of a recording contributes to the log odds of the predicted label (integrated gradients).
    units = spjax.encode(options.recording, spjax.load_encoder("tiny")).units
    found = inside.attribute(lm.params, lm.config, pack, UnitSet.of([units], np.zeros((1, len(pack.task.slots)))))
    for number, values in zip(found.classes, found.values, strict=True):
        decisive = np.argsort(-np.abs(values))[:5]
        print(pack.task.classes[number], {int(i): (int(units[i]), round(float(values[i]), 3)) for i in decisive})

    # What may be edited does not change the pack's hash: description, licence, results.
    pack.card.update(description="Trained on my recordings.", licence="cc-by-4.0")
    shared = pack.save(options.copy)  # with a README.md for people
    print("hash unchanged:", shared.card["card_hash"] == spjax.load_prompt(options.pack).card["card_hash"])
    if options.push:
        print("commit", shared.push_to_hub(options.push))


if __name__ == "__main__":
    main()
