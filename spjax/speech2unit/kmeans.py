"""Features → units: k-means fitted on a stream of any length, and the nearest centroid of each frame in JAX."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from spjax.storage import KMeans

__all__ = ["KMeans", "Stream", "assign", "assign_frames", "fit"]

Stream = Iterable[np.ndarray] | Callable[[], Iterable[np.ndarray]]  # float [n, D] each; the function starts it anew

_POOL_BYTES = 64 << 20  # frames that are held and shuffled together
_START_FRAMES = 20_000  # what the start is found on: a few hundred times as many frames as clusters
_START_ITERATIONS = 50
_MOST_ROWS, _FEWEST_ROWS = 1 << 14, 1 << 6  # frames of one computation of `assign_frames`


def assign(features: jax.Array, centroids: jax.Array) -> jax.Array:
    """The nearest centroid of each frame, in float32 at the highest precision of the device.

    In bfloat16 about 8 % of HuBERT's units would change.

    Args:
      features: [..., D]
      centroids: [C, D]

    Returns:
      int32 [...], argmin of the squared distance; of equally near centroids the first.
    """
    x, centres = jnp.asarray(features, jnp.float32), jnp.asarray(centroids, jnp.float32)
    dots = jnp.einsum("...d,cd->...c", x, centres, precision=jax.lax.Precision.HIGHEST)
    # The frame's own |x|² is the same for every centroid.
    return jnp.argmin(jnp.sum(centres * centres, -1) - 2 * dots, -1).astype(jnp.int32)


_jitted_assign = jax.jit(assign)


def assign_frames(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """`assign` on the host's arrays: few compiled shapes whatever the numbers of frames, bounded memory.

    Args:
      features: float [F, D]
      centroids: float32 [C, D]

    Returns:
      int32 [F]

    Raises:
      ValueError: features of another width than the centroids'.
    """
    if features.ndim != 2 or features.shape[1] != centroids.shape[1]:
        raise ValueError(
            f"features {list(features.shape)} do not fit centroids {list(centroids.shape)}: give the k-means that was "
            "fitted on this encoder and layer"
        )
    units = [np.empty(0, np.int32)]
    for start in range(0, len(features), _MOST_ROWS):
        part = np.asarray(features[start : start + _MOST_ROWS], np.float32)
        rows = max(_FEWEST_ROWS, 1 << (len(part) - 1).bit_length())
        padded = np.pad(part, ((0, rows - len(part)), (0, 0)))
        units.append(np.asarray(_jitted_assign(padded, centroids))[: len(part)])
    return np.concatenate(units)


def _checked(arrays: Iterable[np.ndarray], dim: int | None) -> Iterator[np.ndarray]:
    """The stream as float32 [n, D], every number of it finite."""
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
                f"k-means: frame {seen + int(np.argmin(finite))} of the features holds NaN or infinity. Find the "
                "recording that it comes from; an encoder gives such features for audio that is damaged."
            )
        seen += len(frames)
        yield frames


def _pools(arrays: Iterator[np.ndarray], rows: int | None, fewest: int) -> Iterator[np.ndarray]:
    """The stream cut anew, so that nothing depends on how it was cut: [rows, D] each, the last one shorter.

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
    """Centroids [C, D] to start from: k-means++ and Lloyd's iterations, which leave none of them without frames."""
    from sklearn.cluster import KMeans as Lloyd
    from sklearn.exceptions import ConvergenceWarning

    different = len({row.tobytes() for row in frames})
    if different < clusters:
        raise ValueError(
            f"k-means of {clusters} clusters: the {len(frames)} frames that it starts from hold {different} different "
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
    """Fits a k-means on a stream of features with scikit-learn's MiniBatchKMeans.

    Frames are gathered in pools of a fixed size, a pool is shuffled and cut into batches: memory is bounded, and the
    result depends on the frames, their order and the seed, but not on how the stream was cut or on the number of
    cores. The start is the best that k-means++ and Lloyd's iterations find on frames drawn from the first pool, so give
    recordings in shuffled order where the corpus is long (over 64 MiB of features).

    Args:
      batches: features, float [n, D] each, or a function that starts such a stream anew.
      clusters: C.
      seed: of the start and the shuffling.
      passes: how often the stream is read.
      card: "encoder" and "layer", and "fitted_on" and "provenance" where there is something to say (see `KMeans`).
        What was counted here is added to "fitted_on".
      batch_frames: frames of a batch; at least `clusters` are taken.
      pool_frames: frames of a pool; as many as fill 64 MiB if None.

    Raises:
      ValueError: fewer frames, or fewer different ones, than clusters; NaN or infinity; features of several widths; a
        stream that cannot be read as often as `passes` says.
    """
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import ThreadpoolController

    if clusters < 1 or passes < 1:
        raise ValueError(f"k-means: clusters={clusters} and passes={passes} must be at least 1.")
    if passes > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"k-means: passes={passes} over a stream that can be read once. Give a function that opens it."
        )
    # Sums over several threads are rounded in the order in which these end.
    one_thread = functools.partial(ThreadpoolController().limit, limits=1)
    rng = np.random.default_rng(seed)
    batch_frames = max(batch_frames, clusters)
    model: MiniBatchKMeans | None = None
    frames = 0
    with tqdm(desc=f"k-means of {clusters}", unit=" frames", unit_scale=True, delay=2) as bar:
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
                    # None is moved to another place later on: each has frames already.
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
