"""Extraction: content of the records, independence of runner and interruptions, unusable files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from etils import epath
from etils.epath import backend, gpath
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import assemble, data_flags, fit_kmeans, make_parts, parts
from data_pipelines import extract as extraction
from data_pipelines.clips import Clip, Splits
from data_pipelines.extract import Wanted, extract, extract_all
from data_pipelines.make_parts import ExtractError, build_pipeline
from data_pipelines.manifests import read_user_data
from data_pipelines.splits import BuildError
from spjax.data.records import load_card, read_unit_records
from spjax.data.tfrecords import RecordError
from spjax.encoders.audio import read_audio
from spjax.encoders.encoder import Encoder, encode, load_encoder
from spjax.io import KMeans, load_kmeans, save_encoder, save_kmeans
from spjax.io.files import unflatten
from spjax.models.hubert_config import HubertConfig
from tests.data_pipelines.builders.raw_trees import distinct
from tests.data_pipelines.corpus import COUNTS, TASK, make_corpus, tone
from tests.encoders.bad_files import make_bad_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("raw")


@pytest.fixture(scope="module")
def splits(raw) -> Splits:
    return make_corpus(raw)


@pytest.fixture(scope="module")
def kmeans(raw, splits, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "kmeans"
    save_kmeans(folder, fit_kmeans.fit_kmeans(splits["train"], raw, load_encoder("mfcc"), clusters=12, described="toy"))
    return folder


@pytest.fixture(scope="module")
def encoder(kmeans) -> Encoder:
    return load_encoder("mfcc", kmeans)


@pytest.fixture(scope="module")
def records(raw, splits, kmeans, tmp_path_factory) -> Path:
    """Records made by two workers."""
    out = tmp_path_factory.mktemp("records") / "toy"
    extract(TASK, splits, raw, out, encoder="mfcc", kmeans=kmeans, workers=2, notes=["made of tones"])
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def few(raw: Path, count: int = 6) -> Splits:
    return make_corpus(raw, {"train": count, "test": 2})


# ---- what the records hold


def test_records_have_the_encoders_units_of_each_clip(raw, splits, records, encoder):
    card = load_card(records)
    assert card.counts == {**COUNTS, "train": COUNTS["train"] + 4}
    assert (card.encoder, card.layer, card.kmeans, card.vocabulary) == ("mfcc", 0, encoder.kmeans.id, 12)
    assert card.merged
    assert card.durations
    assert not card.f0
    assert card.notes == ("made of tones",)
    assert set(card.sources) == {"train clips", "valid clips", "test clips"}
    for split, clips in splits.items():
        units, _ = read_unit_records(records, split)
        assert units.ids == sorted(clip.id for clip in clips)
        by_id = {clip.id: clip for clip in clips}
        for i, name in enumerate(units.ids):
            clip = by_id[name]
            wanted = encode(read_audio(raw / clip.path, clip.start, clip.duration), encoder)
            assert units.units_of(i).tolist() == wanted.units.tolist()
            assert units.durations[units.offsets[i] : units.offsets[i + 1]].tolist() == wanted.durations.tolist()
            labels = [TASK.classes[c][1] for c in units.classes[i]]
            assert tuple(labels) == clip.labels
    assert not [path for path in records.parent.iterdir() if path.name != "toy"]


def test_provenance_names_file_crop_and_rate(records):
    from spjax.data.tfrecords import read_frames

    (shard,) = load_card(records).shards["train"]
    text = b"\n".join(read_frames((records / shard.file).read_bytes(), shard.file, check_crc=True))
    for provenance in (b"000.wav, 8000 Hz", b"001.wav, 16000 Hz", b"long.flac from 0.5 s for 0.5 s, 16000 Hz"):
        assert provenance in text


def test_no_merge_gives_one_unit_a_frame(tmp_path, raw, splits, kmeans, encoder):
    two = {"test": splits["test"][:2]}
    card = extract(TASK, two, raw, tmp_path / "u", encoder="mfcc", kmeans=kmeans, merge=False, workers=0)
    units, _ = read_unit_records(tmp_path / "u", "test")
    assert not card.merged
    assert set(units.durations.tolist()) == {1}
    wanted = encode(raw / splits["test"][0].path, encoder, merge=False).units
    assert units.units_of(0).tolist() == wanted.tolist()


def test_f0_is_normalised_by_speaker(tmp_path, kmeans, encoder):
    raw = tmp_path / "raw"
    raw.mkdir()
    clips = []
    for number, (speaker, sound) in enumerate((("ann", 2), ("ann", 1), ("bob", 4), ("", 5))):
        soundfile.write(raw / f"{number}.wav", tone(sound, 0.4, 16000), 16000)
        clips.append(Clip(str(number), f"{number}.wav", ("low", "none"), speaker))
    halves = {"train": clips[:1] + clips[2:], "test": clips[1:2]}
    card = extract(TASK, halves, raw, tmp_path / "u", encoder="mfcc", kmeans=kmeans, f0=True, workers=0)
    assert card.f0
    train, _ = read_unit_records(tmp_path / "u", "train")
    test, _ = read_unit_records(tmp_path / "u", "test")
    alone = [encode(raw / f"{number}.wav", encoder, f0=True) for number in range(4)]
    found = [train.f0[train.offsets[i] : train.offsets[i + 1]] for i in range(3)]
    # Speakers with one recording, or unknown: the mean of the utterance
    np.testing.assert_allclose(found[1], alone[2].f0, atol=1e-6)
    np.testing.assert_allclose(found[2], alone[3].f0, atol=1e-6)
    # A speaker with a high and a low recording in two splits: one is above, one below the common mean
    low, high = ((mine - its.f0)[mine != 0] for mine, its in ((found[0], alone[0]), (test.f0, alone[1])))
    assert np.ptp(low) < 1e-5
    assert np.ptp(high) < 1e-5
    assert low[0] < -0.1
    assert high[0] > 0.1


@settings(max_examples=50)
@given(st.data())
def test_voiced_frames_of_a_speaker_have_mean_zero(data):
    counts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=12))
    speakers = data.draw(st.lists(st.sampled_from(["", "a", "b"]), min_size=len(counts), max_size=len(counts)))
    total = sum(counts)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    voiced = rng.integers(0, 4, total).astype(np.int32)
    part = parts.Part(
        counts=np.asarray(counts, np.int32),
        units=np.arange(total, dtype=np.int32),
        durations=voiced + 1,
        f0=np.where(voiced > 0, rng.normal(5, 1, total), 0).astype(np.float32),
        voiced=voiced,
        rates=np.full(len(counts), 16000, np.int32),
        seconds=np.ones(len(counts)),
        refused=np.asarray([""] * len(counts)),
        repaired=np.asarray([""] * len(counts)),
        files=np.zeros((len(counts), 2), np.int64),
    )
    clips = [Clip(str(i), f"{i}.wav", ("low", "some"), speaker) for i, speaker in enumerate(speakers)]
    made = assemble.utterances(TASK, {"train": clips}, [part], f0=True)["train"]
    assert [len(one.units) for one in made] == counts
    ends = np.cumsum(counts)
    sums: dict[str, float] = {}
    for i, (one, speaker) in enumerate(zip(made, speakers, strict=True)):
        frames = voiced[ends[i] - counts[i] : ends[i]]
        name = speaker or f"nobody {i}"
        sums[name] = sums.get(name, 0.0) + float(np.dot(one.f0, frames))
        assert (one.f0[frames == 0] == 0).all()
    np.testing.assert_allclose(list(sums.values()), 0, atol=1e-4)


# ---- the same whoever makes it


@pytest.mark.distributed
def test_one_worker_makes_the_same_records_as_two(tmp_path, raw, splits, kmeans, records):
    extract(TASK, splits, raw, tmp_path / "toy", encoder="mfcc", kmeans=kmeans, workers=1, notes=["made of tones"])
    assert content(tmp_path / "toy") == content(records)


@pytest.mark.parametrize("how", [{"workers": 0}, {"runner": "FnApiRunner"}], ids=["here", "Beam"])
def test_this_process_makes_the_same_records(tmp_path, raw, splits, kmeans, records, how):
    backwards = {split: clips[::-1] for split, clips in splits.items()}
    notes = ["made of tones"]
    extract(TASK, backwards, raw, tmp_path / "toy", encoder="mfcc", kmeans=kmeans, notes=notes, **how)
    assert content(tmp_path / "toy") == content(records)


@pytest.mark.distributed
def test_a_job_server_makes_the_same_records(tmp_path, raw, splits, kmeans, records):
    extract(
        TASK,
        splits,
        raw,
        tmp_path / "toy",
        encoder="mfcc",
        kmeans=kmeans,
        runner="PortableRunner",
        options=["--job_endpoint=embed", "--environment_type=LOOPBACK"],
        notes=["made of tones"],
    )
    assert content(tmp_path / "toy") == content(records)


def test_several_data_sets_in_one_pipeline(tmp_path, raw, splits, kmeans, records):
    wanted = [
        Wanted(TASK, splits, raw, tmp_path / "toy", notes=["made of tones"]),
        Wanted(TASK, {"test": splits["test"]}, raw, tmp_path / "small"),
    ]
    cards = extract_all(wanted, encoder="mfcc", kmeans=kmeans, workers=0)
    assert [card.counts.get("train") for card in cards] == [104, None]
    assert content(tmp_path / "toy") == content(records)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "toy"]


@pytest.mark.distributed
def test_units_of_a_hubert_in_parallel(tmp_path):
    """A HuBERT sums in another order on more threads: workers must have one thread each for equal bytes."""
    rng = np.random.default_rng(0)
    config = HubertConfig(conv_dim=32, dim=32, layers=1, heads=2, ffn_dim=64, position_width=16, position_groups=4)
    params = {
        path: (0.3 * rng.standard_normal(shape) + path.endswith("scale")).astype(np.float32)
        for path, shape in config.shapes.items()
    }
    save_encoder(tmp_path / "hubert", config, unflatten(params), "tiny")
    centroids = rng.standard_normal((50, config.dim)).astype(np.float32)
    save_kmeans(tmp_path / "km", KMeans(centroids, {"encoder": "tiny", "layer": 1}))
    splits: Splits = {"test": []}
    for number in range(parts.CLIPS_PER_PART + 4):  # two parts, one shape each
        soundfile.write(tmp_path / f"{number}.wav", tone(number, 0.3, 16000), 16000)
        splits["test"].append(Clip(f"{number:03d}", f"{number}.wav", ("low", "none")))
    how: dict[str, Any] = {"encoder": str(tmp_path / "hubert"), "kmeans": tmp_path / "km", "layer": 1}
    for workers in (1, 2):
        card = extract(TASK, splits, tmp_path, tmp_path / f"by {workers}", workers=workers, **how)
        assert (card.encoder, card.layer, card.vocabulary) == ("tiny", 1, 50)
    assert content(tmp_path / "by 1") == content(tmp_path / "by 2")
    units, _ = read_unit_records(tmp_path / "by 1", "test")
    assert len(set(units.units.tolist())) > 3


# ---- interruptions


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "data_pipelines.extract", *flags]


def manifest(path: Path, splits: Splits) -> Path:
    rows = ["path,split,speaker,start,duration,pitch,noise"]
    for split, clips in splits.items():
        for clip in clips:
            crop = f"{clip.start},{clip.duration}" if clip.duration else ","
            rows.append(f"{clip.path},{split},{clip.speaker},{crop},{','.join(clip.labels)}")
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.mark.distributed
def test_continues_after_a_kill(tmp_path, raw, splits, kmeans, monkeypatch):
    flags = [f"--manifest={manifest(tmp_path / 'toy.csv', splits)}", "--crops", f"--raw={raw}", "--encoder=mfcc"]
    flags.append("--name=toy")
    flags += [f"--kmeans={kmeans}"]
    process = subprocess.Popen(command(*flags, f"--out={tmp_path / 'toy'}", "--workers=1"), cwd=ROOT)
    while not (first := list(tmp_path.glob(".toy.parts-*/part-*"))):
        assert process.poll() is None
        time.sleep(0.02)
    workers = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "toy").exists()
    assert_gone(workers)
    (folder,) = tmp_path.glob(".toy.parts-*")
    there = {path.name for path in folder.glob("part-*")}
    if len(there) == 3:  # it had finished
        max(set(folder.glob("part-*")) - set(first)).unlink()
        there = {path.name for path in folder.glob("part-*")}
    made = []
    encode_part = parts.encode_part
    monkeypatch.setattr(parts, "encode_part", lambda *args: made.append(args[2]) or encode_part(*args))
    extraction.main([*flags, f"--out={tmp_path / 'toy'}", "--workers=0"])
    assert made
    assert there | {f"part-{number:06d}.npz" for number in made} == {f"part-{number:06d}.npz" for number in range(3)}
    assert len(there) + len(made) == 3
    extraction.main([*flags, f"--out={tmp_path / 'again'}", "--workers=0"])
    assert content(tmp_path / "toy") == content(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "toy", "toy.csv"]


@pytest.mark.distributed
def test_sigterm_ends_it_with_its_workers(tmp_path, raw, splits, kmeans):
    if sys.platform != "linux":
        pytest.skip("workers are looked for in /proc")
    flags = [f"--manifest={manifest(tmp_path / 'toy.csv', splits)}", "--crops", f"--raw={raw}", "--encoder=mfcc"]
    flags += [f"--kmeans={kmeans}", f"--out={tmp_path / 'toy'}", "--workers=2"]
    process = subprocess.Popen(command(*flags), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while len(workers := children_of(process.pid)) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "ended by SIGTERM" in text
    assert "Traceback" not in text
    assert_gone(workers)
    assert list(tmp_path.glob(".toy.parts-*"))


def children_of(launcher: int) -> list[int]:
    """Process ids of a launcher's workers."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and b"spawn_main" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    return found


