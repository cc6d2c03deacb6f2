"""`SpeechPrompt`, the predictor: one frozen LM, one encoder and any number of prompt packs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from spjax.compilation_cache import keep_programs
from spjax.encoders import prosody
from spjax.encoders.audio import SAMPLE_RATE, Audio, check_length, prepare, read_audio
from spjax.encoders.encoder import Encoder, encode_waves, load_encoder
from spjax.io import StorageError
from spjax.io.banks import load_packs
from spjax.io.packs import PromptPack, check_pack, load_pack
from spjax.models.config import UnitLMConfig
from spjax.serving import artefact, scoring
from spjax.serving.frozen import quantize
from spjax.serving.load import UnitLM, load_unit_lm
from spjax.serving.scoring import Bank, Shape
from spjax.serving.unit_checks import same_units
from spjax.tasks import Task
from spjax.types import Encoded, Params

GROUP_SECONDS = 600  # of speech encoded together: bounds the memory for waves and features

Packs = Mapping[str, Any] | Sequence[Any] | str | os.PathLike[str] | PromptPack
Tasks = str | Sequence[str] | Sequence[Sequence[str]] | None


@dataclasses.dataclass(frozen=True, eq=False)
class SpeechPrompt:
    """Predicts any mix of utterances and tasks with one frozen LM; made by `load`. Safe to call from several threads.

    Attributes:
      config: the LM's architecture.
      params: the LM's weights, cast or quantized to `compute`.
      encoder: speech to units; None if only units are classified.
      packs: prompt packs by name.
      banks: the packs, grouped so that those of one shape share batches.
      compute: storage type of the LM's kernels: float32, bfloat16 or int8.
      merged: whether runs of equal units are merged, as in the packs' training data.
      max_units: the most units of an utterance; None for no limit.
      overlength: "error" refuses longer utterances, "cut" truncates them to `max_units` units.
    """

    config: UnitLMConfig
    params: Params
    encoder: Encoder | None
    packs: dict[str, PromptPack]
    banks: list[Bank]
    compute: str
    merged: bool
    max_units: int | None
    overlength: Literal["error", "cut"]

    @classmethod
    def load(
        cls,
        lm: str | os.PathLike[str] | UnitLM,
        encoder: str | os.PathLike[str] | Encoder | None,
        packs: Packs,
        *,
        kmeans: str | os.PathLike[str] | None = None,
        layer: int = 6,
        lowpass: float | None = None,
        compute: str = "float32",
        max_units: int | None = 1024,
        overlength: Literal["error", "cut"] = "error",
        ahead: bool = False,
        compilation_cache: str | None = None,
    ) -> SpeechPrompt:
        """Load a predictor.

        Args:
          lm: a unit LM or multi-stream LM, or its directory.
          encoder: an encoder with a k-means; or "mfcc", "log_mel" or the directory of a HuBERT, wav2vec2, WavLM or
            Whisper; None to classify units only.
          packs: packs or their directories by name; or a list of packs and of paths that `io.load_packs` takes
            (packs, banks, directories of them, such as a job's), or one of these. The default name of a pack is its
            task's.
          kmeans: directory of the encoder's k-means, if `encoder` is a name or directory.
          layer: layer of an encoder with weights, if `encoder` is a directory.
          lowpass: cut-off of the encoder's low-pass in Hz, if `encoder` is a name or directory.
          compute: float32, bfloat16 or int8 kernels of the LM (`frozen.quantize`); encoding is always float32.
          max_units: the most units of an utterance (1024: about 40 s of speech); None for no limit but that of the LM's
            learned positions, which holds in any case.
          overlength: "error" or "cut" (see the attribute).
          ahead: compile every program now instead of on first use.
          compilation_cache: directory of the persistent compilation cache; None for none.

        Raises:
          StorageError: files absent or damaged, or a pack of another LM or of other units.
          ValueError: no packs, two of one name, an encoder without k-means, an invalid setting.
        """
        if overlength not in ("error", "cut") or (max_units is not None and max_units < 1):
            raise ValueError(
                f"max_units is {max_units!r}, overlength {overlength!r}: give 1 or more (or None), and 'error' or 'cut'"
            )
        if compilation_cache:
            keep_programs(compilation_cache)
        named = _named(packs)
        lm = lm if isinstance(lm, UnitLM) else load_unit_lm(lm)
        if most := lm.config.most_units:
            max_units = min(max_units or most, most)
        for name, pack in named.items():
            try:
                check_pack(pack, lm.hash, lm.config)
            except StorageError as error:
                raise StorageError(f"{name}: {error}") from error
        if isinstance(encoder, Encoder | None):
            if kmeans is not None:
                raise ValueError("kmeans goes with an encoder's name: give load_encoder(NAME, KMEANS) instead")
        else:
            encoder = load_encoder(encoder, kmeans, layer=layer, lowpass=lowpass)
        merged = same_units(named, encoder, lm.config)
        weights = quantize(lm.params, compute)
        made = cls(
            config=lm.config,
            params=weights,
            encoder=encoder,
            packs=named,
            banks=scoring.make_banks(lm.config, weights, compute, named),
            compute=compute,
            merged=merged,
            max_units=max_units,
            overlength=overlength,
        )
        if ahead:
            made.compile_ahead(progress=True)
        return made

    @property
    def tasks(self) -> dict[str, Task]:
        """Slots and labels of each task, by the name of its pack."""
        return {name: pack.task for name, pack in self.packs.items()}

    @property
    def shapes(self) -> list[Shape]:
        """The shapes that batches can have; each is one program per bank."""
        return scoring.shapes(self.max_units or scoring.BUCKETS[-1])

    def compile_ahead(self, units: Sequence[Any] | None = None, tasks: Tasks = None, *, progress: bool = False) -> int:
        """Compile the programs that `predict_units(units, tasks)` uses; without units, all programs.

        If `max_units` is None, "all" means those for up to 1024 units.

        Args:
          units, tasks: as for `predict_units`.
          progress: show a progress bar after two seconds.

        Returns:
          The number of programs compiled.
        """
        if units is None:
            wanted = {(number, shape) for number in range(len(self.banks)) for shape in self.shapes}
        else:
            lengths = np.minimum([_length(one) for one in units], self.max_units or np.inf).astype(int)
            wanted = {
                (number, batch.shape)
                for number, bank in enumerate(self.banks)
                for batch in scoring.plan_batches([bank], lengths, self._requested(tasks, len(lengths)))
            }

        def compiled(one: tuple[int, Shape]) -> None:
            bank = self.banks[one[0]]
            bank.programs.get(one[1], self.params, bank.params)

        # The largest first, since they take longest. An exception waits only for the running compilations.
        order = sorted(wanted, key=lambda one: one[1].rows * one[1].columns, reverse=True)
        pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="compile")
        try:
            ready = pool.map(compiled, order)
            for _ in tqdm(
                ready, total=len(order), desc="compile", unit="program", delay=2, disable=not progress, leave=False
            ):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        return len(wanted)

    def encode(
        self,
        audios: Iterable[Any],
        rate: int | None = None,
        *,
        speaker_f0: float | None = None,
        progress: bool = False,
    ) -> list[Encoded | ValueError]:
        """Encode speech to units, with f0 if the LM is a multi-stream LM.

        Args:
          audios: files, `Audio`s, or arrays of one utterance each.
          rate: sample rate of the arrays, Hz.
          speaker_f0: mean log f0 (Hz) of the speaker, as for `spjax.encode`; by default each utterance's mean.
          progress: show a progress bar after two seconds.

        Returns:
          For each utterance its units, or the error that names what is wrong with it.

        Raises:
          ValueError: the predictor has no encoder.
        """
        if self.encoder is None:
            raise ValueError(
                "the predictor has no encoder, so it takes units only: give load(lm, ENCODER, packs, kmeans=...)"
            )
        audios = list(audios)
        found: list[Any] = [None] * len(audios)
        waves: dict[int, Audio] = {}
        with tqdm(total=len(audios), desc="encode", unit="file", delay=2, disable=not progress, leave=False) as bar:
            for number, audio in enumerate(audios):
                try:
                    loaded = _audio(audio, rate)
                    name = audio if isinstance(audio, str | os.PathLike) else f"utterance {number}"
                    check_length(str(name), loaded.wave, self.encoder.least)
                    waves[number] = loaded
                except ValueError as error:
                    found[number] = error
                held = sum(len(one.wave) for one in waves.values())
                if number + 1 == len(audios) or held >= GROUP_SECONDS * SAMPLE_RATE:
                    for n, encoded in self._encode_group(waves, speaker_f0).items():
                        name = audios[n] if isinstance(audios[n], str | os.PathLike) else f"utterance {n}"
                        found[n] = self._too_long(name, len(encoded.units)) or encoded
                    waves = {}
                bar.update()
        return found

    def _encode_group(self, waves: Mapping[int, Audio], speaker_f0: float | None) -> dict[int, Encoded]:
        assert self.encoder is not None
        f0 = self.config.prosody is not None
        found = encode_waves([one.wave for one in waves.values()], self.encoder, merge=self.merged, f0=f0)
        return {
            number: Encoded(
                one.units,
                one.durations,
                prosody.normalise(one.f0, one.voiced, speaker_f0) if f0 else None,
                waves[number].repairs,
            )
            for number, one in zip(waves, found, strict=True)
        }

    def _too_long(self, name: Any, units: int) -> ValueError | None:
        if self.overlength == "cut" or self.max_units is None or units <= self.max_units:
            return None
        most = self.config.most_units
        of, more = (" of the LM", "") if most and units > most else ("", f"max_units={units} (--max-units={units}) or ")
        return ValueError(
            f"{name} has {units} units, the limit is {self.max_units}{of}: give a shorter one, or load with {more}"
            "overlength='cut' (--cut: only its beginning is classified)"
        )

    def predict(
        self,
        audios: Iterable[Any],
        tasks: Tasks = None,
        rate: int | None = None,
        *,
        speaker_f0: float | None = None,
        progress: bool = False,
    ) -> list[dict[str, Any]]:
        """Predict labels for speech; each utterance is encoded once, whatever the number of tasks.

        Args:
          audios: files, `Audio`s, or arrays of one utterance each.
          tasks: as for `predict_units`.
          rate: sample rate of the arrays, Hz.
          speaker_f0: as for `encode`.
          progress: show progress bars after two seconds.

        Returns:
          As for `predict_units`.

        Raises:
          ValueError: the first bad input, by name (AudioError is a subclass); `encode` returns the error of each.
        """
        units = self.encode(_several(audios), rate, speaker_f0=speaker_f0, progress=progress)
        for one in units:
            if isinstance(one, ValueError):
                raise one
        return self.predict_units(units, tasks, progress)

    def predict_units(self, units: Sequence[Any], tasks: Tasks = None, progress: bool = False) -> list[dict[str, Any]]:
        """Predict labels for utterances given as units.

        Args:
          units: for each utterance its units, at least one; or Encoded, with f0 for a multi-stream LM.
          tasks: task names for all utterances, or a list of names for each; None for every task.
          progress: show a progress bar after two seconds.

        Returns:
          For each utterance `{task: {"labels": {slot: label}, "probabilities": {slot: {label: probability}}}}`. The
          labels are the most probable combination that occurs in training (any combination, if the pack does not list
          them).

        Raises:
          ValueError: an unknown task; or an utterance that is too long, has no units, lacks the prosody that the LM
            needs, or has units outside the LM's vocabulary.
        """
        requested = self._requested(tasks, len(units))
        if not requested:
            return []
        return scoring.answer(self.params, self.banks, self._split(units), requested, progress)

    def scores(self, units: Sequence[Any], tasks: Tasks = None, progress: bool = False) -> dict[str, scoring.Scored]:
        """Log probabilities by task; arguments as for `predict_units`. `scoring.decode_scores` decodes them."""
        requested = self._requested(tasks, len(units))
        return scoring.score(self.params, self.banks, self._split(units), requested, progress) if requested else {}

    def _split(self, units: Sequence[Any]) -> scoring.UnitSet:
        split = scoring.unit_set(units, self.config, cut=True)
        for i, length in enumerate(split.lengths.tolist()):
            if error := self._too_long(f"utterance {i}", length):
                raise error
        return split if self.max_units is None else split.cut(self.max_units)

    def _requested(self, tasks: Tasks, count: int) -> list[tuple[str, ...]]:
        """Task names for each of `count` utterances."""
        if tasks is None:
            return [tuple(self.packs)] * count
        names: Sequence[Any] = (tasks,) if isinstance(tasks, str) else tasks
        each = [names] * count if all(isinstance(name, str) for name in names) else names
        if len(each) != count:
            raise ValueError(f"{len(each)} lists of tasks for {count} utterances: give one list each, or names for all")
        unknown = sorted({name for chosen in each for name in chosen} - self.packs.keys())
        if unknown:
            raise ValueError(f"unknown task {', '.join(map(repr, unknown))}: there are {', '.join(self.packs)}")
        return [tuple(dict.fromkeys(chosen)) for chosen in each]

    def export(
        self,
        directory: str | os.PathLike[str],
        *,
        columns: Sequence[int] = (64, 128, 256),
        rows: Sequence[int] = (1, 8),
        progress: bool = False,
    ) -> Path:
        """Write a directory that serves these tasks from units with jax and numpy only: see `artefact.export`."""
        return artefact.export(
            Path(directory), self.config, self.params, self.banks, self.compute, self.merged,
            columns=columns, rows=rows, progress=progress,
        )  # fmt: skip


def _several(audios: Any) -> Iterable[Any]:
    if isinstance(audios, str | os.PathLike | Audio):
        raise ValueError(f"{type(audios).__name__} is one utterance: give a list of them")
    return audios


def _length(units: Any) -> int:
    return len(units.units if isinstance(units, Encoded) else units)


def _audio(audio: Any, rate: int | None) -> Audio:
    """Samples of one utterance, from any of the input types."""
    if isinstance(audio, Audio):
        return audio
    if isinstance(audio, str | os.PathLike):
        return read_audio(audio)
    if rate is None:
        raise ValueError("the array's sample rate is missing: give rate=, in Hz")
    return prepare(audio, rate)


def _named(packs: Packs) -> dict[str, PromptPack]:
    """Read packs that are given as paths, and name them all.

    Raises:
      StorageError: a pack that is absent or damaged, or two files with one name.
      ValueError: no packs, or two with one name.
    """
    if isinstance(packs, Mapping):
        named = {str(name): pack if isinstance(pack, PromptPack) else load_pack(pack) for name, pack in packs.items()}
    else:
        given = [packs] if isinstance(packs, str | os.PathLike | PromptPack) else list(packs)
        named = load_packs(*(os.fspath(place) for place in given if not isinstance(place, PromptPack)))
        for pack in given:
            if isinstance(pack, PromptPack):
                name = pack.card["task"]
                if name in named:
                    raise ValueError(f"two packs are called {name!r}: leave one out, or give packs={{NAME: PACK, ...}}")
                named[name] = pack
    if not named:
        raise ValueError("no packs: give at least one")
    return named
