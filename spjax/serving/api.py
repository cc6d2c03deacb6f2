"""The HTTP API: predictions for uploaded recordings as JSON, health checks and Prometheus metrics."""

# No `from __future__ import annotations`: FastAPI resolves the handlers' annotations, whose names are imported locally.
import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from spjax.serving.batcher import Batcher, Prediction, QueueFullError, as_json, some, timed_out
from spjax.serving.limits import MEGABYTE, TooLargeError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse

MOST_HELD = 512_000_000  # bytes of uploads in memory, over all clients
SMALL = MEGABYTE  # bytes: uploads up to this size are accepted even when large ones have used up their share
SHARE_OF_LARGE = 0.9  # share of MOST_HELD that larger uploads may use
STALLED_SECONDS = 10.0  # without a byte, after which an upload is aborted; at most a quarter of the timeout
LEAST_RATE = 100_000  # minimum upload rate after those seconds, bytes per second
LONGEST_READ = 0.75  # share of the timeout that reading an upload may take
PULSE = 0.5  # seconds between checks whether the server still accepts the upload
DRAIN_SECONDS = 1.0  # for which a refused upload is read: a client that is still sending would not see the response
METHODS = {"/predict": "POST", "/tasks": "GET", "/health": "GET", "/metrics": "GET", "/openapi.json": "GET"}
FAILED = "internal error: the server log has the details"
RETRY_SECONDS = 1  # the Retry-After header of a 503
LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # histogram buckets, seconds
OUTCOMES = ("answered", "bad", "too_large", "busy", "timeout", "slow", "gone", "failed")  # of a request
SIZES = tuple(2**power for power in range(11))  # histogram buckets of batch sizes

_log = logging.getLogger(__name__)


class _SlowUploadError(Exception):
    """An upload that stalled or is too slow; the message is sent to the client."""


