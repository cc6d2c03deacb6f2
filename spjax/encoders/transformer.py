"""Shared by the encoders: layers, attention, and batching of waves with few shapes and bounded memory."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from tqdm import tqdm

from spjax.encoders.audio import SAMPLE_RATE
from spjax.models.config import Compute
from spjax.models.einsum import einsum
from spjax.models.unit_lm import FLOAT32, dense, layer_norm
from spjax.types import Params

BATCH_FRAMES = 2048  # frames of a batch, 41 s
QUERIES = 512  # queries whose attention is computed at once: bounds the memory of long utterances


def check_layer(layers: int, layer: int) -> None:
    """Raise ValueError unless `layer` is 0 to `layers`."""
    if not 0 <= layer <= layers:
        raise ValueError(f"encoder: layer {layer} does not exist; give 1 to {layers}, or 0 for the input of the first")


def check_wave(number: int, wave: np.ndarray, least: int) -> None:
    """Raise ValueError unless a wave is float32 [n], n at least `least`, and finite."""
    if wave.ndim != 1 or wave.dtype != np.float32:
        raise ValueError(f"encoder: wave {number} is {wave.dtype} {list(wave.shape)}, must be float32 [samples]")
    if len(wave) < least:
        raise ValueError(
            f"encoder: wave {number} has {len(wave)} samples; a frame needs at least {least}. Leave it out or pad it."
        )
    if not np.isfinite(wave).all():
        raise ValueError(f"encoder: wave {number} holds NaN or infinity")


def gelu(x: Float[jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """Exact GELU, by erf: jax.nn.gelu's erfc takes five times as long on CPUs."""
    return 0.5 * x * (1 + jax.lax.erf(x * np.float32(0.5**0.5)))


def conv(
    kernel: Float[jax.Array, "k I C"], x: Float[jax.Array, "B T _"], operand: jnp.dtype, **settings: Any
) -> Float[jax.Array, "B F C"]:
    """Convolution over time: kernel [k, C_in, C], x [B, T, C_in]; operands of type `operand`, sums in float32."""
    return jax.lax.conv_general_dilated(
        x.astype(operand),
        kernel.astype(operand),
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=jax.lax.Precision.HIGHEST if operand == jnp.float32 else None,  # TPUs and GPUs round by default
        preferred_element_type=jnp.float32,
        **settings,
    )


def block(
    weights: Params,
    heads: int,
    x: Float[jax.Array, "B F D"],
    real: Bool[jax.Array, "B F"],
    compute: Compute,
    *,
    pre_norm: bool,
    relative: Float[jax.Array, "R H"] | None = None,
) -> Float[jax.Array, "B F D"]:
    """One layer of a transformer encoder, [B, F, D] to [B, F, D].

    Args:
      weights: of the layer.
      heads: H.
      x: float32 [B, F, D].
      real: [B, F], False where a row is padded.
      compute: operand type of matrix products.
      pre_norm: norms precede attention and feed-forward instead of following their residual sums.
      relative: [2F - 1, H] as of `by_distance`, added to the attention scores times a gate of each query (WavLM).
    """

    def norm(name: str, x: jax.Array, here: bool) -> jax.Array:
        return layer_norm(x, weights[name]) if here else x

    mixed = _attention(weights, heads, norm("attn_norm", x, pre_norm), real, compute, relative)
    x = norm("attn_norm", x + mixed, not pre_norm)
    h = gelu(dense(weights["ffn_in"], norm("ffn_norm", x, pre_norm), compute))
    return norm("ffn_norm", x + dense(weights["ffn_out"], h, compute), not pre_norm)


def by_distance(table: Float[jax.Array, "N H"], frames: int, longest: int) -> Float[jax.Array, "R H"]:
    """WavLM's relative position embeddings of key - query = 1 - F ... F - 1: [N, H] to [2F - 1, H].

    Half of the N buckets are of keys after the query. Of a half, the first half are single distances; the others
    grow logarithmically up to the distance `longest`.
    """
    half = len(table) // 2
    exact = half // 2
    distance = np.arange(1 - frames, frames)
    far = np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(exact)
    share = np.log(far) / np.float32(np.log(longest / exact)) * np.float32(half - exact)  # in float32 as in WavLM
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), exact + share.astype(np.int64))
    return jnp.asarray(table)[np.minimum(bucket, half - 1) + half * (distance > 0)]


