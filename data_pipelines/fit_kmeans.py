"""A k-means of an encoder's features, fitted on the train split of a data set.

    python -m data_pipelines.fit_kmeans --task=lt_sc --raw=RAW/lt_sc --encoder=mfcc --clusters=100 --out=KM/
    python -m data_pipelines.fit_kmeans --manifest=my.csv --encoder=HUBERT/ --layer=6 --clusters=100 --out=KM/

Features are streamed: of a large corpus, `--utterances` drawn by `--seed` are enough. What it was fitted on stands in
its card.
"""

from __future__ import annotations

import argparse
import collections
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
from data_pipelines.splits import shuffled
from spjax.speech2unit.audio import AudioError, read_audio
from spjax.speech2unit.kmeans import KMeans, fit
from spjax.storage import StorageError, save_kmeans

CLIPS_AT_ONCE = 16  # that the encoder makes batches of
UTTERANCES = 5000  # some hours of speech: hundreds of frames for each of a few hundred clusters


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
) -> KMeans:
    """Fits a k-means on clips.

    Args:
      clips: of the train split.
      raw: root of their data set, local or gs://.
      encoder: `spjax.speech2unit.encoder.Encoder`; its own k-means, if it has one, is not used.
      clusters: C.
      utterances: clips to fit on, drawn by the seed; all if there are fewer.
      seed: of the draw, their order, and the fit.
      passes: how often they are gone through.
      on_error: "stop" at a file that cannot be used, or "skip" it.
      described: name of the data set, for the card.

    Raises:
      AudioError: a file that cannot be used, if on_error is "stop".
      ValueError: fewer frames than clusters.
    """
    chosen = _drawn(clips, utterances, seed)
    refused: dict[str, str] = {}
    with tqdm(total=len(chosen) * passes, desc="features", unit=" utterances") as bar:

        def stream() -> Iterator[np.ndarray]:
            refused.clear()
            groups = [chosen[i : i + CLIPS_AT_ONCE] for i in range(0, len(chosen), CLIPS_AT_ONCE)]
            for group, found in zip(groups, _ahead(lambda group: _features(group, raw, encoder), groups), strict=True):
                for clip, features in zip(group, found, strict=True):
                    if isinstance(features, AudioError):
                        if on_error == "stop":
                            raise features
                        refused[clip.id] = str(features)
                    else:
                        yield features
                bar.update(len(group))

        card = {"encoder": encoder.name, "layer": encoder.layer, "fitted_on": _fitted_on(chosen, described)}
        kmeans = fit(stream, clusters, seed=seed, passes=passes, card=card)
    for why in refused.values():
        print(f"refused: {why}", file=sys.stderr)
    kmeans.card["fitted_on"] |= {"refused": len(refused)}
    return kmeans


def _drawn(clips: Sequence[Clip], utterances: int, seed: int) -> list[Clip]:
    return shuffled(sorted(clips, key=lambda clip: clip.id), seed)[:utterances]


def _fitted_on(clips: Sequence[Clip], described: str) -> dict[str, Any]:
    return {"data": described, "split": "train", "utterances": len(clips), "clips": parts.clips_hash(clips)}


def _features(clips: Sequence[Clip], raw: epath.PathLike, encoder: Any) -> list[np.ndarray | AudioError]:
    """float32 [F, D] of each clip, or why it was refused."""
    found: list[Any] = []
    for clip in clips:
        try:
            found.append(read_audio(epath.Path(raw) / clip.path, clip.start, clip.duration).wave)
        except AudioError as error:
            found.append(error)
    rows = [row for row, wave in enumerate(found) if not isinstance(wave, AudioError)]
    for row, features in zip(rows, encoder.features([found[row] for row in rows]) if rows else [], strict=True):
        found[row] = features
    return found


def _ahead(function: Callable[[Any], Any], items: Iterable[Any], threads: int = 2) -> Iterator[Any]:
    """The function's results in order, some computed ahead while what came before is used."""
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
    """How a k-means is fitted, here and in `data_pipelines.extract`."""
    group = parser.add_argument_group("fitting k-means")
    group.add_argument("--utterances", type=int, default=UTTERANCES, help="at most so many, drawn (%(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of the draw and the fit (%(default)s)")


def fit_to(directory: epath.PathLike, data: data_flags.DataSet, args: argparse.Namespace) -> KMeans:
    """Fits as the flags say and writes the directory, local or gs://; one that was fitted in the same way is kept.

    Raises:
      AudioError, ValueError: as `fit_kmeans`.
      StorageError: the directory holds something else.
    """
    encoder = parts.load_encoder(args.encoder, None, args.layer, args.plain_chunks, args.lowpass)
    chosen = _drawn(data.splits["train"], args.utterances, args.seed)
    if (epath.Path(directory) / "card.json").exists():
        kmeans = parts.load_centroids(os.fspath(directory))
        wanted = {**_fitted_on(chosen, data.task.name), "seed": args.seed}
        same = wanted.items() <= kmeans.card["fitted_on"].items() and len(kmeans.centroids) == args.clusters
        if not same or (kmeans.card["encoder"], kmeans.card["layer"]) != (encoder.name, encoder.layer):
            raise StorageError(
                f"{directory} holds a k-means that was fitted in another way ({kmeans.card}): remove it, or give it as "
                "it is by --kmeans"
            )
        print(f"k-means: {directory} is kept")
        return kmeans
    kmeans = fit_kmeans(
        data.splits["train"],
        data.raw,
        encoder,
        clusters=args.clusters,
        utterances=args.utterances,
        seed=args.seed,
        on_error=args.on_error,
        described=data.task.name,
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
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.fit_kmeans",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    data_flags.add_data_flags(parser)
    parser.add_argument("--out", required=True, help="directory of the k-means to make (local or gs://)")
    parser.add_argument("--clusters", type=int, default=100, help="how many (%(default)s)")
    data_flags.add_encoder_flags(parser)
    add_fit_flags(parser)
    args = parser.parse_args(argv)
    try:
        fit_to(args.out, data_flags.chosen(args), args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
