"""Whisper's encoder: waves to features, 50 frames a second, computed up to the requested layer only.

`log_mel` is the front end, on the host; `features` is the model, a pure function of a padded batch, whose padding does
not affect the results; `extract` is both, for any number of waves of any length.

An utterance is encoded at its length, not padded to 30 s as in Whisper's reference code (docs/whisper.md).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from spjax.encoders.acoustic import mel_power, one_thread
from spjax.encoders.audio import MIN_SAMPLES, SAMPLE_RATE
from spjax.encoders.transformer import (
    BATCH_FRAMES,
    Piece,
    block,
    check_layer,
    check_wave,
    conv,
    gelu,
    place,
    run_pieces,
    windows,
)
from spjax.models.config import Compute
from spjax.models.unit_lm import FLOAT32, layer_norm
from spjax.models.whisper_config import WhisperConfig
from spjax.types import Params

__all__ = ["WhisperConfig", "extract", "features", "log_mel", "place"]

MARGIN = (200, 40)  # samples of silence around a wave so that every frame is a full window of 400 samples
_WINDOW, _HOP = 400, 160  # of the spectrum, samples


def log_mel(wave: Float[np.ndarray, " n"], mels: int) -> Float[np.ndarray, "M mels"]:
    """Whisper's log-mel spectrum. Step m is centred on sample 160 m.

    Levels (log10 of power, at least 1e-10) are clipped at 8 below the utterance's maximum, then scaled by (x + 4) / 4.

    Args:
      wave: float32 [n] at 16 kHz, n at least 400.
      mels: bands, Slaney's mel scale and norm, 0 to 8 kHz.

    Returns:
      float32 [n // 160, mels].
    """
    bank, window = _filters(mels)
    around = np.pad(wave.astype(np.float64), _WINDOW // 2, mode="reflect")
    parts = np.lib.stride_tricks.sliding_window_view(around, _WINDOW)[::_HOP][: len(wave) // _HOP]
    with one_thread():
        level = np.log10(np.maximum(mel_power(parts, window, bank), 1e-10))
    return ((np.maximum(level, level.max() - 8) + 4) / 4).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _filters(mels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mel filters float64 [201, mels] and the periodic Hann window float64 [400]."""
    import librosa

    bank = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=_WINDOW, n_mels=mels, dtype=np.float64)
    return np.ascontiguousarray(bank.T), librosa.filters.get_window("hann", _WINDOW)


def features(
    params: Params,
    config: WhisperConfig,
    spectra: Float[jax.Array, "B M mels"],
    lengths: Int[jax.Array, " B"],
    layer: int,
    *,
    compute: Compute = FLOAT32,
) -> Float[jax.Array, "B F D"]:
    """Features of a padded batch; padding does not affect an utterance's frames.

    Args:
      params: the encoder's weights (docs/design.md); layers after `layer` may be missing.
      config: the architecture.
      spectra: float32 [B, M, mels], padded `log_mel`s; M at most twice `config.positions`.
      lengths: int32 [B], steps of each.
      layer: 1 to L, whose output is returned (that of the last after the final norm); 0 is the input of the first.
      compute: operand type of matrix products; its remat setting is ignored.

    Returns:
      float32 [B, F, D], F = (M + 1) // 2. Frames from (length + 1) // 2 on are padding.

    Raises:
      ValueError: an unknown layer, or more frames than there are positions.
    """
    check_layer(config.layers, layer)
    steps = spectra.shape[1]
    if steps > 2 * config.positions:
        raise ValueError(f"Whisper: a spectrum of {steps} steps; there are positions for {2 * config.positions}")
    real = (jnp.arange(steps) < lengths[:, None])[..., None]
    x = jnp.where(real, spectra, 0)
    for number, operand in enumerate((jnp.dtype(jnp.float32), compute.operand)):
        weights = params["conv"][str(number)]
        x = conv(weights["kernel"], x, operand, window_strides=(number + 1,), padding=[(1, 1)])
        x = gelu(x + weights["bias"])
        if number == 0:
            x = jnp.where(real, x, 0)
    x = x + params["position"]["table"][: x.shape[1]]
    real = jnp.arange(x.shape[1]) < (lengths[:, None] + 1) // 2
    for number in range(layer):
        x = block(params["layers"][str(number)], config.heads, x, real, compute, pre_norm=True)
    return layer_norm(x, params["norm"]) if layer == config.layers else x


_run = jax.jit(features, static_argnames=("config", "layer", "compute"))


def extract(
    params: Params,
    config: WhisperConfig,
    waves: Sequence[np.ndarray],
    layer: int,
    *,
    batch_frames: int = BATCH_FRAMES,
    compute: Compute = FLOAT32,
    progress: bool = False,
) -> list[Float[np.ndarray, "_ D"]]:
    """Features of waves of any length, each as if it were encoded alone, at its length.

    There are positions for 30 s. Longer waves are encoded in windows of 30 s that overlap by 10 s and restart the
    positions; a frame is taken from the window in which it is farther from the ends. The spectrum and its clipping
    level are those of the whole wave.

    Args:
      params: the encoder's weights; for repeated calls, from `place`.
      config: the architecture.
      waves: float32 [n] each, mono at 16 kHz, n at least 400. Zero-pad a wave to 480,000 to get the features of
        Whisper's reference code.
      layer: 1 to L, whose output is returned (that of the last after the final norm); 0 is the input of the first.
      batch_frames: frames of a batch, padding included (50 a second); a longer window is a batch of one.
      compute: operand type of matrix products. bfloat16 changes some units.
      progress: show a progress bar.

    Returns:
      float32 [F_i, D] each, in the order of `waves`; F_i = config.frames(n_i).

    Raises:
      ValueError: an unknown layer; a wave that is too short, of another type or not finite.
    """
    check_layer(config.layers, layer)
    params, size, pieces = place(params, layer, compute), config.positions, []
    for number, wave in enumerate(waves):
        check_wave(number, wave, MIN_SAMPLES)
        spectrum = log_mel(wave, config.mels)
        for start, first, last in windows(config.frames(len(wave)), size, size // 3):
            part = spectrum[2 * start : 2 * (start + size)]
            pieces.append(Piece(number, (len(part) + 1) // 2, first, last, len(part) * _HOP, part))

    def run(frames: int, rows: list[Piece]) -> jax.Array:
        padded = np.zeros((len(rows), 2 * frames, config.mels), np.float32)
        for row, piece in zip(padded, rows, strict=True):
            row[: len(piece.data)] = piece.data
        lengths = np.asarray([len(piece.data) for piece in rows], np.int32)
        return _run(params, config, padded, lengths, layer, compute=compute)

    title = f"Whisper layer {layer}"
    return run_pieces(title, len(waves), pieces, run, batch_frames=batch_frames, most=size, progress=progress)