def assert_gone(processes: list[int]) -> None:
    start = time.monotonic()
    while any(Path(f"/proc/{number}").exists() for number in processes):
        assert time.monotonic() - start < 30
        time.sleep(0.05)


def test_parts_of_changed_audio_are_not_reused(tmp_path, kmeans, monkeypatch):
    raw = tmp_path / "raw"
    splits = make_corpus(raw, {"train": 80, "test": 2})
    how: dict[str, Any] = {"encoder": "mfcc", "kmeans": kmeans, "workers": 0}
    made = []
    encode_part = parts.encode_part
    monkeypatch.setattr(parts, "encode_part", lambda *args: made.append(args[2]) or encode_part(*args))
    with monkeypatch.context() as stopped:  # all parts exist, but no records
        stopped.setattr(extraction, "write_unit_records", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract(TASK, splits, raw, tmp_path / "u", **how)
    assert sorted(made) == [0, 1]
    made.clear()
    shutil.copy(raw / "001.wav", raw / "070.wav")
    extract(TASK, splits, raw, tmp_path / "u", **how)
    assert made == [1]
    extract(TASK, splits, raw, tmp_path / "fresh", **how)
    assert content(tmp_path / "u") == content(tmp_path / "fresh")
    units, _ = read_unit_records(tmp_path / "u", "train")
    assert units.units_of(units.ids.index("001")).tolist() == units.units_of(units.ids.index("070")).tolist()


def test_file_stats(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    os.utime(tmp_path / "a", ns=(5, 1_000_000_007))
    assert parts.file_stats(tmp_path, ["a", "none", "a"]).tolist() == [[3, 1_000_000_007], [-1, -1], [3, 1_000_000_007]]
    assert parts.file_stats(tmp_path, []).shape == (0, 2)


def test_parts_of_other_settings_are_not_reused():
    job = parts.Job("raw", "mfcc", "km", {"kmeans": "a"}, (("a.wav", 0.0, None),), 6)
    other = [{"identity": {"kmeans": "b"}}, {"clips": (("a.wav", 0.5, None),)}, {"f0": True}, {"merge": False}]
    hashes = {job.hash, *(dataclasses.replace(job, **change).hash for change in other)}
    assert len(hashes) == 5
    assert dataclasses.replace(job, raw="elsewhere", stop="x").hash == job.hash


def test_a_job_round_trips_through_its_file(tmp_path):
    job = parts.Job("raw", "mfcc", "km", {"kmeans": "a"}, (("a.wav", 0.0, None), ("b.wav", 1.5, 2.0)), 6, f0=True)
    assert parts.load_job(parts.save_job(epath.Path(tmp_path), job)) == job
    assert job.parts == 1


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("make_part", "element", "message"),
    [
        (os._exit, 3, "a worker process died, .* --workers of"),
        (make_parts._make_part, ("none/job.json", 0), "a worker failed: .*none/job.json"),
    ],
)
def test_a_dead_or_failed_worker_ends_the_run(monkeypatch, make_part, element, message):
    monkeypatch.setattr(make_parts, "_make_part", make_part)
    with pytest.raises(ExtractError, match=f"{message}.*run the same command again"):
        make_parts._run_here([element] * 2, 2)


@pytest.mark.parametrize(
    ("how", "name"), [({"workers": 0}, "a worker"), ({"runner": "FnApiRunner"}, "FnApiRunner")], ids=["here", "Beam"]
)
def test_an_error_of_a_part_is_reported(tmp_path, kmeans, monkeypatch, how, name):
    def fail(*_: Any) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(parts, "encode_part", fail)
    raw = tmp_path / "raw"
    with pytest.raises(ExtractError, match=f"{name} failed: .*the disk is full"):
        extract(TASK, few(raw), raw, tmp_path / "u", encoder="mfcc", kmeans=kmeans, **how)
    assert not (tmp_path / "u").exists()


class BeamJob:
    """A Beam pipeline, and the job that it starts, with a given end."""

    def __init__(self, end: str | Exception | signal.Signals) -> None:
        self.end, self.cancelled = end, threading.Event()

    def run(self) -> BeamJob:
        return self

    def wait_until_finish(self) -> str:
        if isinstance(self.end, Exception):
            raise self.end
        if isinstance(self.end, signal.Signals):
            os.kill(os.getpid(), self.end)
            self.cancelled.wait(60)
        return str(self.end)

    def cancel(self) -> None:
        self.cancelled.set()


def test_a_job_is_cancelled_by_sigterm():
    job = BeamJob(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"), extraction._orderly_end():
        make_parts._run_beam(job, "FlinkRunner")
    assert job.cancelled.is_set()


def test_a_runner_that_gives_up_is_named(tmp_path, raw, splits, kmeans, monkeypatch):
    how: dict[str, Any] = {"encoder": "mfcc", "kmeans": kmeans, "runner": "FlinkRunner"}
    for end, message in (
        ("FAILED", "FlinkRunner ended as FAILED with parts missing: see its log"),
        (TimeoutError(), "FlinkRunner failed: TimeoutError, no answer"),
    ):
        monkeypatch.setattr(make_parts, "build_pipeline", lambda *_, end=end: BeamJob(end))
        with pytest.raises(ExtractError, match=message):
            extract(TASK, splits, raw, tmp_path / "u", **how)


def test_an_unreachable_bucket_is_reported(tmp_path, raw, kmeans, monkeypatch):
    error = type("UnavailableError", (Exception,), {"__module__": "tensorflow.python.framework.errors_impl"})

    def away(*_: Any, **__: Any) -> None:
        raise error("no connection")

    monkeypatch.setattr(extraction, "extract_data", away)
    monkeypatch.setattr(data_flags, "chosen", lambda _: None)
    flags = ["--task=fsc", f"--raw={raw}", "--encoder=mfcc", f"--kmeans={kmeans}", f"--out={tmp_path / 'u'}"]
    with pytest.raises(SystemExit, match=r"error: a bucket cannot be reached \(no connection\): .*again to continue"):
        extraction.main(flags)


# ---- bad files


@pytest.fixture
def with_bad(tmp_path) -> tuple[Path, Splits, dict[str, Path]]:
    raw = tmp_path / "raw"
    splits = few(raw, 60)
    bad = make_bad_files(raw / "bad")
    for number, (kind, path) in enumerate(bad.items()):
        split = "train" if number % 2 else "test"
        splits[split].append(Clip(f"{number:02d} {kind}", f"bad/{path.name}", ("low", "none")))
    return raw, splits, bad


def test_repairs_are_listed_and_counted(tmp_path, kmeans, capsys):
    raw = tmp_path / "raw"
    splits = few(raw, 60)
    clip = splits["test"][0]
    path = raw / clip.path
    data = bytearray(path.read_bytes())
    place = data.index(b"data") + 4
    data[place : place + 4] = bytes(4)
    path.write_bytes(data)
    card = extract(TASK, splits, raw, tmp_path / "u", encoder="mfcc", kmeans=kmeans, workers=0)
    (row,) = [json.loads(line) for line in (tmp_path / "u-repaired.jsonl").read_text().splitlines()]
    assert (row["split"], row["id"], row["path"]) == ("test", clip.id, clip.path)
    assert row["why"].startswith("its length field says 0 bytes")
    assert f"repaired: {clip.path}: {row['why']}" in capsys.readouterr().err
    assert f"test: 1 of {len(splits['test'])} clips were repaired" in card.notes
    assert not (tmp_path / "u-refused.jsonl").exists()


def test_good_files_are_kept_and_bad_ones_named(tmp_path, with_bad, kmeans, encoder, capsys):
    raw, splits, bad = with_bad
    assert len(bad) >= 20
    card = extract(TASK, splits, raw, tmp_path / "u", encoder="mfcc", kmeans=kmeans, on_error="skip", workers=0)
    text = capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "u-refused.jsonl").read_text().splitlines()]
    assert len(rows) == len(bad)
    assert {row["path"] for row in rows} == {f"bad/{path.name}" for path in bad.values()}
    for row in rows:
        assert str(raw / row["path"]) in row["why"]
        assert f"refused: {row['why']}" in text
    for split, clips in splits.items():
        good = sorted(clip.id for clip in clips if not clip.path.startswith("bad/"))
        units, _ = read_unit_records(tmp_path / "u", split)
        assert units.ids == good
        refused = len(clips) - len(good)
        assert f"{split}: {refused} of {len(clips)} clips were refused" in card.notes
    # Clips next to bad ones have the same units as alone
    units, _ = read_unit_records(tmp_path / "u", "test")
    name = units.ids[0]
    clip = next(clip for clip in splits["test"] if clip.id == name)
    assert units.units_of(0).tolist() == encode(raw / clip.path, encoder).units.tolist()


