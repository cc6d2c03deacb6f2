"""`python -m spjax.convert KIND SRC OUT`: import checkpoints of other projects (`--help` lists the kinds)."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spjax import process

    process.run("spjax.convert.__main__")

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from spjax.command_line import Parser, local_path, output, place
from spjax.convert import ConvertError, decoders, fairseq, hubert, pgslm, sklearn, speechprompt, whisper
from spjax.convert.checkpoint import Checkpoint, read_checkpoint
from spjax.convert.options import parse
from spjax.io import (
    StorageError,
    kinds,
    load_kmeans,
    places,
    read_unit_lm,
    save_encoder,
    save_kmeans,
    save_pack,
    save_unit_lm,
)
from spjax.models.config import UnitLMConfig
from spjax.types import Params


def _read(options: argparse.Namespace) -> Checkpoint:
    heads = getattr(options, "heads", None)
    more = [] if heads is None else [f"decoder_attention_heads={heads}"]
    return read_checkpoint(options.source, parse([*options.option, *more]))


def _save_lm(options: argparse.Namespace, config: UnitLMConfig, params: Params, provenance: dict[str, Any]) -> None:
    if getattr(options, "kmeans", None):
        kmeans = load_kmeans(options.kmeans)
        units = len(kmeans.centroids)
        if units != config.num_units:
            raise ConvertError(
                f"--kmeans={options.kmeans} has {units} units, the LM {config.num_units}. Give that of its units."
            )
        made = {"encoder": kmeans.card["encoder"], "layer": kmeans.card["layer"] or 0, "kmeans": kmeans.id}
        provenance = {**provenance, "units": {**made, "vocabulary": units}}
    identity = save_unit_lm(options.out, config, params, provenance)
    kind = "unit" if config.prosody is None else "multi-stream"
    sizes = f"{config.layers} layers, dim {config.dim}, {config.heads} heads, ffn {config.ffn_dim}"
    print(f"{options.out}: {kind} LM of {config.num_params:,} parameters ({sizes}, {config.vocab_size} symbols)")
    print(f"hash {identity}")


def _import_unit_lm(options: argparse.Namespace) -> None:
    tokens = decoders.Tokens(options.units, options.first_unit, options.pad, options.opener, options.unit_tokens)
    if options.source.is_dir():
        if options.dict is not None or options.heads is not None:
            raise ConvertError(f"{options.source} is a directory, whose files say it. Leave out --dict and --heads.")
        config, params, origin, notes = decoders.import_decoder(options.source, tokens, parse(options.option))
        for note in notes:
            print(note)
        _save_lm(options, config, params, origin)
        return
    if tokens != decoders.Tokens():
        raise ConvertError(f"{options.source} is a file, whose dict.txt names the units. Leave out the tokens' flags.")
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
    params, card, notes = speechprompt.import_prompt(
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
    folders = (*_ENCODERS, *(("unit_lm",) if (options.source / "config.json").is_file() else ()))
    if options.source.is_dir() and (options.job not in folders or kinds.ours(options.source)):
        what, todo = kinds.describe(options.source)
        todo = "It needs no import." if kinds.ours(options.source) else todo or "Give the file."
        raise ConvertError(f"{options.source} is {what or 'a directory'}, not a file to import. {todo}")


class _Kind(NamedTuple):
    """A kind of checkpoint: its help, the metavar and help of SRC, names in `_FLAGS`, and the import."""

    title: str
    about: str
    source: tuple[str, str]
    flags: tuple[str, ...]
    run: Callable[[argparse.Namespace], None]


_FAIRSEQ = ("SRC.pt", "fairseq checkpoint")
_KINDS = {
    "unit_lm": _Kind(
        "fairseq GSLM checkpoint, or a Hugging Face LLaMA, Mistral, Qwen2 or OPT -> unit LM directory",
        """  %(prog)s hubert100_lm/checkpoint_best.pt lms/gslm
  %(prog)s slam/ lms/slam