def make_app(batcher: Batcher) -> "FastAPI":
    """Make the FastAPI application.

    - `POST /predict?tasks=a,b`, an audio file as the body, or as the form field `file` (with an optional field
      `tasks`): `as_json`'s predictions, for all tasks by default. `tasks` may be repeated.
    - `GET /tasks`: labels by task and slot. `GET /health`; `GET /metrics`, for Prometheus.

    A trailing slash is ignored. Errors are `{"error": sentence}`: 400 for a bad request, 404 and 405 for an unknown
    path or method, 408 for a slow upload, 413 for one that is too large or too long, 415 for a compressed body, 500 for
    an internal error, 503 (retry) when the queue is full or the server is stopping, 504 after the timeout.

    Args:
      batcher: warmed up, and open for as long as the application runs.
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

    # FastAPI's documentation pages load scripts from other hosts.
    about = "Prompted tasks in front of one frozen speech unit LM."
    app = FastAPI(title="spjax", description=about, docs_url=None, redoc_url=None)
    registry = CollectorRegistry()
    registry.register(_BatcherMetrics(batcher))  # type: ignore[arg-type]  # any object with `collect` is a collector
    ProcessCollector(registry=registry)
    outcomes = Counter("spjax_requests", "Requests to /predict.", ["outcome"], registry=registry)
    for outcome in OUTCOMES:  # exported as 0 from the start
        outcomes.labels(outcome)
    latency = Histogram("spjax_request_seconds", "From a request to its answer.", registry=registry, buckets=LATENCIES)
    memory = _Memory()
    app.add_middleware(_Paths)
    app.add_exception_handler(HTTPException, refuse_place)  # type: ignore[arg-type]  # it is called with no other
    app.add_exception_handler(Exception, _refuse_failed)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether requests are accepted, and the model and tasks that are served."""
        stats = batcher.stats()
        predictor = batcher.predictor
        lm = next(iter(predictor.packs.values())).card["lm"]["hash"]
        body = {"ready": stats.open, "lm": lm, "tasks": list(predictor.packs), "compute": predictor.compute}
        body |= {"waiting": stats.waiting, "working": stats.working, "answered": stats.answered}
        return JSONResponse(body, 200 if stats.open else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/tasks")
    async def tasks() -> JSONResponse:
        """Labels by task and slot."""
        named = batcher.predictor.tasks.items()
        return JSONResponse({name: {slot.name: list(slot.labels) for slot in task.slots} for name, task in named})

    body = {"audio/*": {"schema": {"type": "string", "format": "binary"}}}

    @app.post("/predict", openapi_extra={"requestBody": {"content": body, "required": True}})
    async def predict(request: Request, tasks: Annotated[Sequence[str], Query()] = ()) -> Response:
        """Labels and probabilities for the recording in the body; `tasks`: task names, comma-separated; default all."""
        began = time.perf_counter()
        outcome, response = "failed", refused(500, FAILED)
        try:
            async with asyncio.timeout(batcher.limits.timeout):
                with memory.share() as take:
                    _check_encoding(request)
                    data, named = await _body(request, batcher, take)
                    _check_names("query parameter", request.query_params, ("tasks",))
                    requested = _task_names([*tasks, *named], batcher.predictor.packs)
                    prediction = await _predict(batcher, request.receive, data, requested)
            outcome, response = "answered", _reply(prediction)
            latency.observe(time.perf_counter() - began)
        except QueueFullError as error:
            outcome, response = "busy", refused(503, str(error))
        except TooLargeError as error:
            outcome, response = "too_large", refused(413, str(error))
        except ValueError as error:
            outcome, response = "bad", refused(400, str(error))
        except _SlowUploadError as error:
            outcome, response = "slow", refused(408, str(error))
        except HTTPException as error:  # a malformed form
            outcome, response = "bad", refused(error.status_code, str(error.detail))
        except TimeoutError:
            outcome, response = "timeout", refused(504, timed_out(batcher.limits))
        except ClientDisconnect:
            outcome = "gone"
        except Exception:
            _log.exception("POST /predict failed")
        finally:
            outcomes.labels(outcome).inc()
        return response

    return app


class _Paths:
    """ASGI middleware: ignores trailing slashes and refuses wrong methods on the API's paths."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"].rstrip("/") if scope["type"] == "http" else ""
        app = self.app
        if path in METHODS:
            method = "GET" if scope["method"] == "HEAD" else scope["method"]  # uvicorn sends no body for HEAD
            scope = {**scope, "path": path, "method": method}
            if method != METHODS[path]:
                app = refused(405, _how(path), {"Allow": METHODS[path]})
        await app(scope, receive, send)


def _how(path: str) -> str:
    if path == "/predict":
        return "POST a recording: curl --data-binary @FILE '.../predict?tasks=NAME'"
    return f"{path} accepts GET only: curl '...{path}'"


def refused(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> "Response":
    """The response to a refused request, `{"error": sentence}`."""
    from fastapi.responses import JSONResponse

    more = {408: {"Connection": "close"}, 503: {"Retry-After": str(RETRY_SECONDS)}}.get(status, {})
    kind = _last_response() if status == 408 else JSONResponse
    return kind({"error": sentence}, status, {**more, **(headers or {})})


@functools.cache
def _last_response() -> type["JSONResponse"]:
    """A response that reads on before the connection closes: a client that is still sending would not see it."""
    from fastapi.responses import JSONResponse

    class Last(JSONResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self.body, "more_body": True})
            await drain(receive, DRAIN_SECONDS)
            await send({"type": "http.response.body", "body": b""})

    return Last


async def drain(receive: Callable[[], Awaitable[Any]], seconds: float) -> None:
    """Read and discard a request's body for up to `seconds`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while (await receive()).get("more_body", False):
                await asyncio.sleep(0)


async def refuse_place(request: Any, error: Any) -> "Response":
    """Exception handler that formats Starlette's 404, 405 and other errors as the API's."""
    if error.status_code in (404, 405):
        path = request.url.path[:100]
        what = f"there is no {path} here" if error.status_code == 404 else f"{path} takes no {request.method[:20]}"
        usage = "POST a recording to /predict, or GET /tasks, /health, /metrics"
        return refused(error.status_code, f"{what}: {usage}", error.headers)
    return refused(error.status_code, str(error.detail), error.headers)


async def _refuse_failed(_: Any, error: Exception) -> "Response":
    return refused(500, FAILED)  # Starlette has logged it


def _check_encoding(request: "Request") -> None:
    """Raise HTTPException (415) if the body is compressed: it would be reported as damaged audio."""
    from starlette.exceptions import HTTPException

    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        why = f"Content-Encoding {encoding[:40]!r} is not supported: send the file as it is, FLAC or Ogg to save bytes"
        raise HTTPException(415, why)


class _Memory:
    """Counts the bytes of uploads that all requests hold."""

    def __init__(self) -> None:
        self.held = 0

    @contextlib.contextmanager
    def share(self) -> Iterator[Callable[[int], int]]:
        """Yield a function that reserves bytes for this request and returns the request's total so far."""
        mine = 0

        def take(count: int) -> int:
            nonlocal mine
            room = MOST_HELD if mine + count <= SMALL else SHARE_OF_LARGE * MOST_HELD
            if self.held + count > room:
                raise QueueFullError("too many uploads are in progress: try again later")
            self.held += count
            mine += count
            return mine

        try:
            yield take
        finally:
            self.held -= mine


async def _body(request: "Request", batcher: Batcher, take: Callable[[int], int]) -> tuple[bytes, list[str]]:
    """Read the upload: the body or the form's file, and the tasks that the form names.

    Raises:
      TooLargeError: by its Content-Length, or as soon as more bytes have come.
      QueueFullError: all requests together hold too many bytes, or the server is stopping.
      _SlowUploadError: the upload stalled or is too slow.
      ValueError: a form without a file, or with an unknown field.
    """
    from starlette.datastructures import UploadFile
    from starlette.requests import Request

    limits, more = batcher.limits, True

    async def counted() -> Any:
        nonlocal more
        message = await _next(request.receive, batcher, until)
        more = message.get("more_body", False)
        count = len(message.get("body", b""))
        until.received(count)
        limits.check_bytes(take(count))
        return message

    until = _Deadline(limits.timeout)
    try:
        promised = request.headers.get("content-length", "")
        limits.check_bytes(int(promised) if promised.isdecimal() else 0)
        counting = Request(request.scope, counted)
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return await counting.body(), []
        async with counting.form(max_files=1) as form:
            _check_names("form field", form, ("file", "tasks"))
            file, named = form.get("file"), form.getlist("tasks")
            if not isinstance(file, UploadFile):
                raise ValueError("the form has no file field named 'file': send one, or send the file as the body")
            if not all(isinstance(name, str) for name in named):
                raise ValueError("the form's 'tasks' is a file: send task names")
            return await file.read(), [str(name) for name in named]
    except (TooLargeError, QueueFullError):
        # A connection that closes while its client is still sending loses the response: read and discard for a while.
        left = limits.max_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while more and left > 0:
                    message = await request.receive()
                    more = message.get("more_body", False)
                    left -= len(message.get("body", b""))
        raise


class _Deadline:
    """The deadline of an upload: every byte extends it, up to a share of the timeout."""

    def __init__(self, timeout: float) -> None:
        self.stalled, self.longest = min(STALLED_SECONDS, timeout / 4), LONGEST_READ * timeout
        self.began, self.bytes = time.monotonic(), 0
        self.until = self.began + self.stalled

    def received(self, count: int) -> None:
        """Extend the deadline by `count` new bytes."""
        self.bytes += count
        by_rate = self.began + min(self.stalled + self.bytes / LEAST_RATE, self.longest)
        self.until = min(by_rate, time.monotonic() + self.stalled)


async def _next(receive: Callable[[], Awaitable[Any]], batcher: Batcher, deadline: _Deadline) -> Any:
    """The next message of an upload.

    Raises:
      QueueFullError: the server is stopping.
      _SlowUploadError: nothing came before the deadline.
    """
    while True:
        batcher.check_open()
        try:
            async with asyncio.timeout(min(PULSE, deadline.until - time.monotonic())):
                return await receive()
        except TimeoutError:
            if time.monotonic() >= deadline.until:
                message = (
                    f"the upload stalled or is too slow: {deadline.bytes} bytes so far. Send it again, or a shorter"
                )
                raise _SlowUploadError(f"{message} or compressed file (FLAC, Ogg)") from None


def _check_names(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raise ValueError for an unknown name, which would otherwise be ignored silently."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        allowed = " and ".join(map(repr, known))
        raise ValueError(f"unknown {what} {some(unknown)}: leave it out, or send {allowed}")


def _task_names(given: Sequence[str], known: Collection[str]) -> list[str] | None:
    """Task names from the request; each value is one name (which may hold commas) or several with commas between.

    Returns:
      The names; None for all tasks.

    Raises:
      ValueError: `tasks` is present but empty.
    """
    names = [name for one in given for name in ([one] if one in known else one.split(",")) if name]
    if given and not names:
        raise ValueError("tasks is empty: name at least one task, or leave it out for all")
    return names or None


async def _predict(
    batcher: Batcher, receive: Callable[[], Awaitable[Any]], data: bytes, tasks: list[str] | None
) -> Prediction:
    """Submit the upload and wait for the prediction; cancel it if the client disconnects first.

    Raises:
      ClientDisconnect: the client disconnected.
      QueueFullError, ValueError, RuntimeError: from the batcher.
    """
    from starlette.requests import ClientDisconnect

    async def leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            await asyncio.sleep(0)

    answer = asyncio.wrap_future(batcher.submit(data, tasks))
    gone = asyncio.create_task(leaves())
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


def _reply(prediction: Prediction) -> "Response":
    """The prediction as a JSON response.

    Raises:
      RuntimeError: a probability is NaN or infinite, which JSON cannot hold; an internal error.
    """
    from fastapi.responses import JSONResponse

    try:
        return JSONResponse(as_json(prediction))
    except ValueError as error:
        raise RuntimeError("a prediction holds NaN or infinite numbers") from error


class _BatcherMetrics:
    """The batcher's counters as a prometheus_client collector."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher

    def collect(self) -> Iterator[Any]:
        """The current values."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        stats = self.batcher.stats()
        yield GaugeMetricFamily("spjax_waiting", "Utterances waiting for a batch.", stats.waiting)
        yield GaugeMetricFamily("spjax_working", "Utterances in the batch being computed.", stats.working)
        yield CounterMetricFamily("spjax_answered", "Utterances answered, including the page's.", stats.answered)
        yield CounterMetricFamily("spjax_failed_batches", "Batches that failed as a whole.", stats.failed)
        for name, counts in (("rows", stats.rows), ("utterances", stats.utterances)):
            buckets = [(str(size), sum(n for value, n in counts.items() if value <= size)) for size in SIZES]
            yield HistogramMetricFamily(
                f"spjax_batch_{name}",
                f"Batches by their {name}.",
                [*buckets, ("+Inf", sum(counts.values()))],
                sum(value * n for value, n in counts.items()),
            )
