"""Pitch: log f0 of each encoder frame by pYIN, then of each segment, less the speaker's mean.

pYIN (Mauch and Dixon, 2014) as in librosa, with three differences. The window is shorter, so that pitch hardly changes
within it. The difference function is averaged over the samples compared, so that it does not favour short periods.
The Viterbi search is limited to possible changes of pitch, which finds the same path ten times as fast.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from spjax.encoders.audio import MIN_SAMPLES, SAMPLE_RATE

F0_RANGE = (60.0, 500.0)  # Hz: from low men's voices to children's
_WINDOW = 640  # samples of an analysis window: more than two of the longest periods
_PERIODS = int(SAMPLE_RATE // F0_RANGE[1]), int(np.ceil(SAMPLE_RATE / F0_RANGE[0]))  # samples
_SEMITONE = 10  # pitch bins a semitone
_BINS = int(12 * _SEMITONE * np.log2(F0_RANGE[1] / F0_RANGE[0])) + 1
_THRESHOLDS = 100  # thresholds on aperiodicity, distributed as Beta(2, 18)
_BOLTZMANN = 2.0  # decay of the prior over successive troughs below a threshold
_NO_TROUGH = 0.004  # probability of voicing if no trough is below the threshold; 0.01 (librosa) voices 10 % of noise
_LEAP = 35.92  # largest change of pitch, octaves a second
_SWITCH = 0.01  # probability that voicing starts or ends at a frame
_NEVER = float(np.log(np.finfo(np.float64).tiny))  # log of probability 0
_BLOCK, _CONTEXT = 3000, 100  # frames tracked at once (bounds memory), and their context on either side


def log_f0(wave: np.ndarray, hop: int) -> Float[np.ndarray, " F"]:
    """Natural log of f0 (Hz) of voiced frames.

    Frame t is centred on sample `hop * t + 200`, like the encoders' frames (complete windows of 400 samples): use hop
    320 with HuBERT, 160 with MFCC and log-mel.

    Args:
      wave: float32 [n] at 16 kHz, n at least 400.
      hop: samples between frames.

    Returns:
      float32 [F], F = (n - 400) // hop + 1; NaN where unvoiced.

    Raises:
      ValueError: not a 1-D wave of at least 400 samples, or hop below 1.
    """
    if wave.ndim != 1 or len(wave) < MIN_SAMPLES or hop < 1:
        raise ValueError(
            f"wave has shape {list(wave.shape)}, must be [n] of {MIN_SAMPLES} samples or more; hop {hop}, 1 or more"
        )
    total = (len(wave) - MIN_SAMPLES) // hop + 1
    around = np.pad(np.asarray(wave, np.float32), ((_WINDOW - MIN_SAMPLES) // 2, _WINDOW))
    frames = np.lib.stride_tricks.sliding_window_view(around, _WINDOW)[::hop]
    found = np.empty(total, np.float32)
    for first in range(0, total, _BLOCK):
        start, last = max(0, first - _CONTEXT), min(total, first + _BLOCK)
        bins = _track(_pitch_odds(frames[start : min(total, last + _CONTEXT)]), hop)[first - start : last - start]
        found[first:last] = np.where(bins < 0, np.nan, np.log(F0_RANGE[0]) + bins * (np.log(2) / (12 * _SEMITONE)))
    return found


def _aperiodicity(frames: np.ndarray) -> np.ndarray:
    """YIN's cumulative mean normalised difference.

    Args:
      frames: float32 [F, _WINDOW].

    Returns:
      float32 [F, periods]: 0 for a perfectly periodic frame, about 1 for an aperiodic one.
    """
    shortest, longest = _PERIODS
    lags = np.arange(1, longest + 1)
    frames = frames - frames.mean(axis=1, keepdims=True)  # differences are unchanged, rounding errors smaller
    energy = np.cumsum(np.square(frames, dtype=np.float64), axis=1)
    both = energy[:, -1 - lags] + energy[:, -1:] - energy[:, lags - 1]  # of all but the last lag samples, and the first
    alike = np.fft.irfft(np.abs(np.fft.rfft(frames, 2 * _WINDOW)) ** 2)[:, lags]
    difference = np.maximum(both - 2 * alike, 0) / (_WINDOW - lags)
    mean = np.cumsum(difference, axis=1) / lags
    sounds = mean > np.finfo(np.float32).eps ** 2  # smaller than any 16-bit signal
    return np.divide(difference, mean, out=np.ones_like(mean), where=sounds)[:, shortest - 1 :].astype(np.float32)


def _pitch_odds(frames: np.ndarray) -> np.ndarray:
    """Probability of each pitch in each frame, before tracking.

    Args:
      frames: float32 [F, _WINDOW].

    Returns:
      float64 [F, _BINS]; 1 minus a row's sum is the probability that the frame is unvoiced.
    """
    depth = _aperiodicity(frames)
    before, after = np.pad(depth, ((0, 0), (1, 0)), "edge")[:, :-1], np.pad(depth, ((0, 0), (0, 1)), "edge")[:, 1:]
    first = np.arange(depth.shape[1]) == 0
    trough = np.where(first, depth < after, (depth < before) & (depth <= after))
    row, lag = np.nonzero(trough)
    low = depth[row, lag]
    # Each threshold spreads its weight over the troughs below it, the first ones most; if there are none, it gives
    # _NO_TROUGH of it to the lowest.
    edges = np.linspace(0, 1, _THRESHOLDS + 1)
    passed = 1 - (1 - edges) ** 18 * (1 + 18 * edges)  # CDF of Beta(2, 18) at the edges
    decay = np.exp(-_BOLTZMANN * np.arange(depth.shape[1] + 1))
    odds = np.zeros(len(low))
    for threshold, weight in zip(edges[1:], np.diff(passed), strict=True):
        below = np.flatnonzero(low < threshold)
        where, count = row[below], np.bincount(row[below], minlength=len(frames))
        rank = np.arange(len(below)) - (np.cumsum(count) - count)[where]
        odds[below] += weight * decay[rank] * (1 - decay[1]) / (1 - decay[count[where]])
    deepest = np.where(trough, depth, np.inf).argmin(axis=1)
    lowest = np.flatnonzero(lag == deepest[row])
    odds[lowest] += _NO_TROUGH * passed[np.searchsorted(edges[1:], low[lowest], "right")]
    # Parabolic interpolation of the period.
    bend, slope = (before + after - 2 * depth)[row, lag], ((after - before) / 2)[row, lag]
    inside = (np.abs(slope) < np.abs(bend)) & (lag > 0) & (lag < depth.shape[1] - 1)
    period = _PERIODS[0] + lag - np.divide(slope, bend, out=np.zeros_like(bend), where=inside)
    pitch = np.round(12 * _SEMITONE * np.log2(SAMPLE_RATE / F0_RANGE[0] / period)).astype(int)
    found = np.zeros((len(frames), _BINS))
    known = pitch < _BINS
    found[row[known], np.maximum(pitch[known], 0)] = odds[known]
    return found


def _track(odds: np.ndarray, hop: int) -> np.ndarray:
    """The most probable path of pitch and voicing (Viterbi). Unvoiced states have a (hidden) pitch too.

    Args:
      odds: float64 [F, _BINS], from `_pitch_odds`.
      hop: samples between frames.

    Returns:
      int [F]: the bin, -1 where unvoiced.
    """
    reach = round(_LEAP * 12 * hop / SAMPLE_RATE) * _SEMITONE // 2  # bins
    leap = 1 - np.abs(np.arange(-reach, reach + 1)) / (reach + 1)
    share = np.log(np.convolve(np.ones(_BINS), leap)[reach : reach + _BINS])  # normaliser: leaps that stay in range
    stay, switch, leap = np.log(1 - _SWITCH), np.log(_SWITCH), np.log(leap)
    unvoiced = np.repeat(np.maximum(1 - odds.sum(axis=1, keepdims=True), 0) / _BINS, _BINS, axis=1)
    emission = np.log(np.maximum(np.stack([odds, unvoiced], axis=1), np.exp(_NEVER)))  # [F, voiced or not, bins]
    best = emission  # overwritten with the log probability of the best path that ends in a state
    leaving = np.full((len(odds), 2, _BINS + 2 * reach), -np.inf)
    for t in range(len(odds)):
        if t:
            ways = np.lib.stride_tricks.sliding_window_view(leaving[t - 1], _BINS, axis=1)  # [2, leaps, bins]
            best[t] += (ways + leap[:, None]).max(axis=1)
        here = best[t] - share
        leaving[t, :, reach : reach + _BINS] = np.maximum(here + stay, here[::-1] + switch)
    bins = np.empty(len(odds), int)
    state, bin_ = divmod(int(best[-1].argmax()), _BINS)
    for t in range(len(odds) - 1, -1, -1):
        bins[t] = -1 if state else bin_
        if t:
            bin_ += int((leaving[t - 1, state, bin_ : bin_ + 2 * reach + 1] + leap).argmax()) - reach
            if best[t - 1, state, bin_] + stay < best[t - 1, 1 - state, bin_] + switch:
                state = 1 - state
    return bins


def segment_f0(
    log_f0: np.ndarray, durations: Int[np.ndarray, " U"]
) -> tuple[Float[np.ndarray, " U"], Int[np.ndarray, " U"]]:
    """Mean log f0 over the voiced frames of each segment.

    Args:
      log_f0: float [F], NaN where unvoiced.
      durations: int [U], frames of each segment; their sum is F.

    Returns:
      mean: float32 [U], 0 if no frame is voiced; voiced: int32 [U], the number of voiced frames.

    Raises:
      ValueError: durations that do not sum to F.
    """
    count = len(durations)
    if log_f0.ndim != 1 or np.sum(durations) != len(log_f0):
        raise ValueError(
            f"durations sum to {np.sum(durations)}, log f0 has shape {list(log_f0.shape)}: give both for the same "
            "utterance and hop"
        )
    segments = np.repeat(np.arange(count), durations)
    known = ~np.isnan(log_f0)
    voiced = np.bincount(segments[known], minlength=count)
    total = np.bincount(segments[known], weights=log_f0[known], minlength=count)
    return (total / np.maximum(voiced, 1)).astype(np.float32), voiced.astype(np.int32)


def voiced_mean(mean: Float[np.ndarray, " U"], voiced: Int[np.ndarray, " U"]) -> float:
    """Mean log f0 over all voiced frames of segments, of an utterance or a speaker; 0 if there are none.

    Args:
      mean, voiced: [U] each, from `segment_f0`, or concatenated over utterances.
    """
    total = int(np.sum(voiced))
    return float(np.dot(np.asarray(mean, np.float64), voiced)) / total if total else 0.0


def normalise(
    mean: Float[np.ndarray, " U"], voiced: Int[np.ndarray, " U"], speaker_mean: float | None = None
) -> Float[np.ndarray, " U"]:
    """Log f0 of segments less the speaker's mean.

    Args:
      mean, voiced: [U] each, from `segment_f0`.
      speaker_mean: mean log f0 over the voiced frames of all of the speaker's utterances; None: the utterance's.

    Returns:
      float32 [U], 0 if no frame is voiced; also where it equals the mean exactly, such as for the only voiced segment
      of an utterance without a named speaker.
    """
    centre = voiced_mean(mean, voiced) if speaker_mean is None else speaker_mean
    return np.where(voiced > 0, mean - centre, 0).astype(np.float32)


def f0_edges(f0: np.ndarray, bins: int = 32) -> tuple[float, ...]:
    """Quantile edges of f0 bins with equally many voiced segments, for `ProsodyConfig.f0_edges`.

    Args:
      f0: float [n], log f0 of all train segments less their speakers' means, 0 where unvoiced.
      bins: number of bins; pGSLM has 32.

    Returns:
      bins - 1 numbers in ascending order; some may be equal.

    Raises:
      ValueError: fewer than 2 bins, or no segment is voiced.
    """
    if bins < 2:
        raise ValueError(f"f0 needs at least 2 bins, not {bins}: give 2 or more (pGSLM has 32)")
    voiced = np.asarray(f0, np.float64)[np.asarray(f0) != 0]
    if not len(voiced):
        raise ValueError(
            f"none of {np.size(f0)} segments is voiced, so f0 bins cannot be fitted: give f0 of the train split, "
            "extracted with --f0 of data_pipelines.extract from recordings of speech"
        )
    return tuple(np.maximum.accumulate(np.quantile(voiced, np.arange(1, bins) / bins)).tolist())
