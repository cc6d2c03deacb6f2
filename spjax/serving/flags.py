"""The command line's flags that say what to serve: an LM, an encoder, prompt packs."""

from __future__ import annotations

import argparse

from spjax.command_line import pack_place, place, place_or_none
from spjax.serving.frozen import KINDS
from spjax.serving.load import UnitLM
from spjax.serving.predictor import SpeechPrompt


def add_predictor_flags(parser: argparse.ArgumentParser, speech: bool = True) -> None:
    """Flags of what `load_predictor` loads. `speech`: nothing but recordings is answered, so an encoder is required."""
    parser.add_argument(
        "--lm", type=place, required=True, help="directory of the unit LM that the packs were trained with, or tiny"
    )
    parser.add_argument(
        "--encoder", type=place, required=speech, help="mfcc, log_mel, tiny, or the directory of a HuBERT or Whisper"
    )
    parser.add_argument("--kmeans", type=place, help="directory of the encoder's k-means; --encoder=tiny has its own")
    parser.add_argument("--layer", type=int, default=6, help="of a HuBERT or Whisper (%(default)s)")
    parser.add_argument("--lowpass", type=float, metavar="HZ", help="of the encoder, if the packs were trained so")
    parser.add_argument(
        "--packs", type=pack_place, required=True, action="append", metavar="[NAME=]DIR",
        help="a prompt pack, a bank, or a directory of them (a job's, say); may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--compute", choices=tuple(KINDS), default="float32", help="the LM's kernels (%(default)s); units do not change"
    )
    parser.add_argument("--max-units", type=int, default=1024, help="most units of an utterance (%(default)s)")
    parser.add_argument("--cut", action="store_true", help="answer for the beginning of longer ones")
    parser.add_argument(
        "--compilation-cache", default="~/.cache/spjax/xla", type=place_or_none, metavar="DIR",
        help="where compiled programs are kept; '' for nowhere (%(default)s)",
    )  # fmt: skip


def load_predictor(options: argparse.Namespace, lm: UnitLM | None = None) -> SpeechPrompt:
    """The predictor that the flags describe. `lm`: the unit LM, where it is in memory already.

    Raises:
      StorageError, ValueError: as `SpeechPrompt.load`.
    """
    return SpeechPrompt.load(
        lm or options.lm, options.encoder, options.packs, kmeans=options.kmeans, layer=options.layer,
        lowpass=options.lowpass, compute=options.compute, max_units=options.max_units,
        overlength="cut" if options.cut else "error", compilation_cache=options.compilation_cache,
    )  # fmt: skip
