"""The predictor: one frozen LM, one encoder and any number of prompt packs; an utterance's answers to all of them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from spjax.compilation_cache import keep_programs
from spjax.models.config import UnitLMConfig
from spjax.serving import artefact, scoring
from spjax.serving.frozen import narrow
from spjax.serving.load import UnitLM, load_unit_lm
from spjax.serving.scoring import Bank, Shape
from spjax.speech2unit import prosody
from spjax.speech2unit.audio import SAMPLE_RATE, Audio, prepare, read_audio
from spjax.speech2unit.encoder import Encoder, load_encoder
from spjax.speech2unit.units import merge
from spjax.storage import StorageError
from spjax.storage.banks import load_packs
from spjax.storage.packs import PromptPack, check_pack, load_pack
from spjax.tasks import Task
from spjax.types import Encoded, Params

GROUP_SECONDS = 600  # of speech that is encoded together: bounds the memory that waves and features take

Packs = Mapping[str, Any] | Sequence[Any] | str | os.PathLike[str] | PromptPack
Tasks = str | Sequence[str] | Sequence[Sequence[str]] | None


@dataclasses.dataclass(frozen=True, eq=False)
class SpeechPrompt:
    """Tasks in front of one frozen LM; `load` makes one. Any mix of utterances and tasks is answered together.

    Calls from several threads do not disturb each other.

    Attributes:
      config: the LM's architecture.
      params: its weights, as `compute` has them.
      encoder: speech to units; None where only units are asked about.
      packs: name to prompt pack.
      banks: the packs, those of one form in one.
      compute: float32, bfloat16 or int8: what the LM's kernels are kept in.
      merged: runs of equal units are one, as in what the packs were trained on.
      max_units: the most units of an utterance; None for no limit.
      overlength: "error" refuses longer ones, "cut" answers for their first `max_units` units.
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
        """A predictor of what the packs were trained for.

        Args:
          lm: a unit LM or multi-stream LM, or its directory.
          encoder: an encoder with a k-means; or "mfcc", "log_mel" or the directory of a HuBERT or Whisper; None: units
            only.
          packs: packs or their directories by name; or a list of packs and of places that `storage.load_packs` takes
            (packs, banks, directories of them, a job's, say), or one of them. A pack is called as its task.
          kmeans: directory of the encoder's k-means, where `encoder` is a name or directory.
          layer: of a HuBERT or Whisper, likewise.
          lowpass: of the encoder, likewise.
          compute: float32, bfloat16 or int8 kernels of the LM (`frozen.narrow`); units come of float32 in any case.
          max_units: the most units of an utterance (1024: about 40 s of speech); None for no limit.
          overlength: "error" or "cut" (see the attribute).
          ahead: compile every program now, not when it is first wanted.
          compilation_cache: directory where compiled programs are kept for the next process; None for nowhere.

        Raises:
          StorageError: files absent or damaged, or a pack of another LM or of other units.
          ValueError: no packs, two of one name, an encoder without k-means, a setting that makes no sense.
        """
        if overlength not in ("error", "cut") or (max_units is not None and max_units < 1):
            raise ValueError(
                f"max_units is {max_units!r}, overlength {overlength!r}: give 1 or more (or None), and 'error' or 'cut'"
            )
        if compilation_cache:
            keep_programs(compilation_cache)
        named = _named(packs)
        lm = lm if isinstance(lm, UnitLM) else load_unit_lm(lm)
        for name, pack in named.items():
            try:
                check_pack(pack, lm.hash, lm.config)
            except StorageError as error:
                raise StorageError(f"{name}: {error}") from error
        if isinstance(encoder, Encoder | None):
            if kmeans is not None:
                raise ValueError("kmeans goes with an encoder's name: load_encoder(NAME, KMEANS) has its own")
        else:
            encoder = load_encoder(encoder, kmeans, layer=layer, lowpass=lowpass)
        merged = _same_units(named, encoder, lm.config)
        weights = narrow(lm.params, compute)
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
        """Slots and labels by the name that a task is asked for by."""
        return {name: pack.task for name, pack in self.packs.items()}

    @property
    def shapes(self) -> list[Shape]:
        """The shapes that batches can have: as many programs for each bank, where utterances are limited in length."""
        return scoring.shapes(self.max_units or scoring.BUCKETS[-1])

    def compile_ahead(self, units: Sequence[Any] | None = None, tasks: Tasks = None, *, progress: bool = False) -> int:
        """Compile the programs that `predict_units(units, tasks)` takes; of no units, all that there are.

        Without a limit on length those up to 1024 units are made.

        Args:
          units, tasks: as `predict_units` takes them.
          progress: a bar, after two seconds.

        Returns:
          How many programs are ready.
        """
        if units is None:
            wanted = {(number, shape) for number in range(len(self.banks)) for shape in self.shapes}
        else:
            lengths = np.minimum([_length(one) for one in units], self.max_units or np.inf).astype(int)
            wanted = {
                (number, batch.shape)
                for number, bank in enumerate(self.banks)
                for batch in scoring.work([bank], lengths, self._asked(tasks, len(lengths)))
            }

        def compiled(one: tuple[int, Shape]) -> None:
            bank = self.banks[one[0]]
            bank.programs.get(one[1], self.params, bank.params)

        # The largest first: they take longest. Leaving early waits for those at hand only.
        order = sorted(wanted, key=lambda one: one[1].rows * one[1].columns, reverse=True)
        pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="compile")
        try:
            ready = pool.map(compiled, order)
            for _ in tqdm(ready, total=len(order), desc="compile", unit="program", delay=2, disable=not progress):
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
        """Speech as units, with f0 where the LM is a multi-stream LM.

        Args:
          audios: files, `Audio`s, or arrays of one utterance each.
          rate: samples a second of the arrays.
          speaker_f0: mean log f0 (Hz) of their speaker, as `spjax.encode` takes it; by default each utterance's own.
          progress: a bar, after two seconds.

        Returns:
          Of each its units; or the error, which says what is wrong with it and why it cannot be answered.

        Raises:
          ValueError: there is no encoder.
        """
        if self.encoder is None:
            raise ValueError(
                "there is no encoder, so units only are answered: give load(lm, ENCODER, packs, kmeans=...)"
            )
        audios = list(audios)
        found: list[Any] = [None] * len(audios)
        waves: dict[int, Audio] = {}
        with tqdm(total=len(audios), desc="encode", unit="file", delay=2, disable=not progress) as bar:
            for number, audio in enumerate(audios):
                try:
                    waves[number] = _audio(audio, rate)
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
        made = {}
        found = self.encoder.units([one.wave for one in waves.values()])
        for (number, (wave, _, repairs)), frames in zip(waves.items(), found, strict=True):
            units, durations = merge(frames) if self.merged else (frames, np.ones_like(frames))
            f0 = None
            if self.config.prosody is not None:
                f0 = prosody.normalise(*prosody.segment_f0(self.encoder.log_f0(wave), durations), speaker_f0)
            made[number] = Encoded(units, durations, f0, repairs)
        return made

    def _too_long(self, name: Any, units: int) -> ValueError | None:
        if self.overlength == "cut" or self.max_units is None or units <= self.max_units:
            return None
        return ValueError(
            f"{name} has {units} units, the limit is {self.max_units}: give a shorter one, or start with "
            f"max_units={units} (--max-units={units}), or with overlength='cut' (--cut) to be answered for its "
            "beginning"
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
        """Answers for speech, which is encoded once whatever the number of tasks.

        Args:
          audios: files, `Audio`s, or arrays of one utterance each.
          tasks: as `predict_units` takes them.
          rate: samples a second of the arrays.
          speaker_f0: as `encode` takes it.
          progress: bars, after two seconds.

        Returns:
          As `predict_units`.

        Raises:
          ValueError: the first thing that cannot be used, by name (AudioError, one of them); `encode` tells of each.
        """
        units = self.encode(_several(audios), rate, speaker_f0=speaker_f0, progress=progress)
        for one in units:
            if isinstance(one, ValueError):
                raise one
        return self.predict_units(units, tasks, progress)

    def predict_units(self, units: Sequence[Any], tasks: Tasks = None, progress: bool = False) -> list[dict[str, Any]]:
        """Answers for utterances given as units.

        Args:
          units: an utterance's units each, at least one; or Encoded, with f0 for a multi-stream LM.
          tasks: names of tasks for all utterances, or a list of names for each; None for every task there is.
          progress: a bar, after two seconds.

        Returns:
          For each utterance `{task: {"labels": {slot: label}, "probabilities": {slot: {label: probability}}}}`. The
          labels are the likeliest combination that training saw (any combination, if the pack does not say).

        Raises:
          ValueError: no such task, an utterance that is too long, has no units, no prosody where the LM wants it, or
            units that the LM does not know.
        """
        asked = self._asked(tasks, len(units))
        if not asked:
            return []
        return scoring.answer(self.params, self.banks, self._split(units), asked, progress)

    def scores(self, units: Sequence[Any], tasks: Tasks = None, progress: bool = False) -> dict[str, scoring.Scored]:
        """Log probabilities by task, where `predict_units` gives answers; `scoring.read_off` reads them."""
        asked = self._asked(tasks, len(units))
        return scoring.score(self.params, self.banks, self._split(units), asked, progress) if asked else {}

    def _split(self, units: Sequence[Any]) -> scoring.UnitSet:
        split = scoring.unit_set(units, self.config)
        for i, length in enumerate(split.lengths.tolist()):
            if error := self._too_long(f"utterance {i}", length):
                raise error
        return split if self.max_units is None else split.cut(self.max_units)

    def _asked(self, tasks: Tasks, count: int) -> list[tuple[str, ...]]:
        """The names that each of `count` utterances is asked."""
        if tasks is None:
            return [tuple(self.packs)] * count
        names: Sequence[Any] = (tasks,) if isinstance(tasks, str) else tasks
        each = [names] * count if all(isinstance(name, str) for name in names) else names
        if len(each) != count:
            raise ValueError(f"{len(each)} lists of tasks for {count} utterances: give one a piece, or names for all")
        unknown = sorted({name for own in each for name in own} - self.packs.keys())
        if unknown:
            raise ValueError(f"no task {', '.join(map(repr, unknown))}: there are {', '.join(self.packs)}")
        return [tuple(dict.fromkeys(own)) for own in each]

    def export(
        self,
        directory: str | os.PathLike[str],
        *,
        columns: Sequence[int] = (64, 128, 256),
        rows: Sequence[int] = (1, 8),
        progress: bool = False,
    ) -> Path:
        """Write what serves these tasks from units without this code: see `artefact.export`."""
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
    """Samples of one utterance, whatever it is given as."""
    if isinstance(audio, Audio):
        return audio
    if isinstance(audio, str | os.PathLike):
        return read_audio(audio)
    if rate is None:
        raise ValueError("the array's rate is missing: give rate=, samples a second")
    return prepare(audio, rate)


def _named(packs: Packs) -> dict[str, PromptPack]:
    """Packs by name, each read.

    Raises:
      StorageError: a pack that is absent or damaged, or two of one name.
      ValueError: none, or two in memory of one name, or one in memory called as one that is read.
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
        raise ValueError("no packs: give one at least")
    return named


def _same_units(packs: Mapping[str, PromptPack], encoder: Encoder | None, config: UnitLMConfig) -> bool:
    """Whether units are merged, if all packs were trained on units of one kind, and the encoder gives those.

    Raises:
      StorageError: a pack of other units.
      ValueError: an encoder without k-means, or of more units than the LM knows.
    """
    known: dict[str, Any] = {}
    for name, pack in packs.items():
        told = units_of(pack.card)
        check_units(f"prompt pack {name!r}", told, "the packs before it", known, "Load them apart.")
        known = told | known
    merged = known.get("merged", True)
    if encoder is None:
        return merged
    if encoder.kmeans is None:
        raise ValueError(f"encoder {encoder.name} has no k-means, so it gives no units: give kmeans=DIR (--kmeans=DIR)")
    ours = {"encoder": encoder.name, "layer": encoder.layer or 0, "kmeans": encoder.kmeans.id}
    way_out = "Give the encoder and k-means that it was trained with, or train a prompt on these units."
    for name, pack in packs.items():
        check_units(f"prompt pack {name!r}", units_of(pack.card), "this encoder", ours, way_out)
    if len(encoder.kmeans.centroids) > config.num_units:
        raise ValueError(
            f"the k-means has {len(encoder.kmeans.centroids)} units, the LM knows {config.num_units}: give the k-means "
            "of its units"
        )
    return merged


def units_of(card: Any) -> dict[str, Any]:
    """What a card says of how units were made, as far as it does."""
    told = {name: card[name] for name in ("encoder", "layer", "kmeans", "merged") if card[name] is not None}
    return told | ({"layer": told.get("layer", 0)} if "encoder" in told else {})  # of an encoder without layers: 0


def check_units(what: str, theirs: Mapping[str, Any], other: str, ours: Mapping[str, Any], way_out: str) -> None:
    """Refuse units that are not made alike. What either does not say is not held against it.

    A k-means that goes by a name ("km100", of imported unit text) cannot be compared with one that goes by its id.

    Args:
      what: whose units the first are, in words.
      theirs: as `units_of` gives them.
      other: whose the second are.
      ours: likewise.
      way_out: what to do, a sentence.

    Raises:
      StorageError: they differ.
    """
    by_id = [bool(re.fullmatch("[0-9a-f]{12}", str(side.get("kmeans")))) for side in (theirs, ours)]
    both = [name for name in theirs if name in ours and (name != "kmeans" or by_id[0] == by_id[1])]
    differing = [name for name in both if theirs[name] != ours[name]]
    if differing:
        told = [", ".join(f"{name} {side[name]}" for name in differing) for side in (theirs, ours)]
        raise StorageError(f"{what} goes with units of {told[0]}, {other} with {told[1]}. {way_out}")
