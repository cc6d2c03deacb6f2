"""HuBERT, wav2vec2 and WavLM: waves to features, computed up to the requested layer only.

`features` is the model, a pure function of a padded batch, whose padding does not affect the results. `extract` takes
any number of waves of any length, with few compiled shapes and bounded memory.

Shapes: C channels and T steps in the convolutions, F frames of width D after them (docs/design.md).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from spjax.encoders.transformer import (
    BATCH_FRAMES,
    Piece,
    block,
    by_distance,
    check_layer,
    check_wave,
    conv,
    gelu,
    place,
    run_pieces,
    windows,
)
from spjax.models.config import Compute
from spjax.models.einsum import einsum
from spjax.models.hubert_config import HubertConfig
from spjax.models.unit_lm import EPS, FLOAT32, dense, layer_norm
from spjax.types import Params

__all__ = ["ChannelNorm", "HubertConfig", "channel_norm", "extract", "features", "place"]

CHUNK = 1_600_000  # samples (100 s) of a chunk, as in fairseq's GSLM code; shorter waves are encoded in one piece
OVERLAP = 160_000  # samples (10 s) that neighbouring chunks share: a kept frame has at least 5 s on either side
_SEGMENT = 512  # frames whose convolutions are computed at once: bounds their memory (64 steps a frame)


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
    waves: Float[jax.Array, "B n"],
    lengths: Int[jax.Array, " B"],
    layer: int,
    *,
    norm: ChannelNorm | None = None,
    compute: Compute = FLOAT32,
) -> Float[jax.Array, "B F D"]:
    """Features of a padded batch; padding does not affect an utterance's frames.

    Args:
      params: the encoder's weights (docs/design.md); layers after `layer` may be missing.
      config: the architecture.
      waves: float32 [B, n], 16 kHz, normalised if `config.wave_eps`, zero-padded; n at least `config.field`.
      lengths: int32 [B], samples of each wave.
      layer: 1 to L, whose output is returned; 0 is the input of the first. As transformers' hidden_states: with
        `config.pre_norm`, no norm follows the last.
      norm: group norm statistics [B, C] each, if `waves` are cut from longer signals; None computes each wave's.
      compute: operand type of matrix products; its remat setting is ignored.

    Returns:
      float32 [B, F, D], F = config.frames(n). Frames from `config.frames(length)` on are padding.

    Raises:
      ValueError: an unknown layer, or waves shorter than a frame.
    """
    check_layer(config.layers, layer)
    frames = config.frames(waves.shape[1])
    if not frames:
        raise ValueError(f"encoder: waves of {waves.shape[1]} samples; a frame takes {config.field}")
    if config.conv_layer_norm:
        norm = None
    elif norm is None:
        norm = _measure(params, config, waves, lengths)
    real = jnp.arange(frames) < ((lengths - config.field) // config.hop + 1)[:, None]
    x = _convolve(params["conv"], config, waves, norm, params["conv_norm"], compute)
    x = dense(params["project"], layer_norm(x, params["project_norm"]), compute)
    x = x + gelu(_position(params, config, x, real, compute))
    if not config.pre_norm:
        x = layer_norm(x, params["norm"])
    relative = by_distance(params["relative"]["table"], frames, config.max_distance) if config.buckets else None
    for number in range(layer):
        weights = params["layers"][str(number)]
        x = block(weights, config.heads, x, real, compute, pre_norm=config.pre_norm, relative=relative)
    return x


# Convolutions over the wave


def _convolve(
    convs: Params, config: HubertConfig, waves: jax.Array, norm: ChannelNorm | None, affine: Params, compute: Compute
) -> jax.Array:
    """Waves [B, n] to [B, F, C], computed in segments of frames, each from its samples only."""

    def run(waves: jax.Array) -> jax.Array:
        x = waves[..., None]
        for number, stride in enumerate(config.conv_strides):
            # The first convolution has ten products an output: bfloat16 gains nothing.
            operand = jnp.dtype(jnp.float32) if number == 0 else compute.operand
            x = conv(convs[str(number)]["kernel"], x, operand, window_strides=(stride,), padding="VALID")
            if number == 0 and norm is not None:  # a bias would cancel
                x = (x - norm.mean[:, None]) * (norm.scale * affine["scale"])[:, None] + affine["bias"]
            elif config.conv_bias:
                x = x + convs[str(number)]["bias"]
            x = gelu(layer_norm(x, affine[str(number)]) if config.conv_layer_norm else x)
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
    """Statistics of each wave of a padded batch, in two passes over the first convolution's output."""
    kernel, stride = params["conv"]["0"]["kernel"], config.conv_strides[0]
    x = conv(kernel, waves[..., None], jnp.dtype(jnp.float32), window_strides=(stride,), padding="VALID")
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 128), (0, 0)))
    steps = (lengths - config.conv_kernels[0]) // stride + 1
    weight = (jnp.arange(x.shape[1]) < steps[:, None]) / jnp.maximum(steps, 1)[:, None]
    x, weight = (part.reshape(len(x), -1, 128, *part.shape[2:]) for part in (x, weight))

    def average(x: jax.Array) -> jax.Array:
        # Sums of 128 steps, then of these: one long float32 sum would lose precision. As products, since XLA on CPUs is
        # several times slower at summing over an axis that is not the last.
        return einsum("bst,bstc->bsc", weight, x, jnp.dtype(jnp.float32)).sum(axis=1)

    mean = average(x)
    return ChannelNorm(mean, jax.lax.rsqrt(average(jnp.square(x - mean[:, None, None])) + EPS))


