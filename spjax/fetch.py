"""`python -m spjax.fetch gslm_hubert100`: download published models and data sets, verify and convert them.

OUT will hold `hubert/`, `kmeans/` and `unit_lm/` in the formats of spjax (docs/design.md) or `raw/`, the root of a
data set; `downloads/`, the files as published; and `fetched.json`, the URL of each.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spjax import process

    process.run("spjax.fetch")

import dataclasses
import json
import os
import shutil
import sys
import tempfile
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from spjax.command_line import Parser, local_output, local_path
from spjax.convert import ConvertError
from spjax.convert.checkpoint import read_checkpoint
from spjax.convert.fairseq import import_unit_lm
from spjax.convert.hubert import import_hubert
from spjax.convert.pgslm import F0_BINS, import_pgslm, read_f0_edges
from spjax.convert.sklearn import import_kmeans
from spjax.io import KMeans, StorageError, save_kmeans, save_unit_lm
from spjax.io.download import FetchError, download, unpack
from spjax.io.encoders import save_encoder
from spjax.io.files import write_file

CACHE = "~/.cache/spjax"
ENCODER, LAYER = "hubert_base_ls960", 6  # of GSLM's k-means
DOWNLOADS, RECORD = "downloads", "fetched.json"

_F0_COUNT = 32  # f0 bins of the published discrete pGSLM


@dataclasses.dataclass(frozen=True)
class File:
    """A published file and how it is converted.

    Attributes:
      url: where it was published.
      kind: "hubert", "kmeans", "unit_lm" (an archive of checkpoint_best.pt and dict.txt), "f0_bins" (only validated),
        "pgslm" (a checkpoint; the f0_bins of a discrete one come first), "archive" (.tar.gz) or "plain" (kept as it
        is).
      into: path below OUT of the converted product; empty for "f0_bins" and "plain".
      name: path below the downloads; empty for the last part of the URL.
      sha256: hex, if the publisher provides it.
      encoder: name of the encoder, or of the one whose features a k-means is of.
      layer: its layer, of a k-means.
    """

    url: str
    kind: str
    into: str = ""
    name: str = ""
    sha256: str | None = None
    encoder: str = ENCODER
    layer: int = LAYER

    @property
    def filename(self) -> str:
        """File name on disk."""
        return self.name or self.url.rpartition("/")[2]

    @property
    def product(self) -> str:
        """Path below OUT of the converted product, or of the file."""
        return self.into or f"{DOWNLOADS}/{self.filename}"


@dataclasses.dataclass(frozen=True)
class FetchSet:
    """Files that belong together, fetched by one name."""

    name: str
    about: str
    files: tuple[File, ...]
    place: str = "models"  # folder of the cache
    then: str = ""  # commands that convert files that are kept as they are; {out} is OUT

    def default_out(self) -> Path:
        """The default of --out."""
        return Path(CACHE).expanduser() / self.place / self.name


_MODELS = "https://dl.fbaipublicfiles.com"
_TWIST = f"{_MODELS}/textless_nlp/twist"
_MHUBERT = f"{_TWIST}/speech_tokenizer/mhubert_base_25hz_cp_mls_cv_sp_fisher"
_GSLM, _PGSLM = f"{_MODELS}/textless_nlp/gslm/hubert", f"{_MODELS}/textless_nlp/pgslm"
_SPEECH_COMMANDS = "http://download.tensorflow.org/data"

_HUBERT = File(
    f"{_MODELS}/hubert/hubert_base_ls960.pt",
    "hubert",
    "hubert",
    sha256="1703cf8d2cdc76f8c046f5f6a9bcd224e0e6caf4744cad1a1f4199c32cac8c8d",
)
_KMEANS = {
    clusters: File(f"{_GSLM}/km{clusters}/km.bin", "kmeans", "kmeans", f"km{clusters}.bin", sha256)
    for clusters, sha256 in {
        50: "d01a7d5bc2c54b7b5f25f321ba525b4d230b06e3927f90bad0394198bc89f494",
        100: "f14a3104615485381fc489701d6761c9abbdbb0d43607cf55518a1e2891023fe",
        200: "b3c46c9cdd1707ad852dd53c359aa73942e79d53c432a9a8a419ed046408024b",
        500: "411c8668e1314751404f58636f935fc73540a6793890435da4a8ffadf157398e",
    }.items()
}


def _unit_lm(clusters: int) -> File:
    return File(f"{_GSLM}/lm_km{clusters}/hubert{clusters}_lm.tgz", "unit_lm", "unit_lm")


def _pgslm(kind: str) -> FetchSet:
    checkpoint = File(f"{_PGSLM}/ulm_checkpoints/{kind}_shift_1_1.pt", "pgslm", "unit_lm")
    edges = File(f"{_PGSLM}/vocoder/blizzard2013/{F0_BINS}", "f0_bins")
    about = f"pGSLM: language model of HuBERT's 100 units, durations and f0; {kind.replace('_', ' ')}"
    return FetchSet(f"pgslm_{kind}", about, (edges, checkpoint) if kind.startswith("discrete") else (checkpoint,))


def _twist(size: str) -> FetchSet:
    files = (File(f"{_TWIST}/lms/TWIST-{size}.zip", "plain"),)
    folder = f"{{out}}/{DOWNLOADS}/TWIST-{size}"
    convert = f"python -m spjax.convert unit_lm {folder} {{out}}/unit_lm --kmeans=KM"
    then = f"python -m zipfile -e {folder}.zip {folder}\n{convert}"
    return FetchSet(f"twist_{size.lower()}", f"TWIST {size}: language model of mhubert25hz's units", files, then=then)


def _repository(name: str, about: str, repository: str) -> FetchSet:
    url = f"https://github.com/{repository}/archive/HEAD.tar.gz"
    return FetchSet(name, about, (File(url, "archive", "raw", f"{name}.tar.gz"),), "data")


SETS: dict[str, FetchSet] = {
    entry.name: entry
    for entry in (
        *(
            FetchSet(
                f"gslm_hubert{clusters}",
                f"GSLM: HuBERT, its {clusters} units, their language model",
                (_HUBERT, _KMEANS[clusters], _unit_lm(clusters)),
            )
            for clusters in (50, 100, 200)
        ),
        FetchSet("hubert_base_ls960", "HuBERT base, 960 h of LibriSpeech", (_HUBERT,)),
        *(
            FetchSet(
                f"km{clusters}", f"k-means of {clusters} clusters, HuBERT base layer {LAYER}", (_KMEANS[clusters],)
            )
            for clusters in (50, 100, 200, 500)
        ),
        FetchSet(
            "mhubert25hz",
            "mHuBERT of 25 frames a second and its 500 units of layer 11: the units of TWIST and Slam",
            (
                File(
                    f"{_MHUBERT}.pt",
                    "hubert",
                    "hubert",
                    sha256="edf0f5be2581a568a236aeb2781a5607c5af25806e12f40f7f2391e861fe3cf0",
                    encoder="mhubert_base_25hz",
                ),
                File(
                    f"{_MHUBERT}_L11_km500.bin",
                    "kmeans",
                    "kmeans",
                    sha256="03cc04a9c24fec4285e73e709c485756d8f116aa8e724eac555de6a7cf8d28ad",
                    encoder="mhubert_base_25hz",
                    layer=11,
                ),
            ),
        ),
        *map(_twist, ("350M", "1.3B", "7B")),
        FetchSet(
            "slam",
            "Slam: language model of mhubert25hz's units, from Qwen2.5-0.5B",
            tuple(
                File(f"https://huggingface.co/slprl/slam/resolve/main/{name}", "plain", name=f"slam/{name}")
                for name in ("config.json", "model.safetensors")
            ),
            then=f"python -m spjax.convert unit_lm {{out}}/{DOWNLOADS}/slam {{out}}/unit_lm --kmeans=KM",
        ),
        *map(_pgslm, ("continuous_no_prosody", "continuous_prosody", "discrete_no_prosody", "discrete_prosody")),
        FetchSet(
            "gsc",
            "Google Speech Commands v0.01 and its test set",
            tuple(
                File(f"{_SPEECH_COMMANDS}/{part}.tar.gz", "archive", f"raw/{part}")
                for part in ("speech_commands_v0.01", "speech_commands_test_set_v0.01")
            ),
            "data",
        ),
        _repository("lt_sc", "Lithuanian Speech Commands", "kolesov93/lt_speech_commands"),
        _repository("ar_sc", "Arabic Speech Commands", "ltkbenamer/AR_Speech_Database"),
        _repository("esc50", "ESC-50, environmental sounds", "karolpiczak/ESC-50"),
    )
}


def _check_sha256(path: Path, expected: str | None) -> str:
    """The file's sha256 (hex); an error if it is not the expected one."""
    import pooch  # slow

    found: str = pooch.file_hash(path)
    if expected not in (None, found):
        raise FetchError(
            f"{path} has the sha256 {found}, must be {expected}: it is damaged or another file. "
            "Put the right file there."
        )
    return found


