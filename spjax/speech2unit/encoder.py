"""An encoder as a whole: features and k-means, from a file or an array to an utterance's units."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from spjax.speech2unit import acoustic, prosody
from spjax.speech2unit import audio as audio_in
from spjax.speech2unit.audio import MIN_SAMPLES, SAMPLE_RATE, Audio, prepare, read_audio
from spjax.speech2unit.units import merge as merge_runs
from spjax.storage import KMeans, assets, places
from spjax.types import Encoded

ACOUSTIC = {"mfcc": acoustic.MFCC, "log_mel": acoustic.LOG_MEL}  # encoders that need no weights
PLAIN_CHUNK = 1_600_000  # samples that the reference encodes at once, 100 s


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """Waves to features to units; `load_encoder` makes one.

    Attributes:
      name: "mfcc", "log_mel", or what its directory calls it; and the low-pass, where there is one.
      layer: of a HuBERT or Whisper; None for the others.
      hop: samples between frames. Frame t is centred on sample `hop * t + center`.
      features: waves float32 [n] each (16 kHz, n at least 400) → features float32 [F, D] each, as if encoded alone.
      kmeans: centroids [C, D]; None where only features are wanted.
      chunk: samples that are encoded apart, each chunk losing the frames across its end; None: nothing is lost.
      margin: samples of silence before and after a wave that make its frames those of whole windows of 400 samples.
    """

    name: str
    layer: int | None
    hop: int
    features: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
    kmeans: KMeans | None = None
    chunk: int | None = None
    margin: tuple[int, int] = (0, 0)

    @property
    def center(self) -> int:
        """The sample that frame 0 is centred on."""
        return MIN_SAMPLES // 2 - self.margin[0]

    def units(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Waves float32 [n] each → units int32 [F] each, one a frame.

        Raises:
          ValueError: the encoder was loaded without k-means, or a wave is not as `features` wants it.
        """
        if self.kmeans is None:
            raise ValueError(f"encoder {self.name} has no k-means, so it gives features only: load it with one")
        from spjax.speech2unit.kmeans import assign_frames

        return [assign_frames(features, self.kmeans.centroids) for features in self.features(waves)]

    def log_f0(self, wave: np.ndarray) -> np.ndarray:
        """Wave float32 [n] → log f0 float32 [F] of the frames that it is encoded to, NaN where unvoiced (prosody)."""
        wave = np.pad(wave, self.margin)
        size = self.chunk or len(wave)
        chunks = [wave[first : first + size] for first in range(0, len(wave), size)]
        return np.concatenate([prosody.log_f0(part, self.hop) for part in chunks if len(part) >= prosody.MIN_SAMPLES])


def load_encoder(
    encoder: str | os.PathLike[str],
    kmeans: str | os.PathLike[str] | None = None,
    *,
    layer: int = 6,
    plain_chunks: bool = False,
    lowpass: float | None = None,
) -> Encoder:
    """Loads an encoder.

    Args:
      encoder: "mfcc", "log_mel", or the directory of a HuBERT or Whisper; "tiny": "mfcc" with the k-means that goes
        with spjax.
      kmeans: "tiny", or directory of a k-means that was fitted on this encoder's features; None for features only.
      layer: of a HuBERT or Whisper, from 1.
      plain_chunks: HuBERT encodes chunks of 100 s apart, as the reference does.
      lowpass: Hz above which nothing is heard, where recordings of different band widths must not be told by that. It
        is part of the encoder's name: its k-means and unit LM are others.

    Raises:
      ValueError: no such encoder or layer, or a k-means of another encoder, layer or feature size; StorageError (one of
        them) where files are absent or damaged.
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


def encode(
    audio: str | os.PathLike[str] | Audio | Any,
    encoder: Encoder,
    *,
    rate: int | None = None,
    merge: bool = True,
    f0: bool = False,
    speaker_f0: float | None = None,
) -> Encoded:
    """One utterance as units.

    Args:
      audio: an audio file, or the samples of one utterance as an array (`audio.prepare` says which).
      encoder: with a k-means.
      rate: samples a second of an array; a file says itself.
      merge: runs of equal units as one.
      f0: add the pitch of each segment, less the speaker's mean.
      speaker_f0: that mean, log f0 (Hz) over the voiced frames of all that the speaker said (`spjax.speaker_f0`), as
        records of named speakers have it; by default the utterance's own.

    Raises:
      ValueError: an encoder without k-means, or a rate that is missing or too many; AudioError (one of them) where the
        audio cannot be used.
    """
    if not isinstance(encoder, Encoder):
        raise ValueError(f"encoder is {encoder!r}, must be what load_encoder(NAME, KMEANS) returns")
    if audio is None:
        raise ValueError("audio is None: give a file or an array")
    if isinstance(audio, str | os.PathLike | Audio):
        if rate is not None:
            raise ValueError(f"rate {rate} is given for audio that says its own: give a rate with an array only")
        said = audio if isinstance(audio, Audio) else read_audio(audio)
    elif isinstance(audio, list | tuple):
        raise ValueError(f"a {type(audio).__name__} is no utterance: give one file or array a call")
    elif rate is None:
        raise ValueError("the array's rate is missing: give rate=, samples a second")
    else:
        said = prepare(audio, rate)
    frames = encoder.units([said.wave])[0]
    units, durations = merge_runs(frames) if merge else (frames, np.ones_like(frames))
    if not f0:
        return Encoded(units, durations, notes=said.repairs)
    segments = prosody.segment_f0(encoder.log_f0(said.wave), durations)
    return Encoded(units, durations, prosody.normalise(*segments, speaker_f0), said.repairs)


def features(
    audio: str | os.PathLike[str] | Audio | Any,
    encoder: str | os.PathLike[str],
    layer: int = 3,
    pad_seconds: float | None = None,
) -> np.ndarray:
    """Features of one utterance. It loads the encoder: for many, `load_encoder(...).features(waves)` is faster.

    Args:
      audio: an audio file; or the samples of one utterance as an array, mono at 16 kHz (`audio.prepare`).
      encoder: directory of a HuBERT or Whisper; "mfcc" or "log_mel".
      layer: 1 to L: its output, of Whisper's last layer after the final norm, as transformers numbers
        `hidden_states`; 0: the input of the first. "mfcc" and "log_mel" have none.
      pad_seconds: a shorter wave is padded with zeros to so many seconds, up to an hour, and the frames of the padding
        are returned too: 30 is what Whisper's own code does, which gives 1,500 frames. None for no padding.

    Returns:
      float32 [F, D].

    Raises:
      ValueError: no such encoder or layer, or a pad_seconds that is none; AudioError, StorageError (both of them) where
        the audio or the encoder cannot be used.
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
    """A speaker's mean log f0 (Hz), for `encode`: over the voiced frames of some recordings, the more the better.

    Args:
      recordings: files, or what `read_audio` or `prepare` returns.
      encoder: whose frames are meant.

    Raises:
      ValueError: nothing in them is voiced; AudioError (one of them) where one cannot be used.
    """
    waves = (one.wave if isinstance(one, Audio) else read_audio(one).wave for one in recordings)
    heard = np.concatenate([np.zeros(0), *(encoder.log_f0(wave) for wave in waves)])
    if np.isnan(heard).all():
        raise ValueError(f"none of {len(recordings)} recordings has a voiced frame: the speaker's f0 is not known")
    return float(np.nanmean(heard))


