"""`python -m spjax.packs show|merge|split|refresh|push|pull`: manage prompt packs and banks."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spjax import process

    process.run("spjax.packs")

import argparse
import sys
from collections.abc import Sequence

from spjax.command_line import Parser, output, pack_place, place
from spjax.io import StorageError, banks, places
from spjax.io.pack_readme import baselines, intervals
from spjax.io.packs import PromptPack, push_pack
from spjax.io.refresh import refresh
from spjax.models.prompts import shape_of
from spjax.tasks import METRICS


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m spjax.packs",
        description="""  %(prog)s show runs/fsc/packs
  %(prog)s merge runs/fsc/packs/seed_0 words=runs/gsc/packs/seed_0 --out=bank
  %(prog)s push runs/fsc/packs/seed_0 USER/NAME

A prompt pack is a directory: one trained prompt and its card. A bank holds packs of one unit LM. `COMMAND --help` has
the flags of a command.""",
    )
    jobs = parser.add_commands()
    show = jobs.add_parser("show", help="list packs, with what they need")
    show.add_argument("path", metavar="PATH", type=pack_place, help="a pack, a bank, or a directory of them")

    merge = jobs.add_parser("merge", help="packs of one unit LM -> a bank")
    merge.add_argument(
        "packs",
        metavar="[NAME=]PATH",
        type=pack_place,
        nargs="+",
        help="a pack, and what to call it; or a bank, or a directory of packs",
    )
    merge.add_argument("--out", metavar="BANK", type=output, required=True, help="directory to write")
    merge.add_argument("--force", action="store_true", help="replace an existing bank")

    split = jobs.add_parser("split", help="a bank -> its packs")
    split.add_argument("bank", metavar="BANK", type=place)
    split.add_argument("--out", metavar="DIR", type=output, required=True, help="directory to write the packs in")

    refresh = jobs.add_parser("refresh", help="add the hash of the card to files of older versions of spjax")
    refresh.add_argument(
        "paths", metavar="PATH", type=place, nargs="+", help="a pack, bank, unit LM, encoder or k-means"
    )

    push = jobs.add_parser(
        "push", help="a pack -> the Hugging Face hub", epilog="log in first: hf auth login, or HF_TOKEN"
    )
    push.add_argument("pack", metavar="PACK", type=place)
    push.add_argument("repository", metavar="USER/NAME")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--licence", metavar="ID", help="for the README, e.g. cc-by-4.0 (default: as the README has it)")
    push.add_argument("--revision", metavar="BRANCH", help="default: main")
    push.add_argument("--message", metavar="TEXT", help="commit message")

    pull = jobs.add_parser("pull", help="a pack on the Hugging Face hub -> a directory")
    pull.add_argument("repository", metavar="USER/NAME")
    pull.add_argument("--out", metavar="PACK", type=output, required=True, help="directory to write")
    pull.add_argument("--revision", metavar="REVISION", help="branch, tag or commit (default: main)")
    return parser


def describe(name: str, pack: PromptPack) -> str:
    """Describe a pack in a few lines: task and labels, shape, results, and what it needs."""
    card, params = pack.card, pack.params
    slots = ", ".join(f"{slot['name']} ({len(slot['labels'])})" for slot in card["slots"])
    shape, lora = shape_of(params), card.get("lora")
    prompt = []
    if shape["length"] or not lora:
        prompt.append(f"{shape['length']} {'in each layer' if shape['deep'] else 'at the input'}")
    if lora:
        prompt.append(f"LoRA of rank {lora['rank']} (alpha {lora['alpha']:g}) on {', '.join(lora['targets'])}")
    results = card["results"]
    scores = {split: s["headline"] for split, s in results.items() if isinstance(s, dict) and "headline" in s}
    ends = {split: f" ({100 * low:.2f} to {100 * high:.2f})" for split, (low, high) in intervals(results).items()}
    shown = [f"{split} {100 * value:.2f} %{ends.get(split, '')}" for split, value in scores.items()]
    shown += [
        f"{name} {split} {100 * value:.2f} %" for name, of in baselines(results).items() for split, value in of.items()
    ]
    units = [
        card["encoder"],
        card["layer"] and f"layer {card['layer']}",
        card["kmeans"] and f"k-means {card['kmeans']}",
    ]
    lm = card["lm"]
    return "\n".join(
        [
            f"{name}: {card['task']}, {card['parameters']:,} parameters",
            f"  slots    {slots}; {card['verbalizer']['kind']} verbalizer",
            f"  prompt   {'; '.join(prompt)}; separators {shape['separators']}",
            f"  results  {METRICS[card['metric']]}: {', '.join(shown) or 'none recorded'}",
            f"  units    {', '.join(str(part) for part in units if part) or 'unknown'}",
            f"  unit LM  {lm['hash'][:12]} ({lm['layers']} layers, dim {lm['dim']}, vocabulary {lm['vocab_size']})",
        ]
    )


def _show(options: argparse.Namespace) -> None:
    for name, pack in banks.load_packs(options.path).items():
        print(describe(name, pack))


def _merge(options: argparse.Namespace) -> None:
    if places.at(options.out).exists() and not options.force:
        raise StorageError(f"{options.out} exists. Choose another directory, or replace it with --force.")
    members = banks.load_packs(*options.packs)
    banks.save_bank(options.out, members)
    print(f"{options.out}: bank of {len(members)} prompts: {', '.join(members)}")


def _split(options: argparse.Namespace) -> None:
    for path in banks.split_bank(options.bank, options.out):
        print(path)


def _refresh(options: argparse.Namespace) -> None:
    for path in options.paths:
        print(refresh(path))


def _push(options: argparse.Namespace) -> None:
    commit = push_pack(
        options.pack,
        options.repository,
        private=options.private,
        revision=options.revision,
        message=options.message,
        licence=options.licence,
    )
    print(f"{options.repository}: commit {commit}")


def _pull(options: argparse.Namespace) -> None:
    if places.at(options.out).exists():
        raise StorageError(f"{options.out} exists. Choose another directory.")
    fetched = PromptPack.from_hub(options.repository, revision=options.revision)
    print(describe(options.out, fetched.save(options.out)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
      arguments: command-line arguments; None for sys.argv.

    Raises:
      SystemExit: with a message, if something is refused.
    """
    options = _parser().parse_args(arguments)
    try:
        commands = {
            "show": _show,
            "merge": _merge,
            "split": _split,
            "refresh": _refresh,
            "push": _push,
            "pull": _pull,
        }
        commands[options.job](options)
    except (StorageError, OSError) as error:
        sys.exit(f"error: {error}")
