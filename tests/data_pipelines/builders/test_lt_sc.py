"""Lithuanian commands: tables and noise rows, Unicode forms, and the published recordings."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from etils import epath

from data_pipelines.builders import lt_sc
from data_pipelines.split_manifests import inspect_files
from data_pipelines.splits import BuildError
from spjax.tasks import TASKS
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, listed, record, shared, write

WORDS = (*TASKS["lt_sc"].slots[0].labels[:13], "taip", "du")
SPEAKERS = {"train_limit20": range(1, 13), "dev_full": range(13, 17), "test_full": range(17, 21)}


def row(word: str, name: str, label: str) -> str:
    return f"/elsewhere/lt_speech_commands/dataset/{word}/{name}.wav\t{label}\n"


def plant(root: Path, order: int, form: str = "NFC", tables: str = "csv/") -> None:
    names = []
    for table, speakers in SPEAKERS.items():
        text = "filename\tlabel\n"
        for word in WORDS:
            for speaker in speakers:
                if (table, word) == ("dev_full", "į_dešinę"):
                    continue
                names.append(f"dataset/{word}/{speaker:02d}_nohash_0.wav")
                text += row(word, f"{speaker:02d}_nohash_0", word if word in WORDS[:13] else "unknown")
        write(root, f"{tables}{table}.csv", text)
    names += [f"dataset/_background_noise_/{number}.wav" for number in range(30)]
    noise = "".join(row("_background_noise_", str(number), "silence") for number in reversed(range(30)))
    write(root, f"{tables}noise_full.csv", "filename\tlabel\n" + noise)
    record(root, [unicodedata.normalize(form, name) for name in names], order)


def test_splits(tmp_path: Path):
    found = listed(lt_sc.clips, plant, tmp_path, ["paper", "honest"])
    paper, honest = found["paper"], found["honest"]
    assert counts(paper) == (15 * 12 + 10, 14 * 4 + 10, 15 * 4 + 10)
    silent = {split: [clip.id for clip in part if clip.labels == ("silence",)] for split, part in paper.items()}
    assert sorted(silent["test"]) == sorted(f"dataset/_background_noise_/{number}.wav" for number in range(20, 30))
    assert not shared(paper, "speaker")
    assert not shared(honest, "speaker")
    assert labels(paper["train"]) - labels(paper["valid"]) == {"į_dešinę"}
    assert honest["test"] == paper["test"]
    assert labels(honest["valid"]) == labels(honest["train"]) == set(TASKS["lt_sc"].slots[0].labels)


def test_unicode_forms_give_equal_splits(tmp_path: Path):
    plant(tmp_path / "nfc", 0)
    plant(tmp_path / "nfd", 0, form="NFD", tables="")  # tables at the root
    composed, decomposed = (lt_sc.clips(epath.Path(tmp_path / form)) for form in ("nfc", "nfd"))
    assert [clip.id for clip in everything(composed)] == [clip.id for clip in everything(decomposed)]
    assert all((tmp_path / "nfd" / clip.path).is_file() for clip in everything(decomposed))


def test_faults_are_named(tmp_path: Path):
    plant(tmp_path, 0)
    table = tmp_path / "csv" / "dev_full.csv"
    whole = table.read_text(encoding="utf-8")
    table.write_text(whole + row("ne", "99_nohash_0", "ne"), encoding="utf-8")
    with pytest.raises(BuildError, match=r"dev_full.csv, line 58 names dataset/ne/99_nohash_0.wav, which is missing"):
        lt_sc.clips(epath.Path(tmp_path))
    table.write_text(whole.replace("\tlabas", "\tlaba"), encoding="utf-8")
    with pytest.raises(BuildError, match=r"labas/13_nohash_0.wav has the label 'laba', which is not in the task"):
        lt_sc.clips(epath.Path(tmp_path))
    table.write_text(whole.replace("\t", ","), encoding="utf-8")
    with pytest.raises(
        BuildError, match=r"lacks filename, label: its first line must have the names, separated by '\\t'"
    ):
        lt_sc.clips(epath.Path(tmp_path))
    table.unlink()
    with pytest.raises(BuildError, match=r"neither .*csv/dev_full.csv nor .*dev_full.csv exists"):
        lt_sc.clips(epath.Path(tmp_path))


@pytest.mark.parametrize("protocol", ["paper", "honest"])
def test_real_recordings(audio: Path, protocol: str):
    splits = lt_sc.clips(epath.Path(audio / "lt_sc"), protocol)
    assert counts(splits) == {"paper": (598, 85, 98), "honest": (601, 82, 98)}[protocol]
    assert not shared(splits, "speaker")
    assert len(labels(splits["valid"])) == {"paper": 14, "honest": 15}[protocol]
    files = inspect_files(audio / "lt_sc", [clip.path for clip in everything(splits)])
    assert len(files) == len({facts.sha256 for facts in files.values()}) == 781
    assert {facts.rate for facts in files.values()} == {16_000}
