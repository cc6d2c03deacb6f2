"""Pitch: log f0 of each encoder frame by librosa's pYIN, then of each segment, less the speaker's mean."""

from __future__ import annotations

import numpy as np

from spjax.speech2unit.audio import MIN_SAMPLES, SAMPLE_RATE

F0_RANGE = (60.0, 500.0)  # Hz: from low men's voices to children's
_WINDOW = 1024  # samples that pitch is looked for in: nearly four periods of the lowest
_NO_TROUGH = 0.004  # pYIN's belief in pitch where it sees no period; at librosa's 0.01 a tenth of white noise is voiced
_BLOCK, _CONTEXT = 3000, 100  # frames tracked at once, which bounds memory, and what they see on either side


def log_f0(wave: np.ndarray, hop: int) -> np.ndarray:
    """Natural log of f0 (Hz) where speech is voiced.

    Frame t is centred on sample `hop * t + 200`, as the encoders' frames are (their windows are 400 samples, and only
    whole ones count): hop 320 goes with HuBERT, 160 with MFCC and log-mel.

    Args:
      wave: float32 [n] at 16 kHz, n at least 400.
      hop: samples between frames.

    Returns:
      float32 [F], F = (n - 400) // hop + 1; NaN where unvoiced.

    Raises:
      ValueError: not one wave of 400 samples or more, or no hop.
    """
    import librosa

    if wave.ndim != 1 or len(wave) < MIN_SAMPLES or hop < 1:
        raise ValueError(
            f"wave has shape {list(wave.shape)}, must be [n] of {MIN_SAMPLES} samples or more; hop {hop}, 1 or more"
        )
    total = (len(wave) - MIN_SAMPLES) // hop + 1
    around = np.pad(np.asarray(wave, np.float32), ((_WINDOW - MIN_SAMPLES) // 2, _WINDOW))
    found = np.empty(total, np.float32)
    low, high = F0_RANGE
    for first in range(0, total, _BLOCK):
        start, stop = max(0, first - _CONTEXT), min(total, first + _BLOCK + _CONTEXT)
        f0, _, _ = librosa.pyin(
            around[start * hop : (stop - 1) * hop + _WINDOW],
            fmin=low,
            fmax=high,
            sr=SAMPLE_RATE,
            frame_length=_WINDOW,
            hop_length=hop,
            center=False,
            no_trough_prob=_NO_TROUGH,
        )
        last = min(total, first + _BLOCK)
        found[first:last] = np.log(f0[first - start : last - start])
    return found


def segment_f0(log_f0: np.ndarray, durations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean log f0 over the voiced frames of each segment.

    Args:
      log_f0: float [F], NaN where unvoiced.
      durations: int [U], frames of each segment; their sum is F.

    Returns:
      mean: float32 [U], 0 where no frame is voiced; voiced: int32 [U], how many are.

    Raises:
      ValueError: durations that do not sum to F.
    """
    count = len(durations)
    if log_f0.ndim != 1 or np.sum(durations) != len(log_f0):
        raise ValueError(
            f"durations sum to {np.sum(durations)}, log f0 has shape {list(log_f0.shape)}: give both of one utterance "
            "and one hop"
        )
    segments = np.repeat(np.arange(count), durations)
    heard = ~np.isnan(log_f0)
    voiced = np.bincount(segments[heard], minlength=count)
    total = np.bincount(segments[heard], weights=log_f0[heard], minlength=count)
    return (total / np.maximum(voiced, 1)).astype(np.float32), voiced.astype(np.int32)


def voiced_mean(mean: np.ndarray, voiced: np.ndarray) -> float:
    """Mean log f0 over all voiced frames of segments (of an utterance, or of a speaker's all); 0 where there are none.

    Args:
      mean, voiced: [U] each, as `segment_f0` gives them, or several utterances' put together.
    """
    total = int(np.sum(voiced))
    return float(np.dot(np.asarray(mean, np.float64), voiced)) / total if total else 0.0


def normalise(mean: np.ndarray, voiced: np.ndarray, speaker_mean: float | None = None) -> np.ndarray:
    """Log f0 of segments less the speaker's mean.

    Args:
      mean, voiced: [U] each, as `segment_f0` gives them.
      speaker_mean: log f0 over the voiced frames of all that the speaker said; the utterance's own if None.

    Returns:
      float32 [U], 0 where no frame is voiced.
    """
    centre = voiced_mean(mean, voiced) if speaker_mean is None else speaker_mean
    return np.where(voiced > 0, mean - centre, 0).astype(np.float32)
