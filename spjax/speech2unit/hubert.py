"""HuBERT: waves to features, 50 frames a second, up to the layer that is asked for and no further (FACTS.md).

`features` is the model, a pure function of one padded batch in which every utterance gets the features that it has
alone. `extract` is what one calls: any number of waves of any length, in few shapes and bounded memory.

A wave has C channels per step and T steps in the convolutions, F frames of width D behind them (docs/design.md).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spjax.models.config import Compute
from spjax.models.contract import contract
from spjax.models.hubert_config import HubertConfig
from spjax.models.unit_lm import EPS, FLOAT32, layer_norm
from spjax.speech2unit.transformer import (
    BATCH_FRAMES,
    Piece,
    attention,
    check_layer,
    check_wave,
    conv,
    dense,
    gelu,
    place,
    run_pieces,
    windows,
)
from spjax.types import Params

__all__ = ["ChannelNorm", "HubertConfig", "channel_norm", "extract", "features", "place"]

CHUNK = 1_600_000  # samples of a chunk, 100 s: what the reference encodes whole is encoded whole here
OVERLAP = 160_000  # samples that neighbouring chunks share, 10 s: a kept frame sees 5 s or more on either side
_SEGMENT = 512  # frames of a batch whose convolutions are computed at once: bounds their memory (64 steps a frame)


class ChannelNorm(NamedTuple):
    """Statistics of the first convolution's output over all of an utterance's steps, for its group norm.

    Attributes:
      mean: float32 [..., C]
      scale: float32 [..., C], 1 / sqrt(variance + eps)
    """

    mean: Any
    scale: Any


def features(
    params: Params,
    config: HubertConfig,
    waves: jax.Array,
    lengths: jax.Array,
    layer: int,
    *,
    norm: ChannelNorm | None = None,
    compute: Compute = FLOAT32,
) -> jax.Array:
    """Features of a padded batch; what lies behind an utterance's end changes nothing of its own frames.

    Args:
      params: the encoder's weights (docs/design.md); layers behind `layer` may be left out.
      config: its architecture.
      waves: float32 [B, n], 16 kHz, zero-padded; n at least `config.field`.
      lengths: int32 [B], samples of each wave.
      layer: 1 to L, whose output after its final norm is asked for; 0 is the input of the first.
      norm: [B, C] each, of a longer signal that `waves` are cut from; None takes each wave's own.
      compute: operand type of matrix products; remat is not used.

    Returns:
      float32 [B, F, D], F = config.frames(n). Frames from `config.frames(length)` on mean nothing.

    Raises:
      ValueError: no such layer, or waves shorter than a frame.
    """
    check_layer("HuBERT", config.layers, layer)
    frames = config.frames(waves.shape[1])
    if not frames:
        raise ValueError(f"HuBERT: waves of {waves.shape[1]} samples; a frame takes {config.field}")
    if norm is None:
        norm = _measure(params, config, waves, lengths)
    real = jnp.arange(frames) < ((lengths - config.field) // config.hop + 1)[:, None]
    x = _convolve(params["conv"], config, waves, norm, params["conv_norm"], compute)
    x = dense(params["project"], layer_norm(x, params["project_norm"]), compute)
    x = jnp.where(real[..., None], x, 0)
    x = layer_norm(x + gelu(_position(params["position"], config, x, compute)), params["norm"])
    for number in range(layer):
        x = _block(params["layers"][str(number)], config, x, real, compute)
    return x


# Convolutions over the wave


def _convolve(
    convs: Params, config: HubertConfig, waves: jax.Array, norm: ChannelNorm, affine: Params, compute: Compute
) -> jax.Array:
    """Waves [B, n] to [B, F, C], a segment of frames after the other: each needs its own samples only."""

    def run(waves: jax.Array) -> jax.Array:
        x = waves[..., None]
        for number, stride in enumerate(config.conv_strides):
            # The first has ten multiplications a number: nothing to gain from narrow operands.
            operand = jnp.dtype(jnp.float32) if number == 0 else compute.operand
            x = conv(convs[str(number)]["kernel"], x, operand, window_strides=(stride,), padding="VALID")
            if number == 0:
                x = (x - norm.mean[:, None]) * (norm.scale * affine["scale"])[:, None] + affine["bias"]
            x = gelu(x)
        return x

    frames = config.frames(waves.shape[1])
    segments = -(-frames // max(32, _SEGMENT // len(waves)))
    if segments == 1:
        return run(waves)
    size = -(-frames // segments)
    samples = (segments * size - 1) * config.hop + config.field
    waves = jnp.pad(waves, ((0, 0), (0, max(0, samples - waves.shape[1]))))

    def segment(number: jax.Array) -> jax.Array:
        taken = (size - 1) * config.hop + config.field
        return run(jax.lax.dynamic_slice_in_dim(waves, number * size * config.hop, taken, axis=1))

    done = jnp.swapaxes(jax.lax.map(segment, jnp.arange(segments)), 0, 1)
    return done.reshape(len(waves), -1, config.conv_dim)[:, :frames]


def _measure(params: Params, config: HubertConfig, waves: jax.Array, lengths: jax.Array) -> ChannelNorm:
    """Statistics of each wave of a padded batch, two passes over the first convolution's output."""
    kernel, stride = params["conv"]["0"]["kernel"], config.conv_strides[0]
    x = conv(kernel, waves[..., None], jnp.dtype(jnp.float32), window_strides=(stride,), padding="VALID")
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 128), (0, 0)))
    steps = (lengths - config.conv_kernels[0]) // stride + 1
    weight = (jnp.arange(x.shape[1]) < steps[:, None]) / jnp.maximum(steps, 1)[:, None]
    x, weight = (part.reshape(len(x), -1, 128, *part.shape[2:]) for part in (x, weight))

    def average(x: jax.Array) -> jax.Array:
        # Sums of 128 steps, then of those: a long sum in float32 drifts. As products, since XLA for CPUs is several
        # times slower to sum over an axis that is not the last.
        return contract("bst,bstc->bsc", weight, x, jnp.dtype(jnp.float32)).sum(axis=1)

    mean = average(x)
    return ChannelNorm(mean, jax.lax.rsqrt(average(jnp.square(x - mean[:, None, None])) + EPS))