def test_a_label_whose_clips_are_all_refused_is_an_error(tmp_path, kmeans):
    """Also with skipped files, since the label could not be learnt."""
    raw = tmp_path / "raw"
    splits = few(raw)
    for clip in splits["train"]:
        if clip.labels[0] == "high":
            (raw / clip.path).write_text("no audio")
    with pytest.raises(ExtractError, match=r"every clip of 'high' \(pitch\) in train was refused, such as: .*001.wav"):
        extract(TASK, splits, raw, tmp_path / "u", encoder="mfcc", kmeans=kmeans, on_error="skip", workers=0)
    assert not (tmp_path / "u").exists()


def test_stops_at_a_bad_file_until_it_is_repaired(tmp_path, kmeans, capsys):
    raw = tmp_path / "raw"
    splits = make_corpus(raw, {"train": 130, "valid": 2, "test": 2})
    good = (raw / "070.wav").read_bytes()
    (raw / "070.wav").write_bytes(good[:-100])
    flags = [f"--manifest={manifest(tmp_path / 'toy.csv', splits)}", "--crops", f"--raw={raw}", "--encoder=mfcc"]
    flags.append("--name=toy")
    flags += [f"--kmeans={kmeans}", f"--out={tmp_path / 'toy'}", "--workers=0"]
    with pytest.raises(SystemExit) as ended:
        extraction.main(flags)
    assert str(ended.value.code).startswith(f"error: {raw / '070.wav'} is cut off")
    assert "--on-error=skip" in str(ended.value.code)
    assert not (tmp_path / "toy").exists()
    (folder,) = tmp_path.glob(".toy.parts-*")
    before = {path.name for path in folder.glob("part-*")}
    assert "part-000001.npz" in before
    assert len(before) < 3
    (raw / "070.wav").write_bytes(good)
    extraction.main(flags)
    assert "train: 134 utterances" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "toy", "toy.csv"]


