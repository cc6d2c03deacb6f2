"""An encoder as a whole: features and k-means, from a file or an array to an utterance's units."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from spjax.speech2unit import acoustic, prosody
from spjax.speech2unit import audio as audio_in
from spjax.speech2unit.audio import Audio, prepare, read_audio
from spjax.speech2unit.units import merge as merge_runs
from spjax.storage import KMeans, places
from spjax.types import Encoded

ACOUSTIC = {"mfcc": acoustic.MFCC, "log_mel": acoustic.LOG_MEL}  # encoders that need no weights
PLAIN_CHUNK = 1_600_000  # samples that the reference encodes at once, 100 s


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """Waves to features to units; `load_encoder` makes one.

    Attributes:
      name: "mfcc", "log_mel", or what its directory calls a HuBERT; and the low-pass, where there is one.
      layer: of a HuBERT; None for the others.
      hop: samples between frames. Frame t is centred on sample `hop * t + 200`.
      features: waves float32 [n] each (16 kHz, n at least 400) → features float32 [F, D] each, as if encoded alone.
      kmeans: centroids [C, D]; None where only features are wanted.
      chunk: samples that are encoded apart, each chunk losing the frames across its end; None: nothing is lost.
    """

    name: str
    layer: int | None
    hop: int
    features: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
    kmeans: KMeans | None = None
    chunk: int | None = None

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
      encoder: "mfcc", "log_mel", or the directory of a HuBERT.
      kmeans: directory of a k-means that was fitted on this encoder's features; None for features only.
      layer: of a HuBERT, from 1.
      plain_chunks: HuBERT encodes chunks of 100 s apart, as the reference does.
      lowpass: Hz above which nothing is heard, where recordings of different band widths must not be told by that. It
        is part of the encoder's name: its k-means and unit LM are others.

    Raises:
      ValueError: no such encoder or layer, or a k-means of another encoder, layer or feature size; StorageError (one of
        them) where files are absent or damaged.
    """
    if lowpass is not None:
        audio_in.check_lowpass(lowpass)
    name = os.fspath(encoder)
    if name in ACOUSTIC:
        config = ACOUSTIC[name]
        loaded = Encoder(name, None, config.hop, functools.partial(_acoustic_features, config))
        dim = config.dim
    elif places.at(name).is_dir():
        loaded, dim = _load_hubert(name, layer, plain_chunks)
    else:
        raise ValueError(
            f"encoder {name!r} is neither {' nor '.join(ACOUSTIC)} nor the directory of a HuBERT. "
            "Import one by `python -m spjax.convert hubert`."
        )
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
    # Products too small to share: beside XLA's threads several of BLAS's took five times as long.
    with _threads().limit(limits=1, user_api="blas"):
        return [acoustic.features(wave, config) for wave in waves]


@functools.cache
def _threads() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _narrow_features(
    features: Callable[[Sequence[np.ndarray]], list[np.ndarray]], hertz: float, waves: Sequence[np.ndarray]
) -> list[np.ndarray]:
    return features([audio_in.lowpass(wave, hertz) for wave in waves])


def _load_hubert(directory: str, layer: int, plain_chunks: bool) -> tuple[Encoder, int]:
    """The encoder, and D."""
    from spjax.speech2unit import hubert
    from spjax.storage.huberts import load_hubert

    config, params, info = load_hubert(directory)
    if type(layer) is not int or not 1 <= layer <= config.layers:
        raise ValueError(f"{directory} has the layers 1 to {config.layers}, {layer!r} is none of them")
    params = hubert.place(params, layer)  # on the device once, not at every call
    features = functools.partial(hubert.extract, params, config, layer=layer)
    if not plain_chunks:
        return Encoder(info["name"], layer, config.hop, features), config.dim
    features = functools.partial(features, plain_chunks=True, chunk=PLAIN_CHUNK)
    return Encoder(info["name"], layer, config.hop, features, chunk=PLAIN_CHUNK), config.dim


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