def channel_norm(kernel: np.ndarray, stride: int, wave: np.ndarray) -> ChannelNorm:
    """The same statistics on the host, in float64 and without the convolution: mean and covariance of its windows tell.

    Args:
      kernel: [k, 1, C] of the first convolution.
      stride: its stride.
      wave: float32 [n], n at least k.

    Returns:
      [C] each.
    """
    weights = np.asarray(kernel, np.float64)[:, 0]
    windows = np.lib.stride_tricks.sliding_window_view(wave, len(weights))[::stride]
    origin = wave.mean(dtype=np.float64)  # sums of squares about it lose nothing to a constant offset
    first, second = np.zeros(len(weights)), np.zeros((len(weights), len(weights)))
    for start in range(0, len(windows), 1 << 18):
        part = windows[start : start + (1 << 18)].astype(np.float64) - origin
        first += part.sum(0)
        second += part.T @ part
    center = first / len(windows)
    covariance = second / len(windows) - np.outer(center, center)
    variance = np.maximum(np.einsum("kc,kj,jc->c", weights, covariance, weights), 0)
    mean = (center + origin) @ weights
    return ChannelNorm(mean.astype(np.float32), (1 / np.sqrt(variance + EPS)).astype(np.float32))


# Transformer


def _position(weights: Params, config: HubertConfig, x: jax.Array, compute: Compute) -> jax.Array:
    """Grouped convolution over time, [B, F, D] to [B, F, D], zeros beyond both ends."""
    left = config.position_width // 2
    sides = [(left, config.position_width - 1 - left)]
    groups = config.position_groups
    x = conv(weights["kernel"], x, compute.operand, window_strides=(1,), padding=sides, feature_group_count=groups)
    return x + weights["bias"]


def _block(weights: Params, config: HubertConfig, x: jax.Array, real: jax.Array, compute: Compute) -> jax.Array:
    """One post-norm layer, [B, F, D] to [B, F, D]; `real` [B, F] says which frames may be looked at."""
    mixed = attention(weights, config.heads, x, real, compute)
    x = layer_norm(x + mixed, weights["attn_norm"])
    h = dense(weights["ffn_out"], gelu(dense(weights["ffn_in"], x, compute)), compute)
    return layer_norm(x + h, weights["ffn_norm"])


# Any number of waves

_run = jax.jit(features, static_argnames=("config", "layer", "compute"))


