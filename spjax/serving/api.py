"""The HTTP API: recordings in, answers out as JSON, health and metrics."""

# Annotations are real objects here: FastAPI reads those of the functions below, whose names are not the module's.
import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from spjax.serving.batcher import Answered, Batcher, Busy, as_json, some, timed_out
from spjax.serving.limits import MEGABYTE, TooLargeError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse

MOST_HELD = 512_000_000  # bytes of uploads in memory, of all clients together
SMALL = MEGABYTE  # bytes of an upload: such find room when larger ones have taken all of theirs
SHARE_OF_LARGE = 0.9  # of MOST_HELD
STALLED_SECONDS = 10.0  # without a byte, after which an upload is given up; at most a quarter of the whole timeout
LEAST_RATE = 100_000  # bytes a second that an upload must come with, beyond those seconds
LONGEST_READ = 0.75  # of the whole timeout
PULSE = 0.5  # seconds between looks whether an upload that is waited for is wanted still
DRAIN_SECONDS = 1.0  # for which a refused upload is read on: a client that still sends would lose the answer
METHODS = {"/predict": "POST", "/tasks": "GET", "/health": "GET", "/metrics": "GET", "/openapi.json": "GET"}
FAILED = "the server failed to answer this; its log says why"
RETRY_SECONDS = 1  # after which a client that was sent away may ask again
LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds, of the histogram
OUTCOMES = ("answered", "bad", "too_large", "busy", "timeout", "slow", "gone", "failed")  # of a request
SIZES = tuple(2**power for power in range(11))  # of batches, likewise

_log = logging.getLogger(__name__)


class _Slow(Exception):  # noqa: N818  # of a connection, no fault
    """An upload that does not come, or comes too slowly; the message says so to who sends it."""


def make_app(desk: Batcher) -> "FastAPI":
    """An application that answers by a desk.

    - `POST /predict?tasks=a,b`, an audio file as the body, or as `file` of a form, which may have `tasks` too:
      `as_json`'s answers, of all tasks if none are named. `tasks` may be there several times.
    - `GET /tasks`: labels by task and slot. `GET /health`; `GET /metrics`, for Prometheus.

    Each with or without a slash at its end. An error is `{"error": sentence}`: 400 for what cannot be answered, 404 and
    405 for other places and methods, 408 for an upload that does not come, 413 for what is too large or too long, 415
    for a compressed body, 500 for faults of the server, 503 (ask again) where too many wait or the server stops, 504
    where it took too long.

    Args:
      desk: warm, and open for as long as the application runs.
    """
    from fastapi import FastAPI, Query, Request
    from fastapi.responses import JSONResponse, Response
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        CollectorRegistry,
        Counter,
        Histogram,
        ProcessCollector,
        generate_latest,
    )
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    # The pages that FastAPI would show of itself load scripts from elsewhere.
    about = "Prompted tasks in front of one frozen speech unit LM."
    app = FastAPI(title="spjax", description=about, docs_url=None, redoc_url=None)
    registry = CollectorRegistry()
    registry.register(_DeskMetrics(desk))  # type: ignore[arg-type]  # a collector is what has `collect`
    ProcessCollector(registry=registry)
    outcomes = Counter("spjax_requests", "Requests to /predict.", ["outcome"], registry=registry)
    for outcome in OUTCOMES:  # told from the start, none of each
        outcomes.labels(outcome)
    latency = Histogram("spjax_request_seconds", "From a request to its answer.", registry=registry, buckets=LATENCIES)
    memory = _Memory()
    app.add_middleware(_Paths)
    app.add_exception_handler(HTTPException, refuse_place)  # type: ignore[arg-type]  # it is called with no other
    app.add_exception_handler(Exception, _refuse_failed)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether requests are taken, and what is served."""
        stats = desk.stats()
        predictor = desk.predictor
        lm = next(iter(predictor.packs.values())).card["lm"]["hash"]
        body = {"ready": stats.open, "lm": lm, "tasks": list(predictor.packs), "compute": predictor.compute}
        body |= {"waiting": stats.waiting, "working": stats.working, "answered": stats.answered}
        return JSONResponse(body, 200 if stats.open else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/tasks")
    async def tasks() -> JSONResponse:
        """Labels by task and slot."""
        named = desk.predictor.tasks.items()
        return JSONResponse({name: {slot.name: list(slot.labels) for slot in task.slots} for name, task in named})

    body = {"audio/*": {"schema": {"type": "string", "format": "binary"}}}

    @app.post("/predict", openapi_extra={"requestBody": {"content": body, "required": True}})
    async def predict(request: Request, tasks: Annotated[Sequence[str], Query()] = ()) -> Response:
        """Labels and probabilities of the recording in the body; `tasks`: names, also with commas between; else all."""
        began = time.perf_counter()
        outcome, response = "failed", refused(500, FAILED)
        try:
            async with asyncio.timeout(desk.limits.timeout):
                with memory.share() as take:
                    _check_encoding(request)
                    data, named = await _body(request, desk, take)
                    _check_names("query parameter", request.query_params, ("tasks",))
                    asked = _asked([*tasks, *named], desk.predictor.packs)
                    answered = await _answered(desk, request.receive, data, asked)
            outcome, response = "answered", _reply(answered)
            latency.observe(time.perf_counter() - began)
        except Busy as error:
            outcome, response = "busy", refused(503, str(error))
        except TooLargeError as error:
            outcome, response = "too_large", refused(413, str(error))
        except ValueError as error:
            outcome, response = "bad", refused(400, str(error))
        except _Slow as error:
            outcome, response = "slow", refused(408, str(error))
        except HTTPException as error:  # a form that is none
            outcome, response = "bad", refused(error.status_code, str(error.detail))
        except TimeoutError:
            outcome, response = "timeout", refused(504, timed_out(desk.limits))
        except ClientDisconnect:
            outcome = "gone"
        except Exception:
            _log.exception("POST /predict failed")
        finally:
            outcomes.labels(outcome).inc()
        return response

    return app


class _Paths:
    """Has a slash at the end of the API's paths mean nothing, and refuses other methods, beside a page at "/" too."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"].rstrip("/") if scope["type"] == "http" else ""
        app = self.app
        if path in METHODS:
            method = "GET" if scope["method"] == "HEAD" else scope["method"]  # whose answer is sent without its body
            scope = {**scope, "path": path, "method": method}
            if method != METHODS[path]:
                app = refused(405, _how(path), {"Allow": METHODS[path]})
        await app(scope, receive, send)


