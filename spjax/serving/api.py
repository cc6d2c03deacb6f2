"""The HTTP API: recordings in, answers out as JSON, health and metrics."""

# Annotations are real objects here: FastAPI reads those of the functions below, whose names are not the module's.
import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

from spjax.serving.batcher import Answered, Batcher, Busy, timed_out
from spjax.serving.limits import Limits, TooLargeError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

MOST_HELD = 512_000_000  # bytes of uploads in memory, of all clients together
RETRY_SECONDS = 1  # after which a client that was sent away may ask again
LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds, of the histogram
OUTCOMES = ("answered", "bad", "too_large", "busy", "timeout", "gone", "failed")  # of a request
SIZES = tuple(2**power for power in range(11))  # of batches, likewise

_log = logging.getLogger(__name__)


def make_app(desk: Batcher) -> "FastAPI":
    """An application that answers by a desk.

    - `POST /predict?tasks=a,b`, an audio file as the body (or as `file` of a form): `{"units", "durations",
      "answers"}`, of all tasks if none are named.
    - `GET /tasks`: labels by task and slot. `GET /health`; `GET /metrics`, for Prometheus.

    An error is `{"error": sentence}`: 400 for what cannot be answered, 413 for what is too large or too long, 503 (ask
    again) where too many wait, 504 where it took too long.

    Args:
      desk: warm, and open for as long as the application runs.
    """
    from fastapi import FastAPI, Request
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

    app = FastAPI(title="spjax", description="Prompted tasks in front of one frozen speech unit LM.")
    registry = CollectorRegistry()
    registry.register(_DeskMetrics(desk))  # type: ignore[arg-type]  # a collector is what has `collect`
    ProcessCollector(registry=registry)
    outcomes = Counter("spjax_requests", "Requests to /predict.", ["outcome"], registry=registry)
    for outcome in OUTCOMES:  # told from the start, none of each
        outcomes.labels(outcome)
    latency = Histogram("spjax_request_seconds", "From a request to its answer.", registry=registry, buckets=LATENCIES)
    memory = _Memory()

    def refused(status: int, sentence: str) -> Response:
        headers = {"Retry-After": str(RETRY_SECONDS)} if status == 503 else None
        return JSONResponse({"error": sentence}, status, headers)

    @app.exception_handler(HTTPException)
    async def told(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

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
    async def predict(request: Request, tasks: str = "") -> Response:
        """Labels and probabilities of the recording in the body; `tasks`: names with commas between, all if empty."""
        began = time.perf_counter()
        outcome, response = "failed", refused(500, "the server failed to answer this; its log says why")
        try:
            async with asyncio.timeout(desk.limits.timeout):
                with memory.share() as take:
                    data = await _body(request, desk.limits, take)
                    answered = await _answered(desk, request.receive, data, tasks.split(",") if tasks else None)
            outcome, response = "answered", _reply(answered)
            latency.observe(time.perf_counter() - began)
        except Busy as error:
            outcome, response = "busy", refused(503, str(error))
        except TooLargeError as error:
            outcome, response = "too_large", refused(413, str(error))
        except ValueError as error:
            outcome, response = "bad", refused(400, str(error))
        except HTTPException as error:  # a form that is none
            outcome, response = "bad", refused(400, str(error.detail))
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
            if self.held + count > MOST_HELD:
                raise Busy("too many uploads are on their way: ask again in a while")
            self.held += count
            mine += count
            return mine

        try:
            yield take
        finally:
            self.held -= mine


async def _body(request: "Request", limits: Limits, take: Callable[[int], int]) -> bytes:
    """The file that a request brings: its body, or the file in its form.

    Raises:
      TooLargeError: by what the request says of itself, or as soon as more has come.
      Busy: all requests together hold too much.
      ValueError: a form without a file.
    """
    from starlette.datastructures import UploadFile
    from starlette.requests import Request

    async def counted() -> Any:
        message = await request.receive()
        limits.check_bytes(take(len(message.get("body", b""))))
        return message

    try:
        promised = request.headers.get("content-length", "")
        limits.check_bytes(int(promised) if promised.isdecimal() else 0)
        own = Request(request.scope, counted)
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            return await own.body()
        async with own.form(max_files=1, max_fields=8) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise ValueError("the form has no file of the name 'file': send one, or send it as the body itself")
            return await file.read()
    except (TooLargeError, Busy):
        # A connection that closes while its client still sends loses the answer: read on for a while, keeping nothing.
        left = limits.max_bytes
        while left > 0 and (message := await request.receive()).get("more_body"):
            left -= len(message.get("body", b""))
        raise


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

    encoded = answered.encoded
    body = {"units": encoded.units.tolist(), "durations": encoded.durations.tolist(), "answers": answered.answers}
    try:
        return JSONResponse(body)
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
