"""The page without a browser: its endpoints for programs, tables with bad files, bounded attributions."""

from __future__ import annotations

import asyncio
import csv
import io
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from spjax import SpeechPrompt
from spjax.models.prompts import PromptConfig
from spjax.serving import drawing, page
from spjax.serving.batcher import Batcher, Prediction, QueueFullError, as_json
from spjax.serving.limits import Limits
from spjax.storage.packs import PromptPack
from tests.serving import page_world, world

pytestmark = pytest.mark.usefixtures("quick_compile")

LIMITS = Limits(max_bytes=3_000_000, max_seconds=12, queue=32, timeout=600)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory, quick_compile: None) -> SpeechPrompt:
    return page_world.predictor(tmp_path_factory.mktemp("predictor"))


@pytest.fixture(scope="module")
def batcher(predictor: SpeechPrompt) -> Iterator[Batcher]:
    with Batcher(predictor, LIMITS) as batcher:
        yield batcher


def unseen(*_: Any, **__: Any) -> bool:
    """A progress bar that does nothing."""
    return True


def test_programs_are_offered_two_stable_endpoints(batcher: Batcher):
    pytest.importorskip("gradio", reason="gradio is what the page is made of")
    made = page.make_page(batcher)
    named = made.get_api_info()["named_endpoints"]
    assert set(named) == {"/predict", "/batch"}
    predict, batch = ([one["label"] for one in named[name]["parameters"]] for name in ("/predict", "/batch"))
    assert predict == ["Speech", "Tasks"]
    assert batch == ["Recordings, up to 500", "Tasks"]
    assert named["/predict"]["parameters"][1]["parameter_default"] == list(batcher.predictor.tasks)
    assert not made.analytics_enabled
    limits = {fn.concurrency_limit for fn in made.fns.values() if fn.fn is not None}
    assert limits == {None}, "gradio's queue has no limit: the batcher has"


def test_about_has_the_model_and_limits_and_calls(predictor: SpeechPrompt):
    text = page._about(predictor, LIMITS)
    assert predictor.packs["word"].card["lm"]["hash"] in text
    assert "files up to 3 MB and 12 s each" in text
    assert 'curl --data-binary @speech.wav "http://127.0.0.1:7860/predict?tasks=word"' in page._calls(predictor)
    assert "<b>places" not in text, "names are names, not Markdown or HTML"
    assert "256 MB in a table" in " ".join(text.split())
    assert "100 frames a second" in text


def test_a_table_has_rows_for_good_files_and_errors_for_bad_ones(batcher: Batcher, tmp_path: Path):
    good = [page_world.recording(tmp_path / f"good_{n}.wav", 0.5, n) for n in range(2)]
    bad = tmp_path / "bad, very.wav"
    bad.write_bytes(b"RIFF no more")
    long = page_world.recording(tmp_path / "long.wav", 13)
    files = [str(path) for path in (good[0], bad, long, good[1])]
    rows = asyncio.run(page._table(batcher, files, ["order", "mood"], unseen))
    assert [row[0] for row in rows] == ["good_0.wav"] * 3 + ["bad, very.wav", "long.wav"] + ["good_1.wav"] * 3
    read = list(csv.DictReader(io.StringIO(page._csv(rows).decode("utf-8-sig"), newline="")))
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
    rows = asyncio.run(page._table(fickle, [file] * 40, ["mood"], unseen))  # type: ignore[arg-type]
    assert len(rows) == 40
    assert not any(row[-1] for row in rows)
    assert fickle.most <= 16


def test_timeout(tmp_path: Path):
    class Dead:
        limits = Limits(timeout=0.05)
        future: Future[Prediction] = Future()

        def submit(self, audio: str, tasks: Sequence[str]) -> Future[Prediction]:
            return self.future

    dead = Dead()
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
        asyncio.run(page._ask(dead, "a.wav", ["mood"]))  # type: ignore[arg-type]
    assert dead.future.cancelled(), "it is not needed any more"


def test_attributions_run_one_at_a_time_and_few_may_wait():
    running, most = 0, 0

    def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        threading.Event().wait(0.02)
        running -= 1

    async def several() -> list[Any]:
        alone = page._OneAtATime()
        return await asyncio.gather(*(alone(work) for _ in range(7)), return_exceptions=True)

    refused = [one for one in asyncio.run(several()) if one is not None]
    assert most == 1
    assert len(refused) == 3
    assert all(isinstance(one, QueueFullError) and "try again" in str(one) for one in refused)


