"""Encoders: features and k-means, from a file or an array to an utterance's units."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from spjax.encoders import acoustic, prosody
from spjax.encoders import audio as audio_in
from spjax.encoders.audio import MIN_SAMPLES, SAMPLE_RATE, Audio, prepare, read_audio
from spjax.encoders.units import merge as merge_runs
from spjax.io import KMeans, assets, places
from spjax.types import Encoded

ACOUSTIC = {"mfcc": acoustic.MFCC, "log_mel": acoustic.LOG_MEL}  # encoders without weights
PLAIN_CHUNK = 1_600_000  # samples (100 s) that fairseq's GSLM code encodes at once


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """Encodes waves to features and units; made by `load_encoder`.

    Attributes:
      name: "mfcc", "log_mel", or the name in the directory's card; with the low-pass, if there is one.
      layer: layer of an encoder with weights; None for the others.
      hop: samples between frames. Frame t is centred on sample `hop * t + center`.
      features: waves float32 [n] (16 kHz, n at least `least`) → features float32 [F, D] each, independent of the batch.
      kmeans: centroids [C, D]; None if only features are needed.
      chunk: samples of a chunk, if chunks are encoded independently (frames across their borders are lost).
      margin: samples of silence to add before and after a wave so that every frame is a full window of 400 samples;
        negative of an encoder whose frames are longer: samples to leave out for windows in the middle of its frames.
    """

    name: str
    layer: int | None
    hop: int
    features: Callable[[Sequence[np.ndarray]], list[Float[np.ndarray, "F D"]]]
    kmeans: KMeans | None = None
    chunk: int | None = None
    margin: tuple[int, int] = (0, 0)

    @property
    def center(self) -> int:
        """The sample on which frame 0 is centred."""
        return MIN_SAMPLES // 2 - self.margin[0]

    @property
    def least(self) -> int:
        """Samples of the shortest wave."""
        return max(MIN_SAMPLES, MIN_SAMPLES - sum(self.margin))

    def units(self, waves: Sequence[np.ndarray]) -> list[Int[np.ndarray, " _"]]:
        """Encode waves float32 [n] to units int32 [F], one a frame.

        Raises:
          ValueError: the encoder has no k-means, or a wave is invalid (see `features`).
        """
        if self.kmeans is None:
            raise ValueError(f"encoder {self.name} has no k-means, so it gives features only: load it with a k-means")
        from spjax.encoders.kmeans import assign_frames

        return [assign_frames(features, self.kmeans.centroids) for features in self.features(waves)]

    def log_f0(self, wave: np.ndarray) -> Float[np.ndarray, " F"]:
        """Log f0 float32 [F] of a wave float32 [n], one value per encoder frame, NaN where unvoiced."""
        size, (before, after) = self.chunk or len(wave), self.margin
        chunks = [wave[first : first + size] for first in range(0, len(wave), size)]
        chunks = [np.pad(part[max(0, -before) :], (max(0, before), max(0, after))) for part in chunks]
        chunks = [part[: len(part) + min(0, after)] for part in chunks]
        return np.concatenate([prosody.log_f0(part, self.hop) for part in chunks if len(part) >= prosody.MIN_SAMPLES])


def load_encoder(
    encoder: str | os.PathLike[str],
    kmeans: str | os.PathLike[str] | None = None,
    *,
    layer: int = 6,
    plain_chunks: bool = False,
    lowpass: float | None = None,
) -> Encoder:
    """Load an encoder.

    Args:
      encoder: "mfcc", "log_mel", or the directory of a HuBERT, wav2vec2, WavLM or Whisper; "tiny" is "mfcc" with the
        k-means that spjax includes.
      kmeans: "tiny", or directory of a k-means fitted on this encoder's features; None for features only.
      layer: layer of an encoder with weights, from 1.
      plain_chunks: encode 100 s chunks independently (not Whisper), as fairseq's GSLM code does.
      lowpass: cut-off in Hz of a low-pass on the waves, so that recordings of different bandwidths cannot be
        distinguished by it. It is part of the encoder's name, since it needs a k-means and unit LM of its own.

    Raises:
      ValueError: an unknown encoder or layer, or a k-means of another encoder, layer or feature size; StorageError (a
        subclass) if files are absent or damaged.
    """
    if lowpass is not None:
        audio_in.check_lowpass(lowpass)
    name, kmeans = assets.find_encoder(encoder, kmeans)
    loaded, dim = _load(name, layer, plain_chunks)
    if lowpass is not None:
        narrow = functools.partial(_narrow_features, loaded.features, lowpass)
        loaded = dataclasses.replace(loaded, name=f"{loaded.name}_lowpass_{lowpass:g}", features=narrow)
    if kmeans is None:
        return loaded
    return dataclasses.replace(loaded, kmeans=_load_kmeans(os.fspath(kmeans), loaded, dim))


class Segments(NamedTuple):
    """An utterance of U segments, before its f0 is normalised.

    Attributes:
      units, durations: int32 [U], as of `Encoded`.
      f0: float32 [U], mean log f0 (Hz) of the segment's voiced frames, 0 if there are none.
      voiced: int32 [U], number of voiced frames.
    """

    units: np.ndarray
    durations: np.ndarray
    f0: np.ndarray
    voiced: np.ndarray


def encode_waves(waves: Sequence[np.ndarray], encoder: Encoder, *, merge: bool, f0: bool) -> list[Segments]:
    """Encode waves to units: the path of `encode`, of the predictor and of extraction.

    Args:
      waves: float32 [n] each (16 kHz); the encoder makes batches of similar lengths.
      encoder: with a k-means.
      merge: merge runs of equal units.
      f0: measure f0; otherwise it is 0, and no frame is voiced.

    Raises:
      ValueError: as `Encoder.units`.
    """
    found = []
    for wave, frames in zip(waves, encoder.units(waves), strict=True):
        units, durations = merge_runs(frames) if merge else (frames, np.ones_like(frames))
        pitch = encoder.log_f0(wave) if f0 else np.full(len(frames), np.nan, np.float32)
        found.append(Segments(units, durations, *prosody.segment_f0(pitch, durations)))
    return found


def encode(
    audio: str | os.PathLike[str] | Audio | Any,
    encoder: Encoder,
    *,
    rate: int | None = None,
    merge: bool = True,
    f0: bool = False,
    speaker_f0: float | None = None,
) -> Encoded:
    """Encode one utterance to units.

    Args:
      audio: an audio file, `Audio`, or the samples of one utterance as an array (see `audio.prepare`).
      encoder: with a k-means.
      rate: sample rate of an array, Hz; not given for files.
      merge: merge runs of equal units.
      f0: add the pitch of each segment, less the speaker's mean.
      speaker_f0: the speaker's mean log f0 (Hz) over the voiced frames of all of the speaker's recordings (see
        `spjax.speaker_f0`), as in records with named speakers; by default the mean of the utterance.

    Returns:
      Units and durations int32 [U], f0 float32 [U] if requested.

    Raises:
      ValueError: an encoder without k-means, or a rate that is missing or not allowed; AudioError (a subclass) if the
        audio cannot be used.
    """
    if not isinstance(encoder, Encoder):
        raise ValueError(f"encoder is {encoder!r}, must be an Encoder: give load_encoder(NAME, KMEANS)")
    if audio is None:
        raise ValueError("audio is None: give a file or an array")
    if isinstance(audio, str | os.PathLike | Audio):
        if rate is not None:
            raise ValueError(f"rate {rate} is given, but the audio has its own: give a rate with arrays only")
        loaded = audio if isinstance(audio, Audio) else read_audio(audio)
    elif isinstance(audio, list | tuple):
        raise ValueError(f"a {type(audio).__name__} is not an utterance: give one file or array a call")
    elif rate is None:
        raise ValueError("the array's sample rate is missing: give rate=, in Hz")
    else:
        loaded = prepare(audio, rate)
    (one,) = encode_waves([loaded.wave], encoder, merge=merge, f0=f0)
    pitch = prosody.normalise(one.f0, one.voiced, speaker_f0) if f0 else None
    return Encoded(one.units, one.durations, pitch, loaded.repairs)


def features(
    audio: str | os.PathLike[str] | Audio | Any,
    encoder: str | os.PathLike[str],
    layer: int = 3,
    pad_seconds: float | None = None,
) -> Float[np.ndarray, "F D"]:
    """Features of one utterance. Loads the encoder: for many utterances use `load_encoder(...).features(waves)`.

    Args:
      audio: an audio file; or the samples of one utterance as an array, mono at 16 kHz (`audio.prepare`).
      encoder: directory of a HuBERT, wav2vec2, WavLM or Whisper; "mfcc" or "log_mel".
      layer: output of layer 1 to L, as transformers' `hidden_states` (of Whisper the last after the final norm, of
        others before it); 0 is the input of the first layer. Ignored for "mfcc" and "log_mel".
      pad_seconds: zero-pad shorter waves to this length, at most an hour, and return the frames of the padding too;
        Whisper's reference code pads to 30, which gives 1,500 frames. None for no padding.

    Returns:
      float32 [F, D].

    Raises:
      ValueError: an unknown encoder or layer, or an invalid pad_seconds; AudioError or StorageError (subclasses) if the
        audio or the encoder cannot be used.
    """
    number = isinstance(pad_seconds, numbers.Real) and not isinstance(pad_seconds, bool)
    if pad_seconds is not None and not (number and 0 < pad_seconds <= 3600):
        raise ValueError(f"pad_seconds is {pad_seconds!r}, must be None or a number of seconds over 0, up to 3600")
    if not isinstance(audio, Audio):
        audio = read_audio(audio) if isinstance(audio, str | os.PathLike) else prepare(audio, SAMPLE_RATE)
    loaded, _ = _load(assets.find_encoder(encoder, None)[0], layer, lowest=0)
    missing = 0 if pad_seconds is None else round(pad_seconds * SAMPLE_RATE) - len(audio.wave)
    return loaded.features([np.pad(audio.wave, (0, max(0, missing)))])[0]


def speaker_f0(recordings: Sequence[str | os.PathLike[str] | Audio], encoder: Encoder) -> float:
    """Mean log f0 (Hz) of a speaker over the voiced frames of several recordings, for `encode`.

    Args:
      recordings: files, or what `read_audio` or `prepare` returns; the more the better.
      encoder: f0 is computed at its frame rate.

    Raises:
      ValueError: no frame is voiced; AudioError (a subclass) if a recording cannot be used.
    """
    waves = (one.wave if isinstance(one, Audio) else read_audio(one).wave for one in recordings)
    track = np.concatenate([np.zeros(0), *(encoder.log_f0(wave) for wave in waves)])
    if np.isnan(track).all():
        raise ValueError(f"none of {len(recordings)} recordings has a voiced frame: give recordings of speech")
    return float(np.nanmean(track))


def _acoustic_features(config: acoustic.AcousticConfig, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
    with acoustic.one_thread():
        return [acoustic.features(wave, config) for wave in waves]


def _narrow_features(
    features: Callable[[Sequence[np.ndarray]], list[np.ndarray]], hertz: float, waves: Sequence[np.ndarray]
) -> list[np.ndarray]:
    return features([audio_in.lowpass(wave, hertz) for wave in waves])


def _load(name: str, layer: int, plain_chunks: bool = False, lowest: int = 1) -> tuple[Encoder, int]:
    """Load an encoder by name, or from a directory by the kind in its config.json; returns D too."""
    if name in ACOUSTIC:
        config = ACOUSTIC[name]
        return Encoder(name, None, config.hop, functools.partial(_acoustic_features, config)), config.dim
    if places.at(name).is_dir():
        return _load_directory(name, layer, plain_chunks, lowest)
    raise ValueError(
        f"encoder {name!r} is neither {' nor '.join((*ACOUSTIC, *assets.NAMES))} nor the directory of a HuBERT, "
        "wav2vec2, WavLM or Whisper. Import one first: `python -m spjax.convert --help`."
    )


def _load_directory(directory: str, layer: int, plain_chunks: bool, lowest: int) -> tuple[Encoder, int]:
    from spjax.encoders import hubert, whisper
    from spjax.encoders.transformer import place
    from spjax.io.encoders import read_encoder

    config, params, info = read_encoder(directory)
    integral = isinstance(layer, numbers.Integral) and not isinstance(layer, bool)
    if not integral or not lowest <= layer <= config.layers:
        raise ValueError(f"{directory} has layers {lowest} to {config.layers}, not {layer!r}: choose one of them")
    layer = int(layer)
    params = place(params, layer)  # once, instead of at every call
    loaded = functools.partial(Encoder, info["name"], layer, config.hop)
    if isinstance(config, whisper.WhisperConfig):
        if plain_chunks:
            raise ValueError(f"{directory} is a Whisper encoder, plain_chunks is for the others: leave it out")
        features = functools.partial(whisper.extract, params, config, layer=layer)
        return loaded(features, margin=whisper.MARGIN), config.dim
    spare = MIN_SAMPLES - config.field
    loaded = functools.partial(loaded, margin=(spare // 2, spare - spare // 2))
    features = functools.partial(hubert.extract, params, config, layer=layer)
    if not plain_chunks:
        return loaded(features), config.dim
    features = functools.partial(features, plain_chunks=True, chunk=PLAIN_CHUNK)
    return loaded(features, chunk=PLAIN_CHUNK), config.dim


def _load_kmeans(directory: str, encoder: Encoder, dim: int) -> KMeans:
    """Load a k-means and check that it was fitted on this encoder's features."""
    from spjax.io.kmeans_store import load_kmeans

    kmeans = load_kmeans(directory)
    theirs = (kmeans.card["encoder"], kmeans.card.get("layer") or None, kmeans.centroids.shape[1])
    ours = (encoder.name, encoder.layer, dim)
    if theirs != ours:
        raise ValueError(
            f"{directory} was fitted on {_described(*theirs)}; the encoder gives {_described(*ours)}. "
            "Give the k-means of this encoder and layer, or fit one."
        )
    return kmeans


def _described(name: str, layer: int | None, dim: int) -> str:
    return f"{name}{'' if layer is None else f' layer {layer}'}, {dim} features a frame"