def _make_hubert(file: File, path: Path, target: Path) -> None:
    found = import_hubert(path)
    for note in found.provenance.get("notes", ()):
        print(note)
    save_encoder(target, found.config, found.params, file.encoder, {**found.provenance, "url": file.url})


def _make_kmeans(file: File, path: Path, target: Path) -> None:
    found = import_kmeans(path, file.encoder, file.layer)
    card = {**found.card, "provenance": {**found.card["provenance"], "url": file.url}}
    save_kmeans(target, KMeans(found.centroids, card))


def _make_unit_lm(file: File, path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        folder = unpack(path, Path(temporary, "unpacked"))
        found = {name: sorted(folder.rglob(name)) for name in ("checkpoint_best.pt", "dict.txt")}
        for name, paths in found.items():
            if len(paths) != 1:
                raise FetchError(f"{path} holds {len(paths)} files {name}, must hold one. Fetch it again.")
        checkpoint = read_checkpoint(found["checkpoint_best.pt"][0])
        config, params = import_unit_lm(checkpoint, found["dict.txt"][0])
        for note in checkpoint.remarks():
            print(note)
        save_unit_lm(target, config, params, {**checkpoint.provenance("GSLM (fairseq)"), "url": file.url})


def _make_pgslm(file: File, path: Path, target: Path) -> None:
    checkpoint = read_checkpoint(path)
    config, params, notes = import_pgslm(checkpoint, target.parent / DOWNLOADS / F0_BINS)
    for note in notes:
        print(note)
    save_unit_lm(target, config, params, {**checkpoint.provenance("pGSLM (fairseq)"), "url": file.url})


def _keep(file: File, path: Path, target: Path) -> None:
    if file.kind == "f0_bins":
        read_f0_edges(path, _F0_COUNT)
    if path != target:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")  # which a download resumes
        shutil.copyfile(path, part)
        os.replace(part, target)


_MAKERS: dict[str, Callable[[File, Path, Path], object]] = {
    "hubert": _make_hubert,
    "kmeans": _make_kmeans,
    "unit_lm": _make_unit_lm,
    "archive": lambda file, path, target: unpack(path, target),
    "f0_bins": _keep,
    "plain": _keep,
    "pgslm": _make_pgslm,
}


def _read_record(out: Path) -> dict[str, Any]:
    """The record of OUT: path of a product → URL and sha256; empty if it cannot be read."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _record(out: Path, file: File, sha256: str) -> None:
    record = {**_read_record(out), file.product: {"url": file.url, "sha256": sha256}}
    write_file(out / RECORD, (json.dumps(record, indent=2) + "\n").encode())


def _is_made(out: Path, file: File) -> bool:
    """Whether OUT has the file's product; a product from another URL is refused."""
    product, origin = out / file.product, _read_record(out).get(file.product)
    known = isinstance(origin, dict) and origin.get("url") == file.url
    if file.into and product.exists() and not known:
        raise FetchError(f"{product} exists and was not made from {file.url}. Choose another --out, or remove it.")
    return known and product.exists()


def _by_path(url: str) -> PurePosixPath:
    return PurePosixPath(urllib.parse.urlsplit(url).path)


def _obtain(
    file: File, out: Path, base_url: str | None, source: Path | None, attempts: int, wait: float
) -> tuple[Path, str]:
    """Path and sha256 of the file, from `source`, from an earlier call or from the network."""
    if source is not None:
        for path in (source / file.filename, source / _by_path(file.url).name):
            if path.is_file():
                return path, _check_sha256(path, file.sha256)
        print(f"{source} does not hold {file.filename}")
    path = out / DOWNLOADS / file.filename
    if not path.exists():
        url = file.url if base_url is None else f"{base_url.rstrip('/')}{_by_path(file.url)}"
        download(url, path, sha256=file.sha256, attempts=attempts, wait=wait)
    return path, _check_sha256(path, file.sha256)


def _make(file: File, path: Path, sha256: str, out: Path) -> None:
    """Make a file's product, and record its origin."""
    if file.into:
        # Recorded first: a product without a record would be refused, a record without a product is ignored.
        _record(out, file, sha256)
    try:
        _MAKERS[file.kind](file, path, out / file.product)
    except (ConvertError, FetchError) as error:
        if file.sha256 is None and path.parent == out / DOWNLOADS:  # such as an error page of the server
            bad = path.with_name(f"{path.name}.bad")
            os.replace(path, bad)
            raise FetchError(
                f"{error} {path} was renamed to {bad.name}; the same command downloads it again."
            ) from error
        raise
    if not file.into:
        _record(out, file, sha256)


def fetch(
    entry: str | FetchSet,
    out: str | Path | None = None,
    *,
    base_url: str | None = None,
    source: str | Path | None = None,
    attempts: int = 5,
    wait: float = 1.0,
) -> Path:
    """Download, verify and convert a set of published files; existing products are kept.

    Args:
      entry: name of one of `SETS`, or a FetchSet.
      out: output directory; None for the cache (`FetchSet.default_out`).
      base_url: a mirror, with the files under their published paths.
      source: folder with files that were downloaded by hand; missing ones are downloaded.
      attempts: see `download`.
      wait: see `download`.

    Returns:
      The directory, with `hubert`, `kmeans`, `unit_lm`, `raw` or `downloads` in it.

    Raises:
      FetchError: an unknown name, a failed download, another sha256, or another product in its place.
      ConvertError: a file with unexpected contents.
    """
    if isinstance(entry, str):
        if entry not in SETS:
            raise FetchError(f"{entry!r:.40} is unknown. Known are {', '.join(SETS)}.")
        entry = SETS[entry]
    out = Path(out).expanduser() if out is not None else entry.default_out()
    folder = Path(source).expanduser() if source is not None else None
    if folder is not None and not folder.is_dir():
        raise FetchError(f"--from={folder} is not a folder.")
    missing = [file for file in entry.files if not _is_made(out, file)]
    if not missing:
        print(f"{entry.name} is in {out} already")
        return out
    for number, file in enumerate(missing):
        try:
            path, sha256 = _obtain(file, out, base_url, folder, attempts, wait)
        except FetchError as error:  # lists all files, for those who copy them by hand
            others = [f"{later.url} to {out / DOWNLOADS / later.filename}" for later in missing[number + 1 :]]
            raise FetchError(f"{error} Also needed: {'; '.join(others)}." if others else str(error)) from error
        print(f"{path}: sha256 {sha256}{'' if file.sha256 else ' (the publisher provides none to compare)'}")
        _make(file, path, sha256, out)
        print(f"{out / file.product}: {f'made from {path.name}' if file.into else 'kept as it is'}")
    if entry.then:
        print(f"Convert it; KM is the k-means of `python -m spjax.fetch mhubert25hz`:\n{entry.then.format(out=out)}")
    return out


def by_hand(name: str) -> str:
    """Instructions for putting the files of a set in place by hand."""
    entry = SETS[name]
    out = entry.default_out()
    missing = [file for file in entry.files if not (out / file.product).exists()]
    lines = [f"  {file.url}\n    to {out / DOWNLOADS / file.filename}" for file in missing]
    return "\n".join(
        [
            "Put these files there, then give the same command again, which converts them:",
            *lines,
            f"Or, on a machine with a network: python -m spjax.fetch {name} --out=DIR, and copy DIR to {out}.",
        ]
    )


def _listing() -> str:
    lines = []
    for entry in SETS.values():
        lines.append(f"{entry.name}: {entry.about}")
        lines += [f"    {file.url}\n        sha256 {file.sha256 or 'not published'}" for file in entry.files]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
      arguments: command-line arguments; None for sys.argv.

    Raises:
      SystemExit: with a message, if something fails.
    """
    parser = Parser(
        prog="python -m spjax.fetch",
        description="""  %(prog)s --list
  %(prog)s gslm_hubert100
  %(prog)s gslm_hubert100 --out=models/gslm_hubert100

Download published models and data sets, verify and convert them. Giving the same command again resumes an interrupted
download.""",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help=f"one of {', '.join(SETS)}")
    parser.add_argument(
        "--out", metavar="DIR", type=local_output, help=f"output directory (default: {CACHE}/models/NAME, or data/NAME)"
    )
    parser.add_argument("--base-url", metavar="URL", help="a mirror with the files under their published paths")
    parser.add_argument(
        "--from", dest="source", metavar="FOLDER", type=local_path, help="folder with files downloaded by hand"
    )
    parser.add_argument("--list", action="store_true", help="list every set with its files and exit")
    options = parser.parse_args(arguments)
    if options.list:
        print(_listing())
        return
    if options.name is None:
        parser.error("give the NAME of a set; --list shows them all")
    try:
        print(fetch(options.name, options.out, base_url=options.base_url, source=options.source))
    except (FetchError, ConvertError, StorageError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(130)