def _how(path: str) -> str:
    if path == "/predict":
        return "send a recording: curl --data-binary @FILE '.../predict?tasks=NAME', a POST"
    return f"{path} is only read: curl '...{path}', a GET"


def refused(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> "Response":
    """The answer to what is refused, `{"error": sentence}`."""
    from fastapi.responses import JSONResponse

    more = {408: {"Connection": "close"}, 503: {"Retry-After": str(RETRY_SECONDS)}}.get(status, {})
    kind = _last_response() if status == 408 else JSONResponse
    return kind({"error": sentence}, status, {**more, **(headers or {})})


@functools.cache
def _last_response() -> type["JSONResponse"]:
    """The response before a connection closes: what the client still sends is read for a while, or it gets none."""
    from fastapi.responses import JSONResponse

    class Last(JSONResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self.body, "more_body": True})
            await drain(receive, DRAIN_SECONDS)
            await send({"type": "http.response.body", "body": b""})

    return Last


async def drain(receive: Callable[[], Awaitable[Any]], seconds: float) -> None:
    """Reads a request's body on, keeping nothing."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while (await receive()).get("more_body", False):
                await asyncio.sleep(0)


async def refuse_place(request: Any, error: Any) -> "Response":
    """What Starlette refuses by itself, as the API refuses: places that are none, or not for that method."""
    if error.status_code in (404, 405):
        path = request.url.path[:100]
        what = f"there is no {path} here" if error.status_code == 404 else f"{path} takes no {request.method[:20]}"
        ways = "POST a recording to /predict, or GET /tasks, /health, /metrics"
        return refused(error.status_code, f"{what}: {ways}", error.headers)
    return refused(error.status_code, str(error.detail), error.headers)


async def _refuse_failed(_: Any, error: Exception) -> "Response":
    return refused(500, FAILED)  # the log has it from Starlette


def _check_encoding(request: "Request") -> None:
    """Raises HTTPException if the body is compressed: it would be taken for damaged audio."""
    from starlette.exceptions import HTTPException

    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        why = f"a body of Content-Encoding {encoding[:40]!r} is not read: send the file as it is, FLAC or Ogg if small"
        raise HTTPException(415, why)


class _Memory:
    """Counts the bytes of uploads that all requests hold together."""

    def __init__(self) -> None:
        self.held = 0

    @contextlib.contextmanager
    def share(self) -> Iterator[Callable[[int], int]]:
        """Gives a function that takes so many bytes more, and tells how many that makes for this request."""
        mine = 0

        def take(count: int) -> int:
            nonlocal mine
            room = MOST_HELD if mine + count <= SMALL else SHARE_OF_LARGE * MOST_HELD
            if self.held + count > room:
                raise Busy("too many uploads are on their way: ask again in a while")
            self.held += count
            mine += count
            return mine

        try:
            yield take
        finally:
            self.held -= mine


async def _body(request: "Request", desk: Batcher, take: Callable[[int], int]) -> tuple[bytes, list[str]]:
    """The file that a request brings, its body or the file in its form; and the tasks that the form names.

    Raises:
      TooLargeError: by what the request says of itself, or as soon as more has come.
      Busy: all requests together hold too much, or the desk takes none any more.
      _Slow: it does not come.
      ValueError: a form without a file, or with what is not known.
    """
    from starlette.datastructures import UploadFile
    from starlette.requests import Request

    limits, more = desk.limits, True

    async def counted() -> Any:
        nonlocal more
        message = await _next(request.receive, desk, until)
        more = message.get("more_body", False)
        count = len(message.get("body", b""))
        until.came(count)
        limits.check_bytes(take(count))
        return message

    until = _Patience(limits.timeout)
    try:
        promised = request.headers.get("content-length", "")
        limits.check_bytes(int(promised) if promised.isdecimal() else 0)
        own = Request(request.scope, counted)
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return await own.body(), []
        async with own.form(max_files=1) as form:
            _check_names("form field", form, ("file", "tasks"))
            file, named = form.get("file"), form.getlist("tasks")
            if not isinstance(file, UploadFile):
                raise ValueError("the form has no file of the name 'file': send one, or send it as the body itself")
            if not all(isinstance(name, str) for name in named):
                raise ValueError("the form's 'tasks' is a file: send names of tasks")
            return await file.read(), [str(name) for name in named]
    except (TooLargeError, Busy):
        # A connection that closes while its client still sends loses the answer: read on for a while, keeping nothing.
        left = limits.max_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while more and left > 0:
                    message = await request.receive()
                    more = message.get("more_body", False)
                    left -= len(message.get("body", b""))
        raise


class _Patience:
    """Until when an upload is waited for: each byte that comes puts it off, up to a share of the whole timeout."""

    def __init__(self, timeout: float) -> None:
        self.stalled, self.longest = min(STALLED_SECONDS, timeout / 4), LONGEST_READ * timeout
        self.began, self.bytes = time.monotonic(), 0
        self.until = self.began + self.stalled

    def came(self, count: int) -> None:
        """So many bytes came just now."""
        self.bytes += count
        by_rate = self.began + min(self.stalled + self.bytes / LEAST_RATE, self.longest)
        self.until = min(by_rate, time.monotonic() + self.stalled)


async def _next(receive: Callable[[], Awaitable[Any]], desk: Batcher, patience: _Patience) -> Any:
    """The next message of an upload, while it is wanted.

    Raises:
      Busy: the desk takes none any more.
      _Slow: it did not come in time.
    """
    while True:
        desk.check_open()
        try:
            async with asyncio.timeout(min(PULSE, patience.until - time.monotonic())):
                return await receive()
        except TimeoutError:
            if time.monotonic() >= patience.until:
                told = f"the upload does not come, or comes too slowly: {patience.bytes} bytes so far"
                raise _Slow(f"{told}. Send it again, or a shorter or compressed one (FLAC, Ogg)") from None


def _check_names(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raises ValueError if there is one that is not known: it would do nothing, in silence."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        told = " and ".join(map(repr, known))
        raise ValueError(f"no {what} {some(unknown)} is known: leave it out, or send {told}")


def _asked(given: Sequence[str], known: Collection[str]) -> list[str] | None:
    """Tasks by what a request says: names, which may hold commas, or several with commas between; None for all.

    Raises:
      ValueError: `tasks` is there, but names none.
    """
    names = [name for one in given for name in ([one] if one in known else one.split(",")) if name]
    if given and not names:
        raise ValueError("tasks names no task: name one at least, or leave it out for all that there are")
    return names or None


async def _answered(
    desk: Batcher, receive: Callable[[], Awaitable[Any]], data: bytes, tasks: list[str] | None
) -> Answered:
    """The desk's answer, unless the client leaves first: then it is cancelled.

    Raises:
      ClientDisconnect: it left.
      Busy, ValueError, RuntimeError: the desk's.
    """
    from starlette.requests import ClientDisconnect

    async def leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            await asyncio.sleep(0)

    answer = asyncio.wrap_future(desk.submit(data, tasks))
    gone = asyncio.create_task(leaves())
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


def _reply(answered: Answered) -> "Response":
    """As JSON has it, which knows no NaN.

    Raises:
      RuntimeError: a probability is none; that is no fault of the client's.
    """
    from fastapi.responses import JSONResponse

    try:
        return JSONResponse(as_json(answered))
    except ValueError as error:
        raise RuntimeError("an answer holds numbers that are not finite") from error


class _DeskMetrics:
    """What a desk counts, as prometheus_client collects it."""

    def __init__(self, desk: Batcher) -> None:
        self.desk = desk

    def collect(self) -> Iterator[Any]:
        """Metrics of this moment."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        stats = self.desk.stats()
        yield GaugeMetricFamily("spjax_waiting", "Utterances that no batch has taken up yet.", stats.waiting)
        yield GaugeMetricFamily("spjax_working", "Utterances in the batch that is being computed.", stats.working)
        yield CounterMetricFamily("spjax_answered", "Utterances answered, the page's too.", stats.answered)
        yield CounterMetricFamily("spjax_failed_batches", "Batches that failed as a whole.", stats.failed)
        for name, counts in (("rows", stats.rows), ("utterances", stats.utterances)):
            buckets = [(str(size), sum(n for value, n in counts.items() if value <= size)) for size in SIZES]
            yield HistogramMetricFamily(
                f"spjax_batch_{name}",
                f"Batches by their {name}.",
                [*buckets, ("+Inf", sum(counts.values()))],
                sum(value * n for value, n in counts.items()),
            )
