"""Tables of several files: good and bad files, a full queue, names, and CSV that runs nothing."""

from __future__ import annotations

import asyncio
import csv
import io
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from spjax import SpeechPrompt
from spjax.serving import tables
from spjax.serving.batcher import Batcher, Prediction, QueueFullError
from spjax.serving.limits import Limits
from tests.serving import page_world

pytestmark = pytest.mark.usefixtures("quick_compile")

LIMITS = Limits(max_bytes=3_000_000, max_seconds=12, queue=32, timeout=600)


def answered(batcher: Any, files: Sequence[str], tasks: Sequence[str]) -> list[list[Any]]:
    return asyncio.run(tables.answer_files(batcher, files, tasks, lambda *_, **__: True))


def test_a_table_has_rows_for_good_files_and_errors_for_bad_ones(batcher: Batcher, tmp_path: Path):
    good = [page_world.recording(tmp_path / f"good_{n}.wav", 0.5, n) for n in range(2)]
    bad = tmp_path / "bad, very.wav"
    bad.write_bytes(b"RIFF no more")
    long = page_world.recording(tmp_path / "long.wav", 13)
    rows = answered(batcher, [str(path) for path in (good[0], bad, long, good[1])], ["order", "mood"])
    assert [row[0] for row in rows] == ["good_0.wav"] * 3 + ["bad, very.wav", "long.wav"] + ["good_1.wav"] * 3
    read = list(csv.DictReader(io.StringIO(tables.to_csv(rows).decode("utf-8-sig"), newline="")))
    assert [tuple(row.values())[:2] for row in read] == [tuple(map(str, row[:2])) for row in rows]
    assert read[3]["error"].startswith("bad, very.wav is no audio")
    assert str(tmp_path) not in read[3]["error"]
    assert "at most 12 s" in read[4]["error"]
    for path, some in ((good[0], read[:3]), (good[1], read[5:])):
        (answer,) = batcher.predictor.predict([path], ["order", "mood"])
        labels = [(task, slot, label) for task, own in answer.items() for slot, label in own["labels"].items()]
        assert [(row["task"], row["slot"], row["label"]) for row in some] == labels
        for row in some:
            expected = answer[row["task"]]["probabilities"][row["slot"]][row["label"]]
            assert float(row["probability"]) == pytest.approx(expected, abs=1e-5)
            assert row["error"] == ""


class Fickle:
    """A batcher whose queue is full every other time; records the largest number of concurrent requests."""

    limits = Limits(timeout=5)

    def __init__(self, answered: Prediction) -> None:
        self.answered, self.asked, self.now, self.most = answered, 0, 0, 0
        self.lock = threading.Lock()

    def submit(self, audio: str, tasks: Sequence[str]) -> Future[Prediction]:
        with self.lock:
            self.asked += 1
            if self.asked % 2:
                raise QueueFullError("busy")
            self.now += 1
            self.most = max(self.most, self.now)
        future: Future[Prediction] = Future()
        threading.Timer(0.02, self._settle, [future]).start()
        return future

    def _settle(self, future: Future[Prediction]) -> None:
        with self.lock:
            self.now -= 1
        future.set_result(self.answered)


def test_a_table_waits_while_the_queue_is_full_and_leaves_room(batcher: Batcher, tmp_path: Path):
    file = str(page_world.recording(tmp_path / "a.wav", 0.3))
    fickle = Fickle(batcher.answer(file, ["mood"]))
    rows = answered(fickle, [file] * 40, ["mood"])
    assert len(rows) == 40
    assert not any(row[-1] for row in rows)
    assert fickle.most <= 16


def test_timeout():
    class Dead:
        limits = Limits(timeout=0.05)
        future: Future[Prediction] = Future()

        def submit(self, audio: str, tasks: Sequence[str]) -> Future[Prediction]:
            return self.future

    dead = Dead()
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
        asyncio.run(tables.ask(dead, "a.wav", ["mood"]))  # type: ignore[arg-type]
    assert dead.future.cancelled(), "the prediction is no longer needed"


def test_rows_belong_to_files_by_position(batcher: Batcher, predictor: SpeechPrompt, tmp_path: Path):
    """Files of one name are numbered; names have neither control characters nor bidirectional controls."""
    named = {"1": "a.wav", "2": "a.wav", "3": "a.wav (2)", "4": "\u202egnp.wav", "5": "gnp.wav", "6": "b\n\x1bc.wav"}
    files = []
    for number, (folder, name) in enumerate(named.items()):
        (tmp_path / folder).mkdir()
        made = page_world.recording(tmp_path / "made.wav", 0.3 + 0.1 * number, number)
        files.append(str(made.rename(tmp_path / folder / name)))
    Path(files[2]).write_bytes(b"no audio")
    rows = answered(batcher, files, ["mood"])
    expected = ["a.wav", "a.wav (2)", "a.wav (2) (2)", "gnp.wav", "gnp.wav (2)", "b c.wav"]
    assert [row[0] for row in rows] == expected
    for file, row in zip(files, rows, strict=True):
        if file == files[2]:
            assert "no audio" in row[-1]
            continue
        (answer,) = predictor.predict([file], ["mood"])
        assert row[4] == pytest.approx(answer["mood"]["probabilities"]["mood"][row[3]], abs=1e-5)


def test_no_cell_of_the_csv_is_a_formula():
    names = ("=1+1.wav", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n@1", " =cmd|' /C calc'!A0", "＝1", "ünits =1.wav")
    names += ("plain", 'a,"b",c', "two\nlines", "x;=1+1", "a" * 300)
    content = tables.to_csv([[name, name, name, name, 0.25, name] for name in names])
    assert content.startswith(b"\xef\xbb\xbf"), "Excel takes it for UTF-8"
    _, *read = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    for name, row in zip(names, read, strict=True):
        cell = f"'{name}" if name.strip()[0] in "=+-@＝" else name
        assert row == [cell] * 4 + ["0.25", cell]
    assert b'\r\n"x;=1+1","x;=1+1",' in content, "quoted, for those who split at semicolons"