def extract(
    params: Params,
    config: HubertConfig,
    waves: Sequence[np.ndarray],
    layer: int,
    *,
    batch_frames: int = BATCH_FRAMES,
    plain_chunks: bool = False,
    chunk: int = CHUNK,
    overlap: int = OVERLAP,
    compute: Compute = FLOAT32,
    progress: bool = False,
) -> list[np.ndarray]:
    """Features of waves of any length, each as if it were encoded alone.

    Waves longer than a chunk are encoded in overlapping chunks, each frame taken from the chunk in which it lies
    further from the ends, `overlap / 2` samples or more. Group norm statistics are those of the whole wave, so the
    convolutions agree with those of the whole wave everywhere, and the first layer's input does from 64 frames (half a
    positional convolution, 1.3 s) off a chunk's ends. Attention sees its chunk alone: what later layers differ by is
    what attention would have taken from further away.

    Args:
      params: the encoder's weights; to call it often, as `place` gives them.
      config: its architecture.
      waves: float32 [n] each, mono at 16 kHz, n at least `config.field` (400 samples).
      layer: 1 to L, whose output is asked for; 0 is the input of the first.
      batch_frames: frames of a batch, padding included (50 a second); a longer chunk is a batch of one.
      plain_chunks: do as the reference does: chunks are encoded apart, each with its own statistics, and put end to
        end, so that a frame is lost at every border. A last chunk too short for a frame is left out.
      chunk: samples of a chunk, 1,600,000 (100 s) by default as in the reference; memory grows with it.
      overlap: samples that neighbouring chunks share; plain chunks share none.
      compute: operand type of matrix products. bfloat16 changes units (FACTS.md).
      progress: show a bar.

    Returns:
      float32 [F_i, D] each, in the order of `waves`; F_i = config.frames(n_i) unless plain chunks lose some.

    Raises:
      ValueError: no such layer, a wave that is too short, of another type or not finite, sizes that cannot be.
    """
    check_layer("HuBERT", config.layers, layer)
    if chunk < config.field or batch_frames < 1:
        raise ValueError(f"HuBERT: chunk {chunk} must be {config.field} or more, batch_frames {batch_frames} 1 or more")
    if not plain_chunks and not 0 <= overlap <= chunk // 2:
        raise ValueError(f"HuBERT: overlap {overlap} must lie between 0 and half of the chunk, {chunk // 2}")
    for number, wave in enumerate(waves):
        check_wave("HuBERT", number, wave, config.field)
    params = place(params, layer, compute)
    kernel = np.asarray(params["conv"]["0"]["kernel"])
    cut = _plain if plain_chunks else functools.partial(_overlapped, overlap=overlap)
    pieces = [
        piece for number, wave in enumerate(waves) for piece in cut(config, kernel, number, np.asarray(wave), chunk)
    ]

    def run(frames: int, rows: list[Piece]) -> jax.Array:
        padded = np.zeros((len(rows), (frames - 1) * config.hop + config.field), np.float32)
        for row, piece in zip(padded, rows, strict=True):
            # Samples that no frame of the shape reaches are left off: there are fewer than a hop.
            row[: piece.samples] = piece.data[0][: len(row)]
        lengths = np.asarray([piece.samples for piece in rows], np.int32)
        norm = ChannelNorm(*(np.stack(parts) for parts in zip(*(piece.data[1] for piece in rows), strict=True)))
        return _run(params, config, padded, lengths, layer, norm=norm, compute=compute)

    title = f"HuBERT layer {layer}"
    return run_pieces(title, len(waves), pieces, run, batch_frames=batch_frames, progress=progress)


def _plain(config: HubertConfig, kernel: np.ndarray, utterance: int, wave: np.ndarray, chunk: int) -> Iterator[Piece]:
    for start in range(0, len(wave), chunk):
        part = wave[start : start + chunk]
        if frames := config.frames(len(part)):
            norm = channel_norm(kernel, config.conv_strides[0], part)
            yield Piece(utterance, frames, 0, frames, len(part), (part, norm))


def _overlapped(
    config: HubertConfig, kernel: np.ndarray, utterance: int, wave: np.ndarray, chunk: int, overlap: int
) -> Iterator[Piece]:
    """Chunks of one length; the last is moved back to end where the wave ends."""
    norm = channel_norm(kernel, config.conv_strides[0], wave)
    for start, first, last in windows(config.frames(len(wave)), config.frames(chunk), overlap // config.hop):
        part = wave[start * config.hop : (start + config.frames(chunk) - 1) * config.hop + config.field]
        yield Piece(utterance, config.frames(len(part)), first, last, len(part), (part, norm))
