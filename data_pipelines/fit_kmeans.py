"""Fits a k-means of an encoder's features on the train split of a data set.

    python -m data_pipelines.fit_kmeans --task=lt_sc --raw=RAW/lt_sc --encoder=mfcc --clusters=100 --out=KM/
    python -m data_pipelines.fit_kmeans --manifest=my.csv --encoder=HUBERT/ --layer=6 --clusters=100 --out=KM/
    python -m data_pipelines.fit_kmeans --folders=DIR --encoder=mfcc --out=KM/

Features are streamed. Of a large corpus, `--utterances` drawn by `--seed` are enough. The card records the data and
settings.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from spjax import process

    process.run("data_pipelines.fit_kmeans")

import argparse
import collections
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from etils import epath
from tqdm import tqdm

from data_pipelines import data_flags, parts
from data_pipelines.clips import Clip
from data_pipelines.splits import BuildError, shuffled
from spjax.command_line import Parser, output, positive, seed
from spjax.encoders.audio import AudioError, read_audio
from spjax.encoders.kmeans import KMeans, fit
from spjax.io import StorageError, files, kmeans_store, places, save_kmeans

CLIPS_AT_ONCE = 16  # clips passed to the encoder in one call
UTTERANCES = 5000  # hours of speech: hundreds of frames for each of a few hundred clusters


def fit_kmeans(
    clips: Sequence[Clip],
    raw: epath.PathLike,
    encoder: Any,
    *,
    clusters: int = 100,
    utterances: int = UTTERANCES,
    seed: int = 0,
    passes: int = 1,
    on_error: Literal["stop", "skip"] = "stop",
    described: str = "",
    report_refused: bool = True,
) -> KMeans:
    """Fits a k-means on clips.

    Args:
      clips: of the train split.
      raw: root of their data set, local or gs://.
      encoder: `spjax.encoders.encoder.Encoder`; its k-means, if any, is not used.
      clusters: C.
      utterances: number of clips to fit on, drawn by the seed; all if there are fewer.
      seed: of the draw, the order, and the fit.
      passes: passes over the clips.
      on_error: "stop" at a file that cannot be used, or "skip" it.
      described: name of the data set, for the card.
      report_refused: print the skipped and repaired files with the reasons.

    Raises:
      AudioError: a file that cannot be used, if on_error is "stop".
      ValueError: fewer frames than clusters.
    """
    chosen = _drawn(clips, utterances, seed)
    refused: dict[str, str] = {}
    repaired: dict[str, str] = {}
    with tqdm(total=len(chosen) * passes, desc="features", unit=" utterances", leave=False) as bar:

        def stream() -> Iterator[np.ndarray]:
            refused.clear()
            groups = [chosen[i : i + CLIPS_AT_ONCE] for i in range(0, len(chosen), CLIPS_AT_ONCE)]
            for group, found in zip(
                groups, _ahead(lambda group: _features(group, raw, encoder, repaired), groups), strict=True
            ):
                for clip, features in zip(group, found, strict=True):
                    if isinstance(features, AudioError):
                        if on_error == "stop":
                            raise features
                        refused[clip.id] = str(features)
                    else:
                        yield features
                bar.update(len(group))

        card = {"encoder": encoder.name, "layer": encoder.layer, "fitted_on": _fitted_on(chosen, raw, described)}
        kmeans = fit(stream, clusters, seed=seed, passes=passes, card=card)
    for why in dict.fromkeys(refused.values()) if report_refused else ():
        print(f"refused: {why}", file=sys.stderr)
    for what in dict.fromkeys(repaired.values()) if report_refused else ():
        print(f"repaired: {what}", file=sys.stderr)
    kmeans.card["fitted_on"] |= {"refused": len(refused)} | ({"repaired": len(repaired)} if repaired else {})
    return kmeans


def _drawn(clips: Sequence[Clip], utterances: int, seed: int) -> list[Clip]:
    return shuffled(sorted(clips, key=lambda clip: clip.id), seed)[:utterances]


def _fitted_on(clips: Sequence[Clip], raw: epath.PathLike, described: str) -> dict[str, Any]:
    """Returns "fitted_on" of the card: "clips" is a sha256 of the list of clips, "files" of their sizes and times."""
    files = hashlib.sha256(parts.file_stats(raw, [clip.path for clip in clips]).tobytes()).hexdigest()
    known = {"data": described, "split": "train", "utterances": len(clips)}
    return {**known, "clips": parts.clips_hash(clips), "files": files}


def _differences(kmeans: KMeans, wanted: dict[str, Any]) -> str:
    """Describes how a k-means differs from the wanted settings; "" if it does not."""
    found = {**kmeans.card["fitted_on"], "clusters": len(kmeans.centroids)}
    found |= {name: kmeans.card[name] for name in ("encoder", "layer")}
    others = [name for name in wanted if found.get(name) != wanted[name]]
    plain = [f"{name}: {found.get(name)}, now {wanted[name]}" for name in others if name not in ("clips", "files")]
    if plain or not others:  # other settings imply other clips, which need no mention
        return "; ".join(plain)
    return "other clips" if "clips" in others else "audio files that changed since then, or were not recorded"


def _features(
    clips: Sequence[Clip], raw: epath.PathLike, encoder: Any, repaired: dict[str, str]
) -> list[np.ndarray | AudioError]:
    """Returns float32 [F, D] of each clip, or the error that refused it; adds repairs to `repaired` by id."""
    found: list[Any] = []
    for clip in clips:
        try:
            audio = read_audio(epath.Path(raw) / clip.path, clip.start, clip.duration, encoder.least)
            found.append(audio.wave)
            if audio.repairs:
                repaired[clip.id] = f"{clip.path}: {'; '.join(audio.repairs)}"
        except AudioError as error:
            found.append(error)
    rows = [row for row, wave in enumerate(found) if not isinstance(wave, AudioError)]
    for row, features in zip(rows, encoder.features([found[row] for row in rows]) if rows else [], strict=True):
        found[row] = features
    return found


def _ahead(function: Callable[[Any], Any], items: Iterable[Any], threads: int = 2) -> Iterator[Any]:
    """Yields the function's results in order, computing a few ahead in threads."""
    waiting: collections.deque[Future[Any]] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# ---- the command line


