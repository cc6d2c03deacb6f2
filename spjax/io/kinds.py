"""Detects the kind of a path (our directories, other models, archives), for messages about a wrong path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spjax import paths
from spjax.io import places

_DECODERS = ("llama", "mistral", "qwen2", "opt", "speech_language_model")  # as in convert/decoders.py
MAX_JSON = 64 << 20  # bytes; cards of the largest banks take 1 MiB

_OURS = {  # format: its title, the file that describes it, and how to make one
    "spjax-prompt-pack": ("a prompt pack", "card.json", "Give the directory of a trained prompt pack."),
    "spjax-prompt-bank": (
        "a bank of prompt packs",
        "bank.json",
        "Merge packs into one: `python -m spjax.packs merge PACK PACK --out=BANK`.",
    ),
    "spjax-unit-lm": (
        "a unit LM",
        "config.json",
        "Give its directory, or tiny (bundled with spjax); `python -m spjax.convert unit_lm` imports a checkpoint.",
    ),
    "spjax-hubert": (
        "a HuBERT",
        "config.json",
        "Give a HuBERT's directory; `python -m spjax.convert hubert` makes one from a checkpoint.",
    ),
    "spjax-whisper": (
        "a Whisper encoder",
        "config.json",
        "Give a Whisper encoder's directory; `python -m spjax.convert whisper` makes one from Hugging Face's.",
    ),
    "spjax-kmeans": (
        "a k-means",
        "card.json",
        "Give its directory, or tiny (bundled with spjax); `python -m spjax.convert kmeans` imports a km.bin.",
    ),
    "spjax-served": ("an exported artefact (programs for serving)", "card.json", "Its README.md says how to run it."),
}
_CHECKPOINTS = (".pt", ".pth", ".bin", ".th", ".ckpt")  # these and .npz may be valid zip archives
_ARRAYS = (".npy", ".npz", ".pkl", ".joblib")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r:.80} occurs twice")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is not valid JSON")


def load_json(path: str | Path) -> Any:
    """Reads a JSON file: a regular file of at most `MAX_JSON` bytes, with unique keys and finite numbers.

    Raises:
      OSError: missing, not a regular file, or too large.
      ValueError: invalid JSON.
    """
    try:
        text = places.read_limited(path, MAX_JSON).decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_pairs, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():  # lone surrogates cannot be encoded as UTF-8
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def archive(path: Path) -> str | None:
    """Returns a message that says how to unpack `path` if it is an archive, else None."""
    try:
        with places.open_regular(path) as file:
            start = file.read(512) or b""  # some files of /proc return None
    except OSError:
        return None
    kind, command = paths.packed(start), ""
    if start.startswith(paths.ZIP):
        command = f" (`python -m zipfile -e {path.name} DIRECTORY`)"
    elif kind == "a tar archive" or path.suffixes[-2:-1] == [".tar"] or path.suffix == ".tgz":
        command = f" (`tar -xf {path.name}`)"
    return kind and f"{path} is {kind}: unpack it{command}"


def _format(path: Path) -> tuple[str | None, dict[str, Any]]:
    try:
        value = load_json(path) if path.is_file() else None
    except (OSError, ValueError):
        value = None
    value = value if isinstance(value, dict) else {}
    found = value.get("format")
    return found if isinstance(found, str) else None, value


def ours(place: Path) -> bool:
    """Returns whether spjax wrote the directory."""
    return any(_format(place / name)[0] in _OURS for name in ("card.json", "bank.json", "config.json"))


def describe(place: Path) -> tuple[str, str]:
    """Returns the kind of a path and a suggested fix; ("", "") for an unknown kind."""
    if place.is_file():
        if place.suffix in _CHECKPOINTS:
            return "a checkpoint file", "Import it first: `python -m spjax.convert --help` lists the kinds."
        packed = archive(place)
        if place.suffix in _ARRAYS:
            return "a file of arrays", "Import centroids first: `python -m spjax.convert kmeans --help`."
        if packed:
            what, _, todo = packed.removeprefix(f"{place} is ").partition(": ")
            return what, f"{todo[:1].upper()}{todo[1:]}, then give its directory."
        return "a file", "Give the directory that it is in."
    if place.exists() and not place.is_dir():
        return "a pipe or a device", "Give a directory."
    for file in ("card.json", "bank.json", "config.json"):
        found, value = _format(place / file)
        if found in _OURS:
            return _OURS[found][0], ""
        if file == "config.json" and ("model_type" in value or "architectures" in value):
            name = value.get("model_type")
            job = name if name in ("hubert", "wav2vec2", "wavlm", "whisper") else "unit_lm" if name in _DECODERS else ""
            todo = (
                f"Import it first: `python -m spjax.convert {job} {place} OUT`."
                if job
                else "spjax imports only unit LMs, and HuBERT, wav2vec2, WavLM and Whisper encoders."
            )
            return f"a Hugging Face model ({name!s:.40})", todo
    held = sorted(entry.name for entry in place.iterdir()) if place.is_dir() else []
    checkpoints = [name for name in held if name.endswith((".pt", ".pth", ".ckpt"))]
    if checkpoints:
        return (
            f"a directory of checkpoints ({', '.join(checkpoints[:3])})",
            "Import one: `python -m spjax.convert -h`.",
        )
    return "", ""


def mixed_up(path: Path, wanted: str) -> str:
    """Returns the message for a `path` that is not the card of a directory of format `wanted`."""
    place = path.parent
    called, file, suggestion = _OURS.get(wanted, (f"a {wanted} directory", path.name, "Point to one."))
    what, todo = describe(place)
    bank = _OURS["spjax-prompt-bank"][0]
    if what == bank and wanted == "spjax-prompt-pack":
        split = f"{str(place).rstrip('/')}_packs"
        return (
            f"{place} is {bank}, not {called}. Split it first: `python -m spjax.packs split {place} --out={split}`, "
            f"and give one of the packs in {split}."
        )
    if what and what != called:
        return f"{place} is {what}, not {called}. {todo or suggestion}"
    if path.is_file():
        found, _ = _format(path)
        return f'{path} has the format {found!r:.80}, must be "{wanted}". {suggestion}'
    if path.exists():
        return f"{path} is not a file; {place} is not {called}. {suggestion}"
    if not place.exists():
        return f"{path} does not exist, nor does {place}. {suggestion}"
    held = ", ".join(sorted(entry.name for entry in place.iterdir())[:8]) if place.is_dir() else ""
    held = f"it holds {held or 'nothing'}"
    return f"{file} is missing: {path} does not exist, so {place} is not {called} ({held}). {suggestion}"