def channel_norm(kernel: Float[np.ndarray, "k 1 C"], stride: int, wave: Float[np.ndarray, " n"]) -> ChannelNorm:
    """The same statistics on the host in float64, from mean and covariance of the windows instead of a convolution.

    Args:
      kernel: [k, 1, C], of the first convolution.
      stride: of the first convolution.
      wave: float32 [n], n at least k.

    Returns:
      mean and scale, [C] each.
    """
    weights = np.asarray(kernel, np.float64)[:, 0]
    windows = np.lib.stride_tricks.sliding_window_view(wave, len(weights))[::stride]
    origin = wave.mean(dtype=np.float64)  # subtracted so that a constant offset costs no precision
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


def _position(params: Params, config: HubertConfig, x: jax.Array, real: jax.Array, compute: Compute) -> jax.Array:
    """Grouped convolution over time, [B, F, D] to [B, F, D], zero where a row is padded and at both ends."""
    if config.position_norm:
        x = x * params["position_norm"]["scale"] + params["position_norm"]["bias"]
    x = jnp.where(real[..., None], x, 0)
    left = config.position_width // 2
    sides, weights = [(left, config.position_width - 1 - left)], params["position"]
    groups = config.position_groups
    x = conv(weights["kernel"], x, compute.operand, window_strides=(1,), padding=sides, feature_group_count=groups)
    return x + weights["bias"]


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
) -> list[Float[np.ndarray, "_ D"]]:
    """Features of waves of any length, each as if it were encoded alone.

    Waves longer than a chunk are encoded in overlapping chunks; each frame is taken from the chunk in which it is
    farther from the ends, by `overlap / 2` samples or more. Group norm statistics, and those of waves that are
    normalised, are those of the whole wave, so the convolutions equal those of the whole wave, and so does the first
    layer's input from 64 frames (half a positional convolution) off a chunk's ends. Attention is limited to the chunk,
    which is the only approximation.

    Args:
      params: the encoder's weights; for repeated calls, from `place`.
      config: the architecture.
      waves: float32 [n] each, mono at 16 kHz, n at least `config.field` (400 samples).
      layer: as of `features`.
      batch_frames: frames of a batch, padding included; a longer chunk is a batch of one.
      plain_chunks: as in fairseq's GSLM code: chunks do not overlap, each has its own statistics, and a frame is lost
        at every border. A last chunk shorter than a frame is dropped.
      chunk: samples of a chunk, 1,600,000 (100 s) by default; memory grows with it.
      overlap: samples that neighbouring chunks share; ignored for plain chunks.
      compute: operand type of matrix products. bfloat16 changes some units.
      progress: show a progress bar.

    Returns:
      float32 [F_i, D] each, in the order of `waves`; F_i = config.frames(n_i), or fewer with plain chunks.

    Raises:
      ValueError: an unknown layer; a wave that is too short, of another type or not finite; invalid sizes.
    """
    check_layer(config.layers, layer)
    if chunk < config.field or batch_frames < 1:
        raise ValueError(
            f"encoder: chunk {chunk} must be {config.field} or more, batch_frames {batch_frames} 1 or more"
        )
    if not plain_chunks and not 0 <= overlap <= chunk // 2:
        raise ValueError(f"encoder: overlap {overlap} must be between 0 and half of the chunk, {chunk // 2}")
    for number, wave in enumerate(waves):
        check_wave(number, wave, config.field)
    params = place(params, layer, compute)
    kernel = np.asarray(params["conv"]["0"]["kernel"])
    cut = _plain if plain_chunks else functools.partial(_overlapped, overlap=overlap)
    pieces = [
        piece
        for number, wave in enumerate(waves)
        for piece in cut(config, kernel, number, _normalised(np.asarray(wave), config.wave_eps), chunk)
    ]

    def run(frames: int, rows: list[Piece]) -> jax.Array:
        padded = np.zeros((len(rows), (frames - 1) * config.hop + config.field), np.float32)
        for row, piece in zip(padded, rows, strict=True):
            # Drops samples after the last frame, fewer than a hop.
            row[: piece.samples] = piece.data[0][: len(row)]
        lengths = np.asarray([piece.samples for piece in rows], np.int32)
        norms = [piece.data[1] for piece in rows if piece.data[1] is not None]
        norm = ChannelNorm(*map(np.stack, zip(*norms, strict=True))) if norms else None
        return _run(params, config, padded, lengths, layer, norm=norm, compute=compute)

    title = f"layer {layer}"
    return run_pieces(title, len(waves), pieces, run, batch_frames=batch_frames, progress=progress)


