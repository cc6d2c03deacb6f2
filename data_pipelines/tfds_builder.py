"""TFDS builders of all tasks: raw directory → waveform at 16 kHz, labels, splits.

    from data_pipelines.tfds_builder import builder

    lt_sc = builder("lt_sc", "RAW/lt_sc", protocol="honest", data_dir="TFDS")
    lt_sc.download_and_prepare()
    train = lt_sc.as_dataset(split="train")

An example has `id`, `audio` (int16 [n], mono, 16 kHz), `labels` (a ClassLabel a slot), `speaker`, `source` and
`source_rate` (Hz, of the file). The protocol is the builder's config. Nothing is downloaded: the raw directory must
exist.

TFDS's builders of these data sets are not used. `speech_commands` is v0.02, not the paper's v0.01. `accentdb` and
`voxforge` have the right version, and the classes and speaker-disjoint rule of our builders, but they decode by pydub,
accentdb keeps 44.1 kHz and makes no splits, and neither gives files that extraction can hash and cut into parts. TFDS
has no builders of the other tasks.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from data_pipelines.builders import CLIPS
from data_pipelines.clips import Clip, Splits
from data_pipelines.splits import PROTOCOLS, BuildError, check_protocol
from spjax.extras import needs
from spjax.tasks import TASKS, Task

VERSION = "1.0.0"  # of the written data: raise it when a listing or the format of an example changes


def builder(task: str, raw: epath.PathLike, protocol: str = "paper", data_dir: epath.PathLike | None = None) -> Any:
    """Makes the TFDS builder (`tfds.core.GeneratorBasedBuilder`) of a task of the paper.

    Args:
      task: one of `data_pipelines.builders.CLIPS`.
      raw: root of the unpacked data set; local or gs://.
      protocol: "paper" or "honest".
      data_dir: directory of prepared data; None for TFDS's default.

    Raises:
      BuildError: an unknown task or protocol; from `download_and_prepare`, an invalid raw directory.
      AudioError: from `download_and_prepare`, a recording that cannot be used.
    """
    if task not in CLIPS:
        raise BuildError(f"task {task!r} is unknown: choose one of {', '.join(CLIPS)}")
    check_protocol(protocol)
    raw = epath.Path(raw)
    return _builder_class(TASKS[task], tuple(PROTOCOLS))(
        lambda: CLIPS[task](raw, protocol), raw, data_dir=data_dir, config=protocol
    )


def builder_of(task: Task, splits: Splits, raw: epath.PathLike, data_dir: epath.PathLike | None = None) -> Any:
    """Makes a TFDS builder of existing splits, such as the user's (`data_pipelines.manifests`).

    Args:
      task: the task of the labels; its name becomes the data set's.
      splits: the clips.
      raw: root of the clips' paths.
      data_dir: directory of prepared data; None for TFDS's default.
    """
    return _builder_class(task, ("own",))(lambda: splits, epath.Path(raw), data_dir=data_dir, config="own")


def example(clip: Clip, task: Task, raw: epath.PathLike) -> dict[str, Any]:
    """Makes a clip's TFDS example (see the module for the fields).

    Raises:
      AudioError: the recording cannot be used.
    """
    from spjax.encoders.audio import read_audio

    audio = read_audio(epath.Path(raw) / clip.path, clip.start, clip.duration)
    if audio.repairs:
        print(f"repaired: {clip.path}: {'; '.join(audio.repairs)}", file=sys.stderr)
    return {
        "id": clip.id,
        "audio": np.clip(np.rint(audio.wave * 2**15), -(2**15), 2**15 - 1).astype(np.int16),
        "labels": {slot.name: label for slot, label in zip(task.slots, clip.labels, strict=True)},
        "speaker": clip.speaker,
        "source": clip.source,
        "source_rate": audio.source_rate,
    }


@functools.cache
def _builder_class(task: Task, protocols: tuple[str, ...]) -> Any:
    """Makes a class for a task, since TFDS takes the data set's name from the class."""
    with needs("data", "preparing recordings"):
        import tensorflow_datasets as tfds

    class ClipBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Prepares the clips of one task."""

        name = task.name
        code_path = None  # else TFDS looks for download checksums next to the code
        VERSION = tfds.core.Version(VERSION)
        BUILDER_CONFIGS = [  # noqa: RUF012 - TFDS reads the class attribute
            tfds.core.BuilderConfig(name=protocol, description=f"split of the protocol {protocol!r}")
            for protocol in protocols
        ]

        def __init__(self, list_clips: Any, raw: epath.Path, **kwargs: Any) -> None:
            self._list_clips, self._raw = list_clips, raw
            super().__init__(**kwargs)

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "id": tfds.features.Text(),
                "audio": tfds.features.Audio(shape=(None,), dtype=np.int16, sample_rate=16_000),
                "labels": {slot.name: tfds.features.ClassLabel(names=list(slot.labels)) for slot in task.slots},
                "speaker": tfds.features.Text(),
                "source": tfds.features.Text(),
                "source_rate": tfds.features.Scalar(np.int32),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"The task {task.name} of spjax, prepared from a raw tree; metric {task.metric}.",
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("audio", "labels"),
            )

        def _split_generators(self, dl_manager: Any) -> Mapping[str, Any]:
            del dl_manager  # nothing is downloaded
            return {split: self._generate_examples(clips) for split, clips in self._list_clips().items()}

        def _generate_examples(self, clips: list[Clip]) -> Iterator[tuple[str, dict[str, Any]]]:
            for clip in clips:
                yield clip.id, example(clip, task, self._raw)

    return ClipBuilder
