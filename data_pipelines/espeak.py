"""Text-to-speech for the demo: espeak-ng, through the shared library of espeakng-loader (GPLv3, optional).

The engine keeps its state in globals, so a process has one voice at a time. It draws breath noise from its random
generator, which is seeded before every utterance so that equal requests give equal samples.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spjax.extras import needs

_SYNCHRONOUS = 2  # samples are passed to the callback before the call returns
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # espeak_PARAMETER
_UTF8, _SSML = 1, 0x10
_PATH_LIMIT = 140  # the engine copies its data path into 160 bytes and fails on longer ones
# Variants that do not sound like a person, or whose gender is unclear.
_ODD = re.compile(r"robo|robot|whisper|croak|demonic|tweaky|storm|fast|announcer|klatt|mr serious|uni|ricishay", re.I)
REVERSED = frozenset({"aunty"})  # voices with inverted pitch contours, which cannot express questions
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class SpeechError(ValueError):
    """The engine is not installed or fails; the message suggests a fix."""


class Manner(NamedTuple):
    """Speaking style: words a minute, pitch and pitch range in 0..99 (50 is the voice's default)."""

    rate: int = 175
    pitch: int = 50
    range: int = 50


PLAIN = Manner()


class _Engine(NamedTuple):
    library: Any
    samples: list[np.ndarray]
    rate: int
    callback: Any  # keeps a reference for the library, so that Python does not collect it
    raised: list[BaseException]  # errors raised in the callback


def data_path() -> Path:
    """Returns the directory of the engine's data, copied to a short path if its path is too long for the engine.

    Raises:
      MissingExtraError: espeakng-loader is not installed.
    """
    with needs("demo", "synthesised speech"):
        import espeakng_loader
    path = Path(espeakng_loader.get_data_path())
    if len(os.fspath(path)) <= _PATH_LIMIT:
        return path
    user = getattr(os, "getuid", int)()
    short = Path(tempfile.gettempdir()) / f"spjax-espeak-{importlib.metadata.version('espeakng-loader')}-{user}"
    if (short / path.name).exists() and short.stat().st_uid == user:
        return short / path.name
    fresh = Path(tempfile.mkdtemp(prefix="spjax-espeak-"))
    shutil.copytree(path, fresh / path.name)
    try:
        fresh.rename(short)
    except OSError:  # another process was faster, or another user has that name
        return fresh / path.name
    return short / path.name


@functools.cache
def _engine() -> _Engine:
    folder = data_path()
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, os.fspath(folder.parent).encode(), 0)
    if rate <= 0:
        raise SpeechError(f"espeak-ng does not start with the data in {folder}: install espeakng-loader again")
    samples: list[np.ndarray] = []
    raised: list[BaseException] = []

    @_Callback
    def collect(wave: Any, count: int, _: Any) -> int:
        try:
            if wave and count > 0:
                samples.append(np.ctypeslib.as_array(wave, (count,)).copy())
            return 0
        except BaseException as error:  # ctypes drops exceptions of callbacks, such as KeyboardInterrupt
            raised.append(error)
            return 1  # stops the synthesis

    library.espeak_SetSynthCallback(collect)
    return _Engine(library, samples, rate, collect, raised)


def sample_rate() -> int:
    """Returns the sample rate of `say`, in Hz."""
    return _engine().rate


@functools.cache
def voices() -> dict[str, tuple[str, ...]]:
    """Returns the names of human-sounding voice variants, by "male" and "female", sorted."""
    found: dict[str, list[str]] = {"male": [], "female": []}
    for path in sorted((data_path() / "voices" / "!v").iterdir()):
        gender = re.search(r"^gender\s+(male|female)", path.read_text(encoding="utf-8", errors="replace"), re.M)
        if gender and not _ODD.search(path.name):
            found[gender.group(1)].append(path.name)
    return {gender: tuple(names) for gender, names in found.items()}


def say(text: str, language: str, voice: str, manner: Manner = PLAIN, seed: int = 0) -> np.ndarray:
    """Synthesises a text.

    Args:
      text: plain text, or SSML that starts with `<speak>`.
      language: the engine's name of language and accent, such as "en-us" or "lt".
      voice: one of `voices()`.
      manner: speaking style.
      seed: of the breath noise.

    Returns:
      int16 [n] at `sample_rate()`.

    Raises:
      MissingExtraError: the engine is not installed.
      SpeechError: the voice is unknown, or the output is silent.
    """
    library, samples, _, _, raised = _engine()
    if library.espeak_SetVoiceByName(f"{language}+{voice}".encode()) != 0:
        raise SpeechError(f"espeak-ng has no voice {voice!r} of language {language!r}")
    for parameter, value in ((_RATE, manner.rate), (_VOLUME, 100), (_PITCH, manner.pitch), (_RANGE, manner.range)):
        library.espeak_SetParameter(parameter, value, 0)
    library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
    samples.clear()
    raised.clear()
    content, flags = text.encode(), _UTF8 | _SSML * text.startswith("<speak>")
    library.espeak_Synth(content, ctypes.c_size_t(len(content) + 1), 0, 0, 0, flags, None, None)
    if raised:
        raise raised[0]
    wave = np.concatenate(samples) if samples else np.zeros(0, np.int16)
    if not wave.any():
        raise SpeechError(f"espeak-ng returns silence for {text!r} in {language!r} with voice {voice!r}")
    return wave