def test_workers_make_no_more_parts_once_one_refused(tmp_path, raw, kmeans):
    folder = epath.Path(tmp_path)
    clips = tuple((f"missing{i}.wav", 0.0, None) for i in range(130))
    job = parts.Job(str(raw), "mfcc", str(kmeans), {}, clips, 6, stop=str(tmp_path / "stopped"))
    file = parts.save_job(folder, job)
    for number in range(job.parts):
        parts.make_part((file, number))
    assert parts.parts_there(folder) == {0}
    part = parts.read_part(parts.part_path(folder, 0))
    assert (part.counts == 0).all()
    assert "missing7.wav does not exist" in part.refused[7]


def test_a_split_without_a_good_file(tmp_path, raw, splits, kmeans):
    broken = {"train": splits["train"][:2], "test": [Clip("x", "nowhere.wav", ("low", "none"))]}
    with pytest.raises(RecordError, match="split 'test' of toy has no utterances"):
        extract(TASK, broken, raw, tmp_path / "u", encoder="mfcc", kmeans=kmeans, on_error="skip", workers=0)
    assert not (tmp_path / "u").exists()


# ---- flags and places


def test_existing_records_are_not_replaced_by_default(tmp_path, raw, splits, kmeans):
    some = {"test": splits["test"][:3]}
    arguments: dict[str, Any] = {"encoder": "mfcc", "kmeans": kmeans, "workers": 0}
    extract(TASK, some, raw, tmp_path / "u", **arguments)
    with pytest.raises(ExtractError, match=r"is not empty.*--overwrite"):
        extract(TASK, some, raw, tmp_path / "u", **arguments)
    card = extract(TASK, {"test": splits["test"][:4]}, raw, tmp_path / "u", overwrite=True, **arguments)
    assert card.counts == {"test": 4}