Import a fairseq unit LM of GSLM's architecture; or the unit rows of a decoder in Hugging Face's format, slamkit's and
TWIST's included. In float32 or half precision.""",
        ("SRC", "fairseq checkpoint; or directory of config.json and model.safetensors or pytorch_model.bin"),
        ("dict", "units", "first-unit", "pad", "opener", "unit-tokens", "kmeans", "heads", "option"),
        _import_unit_lm,
    ),
    "pgslm": _Kind(
        "fairseq pGSLM checkpoint -> unit LM directory",
        f"""  %(prog)s discrete_prosody_shift_1_1.pt lms/pgslm --f0-bins={pgslm.F0_BINS}

Import a multi-stream LM of units, durations and f0: discrete or continuous, with prosody input or without.""",
        _FAIRSEQ,
        ("f0-bins", "heads", "option"),
        _import_pgslm,
    ),
    "prompt": _Kind(
        "SpeechPrompt v2 prompt checkpoint -> prompt pack",
        """  %(prog)s best.pt packs/fsc --lm=lms/gslm --task=fsc --verbalizer=verbalizer.json

Import a trained prompt. The pack is bound to the unit LM it was trained with.""",
        ("SRC.pt", "prompt checkpoint"),
        ("lm", "task", "verbalizer", "kind", "slots", "data", "option"),
        _import_prompt,
    ),
    "kmeans": _Kind(
        "scikit-learn k-means (km.bin), or centroids in .npy or .pt -> k-means directory",
        """  %(prog)s km.bin kmeans/km100 --encoder=hubert_base_ls960 --layer=6

Import the centroids of a MiniBatchKMeans or KMeans that joblib pickled, from any scikit-learn; or an array
[clusters, dims] of floats that numpy.save or torch.save wrote.""",
        ("KM.bin", "pickle (compressed or not), .npy or .pt"),
        ("encoder", "layer"),
        _import_kmeans,
    ),
    "hubert": _Kind(
        "HuBERT of fairseq; HuBERT, wav2vec2 or WavLM of Hugging Face -> encoder directory",
        """  %(prog)s SRC OUT

Import a HuBERT of fairseq, or a HuBERT, wav2vec2 or WavLM of Hugging Face; its files say which. Tensors that features
do not depend on (masking, pretraining targets, heads) are left out and listed.""",
        (
            "SRC",
            "fairseq checkpoint; or directory of Hugging Face's config.json and model.safetensors or pytorch_model.bin",
        ),
        ("name", "option"),
        _import_encoder,
    ),
    "whisper": _Kind(
        "encoder of a Hugging Face Whisper -> Whisper directory",
        """  %(prog)s whisper-tiny.en/ whispers/whisper_tiny_en

Import the encoder of a Whisper of any size. The decoder is left out and counted.""",
        (
            "SRC",
            "directory of config.json and model.safetensors (in shards or not) or pytorch_model.bin, or such a file",
        ),
        ("name", "option"),
        _import_encoder,
    ),
}
_KINDS |= dict.fromkeys(("wav2vec2", "wavlm"), _KINDS["hubert"])  # other names of it
_FLAGS: dict[str, dict[str, Any]] = {
    "dict": {"metavar": "dict.txt", "type": local_path, "help": "the model's dictionary (default: beside SRC.pt)"},
    **{
        name: {"metavar": "N", "type": int, "help": f"{text} (directories only; default: as the files say)"}
        for name, text in (
            ("units", "number of units"),
            ("first-unit", "token of unit 0"),
            ("pad", "padding token"),
            ("opener", "token that opens a row"),
        )
    },
    "unit-tokens": {
        "metavar": "NAME",
        "help": "the units' tokens as the tokenizer names them, with {} for the number: '<|u{}|>'",
    },
    "kmeans": {
        "metavar": "KM",
        "type": place,
        "help": "k-means of the units that it was trained on: a job refuses other units (default: any are taken)",
    },
    "f0-bins": {
        "metavar": "FILE.th",
        "type": local_path,
        "help": f"edges of a discrete model's f0 bins (default: {pgslm.F0_BINS} beside SRC.pt)",
    },
    "heads": {"metavar": "H", "type": int, "help": "attention heads, if the checkpoint does not say"},
    "lm": {"metavar": "LM", "type": place, "required": True, "help": "imported unit LM that it was trained with"},
    "task": {
        "metavar": "TASK",
        "type": place,
        "help": 'slots and labels: a task that spjax knows, or a .json file {"name", "slots": [{"name", "labels"}], '
        '"metric"} (default: one slot with the labels of --verbalizer)',
    },
    "verbalizer": {
        "metavar": "FILE.json",
        "type": local_path,
        "help": "written by the original code beside its data: label -> unit, or class number of a learnable "
        "verbalizer (default: the class numbers of the task; without a task the labels are numbers)",
    },
    "kind": {
        "metavar": "RULE",
        "choices": ("learnable", "frequency", "random", "identity"),
        "help": "rule that chose the units: learnable, frequency, random or identity (default: learnable if the "
        "checkpoint holds a matrix, else frequency, or identity without --verbalizer)",
    },
    "slots": {"metavar": "K", "type": int, "default": 1, "help": "labels of an utterance, without --task (1)"},
    "data": {
        "metavar": "RECORDS",
        "type": place,
        "help": "unit records of the task: allow only the label combinations of their train split",
    },
    "encoder": {"metavar": "NAME", "required": True, "help": "encoder of the features it was fitted on"},
    "layer": {"metavar": "N", "type": int, "help": "layer of the encoder; leave out if it has none"},
    "name": {"metavar": "NAME", "help": "name of the encoder in records (default: from SRC)"},
    "option": {
        "metavar": "NAME=VALUE",
        "action": "append",
        "default": [],
        "help": "option of the training run that the checkpoint lacks, such as activation_fn=relu; kept in the "
        "provenance",
    },
    "force": {"action": "store_true", "help": "replace what an earlier import wrote to OUT"},
}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m spjax.convert",
        description="""  %(prog)s unit_lm hubert100_lm/checkpoint_best.pt lms/gslm
  %(prog)s hubert hubert_base_ls960.pt huberts/hubert_base_ls960
  %(prog)s kmeans km.bin kmeans/km100 --encoder=hubert_base_ls960 --layer=6

Import checkpoints of other projects. Strict: every tensor must be known. Safe: no code named in a file is imported or
run, and torch is not needed. `COMMAND --help` has the flags of a command.""",
    )
    jobs = parser.add_commands()
    for name, kind in _KINDS.items():
        job = jobs.add_parser(name, help=kind.title, description=kind.about)
        job.add_argument("source", metavar=kind.source[0], type=local_path, help=kind.source[1])
        job.add_argument("out", metavar="OUT", type=output, help="directory to write")
        for flag in (*kind.flags, "force"):
            job.add_argument(f"--{flag}", **_FLAGS[flag])
    return parser


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
        _KINDS[options.job].run(options)
    except (ConvertError, StorageError, OSError) as error:
        sys.exit(f"error: {error}")