def _acoustic_features(config: acoustic.AcousticConfig, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
    with acoustic.one_thread():
        return [acoustic.features(wave, config) for wave in waves]


def _narrow_features(
    features: Callable[[Sequence[np.ndarray]], list[np.ndarray]], hertz: float, waves: Sequence[np.ndarray]
) -> list[np.ndarray]:
    return features([audio_in.lowpass(wave, hertz) for wave in waves])


def _load(name: str, layer: int, plain_chunks: bool = False, lowest: int = 1) -> tuple[Encoder, int]:
    """An encoder by its name, or of the kind that its directory's config.json says; and D."""
    if name in ACOUSTIC:
        config = ACOUSTIC[name]
        return Encoder(name, None, config.hop, functools.partial(_acoustic_features, config)), config.dim
    if places.at(name).is_dir():
        return _load_directory(name, layer, plain_chunks, lowest)
    raise ValueError(
        f"encoder {name!r} is neither {' nor '.join((*ACOUSTIC, *assets.NAMES))} nor the directory of a HuBERT or "
        "Whisper. Import one by `python -m spjax.convert hubert` or `whisper`."
    )


def _load_directory(directory: str, layer: int, plain_chunks: bool, lowest: int) -> tuple[Encoder, int]:
    from spjax.speech2unit import hubert, whisper
    from spjax.speech2unit.transformer import place
    from spjax.storage.encoders import read_encoder

    config, params, info = read_encoder(directory)
    whole = isinstance(layer, numbers.Integral) and not isinstance(layer, bool)
    if not whole or not lowest <= layer <= config.layers:
        raise ValueError(
            f"{directory} has the layers {lowest} to {config.layers}, {layer!r} is none of them: choose one"
        )
    layer = int(layer)
    params = place(params, layer)  # on the device once, not at every call
    loaded = functools.partial(Encoder, info["name"], layer, config.hop)
    if isinstance(config, whisper.WhisperConfig):
        if plain_chunks:
            raise ValueError(f"{directory} is a Whisper encoder, plain_chunks is for HuBERT: leave it out")
        features = functools.partial(whisper.extract, params, config, layer=layer)
        return loaded(features, margin=whisper.MARGIN), config.dim
    features = functools.partial(hubert.extract, params, config, layer=layer)
    if not plain_chunks:
        return loaded(features), config.dim
    features = functools.partial(features, plain_chunks=True, chunk=PLAIN_CHUNK)
    return loaded(features, chunk=PLAIN_CHUNK), config.dim


def _load_kmeans(directory: str, encoder: Encoder, dim: int) -> KMeans:
    """A k-means that belongs to the encoder's features."""
    from spjax.storage.kmeans_store import load_kmeans

    kmeans = load_kmeans(directory)
    theirs = (kmeans.card["encoder"], kmeans.card.get("layer") or None, kmeans.centroids.shape[1])
    ours = (encoder.name, encoder.layer, dim)
    if theirs != ours:
        raise ValueError(
            f"{directory} was fitted on {_described(*theirs)}; the encoder gives {_described(*ours)}. "
            "Give the k-means that belongs to it, or fit one."
        )
    return kmeans


def _described(name: str, layer: int | None, dim: int) -> str:
    return f"{name}{'' if layer is None else f' layer {layer}'}, {dim} features a frame"