def test_a_folder_named_like_an_encoder_is_ignored(tmp_path, raw, splits, kmeans, monkeypatch):
    (tmp_path / "mfcc").mkdir()
    (tmp_path / "mfcc" / "config.json").write_text('{"hash": "x"}')
    monkeypatch.chdir(tmp_path)
    card = extract(TASK, {"test": splits["test"][:2]}, raw, "u", encoder="mfcc", kmeans=kmeans, workers=0)
    assert card.encoder == "mfcc"


@pytest.mark.parametrize(
    ("number", "text"), [(0.5, "0.5"), (2.0, "2"), (3, "3"), (1234.56789, "1234.56789"), (1234567.0, "1234567")]
)
def test_provenance_has_all_digits(number, text):
    assert assemble._seconds(number) == text


def test_invalid_arguments_are_refused_before_any_work(tmp_path, raw, splits, kmeans):
    some = {"test": splits["test"][:3]}
    with pytest.raises(ValueError, match="neither mfcc nor log_mel"):
        extract(TASK, some, raw, tmp_path / "u", encoder="whisper", kmeans=kmeans)
    with pytest.raises(ValueError, match="was fitted on mfcc"):
        extract(TASK, some, raw, tmp_path / "u", encoder="log_mel", kmeans=kmeans)
    with pytest.raises(ExtractError, match="FlinkRunner by its own option"):
        extract(TASK, some, raw, tmp_path / "u", encoder="mfcc", kmeans=kmeans, runner="FlinkRunner", workers=3)
    with pytest.raises(ExtractError, match="--workers=-1: give 0 or more"):
        extract(TASK, some, raw, tmp_path / "u", encoder="mfcc", kmeans=kmeans, workers=-1)
    with pytest.raises(ExtractError, match=r"--parallelism=3: options after -- .* name it by --runner"):
        extract(TASK, some, raw, tmp_path / "u", encoder="mfcc", kmeans=kmeans, options=["--parallelism=3"])
    (file := tmp_path / "file").touch()
    for out, message in (
        (file, "file is a file: choose"),
        (file / "u", "u cannot be written .*file is not a directory"),
    ):
        with pytest.raises((ExtractError, OSError), match=message):
            extract(TASK, some, raw, out, encoder="mfcc", kmeans=kmeans, overwrite=True)
    file.unlink()
    wrong = {"test": [Clip("a", "000.wav", ("loud", "none"))]}
    with pytest.raises(BuildError, match=r"'loud \| none'"):
        extract(TASK, wrong, raw, tmp_path / "u", encoder="mfcc", kmeans=kmeans)
    twice = {"test": [splits["test"][0]] * 2}
    with pytest.raises(BuildError, match="twice"):
        extract(TASK, twice, raw, tmp_path / "u", encoder="mfcc", kmeans=kmeans)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("runner", "flag", "value"),
    [
        ("FlinkRunner", "flink_master", "host:8081"),
        ("SparkRunner", "spark_master_url", "spark://host:7077"),
        ("PortableRunner", "job_endpoint", "host:8099"),
    ],
)
def test_other_runners_take_their_own_options(runner, flag, value):
    pipeline = build_pipeline([("job.json", 0)], runner, options=[f"--{flag}={value}"])
    assert type(pipeline.runner).__name__ == runner
    assert pipeline.options.get_all_options()[flag] == value