@pytest.fixture(scope="module")
def shown(batcher: Batcher, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = page_world.recording(tmp_path_factory.mktemp("shown") / "a.wav", 0.5)
    return as_json(batcher.answer(file))


@pytest.mark.parametrize("task", ["order", "shallow"])
def test_every_kind_of_prompt_can_be_interpreted(predictor: SpeechPrompt, shown: dict[str, Any], task: str):
    weights, decided, alike = page._look(predictor, task, shown)
    assert all(label in weights for _, label in predictor.tasks[task].classes)
    for slot, label in shown["answers"][task]["labels"].items():
        assert f"{slot}: {label}" in decided
    assert decided.count('title="') == len(shown["units"]) * len(predictor.tasks[task].slots)
    assert "shallow" not in alike, "only prompts in the layers are compared"
    assert all(name in alike for name in ("word", "mood", "order", "rule"))


def test_a_quantized_lm_can_be_interpreted(predictor: SpeechPrompt, shown: dict[str, Any]):
    two = {name: predictor.packs[name] for name in ("rule", "mood")}
    narrow = SpeechPrompt.load(world.lm(), None, two, compute="int8")
    _, decided, alike = page._look(narrow, "mood", shown)
    assert f"mood: {shown['answers']['mood']['labels']['mood']}" in decided
    assert "Linear CKA" in alike


def test_only_the_beginning_of_long_utterances_is_explained(predictor: SpeechPrompt, shown: dict[str, Any]):
    long = {**shown, "units": [*range(50)] * 6, "durations": [1] * 300}
    html = page._attribution(predictor, "mood", long)
    assert html.count('title="') == 256
    assert "Only the first 256 units are explained; 44 after them are left out" in html


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([1, 5000], "the LM has 0..99"),
        ([], "lists of one length"),
        ([[1], [2]], "lists of one length"),
        (["a"], "lists of one length"),
        ("units", "lists of one length"),
        ([1.5, 2], "integers"),
        ([True, 2], "lists of one length"),
        ([2**40, 2], "integers"),
    ],
)
def test_bad_units_are_refused(predictor: SpeechPrompt, shown: dict[str, Any], units: Any, message: str):
    with pytest.raises(ValueError, match=message):
        page._attribution(predictor, "mood", {**shown, "units": units, "durations": [1, 1]})


@pytest.mark.parametrize("shown", [{"units": [1]}, {"answers": {}}, ["units"], "units durations", 7])
def test_other_json_is_refused(predictor: SpeechPrompt, shown: Any):
    with pytest.raises(ValueError, match="not a prediction of this page"):
        page._attribution(predictor, "mood", shown)


def test_no_cell_of_the_csv_is_a_formula():
    names = ("=1+1.wav", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n@1", " =cmd|' /C calc'!A0", "＝1", "ünits =1.wav")
    names += ("plain", 'a,"b",c', "two\nlines", "x;=1+1", "a" * 300)
    content = page._csv([[name, name, name, name, 0.25, name] for name in names])
    assert content.startswith(b"\xef\xbb\xbf"), "Excel takes it for UTF-8"
    _, *read = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    for name, row in zip(names, read, strict=True):
        cell = f"'{name}" if name.strip()[0] in "=+-@＝" else name
        assert row == [cell] * 4 + ["0.25", cell]
    assert b'\r\n"x;=1+1","x;=1+1",' in content, "quoted, for those who split at semicolons"


def test_files_of_one_name_are_numbered():
    files = [
        "1/a.wav",
        "2/a.wav",
        "3/a.wav (2)",
        "4/b.wav",
        "5/a.wav",
        "6/\u202egnp.wav",
        "7/gnp.wav",
        "8/b\n\x1bc.wav",
    ]
    expected = ["a.wav", "a.wav (2)", "a.wav (2) (2)", "b.wav", "a.wav (3)", "gnp.wav", "gnp.wav (2)", "b c.wav"]
    assert page._names(files) == expected


def test_rows_belong_to_files_by_position(batcher: Batcher, predictor: SpeechPrompt, tmp_path: Path):
    files = []
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        files.append(str(page_world.recording(tmp_path / str(number) / "a.wav", 0.3 + 0.2 * number, number)))
    Path(files[2]).write_bytes(b"no audio")
    rows = asyncio.run(page._table(batcher, files, ["mood"], unseen))
    assert [row[0] for row in rows] == ["a.wav", "a.wav (2)", "a.wav (3)", "a.wav (4)"]
    for file, row in zip(files, rows, strict=True):
        if file == files[2]:
            assert "no audio" in row[-1]
            continue
        (answer,) = predictor.predict([file], ["mood"])
        assert row[4] == pytest.approx(answer["mood"]["probabilities"]["mood"][row[3]], abs=1e-5)
    shown = drawing.rows(rows)
    assert [shown.count(f">{row[0]}</th>") for row in rows] == [1] * 4


def test_errors_are_shown_in_place_of_the_result():
    gr = pytest.importorskip("gradio", reason="gradio is what the page is made of")

    @page._errors_in_place("", None)
    async def show(what: str) -> Any:
        raise gr.Error(what)

    result = asyncio.run(show("<b>a.wav</b> is no audio"))
    assert result[1:] == ("", None)
    assert "&lt;b&gt;a.wav&lt;/b&gt; is no audio" in result[0]


def test_names_cannot_break_a_table_of_markdown():
    assert page._plain("a\n| b |\r\n\u2028c") == "a &#124; b &#124; c"
    assert page._plain("\u202eevil\u2066") == "evil"
    assert page._plain("نوبت‌ها") == "نوبت‌ها", "a joiner is part of the word"


def test_hints_without_a_recording_or_a_second_prompt(predictor: SpeechPrompt):
    assert "Classify a recording first" in page._attribution(predictor, "mood", None)
    model = world.lm()
    alone: dict[str, PromptPack] = {"mood": world.pack(world.TASKS["mood"], model, PromptConfig(length=2, deep=False))}
    assert "at least two tasks" in page._similarity(SpeechPrompt.load(model, None, alone))
