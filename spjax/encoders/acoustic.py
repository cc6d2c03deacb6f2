"""MFCC and log-mel features, normalised per utterance, 100 frames a second. No weights are needed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from spjax.encoders.audio import SAMPLE_RATE

_BLOCK = 8192  # frames whose spectra are computed at once
_SILENCE = 1e-20  # power floor of the decibels: far below the quietest recording, so that loudness changes nothing
_RANGE = 80.0  # dB below an utterance's loudest band at which levels are clipped
_CONSTANT = 1e-3  # dB: a coefficient whose standard deviation is lower is treated as constant


@dataclasses.dataclass(frozen=True)
class AcousticConfig:
    """Parameters of the features.

    Attributes:
      kind: "mfcc" or "log_mel".
      hop: samples between frames.
      window: samples of a frame (Hann window).
      mels: bands of the mel spectrum, 0 to 8 kHz.
      coefficients: number of cepstral coefficients for "mfcc", including the first (loudness).
      deltas: 0 for none, 1 adds the slope of every coefficient over time, 2 also its curvature.
      delta_width: frames that slopes are fitted to, odd.
    """

    kind: Literal["mfcc", "log_mel"] = "mfcc"
    hop: int = 160
    window: int = 400
    mels: int = 40
    coefficients: int = 13
    deltas: int = 1
    delta_width: int = 9

    def __post_init__(self) -> None:
        if self.kind not in ("mfcc", "log_mel"):
            raise ValueError(f"unknown kind {self.kind!r}: give mfcc or log_mel")
        if min(self.hop, self.window, self.mels, self.coefficients) < 1 or self.coefficients > self.mels:
            raise ValueError(
                f"hop {self.hop}, window {self.window}, mels {self.mels} and coefficients {self.coefficients} must be "
                "1 or more, and coefficients at most mels"
            )
        if self.deltas not in (0, 1, 2) or self.delta_width < 3 or self.delta_width % 2 == 0:
            raise ValueError(
                f"deltas {self.deltas} must be 0, 1 or 2, and delta_width {self.delta_width} odd, 3 or more"
            )

    @property
    def dim(self) -> int:
        """D, the number of features of a frame."""
        return (self.coefficients if self.kind == "mfcc" else self.mels) * (1 + self.deltas)


MFCC = AcousticConfig()
LOG_MEL = AcousticConfig("log_mel", mels=80, deltas=0)


def frames(n: int, config: AcousticConfig) -> int:
    """Number of frames of a wave of n samples; only windows that fit in it count."""
    return max(0, (n - config.window) // config.hop + 1)


def features(wave: np.ndarray, config: AcousticConfig) -> Float[np.ndarray, "F D"]:
    """MFCC or log-mel features. Frame t is centred on sample `hop * t + window / 2`.

    Each coefficient has mean 0 and variance 1 over the utterance (constant ones are 0), so that units do not depend on
    loudness or the channel.

    Args:
      wave: float32 [n] at 16 kHz, n at least `config.window`.
      config: parameters of the features.

    Returns:
      float32 [F, D], F = frames(n, config), D = config.dim.

    Raises:
      ValueError: not a 1-D wave of at least one window.
    """
    import librosa

    if wave.ndim != 1 or len(wave) < config.window:
        raise ValueError(f"wave has shape {list(wave.shape)}, must be [n] of {config.window} samples or more")
    bank, window = _filters(config)
    mel = mel_power(np.lib.stride_tricks.sliding_window_view(wave, config.window)[:: config.hop], window, bank)
    level = librosa.power_to_db(mel, amin=_SILENCE, top_db=_RANGE)
    if config.kind == "mfcc":
        level = level @ _cosines(config)
    stack = [level]
    for order in range(1, config.deltas + 1):
        # "nearest" repeats the first and last frame, so that deltas are defined for the shortest utterance too.
        stack.append(librosa.feature.delta(level, width=config.delta_width, order=order, axis=0, mode="nearest"))
    x = np.concatenate(stack, axis=1)
    x = x - x.mean(axis=0)
    spread = x.std(axis=0)
    return np.divide(x, spread, out=np.zeros_like(x), where=spread > _CONSTANT)


def mel_power(
    parts: Float[np.ndarray, "F W"], window: Float[np.ndarray, " W"], bank: Float[np.ndarray, "half mels"]
) -> Float[np.ndarray, "F mels"]:
    """Power in mel bands: frames [F, W], window [W], filters [W // 2 + 1, mels] → [F, mels]."""
    blocks = (parts[first : first + _BLOCK] for first in range(0, len(parts), _BLOCK))
    return np.concatenate([np.square(np.abs(np.fft.rfft(block * window))) @ bank for block in blocks])


def one_thread() -> Any:
    """Context manager that limits BLAS to one thread.

    The matrices are small: beside XLA's threads, several BLAS threads took five times as long.
    """
    return _threads().limit(limits=1, user_api="blas")


@functools.cache
def _threads() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@functools.lru_cache(maxsize=8)
def _filters(config: AcousticConfig) -> tuple[np.ndarray, np.ndarray]:
    """Mel filters float32 [window // 2 + 1, mels] and Hann window float32 [window]."""
    import librosa

    bank = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=config.window, n_mels=config.mels)
    window = librosa.filters.get_window("hann", config.window)
    return np.ascontiguousarray(bank.T, np.float32), window.astype(np.float32)


@functools.lru_cache(maxsize=8)
def _cosines(config: AcousticConfig) -> np.ndarray:
    """The orthonormal cosine transform (type 2), float32 [mels, coefficients]."""
    from scipy.fft import dct

    return dct(np.eye(config.mels), axis=1, norm="ortho")[:, : config.coefficients].astype(np.float32)