def _attention(
    weights: Params, heads: int, x: jax.Array, real: jax.Array, compute: Compute, relative: jax.Array | None
) -> jax.Array:
    """Self-attention with its projections, [B, F, D] to [B, F, D]."""
    query, key, value = (
        dense(weights[name], x, compute).reshape(*x.shape[:2], heads, x.shape[2] // heads)
        for name in ("query", "key", "value")
    )
    gate = None
    if relative is not None:
        gates = weights["gate"]
        parts = einsum("bfhd,de->bfhe", x.reshape(query.shape), gates["kernel"], compute.operand) + gates["bias"]
        reset, update = jnp.split(jax.nn.sigmoid(parts), 2, axis=-1)
        gate = reset * (update * gates["scale"][:, None] - 1) + 2
    mixed = _attend(query * query.shape[-1] ** -0.5, key, value, real, relative, gate).reshape(x.shape)
    return dense(weights["out"], mixed, compute)


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    real: jax.Array,
    relative: jax.Array | None = None,
    gate: jax.Array | None = None,
) -> jax.Array:
    """Attention, all [B, F, H, Dh] and the gate [B, F, H, 1], in float32; in blocks of queries if there are many."""
    product = functools.partial(einsum, dtype=jnp.dtype(jnp.float32))
    batch, frames, *head = query.shape

    def some(query: jax.Array, numbers: jax.Array, gate: jax.Array | None) -> jax.Array:
        scores = product("bqhd,bkhd->bhqk", query, key)
        if relative is not None and gate is not None:
            bias = relative[jnp.arange(frames) - numbers[:, None] + frames - 1]  # [q, k, H]
            scores += jnp.moveaxis(bias, 2, 0) * jnp.swapaxes(gate, 1, 2)
        scores = jnp.where(real[:, None, None], scores, jnp.finfo(jnp.float32).min)
        return product("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)

    numbers = jnp.arange(frames)
    if frames <= QUERIES:
        return some(query, numbers, gate)
    blocks = -(-frames // QUERIES)

    def cut(x: jax.Array, axis: int) -> jax.Array:
        """Split an axis of queries in blocks, which come first."""
        pad = [(0, blocks * QUERIES - frames if number == axis else 0) for number in range(x.ndim)]
        return jnp.moveaxis(jnp.pad(x, pad).reshape(*x.shape[:axis], blocks, QUERIES, *x.shape[axis + 1 :]), axis, 0)

    parts = (cut(query, 1), cut(numbers, 0), None if gate is None else cut(gate, 1))
    mixed = jax.lax.map(lambda part: some(*part), parts)
    return jnp.swapaxes(mixed, 0, 1).reshape(batch, -1, *head)[:, :frames]


def place(params: Params, layer: int, compute: Compute = FLOAT32) -> Params:
    """Move the weights for features up to `layer` to the device, with kernels in the operand type.

    Args:
      params: the encoder's weights, float32.
      layer: 0 to L.
      compute: as for `extract`.

    Returns:
      The tree without the later layers. The first convolution's kernel stays float32.
    """
    needed = {**params, "layers": {str(number): params["layers"][str(number)] for number in range(layer)}}

    def put(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        names = [str(entry.key) for entry in path]
        cast = names[-1] == "kernel" and names[:2] != ["conv", "0"]
        return jnp.asarray(leaf, compute.operand if cast else jnp.float32)

    placed: Params = jax.tree_util.tree_map_with_path(put, needed)
    return placed


# Any number of waves


class Piece(NamedTuple):
    """A part of a wave that is encoded as one row, and which of its frames are kept.

    Attributes:
      utterance: index of the wave.
      frames: number of frames.
      first: first frame to keep.
      last: last frame to keep, exclusive.
      samples: samples of the wave, for the progress bar.
      data: the input of the encoder.
    """

    utterance: int
    frames: int
    first: int
    last: int
    samples: int
    data: Any


def windows(frames: int, size: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """Windows of at most `size` frames over an utterance: (start, first, last), of which [first, last) is kept.

    All windows have `size` frames unless the utterance is shorter; the last is moved back to end with the utterance.
    Each frame is kept from the window in which it is farther from the ends.
    """
    starts = [*range(0, frames - size, max(1, size - overlap)), max(0, frames - size)]
    # The border is in the middle of the overlap.
    borders = [0, *((a + size + b) // 2 for a, b in itertools.pairwise(starts)), frames]
    for number, start in enumerate(starts):
        yield start, borders[number] - start, borders[number + 1] - start


def run_pieces(
    title: str,
    utterances: int,
    pieces: Sequence[Piece],
    run: Callable[[int, list[Piece]], Any],
    *,
    batch_frames: int,
    most: int | None = None,
    progress: bool = False,
) -> list[Float[np.ndarray, "_ D"]]:
    """Run pieces in batches and concatenate the kept frames of each utterance.

    Args:
      title: of the progress bar.
      utterances: number of utterances.
      pieces: pieces of all utterances, in order.
      run: (frames to pad to, pieces of a batch) → float32 [rows, frames, D].
      batch_frames: frames of a batch, padding included; a longer piece is a batch of one.
      most: the most frames that a row may be padded to; None for no limit.
      progress: show a progress bar.

    Returns:
      float32 [F, D] each.
    """
    found: dict[int, np.ndarray] = {}
    total = sum(piece.samples for piece in pieces) / SAMPLE_RATE
    with tqdm(total=total, desc=title, unit="s", disable=not progress, file=sys.stderr, leave=False) as bar:
        for frames, batch in batches([piece.frames for piece in pieces], batch_frames, most):
            rows = [pieces[number] for number in batch]
            for number, piece, row in zip(batch, rows, np.asarray(run(frames, rows)), strict=True):
                found[number] = row[piece.first : piece.last].copy()
            bar.update(sum(piece.samples for piece in rows) / SAMPLE_RATE)
    parts: list[list[np.ndarray]] = [[] for _ in range(utterances)]
    for number, piece in enumerate(pieces):
        parts[piece.utterance].append(found.pop(number))
    return [some[0] if len(some) == 1 else np.concatenate(some) for some in parts]


def _padded(frames: int) -> int:
    """Round up to 16, 18, 20 ... 32, 36, 40 ... 64, 72 ...: eight sizes an octave, so that few shapes are compiled."""
    if frames <= 16:
        return 16
    step = 1 << ((frames - 1).bit_length() - 4)
    return -(-frames // step) * step


def batches(lengths: Sequence[int], batch_frames: int, most: int | None = None) -> Iterator[tuple[int, list[int]]]:
    """(frames to pad to, indices of pieces), longest first; a power of two of rows, the shortest 3/4 of the longest."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    while order:
        frames = min(_padded(lengths[order[0]]), most or sys.maxsize)
        limit = order[: max(1, batch_frames // frames)]
        count = sum(4 * lengths[number] >= 3 * lengths[order[0]] for number in limit)
        rows = 1 << (count.bit_length() - 1)
        yield frames, order[:rows]
        order = order[rows:]