def test_options_that_beam_does_not_take(caplog):
    with pytest.raises(ExtractError, match=r"--runner=FlinkRunner --parallelism=many: .*invalid int value: 'many'"):
        build_pipeline([("job.json", 0)], "FlinkRunner", ["--parallelism=many"])
    build_pipeline([("job.json", 0)], "FlinkRunner", ["--flink_master=h:1", "--paralelism=3"])  # may be a job server's
    assert "--paralelism=3" in caplog.text


@pytest.mark.parametrize(("runner", "options"), [("NoRunner", []), ("DataflowRunner", ["--project=p"])])
def test_runners_that_cannot_be_used_are_named(runner, options):
    with pytest.raises(ExtractError, match=f"--runner={runner}"):
        build_pipeline([("job.json", 0)], runner, options=options)


class Bucket:
    """A remote file system backed by a local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            here = [a.replace("gs://bucket", str(self.folder)) if isinstance(a, str) else a for a in args]
            return getattr(backend.os_backend, name)(*here, **kwargs)

        return call


def mount(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Mounts a folder as a bucket and returns its URL."""
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Bucket(folder))
    monkeypatch.setattr(gpath, "_GCS_BACKENDS", frozenset())
    return "gs://bucket"


def test_user_data_in_a_bucket(tmp_path, monkeypatch):
    """Gives the same result as locally, except for links, which a bucket does not have."""
    data = tmp_path / "data"
    distinct(data, [f"{label}/{number}.wav" for label in ("no", "yes") for number in range(10)])
    shutil.copy(data / "no" / "1.wav", data / "no" / "copy.wav")
    distinct(data, ["yes/.hidden.wav", "yes/sub.d/deep.FLAC"])
    (data / "no" / "a.txt").write_text("x")
    rows = [f"{label}/{number}.wav,{label}" for label in ("no", "yes") for number in range(10)]
    (data / "my.csv").write_text("\n".join(["path,label", *rows]))
    place = mount(tmp_path, monkeypatch)
    for here, there in [(data, f"{place}/data"), (data / "my.csv", f"{place}/data/my.csv")]:
        expected, found = read_user_data(here), read_user_data(there)
        assert found[:2] == expected[:2]
        assert found.notes == expected.notes
        assert (found.raw, expected.raw) == (f"{place}/data", str(data))
    (data / "stop").mkdir()
    with pytest.raises(BuildError, match="gs://bucket/data/stop holds no recording"):
        read_user_data(f"{place}/data")


