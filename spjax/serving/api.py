"""The HTTP API: predictions for uploaded recordings as JSON, health checks and Prometheus metrics."""

# No `from __future__ import annotations`: FastAPI resolves the handlers' annotations, whose names are imported locally.
import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from spjax.serving.batcher import Batcher, Prediction, QueueFullError, as_json, some, timed_out
from spjax.serving.limits import TooLargeError
from spjax.serving.uploads import UploadLimit

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

METHODS = {"/predict": "POST", "/tasks": "GET", "/health": "GET", "/metrics": "GET", "/openapi.json": "GET"}
FAILED = "internal error: the server log has the details"
RETRY_SECONDS = 1  # the Retry-After header of a 503
LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # histogram buckets, seconds
OUTCOMES = ("answered", "bad", "too_large", "busy", "timeout", "slow", "gone", "failed")  # of a request
SIZES = tuple(2**power for power in range(11))  # histogram buckets of batch sizes

_log = logging.getLogger(__name__)


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
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.exceptions import HTTPException

    # FastAPI's documentation pages load scripts from other hosts.
    about = "Prompted tasks in front of one frozen speech unit LM."
    app = FastAPI(title="spjax", description=about, docs_url=None, redoc_url=None)
    registry, outcomes, latency = _make_metrics(batcher)
    app.add_middleware(UploadLimit, limits=batcher.limits)
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
        outcome, response = "gone", refused(500, FAILED)
        try:
            outcome, response = await _respond(request, tasks, batcher)
            if outcome == "answered":
                latency.observe(time.perf_counter() - began)
        finally:
            outcomes.labels(outcome).inc()
        return response

    return app


async def _respond(request: "Request", tasks: Sequence[str], batcher: Batcher) -> tuple[str, "Response"]:
    """The outcome (see OUTCOMES) of a request to /predict, and its response."""
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    until = asyncio.get_running_loop().time() + batcher.limits.timeout
    try:
        batcher.check_open()
        _check_encoding(request)
        data, named = await _body(request)
        _check_names("query parameter", request.query_params, ("tasks",))
        requested = _task_names([*tasks, *named], batcher.predictor.packs)
        async with asyncio.timeout_at(until):
            prediction = await _predict(batcher, request.receive, data, requested)
        return "answered", _reply(prediction)
    except QueueFullError as error:
        return "busy", refused(503, str(error))
    except TooLargeError as error:
        return "too_large", refused(413, str(error))
    except ValueError as error:
        return "bad", refused(400, str(error))
    except HTTPException as error:  # from `UploadLimit`, or a malformed form
        outcome = {408: "slow", 413: "too_large"}.get(error.status_code, "bad")
        return outcome, refused(error.status_code, str(error.detail))
    except TimeoutError:
        return "timeout", refused(504, timed_out(batcher.limits))
    except ClientDisconnect:
        return "gone", refused(500, FAILED)
    except Exception:
        _log.exception("POST /predict failed")
        return "failed", refused(500, FAILED)


def _make_metrics(batcher: Batcher) -> tuple[Any, Any, Any]:
    """A Prometheus registry, and in it the counter of outcomes and the histogram of latencies."""
    from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

    registry = CollectorRegistry()
    registry.register(_BatcherMetrics(batcher))  # type: ignore[arg-type]  # any object with `collect` is a collector
    ProcessCollector(registry=registry)
    outcomes = Counter("spjax_requests", "Requests to /predict.", ["outcome"], registry=registry)
    for outcome in OUTCOMES:  # exported as 0 from the start
        outcomes.labels(outcome)
    latency = Histogram("spjax_request_seconds", "From a request to its answer.", registry=registry, buckets=LATENCIES)
    return registry, outcomes, latency


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

    more = {"Retry-After": str(RETRY_SECONDS)} if status == 503 else {}
    if status == 408:
        more["Connection"] = "close"  # a slow client would go on sending
    return JSONResponse({"error": sentence}, status, {**more, **(headers or {})})


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


async def _body(request: "Request") -> tuple[bytes, list[str]]:
    """Read the upload: the body or the form's file, and the tasks that the form names.

    Raises:
      HTTPException: from `UploadLimit`, or a malformed form.
      ValueError: a form without a file, or with an unknown field.
    """
    from starlette.datastructures import UploadFile

    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await request.body(), []
    async with request.form(max_files=1) as form:
        _check_names("form field", form, ("file", "tasks"))
        file, named = form.get("file"), form.getlist("tasks")
        if not isinstance(file, UploadFile):
            raise ValueError("the form has no file field named 'file': send one, or send the file as the body")
        if not all(isinstance(name, str) for name in named):
            raise ValueError("the form's 'tasks' is a file: send task names")
        return await file.read(), [str(name) for name in named]


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
