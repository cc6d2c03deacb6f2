"""The HTTP API in one process: predictions, error responses, health, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spjax import SpeechPrompt
from spjax.serving import api, protocol
from spjax.serving.api import make_app
from spjax.serving.batcher import Batcher
from spjax.serving.limits import Limits
from spjax.serving.uploads import read_upload
from tests.encoders import bad_files
from tests.serving import world
from tests.serving.page_world import predictor as make_predictor
from tests.serving.test_batcher import Held, upload

httpx = pytest.importorskip("httpx", reason="httpx is a test dependency")
pytest.importorskip("fastapi", reason="fastapi is in the extra serve")
pytestmark = pytest.mark.usefixtures("quick_compile")
LIMITS = Limits(max_bytes=200_000, max_seconds=3.0, timeout=600.0)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> SpeechPrompt:
    return make_predictor(tmp_path_factory.mktemp("api"))


def asked(batcher: Any, talk: Callable[[Any], Awaitable[Any]], app: Any = None) -> Any:
    """Run `talk` with a client of the batcher's application; return its result."""

    async def whole() -> Any:
        transport = httpx.ASGITransport(app or make_app(batcher), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://batcher") as client:
            return await talk(client)

    return asyncio.run(whole())


def test_answers_are_the_predictors(batcher: Batcher, predictor: SpeechPrompt):
    data = upload(1)
    reply = asked(batcher, lambda client: client.post("/predict?tasks=order,word", content=data))
    assert reply.status_code == 200
    found = reply.json()
    (encoded,) = predictor.encode([read_upload(data, LIMITS)])
    (expected,) = predictor.predict_units([encoded], ["order", "word"])
    assert (found["units"], found["durations"]) == (encoded.units.tolist(), encoded.durations.tolist())
    assert list(found["answers"]) == ["order", "word"]
    for name, answer in expected.items():
        assert found["answers"][name]["labels"] == answer["labels"]
        assert np.abs(world.shares(found["answers"][name]) - world.shares(answer)).max() < 1e-5


def test_a_form_is_answered_like_a_body(batcher: Batcher):
    data = upload(2, kind="FLAC")

    async def talk(client: Any) -> list[Any]:
        form = await client.post("/predict?tasks=word", files={"file": ("a.flac", data)})
        return [form, await client.post("/predict", params={"tasks": "word"}, content=data)]

    form, plain = asked(batcher, talk)
    assert form.status_code == plain.status_code == 200
    assert form.json()["units"] == plain.json()["units"]
    assert form.json()["answers"]["word"]["labels"] == plain.json()["answers"]["word"]["labels"]


def test_all_tasks_when_none_are_named(batcher: Batcher, predictor: SpeechPrompt):
    assert list(asked(batcher, lambda client: client.post("/predict", content=upload(3))).json()["answers"]) == list(
        predictor.packs
    )


@pytest.mark.parametrize(
    ("status", "message", "query", "content"),
    [
        (400, "the upload is empty", "", b""),
        (400, "the upload is no audio", "", b"what was said: stop"),
        (400, "is cut off", "", upload()[:-900]),
        (400, "is silent", "", bad_files.encoded(np.zeros((8000, 1)))),
        (400, "unknown task 'wrod': there are word, mood", "?tasks=wrod", upload()),
        (400, "tasks is empty", "?tasks=", upload()),
        (400, "tasks is empty", "?tasks=,", upload()),
        (400, "tasks is empty", "?tasks=&tasks=,,", upload()),
        (400, "unknown query parameter 'task': leave it out, or send 'tasks'", "?task=word", upload()),
        (400, "unknown query parameter 'tasks[]', 'x'", "?tasks[]=word&tasks=mood&x=1", upload()),
        (413, "larger than 0.2 MB, the most allowed", "", bytes(200_001)),
        (413, "lasts 4 s, at most 3 s are allowed", "", upload(samples=64_000)),
        (413, "lasts 3600 s", "", bad_files.encoded(np.zeros((8_000 * 3600, 1)), rate=8_000, kind="FLAC")[:200_000]),
    ],
    ids=[
        "empty",
        "text",
        "cut off",
        "silent",
        "task",
        "none",
        "comma",
        "commas",
        "parameter",
        "parameters",
        "bytes",
        "seconds",
        "hour",
    ],
)
def test_bad_requests_get_one_sentence(batcher: Batcher, status, message, query, content):
    reply = asked(batcher, lambda client: client.post(f"/predict{query}", content=content))
    assert reply.status_code == status
    assert list(reply.json()) == ["error"]
    assert message in reply.json()["error"]


def test_every_way_to_name_tasks(batcher: Batcher):
    data = upload(3)

    async def talk(client: Any) -> list[Any]:
        url = "/predict?tasks=mood&tasks=word,order&tasks="
        form = {"files": {"file": ("a.wav", data)}, "data": {"tasks": ["word", "order,mood"]}}
        return [
            await client.post(url, content=data),
            await client.post("/predict", **form),
            await client.post("/predict?tasks=rule", **form),
            await client.post("/predict", **{**form, "data": {"task": "word"}}),
            await client.post("/predict", files={**form["files"], "tasks": ("names", b"word")}),
        ]

    *good, unknown, crossed = asked(batcher, talk)
    named = [["mood", "word", "order"], ["word", "order", "mood"], ["rule", "word", "order", "mood"]]
    assert [list(reply.json()["answers"]) for reply in good] == named
    assert (unknown.status_code, crossed.status_code) == (400, 400)
    assert "unknown form field 'task': leave it out, or send 'file' and 'tasks'" in unknown.json()["error"]
    assert crossed.json()["error"]


class Echo:
    """A batcher whose packs have these names; it records which tasks are requested."""

    limits = LIMITS

    def __init__(self, names: list[str]) -> None:
        self.predictor, self.requested = SimpleNamespace(packs=dict.fromkeys(names)), list[str]()

    def check_open(self) -> None:
        self.requested = []

    def submit(self, audio: bytes, tasks: list[str]) -> Future[Any]:
        self.requested = tasks
        done: Future[Any] = Future()
        done.set_exception(ValueError("recorded"))
        return done


@settings(max_examples=40)
@given(known=st.lists(st.text("ab, ", min_size=1), min_size=1, unique=True), data=st.data())
def test_any_task_can_be_requested_by_name(known: list[str], data: st.DataObject):
    """Also names that hold commas, which otherwise separate names."""
    chosen = data.draw(st.lists(st.sampled_from(known), min_size=1))
    plain = [name for name in chosen if "," not in name]
    echo = Echo(known)
    asked(echo, lambda client: client.post("/predict", params={"tasks": chosen}, content=b"a"))
    assert echo.requested == chosen
    if plain:
        asked(echo, lambda client: client.post("/predict", params={"tasks": [",".join(plain), ""]}, content=b"a"))
        assert echo.requested == plain or ",".join(plain) in known


@pytest.mark.parametrize("form", [{"other": ("a.wav", upload())}, {"file": ("", "text")}], ids=["name", "no file"])
def test_forms_without_a_file(batcher: Batcher, form: Any):
    reply = asked(batcher, lambda client: client.post("/predict", files=form))
    assert reply.status_code == 400
    assert reply.json()["error"]


def test_a_broken_form(batcher: Batcher):
    head = {"content-type": "multipart/form-data"}
    reply = asked(batcher, lambda client: client.post("/predict", content=b"--x\r\n", headers=head))
    assert reply.status_code == 400
    assert "error" in reply.json()


@contextlib.contextmanager
def served(app: Any) -> Iterator[Callable[[], socket.socket]]:
    """Serve an application over TCP; yields a function that connects."""
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is in the extra serve")
    config = uvicorn.Config(app, http=protocol.make_protocol(), log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as place:
        address = place.getsockname()
        running = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        running.start()
        try:
            yield lambda: socket.create_connection(address, timeout=10)
        finally:
            server.should_exit = True
            running.join(30)


def posted(size: int | None, query: str = "?tasks=word") -> bytes:
    """Head of a POST request: with a body of that size, or a chunked one."""
    body = "Transfer-Encoding: chunked" if size is None else f"Content-Length: {size}"
    return f"POST /predict{query} HTTP/1.1\r\nHost: x\r\n{body}\r\n\r\n".encode()


def reply_of(connection: socket.socket) -> tuple[int, str]:
    """Status and error message of the response."""
    reply = Reply(connection)
    reply.begin()
    return reply.status, json.loads(reply.read()).get("error", "")


class Reply(http.client.HTTPResponse):
    """A response that is read byte by byte, so that another one may follow."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.fp.close()
        self.fp = connection.makefile("rb", buffering=0)


def test_a_complete_upload_is_refused_at_once(batcher: Batcher):
    """The last message of its body was read before it was refused, so that nothing more comes."""
    with served(make_app(batcher)) as connect, connect() as connection:
        began = time.monotonic()
        connection.sendall(posted(None) + b"40000\r\n" + bytes(0x40000) + b"\r\n0\r\n\r\n")
        status, message = reply_of(connection)
        assert (status, "larger than 0.2 MB" in message) == (413, True)
        assert time.monotonic() - began < 5


@pytest.fixture(scope="module")
def connect(batcher: Batcher) -> Iterator[Callable[[], socket.socket]]:
    with served(make_app(batcher)) as connect:
        yield connect


def response_to(connect: Callable[[], socket.socket], *parts: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the response to raw bytes."""
    with connect() as connection:
        for part in parts:
            connection.sendall(part)
        reply = http.client.HTTPResponse(connection, method=parts[0].split(b" ")[0].decode("latin-1"))
        reply.begin()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()


HOST = b"Host: x\r\n"
REFUSED = {
    "no HTTP": (400, b"\x16\x03\x01 hello\r\n\r\n"),
    "HTTP/2": (404, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "no host": (400, b"GET /health HTTP/1.1\r\n\r\n"),
    "flood of headers": (400, b"GET /health HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 100_000),
    "many headers": (400, b"GET /health HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 20_000),
    "huge query": (400, b"GET /health?" + b"x" * 100_000),
    "two lengths": (400, b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
    "length below 0": (400, b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n"),
    "huge length": (413, b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: 99999999999999999\r\n\r\n"),
    "bad chunk": (400, b"POST /predict HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
    "no body": (400, b"POST /predict HTTP/1.1\r\n" + HOST + b"\r\n"),
    "many tasks": (400, posted(2, "?tasks=" + "x," * 5_000) + b"ab"),
    "many parameters": (400, posted(2, "?" + "&".join(f"p{n}=1" for n in range(5_000))) + b"ab"),
    "nowhere": (404, b"GET /nowhere HTTP/1.1\r\n" + HOST + b"\r\n"),
    "traversal": (404, b"GET /health/../../etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n"),
    "two slashes before": (404, b"GET //health HTTP/1.1\r\n" + HOST + b"\r\n"),
    "get": (405, b"GET /predict HTTP/1.1\r\n" + HOST + b"\r\n"),
    "post": (405, b"POST /tasks/ HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\nab"),
    "of another site": (405, b"OPTIONS /predict HTTP/1.1\r\n" + HOST + b"Origin: http://evil\r\n\r\n"),
    "no method": (405, b"BREW /health HTTP/1.1\r\n" + HOST + b"\r\n"),
    "compressed": (415, posted(2).replace(HOST, HOST + b"Content-Encoding: gzip\r\n") + b"ab"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_every_error_has_the_same_form(connect: Callable[[], socket.socket], kind: str):
    status, head = REFUSED[kind]
    found, headers, body = response_to(connect, head)
    error = json.loads(body)
    assert (found, list(error)) == (status, ["error"])
    assert headers["content-type"] == "application/json"
    assert len(error["error"]) < 1000
    assert "access-control-allow-origin" not in headers
    if status == 405:
        assert headers["allow"] in ("GET", "POST")


def test_internal_errors_have_the_same_form_on_every_route(batcher: Batcher, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batcher, "stats", lambda: 1 / 0)
    reply = asked(batcher, lambda client: client.get("/health"))
    assert (reply.status_code, reply.json()) == (500, {"error": api.FAILED})


@pytest.mark.parametrize("path", ["/predict", "/tasks", "/health", "/metrics", "/openapi.json"])
def test_a_trailing_slash_is_ignored(connect: Callable[[], socket.socket], path: str):
    method, body = (b"POST", upload()) if path == "/predict" else (b"GET", b"")
    answers = []
    for place in (path, path + "/", path + "//"):
        head = b"%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (method, place.encode(), len(body))
        answers.append(response_to(connect, head, body))
    assert {status for status, _, _ in answers} == {200}
    if path != "/metrics":  # which changes with every request
        assert len({body for _, _, body in answers}) == 1
    if path != "/predict":
        status, headers, body = response_to(connect, b"HEAD " + path.encode() + b" HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (status, body) == (200, b"")
        assert int(headers["content-length"]) > 0


def test_expect_100_continue(connect: Callable[[], socket.socket]):
    data = upload()
    with connect() as connection:
        connection.sendall(posted(len(data)).replace(HOST, HOST + b"Expect: 100-continue\r\n"))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(data)
        assert reply_of(connection) == (200, "")
    with connect() as connection:  # Expect: 100-continue: a body that is too large need not be sent
        connection.sendall(posted(10**9).replace(HOST, HOST + b"Expect: 100-continue\r\n"))
        assert reply_of(connection)[0] in (100, 413)


def test_a_stalled_upload_gets_a_408(predictor: SpeechPrompt):
    with (
        Batcher(predictor, Limits(timeout=1.0)) as batcher,
        served(make_app(batcher)) as connect,
        connect() as stalled, connect() as other,
    ):  # fmt: skip
        stalled.sendall(posted(90_000) + bytes(89_000))
        other.sendall(posted(2) + b"no")
        assert reply_of(other)[0] == 400, "it does not wait for the stalled one"
        status, message = reply_of(stalled)
        assert status == 408
        assert "did not arrive within 1 s: 89000 bytes so far. Send it again" in message
        other.sendall(b"GET /metrics HTTP/1.1\r\n" + HOST + b"\r\n")
        reply = Reply(other)
        reply.begin()
        assert b'spjax_requests_total{outcome="slow"} 1.0' in reply.read()


def test_a_form_has_the_same_limit(batcher: Batcher):
    form = {"file": ("a.wav", bytes(200_001))}
    reply = asked(batcher, lambda client: client.post("/predict", files=form))
    assert (reply.status_code, "larger than 0.2 MB" in reply.json()["error"]) == (413, True)


def test_an_endless_body_is_not_read_to_its_end(batcher: Batcher):
    """Of a stream without a length, little more than the limit is read, and nothing is kept."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 10_000
            yield bytes(10_000)

    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": []}
    responses: list[Any] = []
    source = endless()

    async def receive() -> Any:
        return {"type": "http.request", "body": await anext(source), "more_body": True}

    async def send(message: Any) -> None:
        responses.append(message)

    asyncio.run(make_app(batcher)(scope, receive, send))
    assert responses[0]["status"] == 413
    assert sent <= 2 * LIMITS.max_bytes + 20_000


def test_a_full_queue_sends_retry_after_and_requests_time_out(predictor: SpeechPrompt):
    held = Held(predictor)
    with Batcher(held, Limits(queue=1, timeout=0.5)) as batcher:  # type: ignore[arg-type]

        async def talk(client: Any) -> list[Any]:
            first = asyncio.create_task(client.post("/predict", content=upload()))
            while not batcher.stats().working:
                await asyncio.sleep(0.01)
            return [await client.post("/predict", content=upload()), await first, await client.get("/metrics")]

        busy, late, metrics = asked(batcher, talk)
        held.go.set()
    assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
    assert "the queue is full" in busy.json()["error"]
    assert (late.status_code, late.json()) == (
        504, {"error": "no answer within 0.5 s: try again when the server is less busy"},
    )  # fmt: skip
    assert 'spjax_requests_total{outcome="busy"} 1.0' in metrics.text
    assert 'spjax_requests_total{outcome="timeout"} 1.0' in metrics.text


def test_disconnected_clients_are_dropped(predictor: SpeechPrompt):
    held = Held(predictor)

    async def hang_up(batcher: Batcher, app: Any) -> None:
        """Two requests: one disconnects with half of its body sent, one while it is queued."""
        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"tasks=mood", "headers": []}

        async def send(_: Any) -> None:
            await asyncio.sleep(0)

        for whole in (False, True):
            parts = iter([{"type": "http.request", "body": upload(), "more_body": not whole}])

            async def receive() -> Any:
                part = next(parts, None)  # noqa: B023  # it is called within this turn
                while part is None and whole and not batcher.stats().waiting:  # noqa: B023
                    await asyncio.sleep(0.01)
                return part or {"type": "http.disconnect"}

            await asyncio.wait_for(app(scope, receive, send), 10)

    with Batcher(held, LIMITS) as batcher:  # type: ignore[arg-type]
        app = make_app(batcher)

        async def talk(client: Any) -> Any:
            first = asyncio.create_task(client.post("/predict?tasks=word", content=upload()))
            while not batcher.stats().working:
                await asyncio.sleep(0.01)
            await hang_up(batcher, app)
            assert batcher.stats().waiting == 0
            held.go.set()
            return await first, await client.get("/metrics")

        first, metrics = asked(batcher, talk, app)
    assert first.status_code == 200
    assert held.batches == [[("word",)]]
    assert 'spjax_requests_total{outcome="gone"} 2.0' in metrics.text


def test_internal_errors_are_reported_without_details(predictor: SpeechPrompt, caplog: pytest.LogCaptureFixture):
    held = Held(predictor, breaks="word")
    held.go.set()
    with Batcher(held, LIMITS) as batcher:  # type: ignore[arg-type]
        reply = asked(batcher, lambda client: client.post("/predict?tasks=word", content=upload()))
    assert (reply.status_code, reply.json()) == (500, {"error": "internal error: the server log has the details"})
    assert "out of memory" in caplog.text


def test_nan_is_never_sent(batcher: Batcher, monkeypatch: pytest.MonkeyPatch):
    broken = {"word": {"labels": {"word": "yes"}, "probabilities": {"word": {"yes": float("nan")}}}}
    monkeypatch.setattr(SpeechPrompt, "predict_units", lambda self, units, asked: [broken] * len(units))
    reply = asked(batcher, lambda client: client.post("/predict?tasks=word", content=upload()))
    assert reply.status_code == 500
    assert "NaN" not in reply.text


def test_health_tasks_and_metrics(predictor: SpeechPrompt):
    with Batcher(predictor, LIMITS) as batcher:
        app = make_app(batcher)

        async def talk(client: Any) -> list[Any]:
            await asyncio.gather(*(client.post("/predict?tasks=word,mood", content=upload(n)) for n in range(3)))
            await client.post("/predict", content=b"rubbish")
            return [await client.get(path) for path in ("/health", "/tasks", "/metrics", "/nowhere", "/predict")]

        health, tasks, metrics, nowhere, wrong = asked(batcher, talk, app)
        assert health.status_code == 200
        assert health.json() == {
            "ready": True, "lm": predictor.packs["word"].card["lm"]["hash"], "tasks": list(predictor.packs),
            "compute": "float32", "waiting": 0, "working": 0, "answered": 3,
        }  # fmt: skip
        assert tasks.json()["order"] == {"do": ["on", "off", "up"], "what": ["lamp", "heat"]}
        values = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
        assert values['spjax_requests_total{outcome="answered"}'] == "3.0"
        assert values['spjax_requests_total{outcome="bad"}'] == "1.0"
        assert values["spjax_request_seconds_count"] == "3.0"
        assert values["spjax_waiting"] == "0.0"
        assert (values["spjax_batch_rows_sum"], values["spjax_batch_utterances_sum"]) == ("6.0", "3.0")
        assert values['spjax_batch_rows_bucket{le="+Inf"}'] == values["spjax_batch_rows_count"]
        assert nowhere.status_code == 404
        assert "there is no /nowhere here: POST a recording to /predict" in nowhere.json()["error"]
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert "POST a recording: curl --data-binary @FILE" in wrong.json()["error"]
        batcher.refuse()
        stopping = asked(batcher, lambda client: client.get("/health"), app)
        assert (stopping.status_code, stopping.json()["ready"]) == (503, False)


def test_health_checks_the_worker_thread(predictor: SpeechPrompt, monkeypatch: pytest.MonkeyPatch):
    with Batcher(predictor, LIMITS) as batcher:
        monkeypatch.setattr(batcher._worker, "is_alive", lambda: False)
        reply = asked(batcher, lambda client: client.get("/health"))
    assert (reply.status_code, reply.json()["ready"]) == (503, False)


def test_a_get_of_predict_explains_the_post_beside_a_page_too(batcher: Batcher):
    from starlette.responses import PlainTextResponse

    app = make_app(batcher)
    app.mount("/", PlainTextResponse("the page", 404))

    async def talk(client: Any) -> list[Any]:
        return [await client.get("/predict"), await client.put("/predict"), await client.get("/docs")]

    got, put, docs = asked(batcher, talk, app)
    assert (got.status_code, put.status_code) == (405, 405)
    assert "POST a recording" in got.json()["error"]
    assert docs.text == "the page"  # FastAPI's documentation pages would load scripts from other hosts


def test_a_method_that_a_path_does_not_accept_is_named(batcher: Batcher):
    app = make_app(batcher)
    app.get("/")(lambda: "the page")
    reply = asked(batcher, lambda client: client.post("/"), app)
    assert (reply.status_code, reply.headers["allow"]) == (405, "GET")
    assert reply.json()["error"] == "/ takes no POST: POST a recording to /predict, or GET /tasks, /health, /metrics"


def test_the_api_describes_itself(batcher: Batcher):
    described = asked(batcher, lambda client: client.get("/openapi.json")).json()
    assert set(described["paths"]) == {"/predict", "/tasks", "/health", "/metrics"}
    assert "audio/*" in json.dumps(described["paths"]["/predict"])