def test_paths_in_a_bucket(tmp_path, raw, splits, kmeans, monkeypatch):
    bucket = tmp_path / "bucket"
    shutil.copytree(raw, bucket / "raw")
    shutil.copytree(kmeans, bucket / "km")
    some = {"train": splits["train"][:3], "test": splits["test"][:2]}
    extract(TASK, some, raw, tmp_path / "here", encoder="mfcc", kmeans=kmeans, workers=0)
    place = mount(bucket, monkeypatch)
    extract(TASK, some, f"{place}/raw", f"{place}/there", encoder="mfcc", kmeans=f"{place}/km", workers=0)
    assert content(bucket / "there") == content(tmp_path / "here")
    assert sorted(path.name for path in bucket.iterdir()) == ["km", "raw", "there"]


@pytest.mark.slow
@pytest.mark.distributed
def test_real_recordings_from_the_command_line(tmp_path):
    raw = ROOT.parent / "shared" / "audio" / "lt_sc"
    if not raw.is_dir():
        pytest.skip("recordings are not beside this checkout (../shared/audio/lt_sc)")
    flags = ["--task=lt_sc", f"--raw={raw}", "--encoder=mfcc", "--clusters=50", "--utterances=150"]
    done = subprocess.run(
        command(*flags, f"--out={tmp_path / 'lt_sc'}"), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    card = load_card(tmp_path / "lt_sc")
    assert card.counts == {"train": 598, "valid": 85, "test": 98}
    assert card.vocabulary == 50
    assert "note: protocol: paper" in done.stdout
    assert "781/781" in done.stderr
    assert "s of speech/s" in done.stderr
    assert "WARNING" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lt_sc", "lt_sc-kmeans"]


def test_the_bundled_encoder_has_a_k_means(tmp_path, raw, splits):
    some = {"train": splits["train"][:3], "test": splits["test"][:2]}
    named = extract(TASK, some, raw, tmp_path / "named", encoder="tiny", kmeans=None, workers=0)
    by_both = extract(TASK, some, raw, tmp_path / "both", encoder="mfcc", kmeans="tiny", workers=0)
    assert content(tmp_path / "named") == content(tmp_path / "both")
    assert (named.encoder, named.kmeans, named.vocabulary) == ("mfcc", load_kmeans("tiny").id, 100)
    assert by_both.kmeans == named.kmeans


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--encoder=tiny", "--clusters=5"), "--encoder=tiny has its own k-means: leave --clusters out"),
        (("--encoder=mfcc",), "--encoder=mfcc needs a k-means: give --kmeans=DIR, or --clusters=N"),
        (("--encoder=tiny", "--kmeans=other"), "encoder tiny has its own k-means, which other is not"),
    ],
)
def test_an_encoder_has_one_k_means(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        extraction.main([f"--folders={tmp_path}", f"--out={tmp_path / 'out'}", *flags])
    assert not list(tmp_path.iterdir())