def add_fit_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the k-means fit, shared with `data_pipelines.extract`."""
    group = parser.add_argument_group("fitting k-means")
    group.add_argument("--utterances", metavar="N", type=positive, default=UTTERANCES, help="most, drawn (%(default)s)")
    group.add_argument("--seed", metavar="N", type=seed, default=0, help="of the draw and the fit (%(default)s)")


def fit_to(
    directory: epath.PathLike,
    data: data_flags.DataSet,
    args: argparse.Namespace,
    *,
    overwrite: bool = False,
    report_refused: bool = True,
) -> KMeans:
    """Fits a k-means as the flags say and saves it; an existing one with the same settings is kept.

    Args:
      directory: of the k-means, local or gs://.
      data: the data set; its train split is used.
      args: the flags of `add_fit_flags` and of `data_flags`.
      overwrite: replace a k-means with other settings.
      report_refused: see `fit_kmeans`.

    Raises:
      AudioError, ValueError: as `fit_kmeans`; no train split.
      StorageError: the directory holds something else.
    """
    if not data.splits.get("train"):
        raise BuildError(
            f"{data.task.name} has no train split to fit a k-means on: give an existing k-means "
            "by --kmeans of data_pipelines.extract"
        )
    encoder = parts.load_encoder(args.encoder, None, args.layer, args.plain_chunks, args.lowpass)
    chosen = _drawn(data.splits["train"], args.utterances, args.seed)
    if (epath.Path(directory) / "card.json").exists():
        kmeans = parts.load_centroids(os.fspath(directory))
        wanted = {"encoder": encoder.name, "layer": encoder.layer, "clusters": args.clusters, "seed": args.seed}
        other = _differences(kmeans, wanted | _fitted_on(chosen, data.raw, data.task.name))
        if not other:
            print(f"k-means: {directory} is kept")
            return kmeans
        if not overwrite:
            raise StorageError(
                f"{directory} holds a k-means with other settings ({other}): replace it (--overwrite), or "
                "use it by --kmeans of data_pipelines.extract"
            )
    files.check_replaceable(places.at(directory), kmeans_store.FILES)  # before the work
    kmeans = fit_kmeans(
        data.splits["train"],
        data.raw,
        encoder,
        clusters=args.clusters,
        utterances=args.utterances,
        seed=args.seed,
        on_error=args.on_error,
        described=data.task.name,
        report_refused=report_refused,
    )
    if "://" in os.fspath(directory):
        with tempfile.TemporaryDirectory() as folder:
            save_kmeans(Path(folder) / "kmeans", kmeans)
            epath.Path(directory).mkdir(parents=True, exist_ok=True)
            for path in sorted(epath.Path(folder, "kmeans").iterdir(), reverse=True):  # the card last
                path.copy(epath.Path(directory) / path.name)
    else:
        save_kmeans(os.fspath(directory), kmeans)
    print(f"k-means: {directory}, {len(kmeans.centroids)} centroids of {kmeans.card['fitted_on']['frames']:,} frames")
    return kmeans


def main(argv: Sequence[str] | None = None) -> None:
    """The command line (`--help`)."""
    parser = Parser(prog="python -m data_pipelines.fit_kmeans", description=__doc__)
    parser.add_argument("--out", metavar="DIR", type=output, required=True, help="k-means to make (local or gs://)")
    parser.add_argument("--clusters", metavar="N", type=positive, default=100, help="number (%(default)s)")
    data_flags.add_data_flags(parser)
    data_flags.add_encoder_flags(parser)
    add_fit_flags(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a k-means with other settings")
    args = parser.parse_args(argv)
    try:
        fit_to(args.out, data_flags.chosen(args), args, overwrite=args.overwrite)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