def _normalised(wave: np.ndarray, eps: float) -> np.ndarray:
    """A wave of mean 0 and variance 1, `eps` added to the variance; as it is if `eps` is 0."""
    if not eps:
        return wave
    exact = wave.astype(np.float64) - wave.mean(dtype=np.float64)
    return (exact / np.sqrt(np.square(exact).mean() + eps)).astype(np.float32)


def _norm(config: HubertConfig, kernel: np.ndarray, wave: np.ndarray) -> ChannelNorm | None:
    return None if config.conv_layer_norm else channel_norm(kernel, config.conv_strides[0], wave)


def _plain(config: HubertConfig, kernel: np.ndarray, utterance: int, wave: np.ndarray, chunk: int) -> Iterator[Piece]:
    for start in range(0, len(wave), chunk):
        part = wave[start : start + chunk]
        if frames := config.frames(len(part)):
            yield Piece(utterance, frames, 0, frames, len(part), (part, _norm(config, kernel, part)))


def _overlapped(
    config: HubertConfig, kernel: np.ndarray, utterance: int, wave: np.ndarray, chunk: int, overlap: int
) -> Iterator[Piece]:
    """Overlapping chunks of equal length; the last is moved back to end with the wave."""
    norm = _norm(config, kernel, wave)
    for start, first, last in windows(config.frames(len(wave)), config.frames(chunk), overlap // config.hop):
        part = wave[start * config.hop : (start + config.frames(chunk) - 1) * config.hop + config.field]
        yield Piece(utterance, config.frames(len(part)), first, last, len(part), (part, norm))
