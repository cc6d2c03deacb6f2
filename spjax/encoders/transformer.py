"""Shared by HuBERT and Whisper: layers, attention, and batching of waves with few shapes and bounded memory."""

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
from spjax.models.unit_lm import FLOAT32
from spjax.types import Params

BATCH_FRAMES = 2048  # frames of a batch, 41 s
QUERIES = 512  # queries whose attention is computed at once: bounds the memory of long utterances


def check_layer(model: str, layers: int, layer: int) -> None:
    """Raise ValueError unless `layer` is 0 to `layers`."""
    if not 0 <= layer <= layers:
        raise ValueError(f"{model}: layer {layer} does not exist; give 1 to {layers}, or 0 for the input of the first")


def check_wave(model: str, number: int, wave: np.ndarray, least: int) -> None:
    """Raise ValueError unless a wave is float32 [n], n at least `least`, and finite."""
    if wave.ndim != 1 or wave.dtype != np.float32:
        raise ValueError(f"{model}: wave {number} is {wave.dtype} {list(wave.shape)}, must be float32 [samples]")
    if len(wave) < least:
        raise ValueError(
            f"{model}: wave {number} has {len(wave)} samples; a frame needs at least {least}. Leave it out or pad it."
        )
    if not np.isfinite(wave).all():
        raise ValueError(f"{model}: wave {number} holds NaN or infinity")


def gelu(x: Float[jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """Exact GELU, by erf: jax.nn.gelu's erfc takes five times as long on CPUs."""
    return 0.5 * x * (1 + jax.lax.erf(x * np.float32(0.5**0.5)))


def dense(weights: Params, x: Float[jax.Array, "B T D"], compute: Compute) -> Float[jax.Array, "B T E"]:
    """Dense layer, [B, T, D] to [B, T, E], with or without bias."""
    y = einsum("btd,de->bte", x, weights["kernel"], compute.operand)
    return y + weights["bias"] if "bias" in weights else y


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


def attention(
    weights: Params, heads: int, x: Float[jax.Array, "B F D"], real: Bool[jax.Array, "B F"], compute: Compute
) -> Float[jax.Array, "B F D"]:
    """Self-attention with its projections, [B, F, D] to [B, F, D]; `real` [B, F] masks padding."""
    query, key, value = (
        dense(weights[name], x, compute).reshape(*x.shape[:2], heads, x.shape[2] // heads)
        for name in ("query", "key", "value")
    )
    mixed = _attend(query * query.shape[-1] ** -0.5, key, value, real).reshape(x.shape)
    return dense(weights["out"], mixed, compute)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, real: jax.Array) -> jax.Array:
    """Attention, all [B, F, H, Dh], in float32; in blocks of queries if there are many."""
    product = functools.partial(einsum, dtype=jnp.dtype(jnp.float32))

    def some(query: jax.Array) -> jax.Array:
        scores = jnp.where(real[:, None, None], product("bqhd,bkhd->bhqk", query, key), jnp.finfo(jnp.float32).min)
        return product("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)

    batch, frames, *head = query.shape
    if frames <= QUERIES:
        return some(query)
    blocks = -(-frames // QUERIES)
    query = jnp.pad(query, ((0, 0), (0, blocks * QUERIES - frames), (0, 0), (0, 0)))
    mixed = jax.lax.map(some, jnp.swapaxes(query.reshape(batch, blocks, QUERIES, *head), 0, 1))
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
