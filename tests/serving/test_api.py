"""The HTTP API, asked in the same process: answers, refusals that say why, health, metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest

from spjax import SpeechPrompt
from spjax.serving import api
from spjax.serving.api import make_app
from spjax.serving.batcher import Batcher
from spjax.serving.limits import Limits
from spjax.serving.uploads import read_upload
from tests.serving import world
from tests.serving.page_world import predictor as make_predictor
from tests.serving.test_batcher import Held, upload
from tests.speech2unit import bad_files

httpx = pytest.importorskip("httpx", reason="httpx is a test dependency")
pytest.importorskip("fastapi", reason="fastapi is in requirements-serve.txt")
pytestmark = pytest.mark.usefixtures("quick_compile")
LIMITS = Limits(max_bytes=200_000, max_seconds=3.0, timeout=30.0)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> SpeechPrompt:
    return make_predictor(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def desk(predictor: SpeechPrompt) -> Iterator[Batcher]:
    with Batcher(predictor, LIMITS) as desk:
        yield desk


def asked(desk: Any, talk: Callable[[Any], Awaitable[Any]], app: Any = None) -> Any:
    """What `talk` returns, having a client of the desk's application."""

    async def whole() -> Any:
        transport = httpx.ASGITransport(app or make_app(desk), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
            return await talk(client)

    return asyncio.run(whole())


def test_answers_are_the_predictors(desk: Batcher, predictor: SpeechPrompt):
    data = upload(1)
    reply = asked(desk, lambda client: client.post("/predict?tasks=order,word", content=data))
    assert reply.status_code == 200
    found = reply.json()
    (encoded,) = predictor.encode([read_upload(data, LIMITS)])
    (expected,) = predictor.predict_units([encoded], ["order", "word"])
    assert (found["units"], found["durations"]) == (encoded.units.tolist(), encoded.durations.tolist())
    assert list(found["answers"]) == ["order", "word"]
    for name, answer in expected.items():
        assert found["answers"][name]["labels"] == answer["labels"]
        assert np.abs(world.shares(found["answers"][name]) - world.shares(answer)).max() < 1e-5


def test_a_form_is_answered_as_the_body_is(desk: Batcher):
    data = upload(2, kind="FLAC")

    async def talk(client: Any) -> list[Any]:
        form = await client.post("/predict?tasks=word", files={"file": ("a.flac", data)})
        return [form, await client.post("/predict", params={"tasks": "word"}, content=data)]

    form, plain = asked(desk, talk)
    assert form.status_code == plain.status_code == 200
    assert form.json()["units"] == plain.json()["units"]
    assert form.json()["answers"]["word"]["labels"] == plain.json()["answers"]["word"]["labels"]


def test_all_tasks_when_none_are_named(desk: Batcher, predictor: SpeechPrompt):
    assert list(asked(desk, lambda client: client.post("/predict", content=upload(3))).json()["answers"]) == list(
        predictor.packs
    )


@pytest.mark.parametrize(
    ("status", "told", "query", "content"),
    [
        (400, "the upload is empty", "", b""),
        (400, "the upload is no audio", "", b"what was said: stop"),
        (400, "is cut off", "", upload()[:-900]),
        (400, "is silent", "", bad_files.encoded(np.zeros((8000, 1)))),
        (400, "no task 'wrod': there are word, mood", "?tasks=wrod", upload()),
        (400, "no task ''", "?tasks=word,", upload()),
        (413, "larger than 0.2 MB, the most that is taken", "", bytes(200_001)),
        (413, "lasts 4 s, 3 s are the most that is taken", "", upload(samples=64_000)),
        (413, "lasts 3600 s", "", bad_files.encoded(np.zeros((8_000 * 3600, 1)), rate=8_000, kind="FLAC")[:200_000]),
    ],
    ids=["empty", "text", "cut off", "silent", "task", "comma", "bytes", "seconds", "hour"],
)
def test_what_cannot_be_answered_is_told_in_a_sentence(desk: Batcher, status, told, query, content):
    reply = asked(desk, lambda client: client.post(f"/predict{query}", content=content))
    assert reply.status_code == status
    assert list(reply.json()) == ["error"]
    assert told in reply.json()["error"]


@pytest.mark.parametrize("form", [{"other": ("a.wav", upload())}, {"file": ("", "text")}], ids=["name", "no file"])
def test_forms_without_a_file(desk: Batcher, form: Any):
    reply = asked(desk, lambda client: client.post("/predict", files=form))
    assert reply.status_code == 400
    assert reply.json()["error"]


def test_a_broken_form(desk: Batcher):
    head = {"content-type": "multipart/form-data"}
    reply = asked(desk, lambda client: client.post("/predict", content=b"--x\r\n", headers=head))
    assert reply.status_code == 400
    assert "error" in reply.json()


def test_a_body_without_an_end_is_not_read_to_it(desk: Batcher):
    """Of a stream that never says how long it is, little more than the limit is taken, and none of it kept."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 10_000
            yield bytes(10_000)

    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": []}
    said: list[Any] = []
    source = endless()

    async def receive() -> Any:
        return {"type": "http.request", "body": await anext(source), "more_body": True}

    async def send(message: Any) -> None:
        said.append(message)

    asyncio.run(make_app(desk)(scope, receive, send))
    assert said[0]["status"] == 413
    assert sent <= 2 * LIMITS.max_bytes + 20_000


def test_uploads_share_a_memory(desk: Batcher, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(api, "MOST_HELD", len(upload()) * 3 // 2)

    async def talk(client: Any) -> Any:
        release = asyncio.Event()
        first = asyncio.create_task(_over_asgi(desk_app, upload(), release))
        await asyncio.sleep(0.05)
        second = await client.post("/predict", content=upload())
        release.set()
        status = await first
        return status, second, await client.post("/predict?tasks=word", content=upload())

    desk_app = make_app(desk)
    status, second, third = asked(desk, talk, desk_app)
    assert (status, second.status_code, third.status_code) == (200, 503, 200)
    assert "too many uploads are on their way" in second.json()["error"]


async def _over_asgi(app: Any, data: bytes, release: asyncio.Event) -> int:
    """Status of a request whose last byte comes when it is released."""
    parts = iter([(data[:-1], True), (data[-1:], False)])
    status = 0

    async def receive() -> Any:
        part = next(parts, None)
        if part is None:
            await asyncio.sleep(60)
        if not part[1]:
            await release.wait()
        return {"type": "http.request", "body": part[0], "more_body": part[1]}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"tasks=word", "headers": []}
    await app(scope, receive, send)
    return status


def test_a_full_queue_says_when_to_come_again_and_patience_has_an_end(predictor: SpeechPrompt):
    held = Held(predictor)
    with Batcher(held, Limits(queue=1, timeout=0.5)) as desk:  # type: ignore[arg-type]

        async def talk(client: Any) -> list[Any]:
            first = asyncio.create_task(client.post("/predict", content=upload()))
            while not desk.stats().working:
                await asyncio.sleep(0.01)
            return [await client.post("/predict", content=upload()), await first, await client.get("/metrics")]

        busy, late, metrics = asked(desk, talk)
        held.go.set()
    assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
    assert "the most that may" in busy.json()["error"]
    assert (late.status_code, late.json()) == (
        504, {"error": "there was no answer within 0.5 s: ask again when the server has less to do"},
    )  # fmt: skip
    assert 'spjax_requests_total{outcome="busy"} 1.0' in metrics.text
    assert 'spjax_requests_total{outcome="timeout"} 1.0' in metrics.text


def test_who_hangs_up_is_forgotten(predictor: SpeechPrompt):
    held = Held(predictor)

    async def hang_up(desk: Batcher, app: Any) -> None:
        """Two requests: one leaves with half of its body sent, one while it waits for its turn."""
        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"tasks=mood", "headers": []}

        async def send(_: Any) -> None:
            await asyncio.sleep(0)

        for whole in (False, True):
            parts = iter([{"type": "http.request", "body": upload(), "more_body": not whole}])

            async def receive() -> Any:
                part = next(parts, None)  # noqa: B023  # it is called within this turn
                while part is None and whole and not desk.stats().waiting:  # noqa: B023
                    await asyncio.sleep(0.01)
                return part or {"type": "http.disconnect"}

            await asyncio.wait_for(app(scope, receive, send), 10)

    with Batcher(held, LIMITS) as desk:  # type: ignore[arg-type]
        app = make_app(desk)

        async def talk(client: Any) -> Any:
            first = asyncio.create_task(client.post("/predict?tasks=word", content=upload()))
            while not desk.stats().working:
                await asyncio.sleep(0.01)
            await hang_up(desk, app)
            assert desk.stats().waiting == 0
            held.go.set()
            return await first, await client.get("/metrics")

        first, metrics = asked(desk, talk, app)
    assert first.status_code == 200
    assert held.batches == [[("word",)]]
    assert 'spjax_requests_total{outcome="gone"} 2.0' in metrics.text


def test_faults_of_ours_are_told_without_their_insides(predictor: SpeechPrompt, caplog: pytest.LogCaptureFixture):
    held = Held(predictor, breaks="word")
    held.go.set()
    with Batcher(held, LIMITS) as desk:  # type: ignore[arg-type]
        reply = asked(desk, lambda client: client.post("/predict?tasks=word", content=upload()))
    assert (reply.status_code, reply.json()) == (500, {"error": "the server failed to answer this; its log says why"})
    assert "out of memory" in caplog.text


def test_no_answer_has_numbers_that_are_none(desk: Batcher, monkeypatch: pytest.MonkeyPatch):
    broken = {"word": {"labels": {"word": "yes"}, "probabilities": {"word": {"yes": float("nan")}}}}
    monkeypatch.setattr(SpeechPrompt, "predict_units", lambda self, units, asked: [broken] * len(units))
    reply = asked(desk, lambda client: client.post("/predict?tasks=word", content=upload()))
    assert reply.status_code == 500
    assert "NaN" not in reply.text


def test_health_tasks_and_metrics(predictor: SpeechPrompt):
    with Batcher(predictor, LIMITS) as desk:
        app = make_app(desk)

        async def talk(client: Any) -> list[Any]:
            await asyncio.gather(*(client.post("/predict?tasks=word,mood", content=upload(n)) for n in range(3)))
            await client.post("/predict", content=b"rubbish")
            return [await client.get(path) for path in ("/health", "/tasks", "/metrics", "/nowhere", "/predict")]

        health, tasks, metrics, nowhere, wrong = asked(desk, talk, app)
        assert health.status_code == 200
        assert health.json() == {
            "ready": True, "lm": predictor.packs["word"].card["lm"]["hash"], "tasks": list(predictor.packs),
            "compute": "float32", "waiting": 0, "working": 0, "answered": 3,
        }  # fmt: skip
        assert tasks.json()["order"] == {"do": ["on", "off", "up"], "what": ["lamp", "heat"]}
        told = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
        assert told['spjax_requests_total{outcome="answered"}'] == "3.0"
        assert told['spjax_requests_total{outcome="bad"}'] == "1.0"
        assert told["spjax_request_seconds_count"] == "3.0"
        assert told["spjax_waiting"] == "0.0"
        assert (told["spjax_batch_rows_sum"], told["spjax_batch_utterances_sum"]) == ("6.0", "3.0")
        assert told['spjax_batch_rows_bucket{le="+Inf"}'] == told["spjax_batch_rows_count"]
        assert (nowhere.status_code, nowhere.json()) == (404, {"error": "Not Found"})
        assert wrong.status_code == 405
        desk.refuse()
        stopping = asked(desk, lambda client: client.get("/health"), app)
        assert (stopping.status_code, stopping.json()["ready"]) == (503, False)


def test_the_api_describes_itself(desk: Batcher):
    described = asked(desk, lambda client: client.get("/openapi.json")).json()
    assert set(described["paths"]) == {"/predict", "/tasks", "/health", "/metrics"}
    assert "audio/*" in json.dumps(described["paths"]["/predict"])
