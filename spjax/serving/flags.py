"""Command-line flags for what to serve: a unit LM, an encoder, prompt packs."""

from __future__ import annotations

import argparse

from spjax.command_line import pack_place, place, place_or_none
from spjax.serving.frozen import KINDS
from spjax.serving.load import UnitLM
from spjax.serving.predictor import SpeechPrompt


def add_predictor_flags(parser: argparse.ArgumentParser, speech: bool = True) -> None:
    """Add the flags of `load_predictor`. `speech`: only recordings are accepted, so `--encoder` is required."""
    parser.add_argument(
        "--lm", type=place, metavar="DIR", required=True, help="unit LM that the packs were trained with, or tiny"
    )
    parser.add_argument(
        "--packs", type=pack_place, required=True, action="append", metavar="[NAME=]DIR",
        help="a prompt pack, a bank, or a directory of them (such as a job's); may be repeated",
    )  # fmt: skip
    encoder = parser.add_argument_group("encoder")
    encoder.add_argument(
        "--encoder",
        type=place,
        metavar="NAME",
        required=speech,
        help="mfcc, log_mel, tiny, or the directory of an encoder with weights",
    )
    encoder.add_argument("--kmeans", type=place, metavar="DIR", help="the encoder's k-means; not needed for tiny")
    encoder.add_argument(
        "--layer", type=int, metavar="N", default=6, help="layer of an encoder with weights (%(default)s)"
    )
    encoder.add_argument("--lowpass", type=float, metavar="HZ", help="low-pass of the encoder, if the packs used one")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--compute", metavar="TYPE", choices=tuple(KINDS), default="float32",
        help=f"type of the LM's kernels: {', '.join(KINDS)} (%(default)s)",
    )  # fmt: skip
    model.add_argument(
        "--max-units", type=int, metavar="N", default=1024, help="most units of an utterance (%(default)s)"
    )
    model.add_argument("--cut", action="store_true", help="truncate longer utterances instead of refusing them")
    model.add_argument(
        "--compilation-cache", default="~/.cache/spjax/xla", type=place_or_none, metavar="DIR",
        help="directory of compiled programs; '' for none (%(default)s)",
    )  # fmt: skip


def load_predictor(options: argparse.Namespace, lm: UnitLM | None = None) -> SpeechPrompt:
    """Load the predictor that the flags describe. `lm`: the unit LM, if it is in memory already.

    Raises:
      StorageError, ValueError: as `SpeechPrompt.load`.
    """
    return SpeechPrompt.load(
        lm or options.lm, options.encoder, options.packs, kmeans=options.kmeans, layer=options.layer,
        lowpass=options.lowpass, compute=options.compute, max_units=options.max_units,
        overlength="cut" if options.cut else "error", compilation_cache=options.compilation_cache,
    )  # fmt: skip
