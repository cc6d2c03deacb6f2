"""`python -m spjax.convert KIND SRC OUT`: import checkpoints of other projects (`--help` lists the kinds)."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spjax import process

    process.run("spjax.convert.__main__")

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from spjax.command_line import Parser, local_path, output, place
from spjax.convert import ConvertError, fairseq, hubert, pgslm, sklearn, whisper
from spjax.convert.checkpoint import Checkpoint, read_checkpoint
from spjax.convert.options import parse
from spjax.io import StorageError, kinds, places, read_unit_lm, save_encoder, save_kmeans, save_pack, save_unit_lm
from spjax.models.config import UnitLMConfig
from spjax.tasks import TASKS
from spjax.types import Params


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m spjax.convert",
        description="Import checkpoints of other projects. Strict: every tensor must be known. Safe: no code named "
        "in a file is imported or run, and torch is not needed.",
    )
    jobs = parser.add_subparsers(dest="job", required=True)

    lm = jobs.add_parser(
        "unit_lm",
        help="fairseq GSLM checkpoint -> unit LM directory",
        description="Import a fairseq unit LM of GSLM's architecture, in float32 or half precision.",
        epilog="example: python -m spjax.convert unit_lm hubert100_lm/checkpoint_best.pt lms/gslm",
    )
    lm.add_argument("source", metavar="SRC.pt", type=local_path, help="fairseq checkpoint")
    lm.add_argument("out", metavar="OUT", type=output, help="directory to write: config.json and model.safetensors")
    lm.add_argument(
        "--dict", metavar="dict.txt", type=local_path, help="the model's dictionary (default: beside SRC.pt)"
    )

    streams = jobs.add_parser(
        "pgslm",
        help="fairseq pGSLM checkpoint -> unit LM directory",
        description="Import a multi-stream LM of units, durations and f0: discrete or continuous, with prosody input "
        "or without.",
        epilog="example: python -m spjax.convert pgslm discrete_prosody_shift_1_1.pt lms/pgslm "
        f"--f0-bins={pgslm.F0_BINS}",
    )
    streams.add_argument("source", metavar="SRC.pt", type=local_path, help="fairseq checkpoint")
    streams.add_argument(
        "out", metavar="OUT", type=output, help="directory to write: config.json and model.safetensors"
    )
    streams.add_argument(
        "--f0-bins",
        metavar="FILE.th",
        type=local_path,
        help=f"edges of a discrete model's f0 bins (default: {pgslm.F0_BINS} beside SRC.pt)",
    )

    prompt = jobs.add_parser(
        "prompt",
        help="SpeechPrompt v2 prompt checkpoint -> prompt pack",
        description="Import a trained prompt. The pack is bound to the unit LM it was trained with.",
        epilog="example: python -m spjax.convert prompt checkpoint_best.pt packs/fsc --lm=lms/gslm --task=fsc "
        "--verbalizer=verbalizer.json",
    )
    prompt.add_argument("source", metavar="SRC.pt", type=local_path, help="prompt checkpoint")
    prompt.add_argument("out", metavar="OUT", type=output, help="directory to write: card.json and prompt.safetensors")
    prompt.add_argument(
        "--lm", metavar="LM", type=place, required=True, help="imported unit LM that it was trained with"
    )
    prompt.add_argument(
        "--task",
        metavar="TASK",
        type=place,
        help=f"slots and labels: {', '.join(TASKS)}, or a .json file "
        '{"name", "slots": [{"name", "labels"}], "metric"} (default: one slot with the labels of --verbalizer)',
    )
    prompt.add_argument(
        "--verbalizer",
        metavar="verbalizer.json",
        type=local_path,
        help="written by the original code beside its data: label -> unit, or class number of a learnable verbalizer "
        "(default: the class numbers of the task; without a task the labels are numbers)",
    )
    prompt.add_argument(
        "--kind",
        choices=("learnable", "frequency", "random", "identity"),
        help="name of the rule that chose the units (default: learnable if the checkpoint holds a matrix, else "
        "frequency, or identity without --verbalizer)",
    )
    prompt.add_argument(
        "--slots", metavar="K", type=int, default=1, help="labels of an utterance, without --task (default: 1)"
    )
    prompt.add_argument(
        "--data",
        metavar="RECORDS",
        type=place,
        help="unit records of the task: allow only the label combinations of their train split",
    )

    kmeans = jobs.add_parser(
        "kmeans",
        help="scikit-learn k-means (km.bin), or centroids in .npy or .pt -> k-means directory",
        description="Import the centroids of a MiniBatchKMeans or KMeans that joblib pickled, from any scikit-learn; "
        "or an array [clusters, dims] of floats that numpy.save or torch.save wrote.",
        epilog="example: python -m spjax.convert kmeans km.bin kmeans/km100 --encoder=hubert_base_ls960 --layer=6",
    )
    kmeans.add_argument("source", metavar="KM.bin", type=local_path, help="pickle (compressed or not), .npy or .pt")
    kmeans.add_argument(
        "out", metavar="OUT", type=output, help="directory to write: card.json and centroids.safetensors"
    )
    kmeans.add_argument("--encoder", metavar="NAME", required=True, help="encoder of the features it was fitted on")
    kmeans.add_argument("--layer", metavar="N", type=int, help="layer of the encoder; leave out if it has none")

    encoder = jobs.add_parser(
        "hubert",
        aliases=["wav2vec2", "wavlm"],
        help="fairseq or Hugging Face HuBERT, Hugging Face wav2vec2 or WavLM -> encoder directory",
        description="Import a HuBERT, a wav2vec2 or a WavLM; its files say which. Tensors that features do not depend "
        "on (masking, pretraining targets, heads) are left out and listed.",
        epilog="example: python -m spjax.convert hubert hubert_base_ls960.pt huberts/hubert_base_ls960",
    )
    encoder.add_argument(
        "source",
        metavar="SRC",
        type=local_path,
        help="fairseq checkpoint; or Hugging Face's model.safetensors or pytorch_model.bin with config.json beside it, "
        "or the directory of both",
    )

    speech = jobs.add_parser(
        "whisper",
        help="encoder of a Hugging Face Whisper -> Whisper directory",
        description="Import the encoder of a Whisper of any size. The decoder is left out and counted.",
        epilog="example: python -m spjax.convert whisper whisper-tiny.en/ whispers/whisper_tiny_en",
    )
    speech.add_argument(
        "source",
        metavar="SRC",
        type=local_path,
        help="directory of config.json and model.safetensors (in shards or not) or pytorch_model.bin, or such a file",
    )
    for job in (encoder, speech):
        job.add_argument(
            "out", metavar="OUT", type=output, help="directory to write: config.json and model.safetensors"
        )
        job.add_argument("--name", metavar="NAME", help="name of the encoder in records (default: from SRC)")
    for job in (lm, streams):
        job.add_argument("--heads", metavar="H", type=int, help="attention heads, if the checkpoint does not say")
    for job in (lm, streams, prompt, encoder, speech):
        job.add_argument(
            "--option",
            metavar="NAME=VALUE",
            action="append",
            default=[],
            help="an option of the training run that the checkpoint lacks (--option=activation_fn=relu); stored in the "
            "provenance",
        )
    for job in (lm, streams, prompt, kmeans, encoder, speech):
        job.add_argument("--force", action="store_true", help="replace what an earlier import wrote to OUT")
    return parser


def _read(options: argparse.Namespace) -> Checkpoint:
    heads = getattr(options, "heads", None)
    more = [] if heads is None else [f"decoder_attention_heads={heads}"]
    return read_checkpoint(options.source, parse([*options.option, *more]))


def _save_lm(options: argparse.Namespace, config: UnitLMConfig, params: Params, provenance: dict[str, Any]) -> None:
    identity = save_unit_lm(options.out, config, params, provenance)
    kind = "unit" if config.prosody is None else "multi-stream"
    sizes = f"{config.layers} layers, dim {config.dim}, {config.heads} heads, ffn {config.ffn_dim}"
    print(f"{options.out}: {kind} LM of {config.num_params:,} parameters ({sizes}, {config.vocab_size} symbols)")
    print(f"hash {identity}")


def _import_unit_lm(options: argparse.Namespace) -> None:
    checkpoint = _read(options)
    config, params = fairseq.import_unit_lm(checkpoint, options.dict)
    for note in checkpoint.remarks():
        print(note)
    _save_lm(options, config, params, checkpoint.provenance("GSLM (fairseq)"))


def _import_pgslm(options: argparse.Namespace) -> None:
    checkpoint = _read(options)
    config, params, notes = pgslm.import_pgslm(checkpoint, options.f0_bins)
    for note in notes:
        print(note)
    _save_lm(options, config, params, checkpoint.provenance("pGSLM (fairseq)"))
    prosody = config.prosody
    assert prosody is not None
    inputs = [name for name in ("duration", "f0") if getattr(prosody, f"{name}_input")]
    duration, f0 = prosody.symbols
    kind = f"discrete ({duration} symbols of duration, {f0} of f0)" if prosody.discrete else "continuous"
    print(f"streams {kind}, prosody inputs: {' and '.join(inputs) or 'none'}")


def _import_prompt(options: argparse.Namespace) -> None:
    if options.slots < 1 or (options.slots > 1 and options.task):
        raise ConvertError(f"--slots={options.slots} must be at least 1, and is not used with --task.")
    config, _, info = read_unit_lm(options.lm)
    params, card, notes = fairseq.import_prompt(
        _read(options),
        config,
        info["hash"],
        task=options.task,
        verbalizer=options.verbalizer,
        kind=options.kind,
        slots=options.slots,
        records=options.data,
    )
    pack = save_pack(options.out, params, card)
    slots = ", ".join(f"{slot['name']} ({len(slot['labels'])} labels)" for slot in card["slots"])
    kind = card["verbalizer"]["kind"]
    for note in notes:
        print(note)
    print(f"{options.out}: prompt pack of {pack.card['parameters']:,} parameters, {kind} verbalizer, slots {slots}")


def _import_kmeans(options: argparse.Namespace) -> None:
    kmeans = sklearn.import_kmeans(options.source, options.encoder, options.layer)
    save_kmeans(options.out, kmeans)
    clusters, dim = kmeans.centroids.shape
    layer = "" if options.layer is None else f", layer {options.layer}"
    print(f"{options.out}: k-means of {clusters} clusters, dim {dim}, for {options.encoder}{layer}")
    print(f"id {kmeans.id}")


def _import_encoder(options: argparse.Namespace) -> None:
    made = _ENCODERS[options.job](options.source, parse(options.option))
    name = options.name or made.name
    if name is None:
        raise ConvertError(f"{options.source} is named by a hash. Give the model a name: --name=NAME.")
    identity = save_encoder(options.out, made.config, made.params, name, made.provenance)
    for note in made.provenance.get("notes", ()):
        print(note)
    config = made.config
    sizes = f"{config.layers} layers, dim {config.dim}, {config.heads} heads, ffn {config.ffn_dim}"
    print(f"{options.out}: {made.kind} {name} of {config.num_params:,} parameters ({sizes})")
    left = ", ".join(made.unused[:8]) + (f" and {len(made.unused) - 8} more" if len(made.unused) > 8 else "")
    counted = f"{left} ({made.left_out:,} parameters)" if left else "nothing"
    print(f"read {made.read:,} parameters of {made.title}'s; left out: {counted}")
    print(f"hash {identity}")


_ENCODERS = dict.fromkeys(("hubert", "wav2vec2", "wavlm"), hubert.import_hubert) | {"whisper": whisper.import_whisper}


@places.translate_bucket_errors()
def _check_places(options: argparse.Namespace) -> None:
    """Raise ConvertError if OUT exists, or SRC is a directory that cannot be imported."""
    there = places.at(options.out).exists() or os.path.lexists(options.out)  # in a bucket, or a dangling link
    if there and not options.force:
        raise ConvertError(f"{options.out} exists. Choose another directory, or replace it with --force.")
    if options.source.is_dir() and (options.job not in _ENCODERS or kinds.ours(options.source)):
        what, todo = kinds.describe(options.source)
        todo = "It needs no import." if kinds.ours(options.source) else todo or "Give the file."
        raise ConvertError(f"{options.source} is {what or 'a directory'}, not a file to import. {todo}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run an import.

    Args:
      arguments: command-line arguments; None for sys.argv.

    Raises:
      SystemExit: with a message, if the file is refused.
    """
    options = _parser().parse_args(arguments)
    try:
        _check_places(options)
        imports = {
            "unit_lm": _import_unit_lm,
            "pgslm": _import_pgslm,
            "prompt": _import_prompt,
            "kmeans": _import_kmeans,
            **dict.fromkeys(_ENCODERS, _import_encoder),
        }
        imports[options.job](options)
    except (ConvertError, StorageError, OSError) as error:
        sys.exit(f"error: {error}")
