"""Features → units: fit k-means on a stream of any length, and assign frames to the nearest centroid with JAX."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from spjax.io import KMeans

__all__ = ["KMeans", "Stream", "assign", "assign_frames", "fit"]

Stream = Iterable[np.ndarray] | Callable[[], Iterable[np.ndarray]]  # float [n, D] each; a function restarts the stream

_POOL_BYTES = 64 << 20  # frames that are shuffled together
_START_FRAMES = 20_000  # for initialisation: a few hundred frames per cluster
_START_ITERATIONS = 50
_MOST_ROWS, _FEWEST_ROWS = 1 << 14, 1 << 6  # frames of a batch of `assign_frames`
_MOST_DISTANCES = 1 << 22  # distances of a batch: 16 MiB, 2,048 frames of 2,000 centroids


def assign(features: Float[jax.Array, "*F D"], centroids: Float[jax.Array, "C D"]) -> Int[jax.Array, "*F"]:
    """Index of the nearest centroid of each frame, in float32 at the device's highest precision.

    In bfloat16 about 8 % of HuBERT's units would change.

    Args:
      features: [..., D]
      centroids: [C, D]

    Returns:
      int32 [...], argmin of the squared distance; the first of equally near centroids.
    """
    x, centres = jnp.asarray(features, jnp.float32), jnp.asarray(centroids, jnp.float32)
    dots = jnp.einsum("...d,cd->...c", x, centres, precision=jax.lax.Precision.HIGHEST)
    # |x|² is the same for every centroid, so it is left out.
    return jnp.argmin(jnp.sum(centres * centres, -1) - 2 * dots, -1).astype(jnp.int32)


_jitted_assign = jax.jit(assign)


def assign_frames(features: Float[np.ndarray, "F _"], centroids: Float[np.ndarray, "C D"]) -> Int[np.ndarray, " F"]:
    """`assign` for NumPy arrays, with few compiled shapes and bounded memory.

    Args:
      features: float [F, D]
      centroids: float32 [C, D]

    Returns:
      int32 [F]

    Raises:
      ValueError: the features' width is not the centroids'.
    """
    if features.ndim != 2 or features.shape[1] != centroids.shape[1]:
        raise ValueError(
            f"features {list(features.shape)} do not fit centroids {list(centroids.shape)}: give the k-means that was "
            "fitted on this encoder and layer"
        )
    units = [np.empty(0, np.int32)]
    most = max(_FEWEST_ROWS, min(_MOST_ROWS, 1 << max(1, _MOST_DISTANCES // len(centroids)).bit_length() - 1))
    for start in range(0, len(features), most):
        part = np.asarray(features[start : start + most], np.float32)
        rows = max(_FEWEST_ROWS, 1 << (len(part) - 1).bit_length())
        padded = np.pad(part, ((0, rows - len(part)), (0, 0)))
        units.append(np.asarray(_jitted_assign(padded, centroids))[: len(part)])
    return np.concatenate(units)


def _checked(arrays: Iterable[np.ndarray], dim: int | None) -> Iterator[np.ndarray]:
    """The stream as float32 [n, D], checked to be finite and of one width."""
    seen = 0
    for array in arrays:
        frames = np.asarray(array, np.float32)
        if frames.ndim != 2 or frames.shape[1] != (dim or frames.shape[1]) or not frames.shape[1]:
            wanted = f"[frames, {dim}] as those before" if dim else "[frames, D]"
            raise ValueError(f"k-means: features after frame {seen} have shape {list(frames.shape)}, must be {wanted}.")
        dim = frames.shape[1]
        finite = np.isfinite(frames).all(1)
        if not finite.all():
            raise ValueError(
                f"k-means: frame {seen + int(np.argmin(finite))} of the features is NaN or infinite. Find the "
                "recording that it comes from, which may be damaged."
            )
        seen += len(frames)
        yield frames


def _pools(arrays: Iterator[np.ndarray], rows: int | None, fewest: int) -> Iterator[np.ndarray]:
    """Regroup the stream into pools [rows, D] (the last one shorter), so that its original chunks do not matter.

    A pool is overwritten by the next.
    """
    pool: np.ndarray | None = None
    filled = 0
    for array in arrays:
        if pool is None:
            size = array.shape[1]
            pool = np.empty((max(rows or _POOL_BYTES // (4 * size), fewest), size), np.float32)
        while len(array):
            taken = array[: len(pool) - filled]
            pool[filled : filled + len(taken)] = taken
            filled, array = filled + len(taken), array[len(taken) :]
            if filled == len(pool):
                yield pool
                filled = 0
    if pool is not None and filled:
        yield pool[:filled]


def _start(frames: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Initial centroids [C, D]: k-means++ and Lloyd's iterations, which leave no cluster empty."""
    from sklearn.cluster import KMeans as Lloyd
    from sklearn.exceptions import ConvergenceWarning

    different = len({hash(row.tobytes()) for row in frames})
    if different < clusters:
        raise ValueError(
            f"k-means of {clusters} clusters: the {len(frames)} frames for initialisation hold {different} different "
            "ones. Give more speech, in shuffled order, or ask for fewer clusters."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        lloyd = Lloyd(clusters, n_init=1, max_iter=_START_ITERATIONS, random_state=seed)
        return lloyd.fit(frames).cluster_centers_


def fit(
    batches: Stream,
    clusters: int,
    *,
    seed: int = 0,
    passes: int = 1,
    card: Mapping[str, Any],
    batch_frames: int = 10_000,
    pool_frames: int | None = None,
) -> KMeans:
    """Fit k-means on a stream of features with scikit-learn's MiniBatchKMeans.

    Frames are collected in pools of a fixed size; each pool is shuffled and split into batches. So memory is bounded,
    and the result depends on the frames, their order and the seed, but not on the stream's chunks or the number of
    cores. The initial centroids come from frames of the first pool: shuffle the recordings of a long corpus (over
    64 MiB of features).

    Args:
      batches: features, float [n, D] each, or a function that starts such a stream.
      clusters: C.
      seed: of the initialisation and the shuffling.
      passes: how often the stream is read.
      card: "encoder" and "layer", optionally "fitted_on" and "provenance" (see `KMeans`). The number of frames, passes
        and the seed are added to "fitted_on".
      batch_frames: frames of a batch; at least `clusters` are used.
      pool_frames: frames of a pool; None for 64 MiB.

    Returns:
      The k-means, centroids float32 [C, D].

    Raises:
      ValueError: fewer (different) frames than clusters; NaN or infinity; features of several widths; a stream that
        can be read only once, with several passes.
    """
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import ThreadpoolController

    if clusters < 1 or passes < 1:
        raise ValueError(f"k-means: clusters={clusters} and passes={passes} must be at least 1.")
    if passes > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"k-means: passes={passes} over a stream that can be read once. Give a function that opens it."
        )
    # One thread, since sums over several threads are rounded in the order in which the threads end.
    one_thread = functools.partial(ThreadpoolController().limit, limits=1)
    rng = np.random.default_rng(seed)
    batch_frames = max(batch_frames, clusters)
    model: MiniBatchKMeans | None = None
    frames = 0
    with tqdm(desc=f"k-means of {clusters}", unit=" frames", unit_scale=True, delay=2, leave=False) as bar:
        for _ in range(passes):
            dim = None if model is None else model.cluster_centers_.shape[1]
            stream = _checked(batches() if callable(batches) else batches, dim)
            for pool in _pools(stream, pool_frames, batch_frames):
                order = rng.permutation(len(pool))
                if model is None:
                    if len(pool) < clusters:
                        raise ValueError(
                            f"k-means of {clusters} clusters: the features hold {len(pool)} frames, fewer than "
                            "clusters. Give more speech or ask for fewer clusters."
                        )
                    with one_thread():
                        start = _start(pool[order[: max(_START_FRAMES, 40 * clusters)]], clusters, seed)
                    # No reassignment: every cluster has frames after the initialisation.
                    model = MiniBatchKMeans(clusters, init=start, n_init=1, reassignment_ratio=0.0, random_state=seed)
                for first in range(0, len(pool), batch_frames):
                    batch = pool[order[first : first + batch_frames]]
                    with one_thread():
                        model.partial_fit(batch)
                    frames += len(batch)
                    bar.update(len(batch))
    if model is None:
        raise ValueError(f"k-means of {clusters} clusters: the features hold no frames. Give some speech.")
    counted = {"frames": frames // passes, "passes": passes, "seed": seed}
    described = {**card, "fitted_on": {**card.get("fitted_on", {}), **counted}}
    return KMeans(np.ascontiguousarray(model.cluster_centers_, np.float32), described)
