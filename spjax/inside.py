"""`python -m spjax.inside --lm=LM --packs=DIR --out=DIR`: interpret trained prompts.

Writes `summary.md` and plots: the units that a verbalizer uses for each label, the similarity of the packs' prompts
and, with units or records, the attribution of predictions to units.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spjax import process

    process.run("spjax.inside")

import argparse
import sys
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from spjax import paths
from spjax.command_line import Parser, output, pack_place, place, positive
from spjax.data import records
from spjax.data.unit_set import UnitSet
from spjax.evaluation import inside, inside_plots
from spjax.io import StorageError, banks, check_pack, places, read_unit_lm
from spjax.io.packs import PromptPack, check_units, unit_source
from spjax.models.config import UnitLMConfig


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m spjax.inside",
        description="""  %(prog)s --lm=tiny --packs=PACK --out=DIR
  %(prog)s --lm=LM --packs=runs/fsc/packs/seed_0 --data=runs/units/fsc --out=DIR
  %(prog)s --lm=LM --packs=PACK --units="71 12 63" --out=DIR

"""
        + __doc__.partition("\n\n")[2],
    )
    parser.add_argument("--lm", metavar="LM", type=place, required=True, help="unit LM of the packs")
    parser.add_argument(
        "--packs", metavar="PATH", type=pack_place, required=True, help="a pack, a bank, or a directory of them"
    )
    parser.add_argument("--out", metavar="DIR", type=output, required=True, help="directory to write")
    utterances = parser.add_mutually_exclusive_group()
    utterances.add_argument("--units", metavar='"U U ..."', help="an utterance, its units separated by spaces")
    utterances.add_argument("--data", metavar="RECORDS", type=place, help="unit records to take utterances from")
    parser.add_argument("--split", metavar="NAME", default="test", help="split of the records (default: test)")
    parser.add_argument(
        "--utterances", metavar="N", type=positive, default=3, help="number of utterances of the split (default: 3)"
    )
    parser.add_argument(
        "--steps", metavar="N", type=positive, default=inside.STEPS, help="points of integrated gradients (%(default)s)"
    )
    return parser


def _utterances(
    options: argparse.Namespace, config: UnitLMConfig, packs: Mapping[str, PromptPack]
) -> tuple[str | None, list[tuple[str, UnitSet]]]:
    """The records' task (None for given units), and the utterances to explain, by name."""
    if options.units is not None:
        if config.prosody:
            raise ValueError("--units has no prosody, which this multi-stream LM needs: give --data")
        try:
            units = [int(word) for word in options.units.split()]
        except ValueError as error:
            raise ValueError(f"--units={options.units!r:.80} must be integers separated by spaces") from error
        if units and not 0 <= min(units) <= max(units) < config.num_units:
            raise ValueError(f"--units: units {min(units)}..{max(units)} must be in 0..{config.num_units - 1}")
        return None, [("the units given", UnitSet.of([units], np.zeros((1, 1))))]
    if options.data is None:
        return None, []
    split, card = records.read_unit_records(options.data, options.split)
    made = unit_source({name: getattr(card, name) for name in ("encoder", "layer", "kmeans", "merged")})
    fix = "Give records of the units that the pack was trained on."
    for name, pack in packs.items():
        if pack.card["task"] == card.task.name:
            check_units(f"prompt pack {name!r}", unit_source(pack.card), options.data, made, fix)
    if config.prosody and split.f0 is None:
        raise ValueError(
            f"{options.data} holds no f0, which a multi-stream LM needs: extract the recordings with --f0 of "
            "data_pipelines.extract"
        )
    split = (
        (split.with_interpolated_f0() if config.prosody.interpolate_f0 else split)
        if config.prosody
        else split.without_streams()
    )
    chosen = np.unique(np.linspace(0, len(split) - 1, min(options.utterances, len(split))).astype(int))
    return card.task.name, [(split.ids[i], split.take(np.asarray([i]))) for i in chosen]


def look(options: argparse.Namespace) -> str:
    """Write plots and summary of the packs that the options name.

    Returns:
      The summary, Markdown.

    Raises:
      StorageError: a pack that is damaged or of another LM.
      ValueError: units or records that do not match the LM.
    """
    config, lm, info = read_unit_lm(options.lm)
    packs = banks.load_packs(options.packs)
    for name, pack in packs.items():
        try:
            check_pack(pack, info["hash"], config)
        except StorageError as error:
            raise StorageError(f"{options.packs}, {name}: {error}") from error
    task, utterances = _utterances(options, config, packs)
    lm = jax.tree.map(jnp.asarray, lm)
    files: dict[str, bytes] = {}
    plots: dict[str, str] = {}

    def keep(what: str, content: bytes) -> None:
        plots[what] = what.replace("/", "-") + ".png"
        files[plots[what]] = content

    for name, pack in packs.items():
        keep(f"verbalizer/{name}", inside_plots.verbalizer(name, pack.task, inside.verbalizer_weights(pack)))
    deep = {name: pack for name, pack in packs.items() if "key" in pack.params and pack.params["key"].shape[1]}
    similarity = (list(deep), inside.prompt_similarity(lm, list(deep.values()))) if len(deep) > 1 else None
    if similarity:
        keep("similarity", inside_plots.similarity(*similarity))
    # Utterances of a task are explained with that task's packs, if there are any.
    chosen: dict[str, PromptPack] = {name: pack for name, pack in packs.items() if pack.card["task"] == task} or packs
    found = []
    pairs = [(name, utterance, units) for utterance, units in utterances for name in chosen]
    for name, utterance, units in tqdm(pairs, desc="attributions", unit="utterance", disable=not pairs, leave=False):
        one = inside.attribute(lm, config, packs[name], units, steps=options.steps)
        found.append((name, utterance, one))
        keep(
            f"attribution/{len(found) - 1}",
            inside_plots.attribution(f"{utterance}, answered by {name}", packs[name].task, one),
        )
    text = inside.summary(packs, similarity, found, plots)
    out = places.at(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        (out / path).write_bytes(content)
    (out / "summary.md").write_text(text, encoding="utf-8")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
      arguments: command-line arguments; None for sys.argv.

    Raises:
      SystemExit: with a message, if something is refused.
    """
    options = _parser().parse_args(arguments)
    try:
        with paths.writing(options.out):
            text = look(options)
    except (StorageError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(text)
    print(f"written: {places.at(options.out) / 'summary.md'}")
