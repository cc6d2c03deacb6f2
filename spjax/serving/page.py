"""The web page (Gradio): record or upload speech, classify several files, look inside the prompts.

Everything that the browser loads comes from this server, and uploads are deleted after a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import functools
import io
import json
import os
import unicodedata
import urllib.parse
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spjax.data.unit_set import UnitSet
from spjax.evaluation import inside
from spjax.evaluation.markdown import table
from spjax.extras import needs
from spjax.serving import drawing
from spjax.serving.api import refuse_place
from spjax.serving.batcher import Batcher, Prediction, QueueFullError, as_json, timed_out
from spjax.serving.frozen import KINDS
from spjax.serving.limits import MEGABYTE, Limits
from spjax.serving.predictor import SpeechPrompt
from spjax.serving.scoring import unit_set
from spjax.serving.upload_folder import KEPT_SECONDS, delete_old, delete_orphans, upload_folder
from spjax.serving.upload_gate import UPLOAD_BYTES, UploadGate
from spjax.serving.uploads import read_upload
from spjax.speech2unit.audio import SAMPLE_RATE
from spjax.types import Encoded, Params

if TYPE_CHECKING:
    import fastapi
    import gradio

COLUMNS = ("file", "task", "slot", "label", "probability", "error")  # of the CSV
MOST_FILES = 500  # of one table
_AT_ONCE = 16  # files of a table that are queued at a time, so that other clients get their turn
_SWEPT = 600  # seconds between deletions of old uploads
_SESSIONS, _STATES, _EVENTS = 1000, 32, 200  # most recent ones kept: unfetched results, session states, call times
_SESSION_NAME = 64  # characters
_MOST_EXPLAINED = 256  # units: an attribution takes about 20 forward and backward passes over them
_STEPS = 16  # points of integrated gradients
_MOST_WAITING = 4  # requests that may wait for the "Inside" tab
_REPORTED = (QueueFullError, ValueError, TimeoutError, RuntimeError)  # errors whose messages are shown to the client
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # full-width ones too, as in spreadsheets
_BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # change the direction of the text that follows


def mount_page(app: fastapi.FastAPI, batcher: Batcher, path: str = "/") -> fastapi.FastAPI:
    """Mount the page on an app, with its style and its limits on uploads.

    Uploads are written to `upload_folder()`; sets $GRADIO_TEMP_DIR for this process.

    Args:
      app: the app; routes that it has already take precedence.
      batcher: computes the predictions; its limits apply.
      path: URL path of the page.

    Returns:
      The app.
    """
    folder = upload_folder()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # gradio reads it at every request
    with needs("serve", "the page"):
        import gradio as gr
    from starlette.exceptions import HTTPException

    font = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    mono = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=font, font_mono=mono)
    theme.set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")
    page = make_page(batcher)
    # `launch` sets these and mounting does not: without them, gradio accepts the path of any file on this machine as an
    # uploaded file, and anyone could read it.
    page.has_launched = page.is_running = True
    _bound_memory(page)
    _sweep_uploads(app, folder, page)
    app.add_middleware(UploadGate, folder=folder)
    app = gr.mount_gradio_app(
        app, page, path,
        theme=theme, css=drawing.STYLE + _STYLE, max_file_size=batcher.limits.max_bytes, footer_links=[],
        run_history=False, show_error=False, ssr_mode=False, enable_monitoring=False,
    )  # fmt: skip
    # Unknown paths get the API's errors, except below gradio's routes.
    inner: Any = app.routes[-1]
    refuse = inner.app.exception_handlers[HTTPException]

    async def refused(request: Any, error: Any) -> Any:
        return await (refuse if "/gradio_api/" in request.url.path else refuse_place)(request, error)

    inner.app.add_exception_handler(HTTPException, refused)
    return app


def _bound_memory(page: gradio.Blocks) -> None:
    """Limit what gradio keeps per session: by default some 100 kB for each of 10,000, and more for all that ever came.

    The page has no session state, so that dropping it is safe.
    """
    from gradio.utils import LRUCache

    page.state_session_capacity = _STATES
    queue = page._queue
    queue.pending_messages_per_session, queue.pending_event_ids_session = LRUCache(_SESSIONS), LRUCache(_SESSIONS)
    queue.ANALYTICS_MAX_EVENTS = _EVENTS
    take = queue.push

    async def push(body: Any, **more: Any) -> Any:
        if len(body.session_hash or "") > _SESSION_NAME:  # it is kept in memory
            return False, f"session_hash is longer than {_SESSION_NAME} characters: give a shorter one", "error"
        return await take(body=body, **more)

    queue.push = push  # type: ignore[assignment]


def _sweep_uploads(app: fastapi.FastAPI, folder: Path, page: gradio.Blocks) -> None:
    """While the app runs, delete old uploads and folders of dead servers. Gradio forgets interrupted uploads."""
    inner = app.router.lifespan_context

    async def sweep() -> None:
        while True:
            await asyncio.to_thread(delete_old, folder)
            await asyncio.to_thread(delete_orphans, folder.parent)
            for names in page.temp_file_sets:  # gradio keeps all names of uploads, for its cleanup, which is not used
                names.clear()
            await asyncio.sleep(_SWEPT)

    @contextlib.asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[Any]:
        sweeping = asyncio.create_task(sweep())
        try:
            async with inner(app) as state:
                yield state
        finally:
            sweeping.cancel()

    app.router.lifespan_context = lifespan


_STYLE = """
.gradio-container { width: 100% !important; max-width: 1400px !important; margin: 0 auto !important; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container .prose :is(table, th, td) { border-color: var(--border-color-primary) !important; }
.gradio-container .prose :not(pre) > code { white-space: pre-wrap; overflow-wrap: anywhere; }
#csv:not(:has(a)) { display: none; }
footer .divider { display: none; }
#look { align-self: center; }
@media (max-width: 500px) { .gradio-container { padding: .5rem !important; } }
"""


def make_page(batcher: Batcher) -> gradio.Blocks:
    """Make the page; `mount_page` mounts it.

    Its endpoints for `gradio_client` are `/predict` (a file, tasks) and `/batch` (files, tasks).

    Args:
      batcher: computes the predictions; its limits apply.
    """
    import gradio as gr

    predictor = batcher.predictor
    every = list(predictor.tasks)
    attributions = _OneAtATime()

    async def answered(audio: str | None, tasks: Sequence[str] | None) -> Prediction:
        if not audio:
            raise gr.Error("There is no recording yet: record or upload one.", print_exception=False)
        if not tasks:
            raise gr.Error("No task is chosen: choose at least one.", print_exception=False)
        try:
            return await _ask(batcher, audio, tasks)
        except _REPORTED as error:
            raise gr.Error(str(error), print_exception=False) from error

    async def predict(audio: str | None, tasks: list[str]) -> dict[str, Any]:
        return as_json(await answered(audio, tasks))

    @_errors_in_place("", None)
    async def show(audio: str | None, tasks: list[str]) -> tuple[str, str, dict[str, Any]]:
        one = await answered(audio, tasks)
        strip = await asyncio.to_thread(_drawn, str(audio), one.encoded, batcher)
        return drawing.answers(one.answers), strip, as_json(one)

    async def batch(
        files: list[str] | None,
        tasks: list[str],
        progress: Any = gr.Progress(),  # noqa: B008  gradio's way to ask for a progress bar
    ) -> tuple[list[list[Any]], str]:
        if not files or not tasks:
            lacking = "There are no files yet: choose some." if not files else "No task is chosen: choose at least one."
            raise gr.Error(lacking, print_exception=False)
        if len(files) > MOST_FILES:
            message = f"{len(files)} files are too many, a table holds at most {MOST_FILES}: split them."
            raise gr.Error(message, print_exception=False)
        rows = await _table(batcher, files, tasks, progress)
        content = await asyncio.to_thread(_csv, rows)
        # In gradio's cache, from which it is deleted like an upload.
        return rows, gr.processing_utils.save_bytes_to_cache(content, "answers.csv", download.GRADIO_CACHE)

    @_errors_in_place(None)
    async def show_batch(
        files: list[str] | None,
        tasks: list[str],
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> tuple[str, str]:
        rows, content = await batch(files, tasks, progress)
        return drawing.rows(rows), content

    @_errors_in_place("", "")
    async def look(task: str, shown: dict[str, Any] | None) -> tuple[str, str, str]:
        try:
            return await attributions(_look, predictor, task, shown)
        except (QueueFullError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title="Speech prompts", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(
            "# Speech prompts\n"
            "Classify speech with one frozen language model of speech units; each task is a small prompt."
        )
        with gr.Tab("Recording"):
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    audio = _without_links(
                        gr.Audio(sources=["upload", "microphone"], type="filepath", label="Speech", buttons=[])
                    )
                    chosen = gr.CheckboxGroup(every, value=every, label="Tasks", show_select_all=len(every) > 3)
                    ask = gr.Button("Answer", variant="primary")
                with gr.Column(scale=3, min_width=320):
                    labels = gr.HTML(_hint("Record or upload speech, then press Answer."), elem_id="answers")
            drawn = gr.HTML(elem_id="units")
            with gr.Accordion("As JSON", open=False):
                prediction = gr.JSON(show_label=False, elem_id="json")
            shown: list[Any] = [labels, drawn, prediction]
            asking = ask.click(
                show,
                [audio, chosen],
                shown,
                api_visibility="private",
                concurrency_limit=None,
                show_progress_on=[labels],
            )
            plain = gr.Button(visible=False)  # the API endpoint: no drawing
            plain.click(
                predict, [audio, chosen], gr.JSON(visible=False), api_name="predict", concurrency_limit=None,
                api_description="Labels and probabilities for a recording, and its units.",
            )  # fmt: skip
        with gr.Tab("Files"):
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    files = _without_links(
                        gr.File(file_count="multiple", label=f"Recordings, up to {MOST_FILES}", height=180)
                    )
                with gr.Column(scale=3, min_width=320):
                    several = gr.CheckboxGroup(every, value=every, label="Tasks", show_select_all=len(every) > 3)
                    run = gr.Button("Answer all", variant="primary")
            listed = gr.HTML(_hint("Choose recordings, then press Answer all."), elem_id="table")
            download = gr.File(label="As CSV", interactive=False, elem_id="csv", height=80)
            running = run.click(
                show_batch,
                [files, several],
                [listed, download],
                api_visibility="private",
                concurrency_limit=None,
                show_progress_on=[listed],
            )
            # The results belong to the files above: a change of files clears them and cancels running requests.
            gr.on(
                [files.upload, files.clear, files.delete, files.change], None, outputs=[listed, download],
                js="() => ['', null]", cancels=[running],
            )  # fmt: skip
            plain_run = gr.Button(visible=False)
            plain_run.click(
                batch, [files, several],
                [gr.Dataframe(headers=list(COLUMNS), type="array", visible=False), gr.File(visible=False)],
                api_name="batch", concurrency_limit=None,
                api_description="A table of predictions for several files, also as CSV.",
            )  # fmt: skip
        with gr.Tab("Inside"):
            with gr.Row(equal_height=False):
                task = gr.Dropdown(every, value=every[0], label="Task", scale=3, min_width=200)
                open_up = gr.Button("Look", variant="primary", scale=1, min_width=120, elem_id="look")
            gr.Markdown("The first use of a prompt, or of a longer recording, takes half a minute to compile.")
            opened = []
            for title, about in (
                ("Units of each label", "The units with the largest logits for each label, against the slot's mean."),
                ("Attribution", "Effect of each unit of the last recording on the prediction (integrated gradients)."),
                ("Similarity of prompts", "Between all tasks with prompts in every layer of the model."),
            ):
                gr.Markdown(f"### {title}\n{about}")
                opened.append(gr.HTML(elem_id=f"inside-{title.split()[0].lower()}"))
            looking = open_up.click(
                look,
                [task, prediction],
                opened,
                api_visibility="private",
                concurrency_limit=None,
                show_progress_on=opened[:1],
            )
        # The results belong to the recording beside them: a new or trimmed recording clears them and cancels running
        # requests.
        gr.on(
            [audio.change, audio.input, audio.clear, audio.upload, audio.start_recording], None,
            outputs=[*shown, opened[1]], js="() => ['', '', null, '']", cancels=[asking, looking],
        )  # fmt: skip
        with gr.Tab("Use via API"):  # gradio's page of that name shows calls with links, which this server refuses
            calls = gr.Markdown(_calls(predictor), elem_id="calls")
            gr.on(
                page.load, None, [calls], [calls], api_visibility="private",
                js=f"text => text.replaceAll('{_URL}', (location.origin + location.pathname).replace(/\\/+$/, ''))",
            )  # fmt: skip
        with gr.Tab("About"):
            gr.Markdown(_about(predictor, batcher.limits))
    _refuse_quietly(page)
    return page


def _errors_in_place(*others: Any) -> Callable[..., Any]:
    """Decorator: show a handler's error in place of its first output, and set the `others`."""

    def wrapped(handler: Callable[..., Any]) -> Callable[..., Any]:
        import gradio as gr

        @functools.wraps(handler)  # gradio inspects the signature
        async def shown(*arguments: Any) -> Any:
            try:
                return await handler(*arguments)
            except gr.Error as error:
                return drawing.error(error.message), *others

        return shown

    return wrapped


def _refuse_quietly(page: Any) -> None:
    """Refuse malformed input with one sentence, without gradio's traceback in the log."""
    import gradio as gr

    take = page.preprocess_data

    async def checked(*arguments: Any, **options: Any) -> Any:
        try:
            return await take(*arguments, **options)
        except gr.Error as error:  # its message is for the client
            raise gr.Error(error.message, print_exception=False) from error
        except Exception as error:
            sentence = "The input is malformed: upload files first, and give the paths that the upload returned."
            raise gr.Error(sentence, print_exception=False) from error

    page.preprocess_data = checked


def _without_links(component: Any) -> Any:
    """Make the component refuse links: gradio would download them, whatever their size."""
    import gradio as gr

    move = component.async_move_resource_to_block_cache

    async def refuse_links(place: Any) -> Any:
        if urllib.parse.urlsplit(str(place)).scheme in ("http", "https"):
            raise gr.Error("Links are not followed: send the file itself.", print_exception=False)
        return await move(place)

    component.async_move_resource_to_block_cache = refuse_links
    example = {"path": "speech.wav", "meta": {"_type": "gradio.FileData"}}  # gradio's examples are links
    component.example_payload = lambda: [example] if isinstance(component, gr.File) else example
    return component


class _OneAtATime:
    """Runs slow work in a thread, one call at a time, so that predictions are not slowed down."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0

    async def __call__(self, work: Callable[..., Any], *arguments: Any) -> Any:
        if self.waiting >= _MOST_WAITING:
            raise QueueFullError(f"{self.waiting} attributions are waiting already: try again in a minute.")
        self.waiting += 1
        try:
            async with self.lock:
                return await asyncio.to_thread(work, *arguments)
        finally:
            self.waiting -= 1


async def _ask(batcher: Batcher, audio: str, tasks: Sequence[str]) -> Prediction:
    """Submit and wait for the prediction without blocking a thread."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(batcher.submit(audio, tasks)), batcher.limits.timeout)
    except TimeoutError:
        raise TimeoutError(timed_out(batcher.limits)) from None


def _drawn(audio: str, encoded: Encoded, batcher: Batcher) -> str:
    assert batcher.predictor.encoder is not None
    wave, encoder = read_upload(audio, batcher.limits).wave, batcher.predictor.encoder
    return drawing.utterance(wave, encoded.units.tolist(), encoded.durations.tolist(), encoder.hop, encoder.center)


async def _table(
    batcher: Batcher, files: Sequence[str], tasks: Sequence[str], progress: Callable[..., Any]
) -> list[list[Any]]:
    """Rows of COLUMNS, in the order of the files; a file that fails has a row with its error."""
    turn, done = asyncio.Semaphore(_AT_ONCE), 0
    progress((0, len(files)), unit="files")

    async def one(path: str, name: str) -> list[list[Any]]:
        nonlocal done
        async with turn:
            try:
                _, answers = await _ask_again(batcher, path, tasks)
            except _REPORTED as error:
                rows: list[list[Any]] = [[name, "", "", "", None, _one_line(str(error))]]
            else:
                rows = [
                    [name, task, slot, label, round(answer["probabilities"][slot][label], 6), ""]
                    for task, answer in answers.items()
                    for slot, label in answer["labels"].items()
                ]
        done += 1
        progress((done, len(files)), unit="files")
        return rows

    return [row for rows in await asyncio.gather(*map(one, files, _names(files))) for row in rows]


def _names(files: Sequence[str]) -> list[str]:
    """Unique one-line names of files for a table, in order, without bidirectional controls."""
    names: dict[str, None] = {}
    for path in files:
        plain = name = _one_line(Path(path).name)
        number = 1
        while name in names:
            number += 1
            name = f"{plain} ({number})"
        names[name] = None
    return list(names)


async def _ask_again(batcher: Batcher, path: str, tasks: Sequence[str]) -> Prediction:
    """As `_ask`, retried while the queue is full."""
    loop = asyncio.get_running_loop()
    until = loop.time() + batcher.limits.timeout
    while True:
        try:
            return await _ask(batcher, path, tasks)
        except QueueFullError:
            if loop.time() > until:
                raise
            await asyncio.sleep(0.25)


def _csv(rows: Sequence[Sequence[Any]]) -> bytes:
    """CSV for spreadsheets: with a UTF-8 byte order mark, and nothing that would run as a formula.

    Every cell is quoted, since some programs split at semicolons, and a formula could follow one.
    """
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([COLUMNS, *([_harmless(cell) for cell in row] for row in rows)])
    return text.getvalue().encode("utf-8-sig")


def _harmless(cell: Any) -> Any:
    """Prefix text that a spreadsheet would run as a formula with an apostrophe; file names come from clients."""
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip().startswith(_FORMULA) else cell


def _look(predictor: SpeechPrompt, task: str, shown: dict[str, Any] | None) -> tuple[str, str, str]:
    """HTML of the verbalizer's weights, the attribution of the prediction shown, and the similarity of the prompts."""
    pack = predictor.packs[task]
    weights = drawing.verbalizer(pack.task, inside.verbalizer_weights(pack))
    return weights, _attribution(predictor, task, shown), _similarity(predictor)


def _attribution(predictor: SpeechPrompt, task: str, shown: dict[str, Any] | None) -> str:
    if not shown:
        return _hint("Classify a recording first.")
    utterance = _utterance(predictor, shown)
    left = max(0, len(utterance.units) - _MOST_EXPLAINED)
    pack, compute = predictor.packs[task], KINDS[predictor.compute]
    kept = utterance.cut(_MOST_EXPLAINED)
    lm = _differentiable(predictor)
    found = inside.attribute(lm, predictor.config, pack, kept, steps=_STEPS, compute=compute)
    return drawing.attribution(pack.task, found, left)


def _differentiable(predictor: SpeechPrompt) -> Params:
    """The LM's weights with int8 kernels dequantized, since they have no gradients."""
    if predictor.compute != "int8":
        return predictor.params
    dtype = KINDS["int8"].dtype
    layers = {
        name: {leaf: value.astype(dtype) if leaf == "kernel" else value for leaf, value in weights.items()}
        for name, weights in predictor.params["layers"].items()
    }
    return {**predictor.params, "layers": layers}


def _utterance(predictor: SpeechPrompt, shown: dict[str, Any]) -> UnitSet:
    """The utterance of the prediction (JSON) that the page shows."""
    rows = {name: shown[name] for name in ("units", "durations", "f0") if isinstance(shown, dict) and name in shown}
    numbers = all(isinstance(row, list) and all(type(x) in (int, float) for x in row) for row in rows.values())
    if not numbers or not {"units", "durations"} <= set(rows) or len({len(row) for row in rows.values()}) != 1:
        raise ValueError("not a prediction of this page: give an object with units and durations, lists of one length")
    if any(type(x) is not int or not 0 <= x < 2**31 for name in ("units", "durations") for x in rows[name]):
        raise ValueError("units and durations must be integers, 0 or more")
    f0 = np.asarray(rows["f0"], np.float32) if "f0" in rows else None
    units, durations = (np.asarray(rows[name], np.int32) for name in ("units", "durations"))
    return unit_set([Encoded(units, durations, f0)], predictor.config)


@functools.lru_cache(maxsize=4)
def _similarity(predictor: SpeechPrompt) -> str:
    deep = {
        name: pack for name, pack in predictor.packs.items() if "key" in pack.params and pack.params["key"].shape[1]
    }
    if len(deep) < 2:
        return _hint("This needs at least two tasks with deep prompts (in every layer).")
    layers = predictor.params["layers"]
    kernels = {name: {"kernel": layers[name]["kernel"].astype("float32")} for name in ("key", "value")}
    return drawing.similarity(list(deep), inside.prompt_similarity({"layers": kernels}, list(deep.values())))


def _one_line(text: str) -> str:
    """The text in one line, without control characters and bidirectional controls."""
    kept = (sign for sign in " ".join(text.split()) if unicodedata.category(sign) != "Cc")
    return "".join(sign for sign in kept if unicodedata.bidirectional(sign) not in _BIDI)


def _plain(name: str) -> str:
    """A name escaped for a Markdown table."""
    return "".join(f"&#{ord(sign)};" if sign in "<>&|*_`[]\\$~" else sign for sign in _one_line(name))


def _hint(text: str) -> str:
    return f'<div class="spj"><p class="quiet">{text}</p></div>'


def _about(predictor: SpeechPrompt, limits: Limits) -> str:
    """Markdown: the model, its tasks and the limits."""
    lm = next(iter(predictor.packs.values())).card["lm"]
    encoder = predictor.encoder
    rows = [
        [_plain(name), ", ".join(f"{_plain(slot.name)} ({len(slot.labels)} labels)" for slot in task.slots)]
        for name, task in predictor.tasks.items()
    ]
    tasks = "\n".join(table(("task", "slots"), rows))
    encoding = (
        "" if encoder is None else f" Speech encoder: {encoder.name}, {SAMPLE_RATE / encoder.hop:g} frames a second."
    )
    return f"""
Unit language model `{lm["hash"]}`, {lm["layers"]} layers of {lm["dim"]}, frozen, in {predictor.compute}.{encoding}
Uploads are deleted after {(KEPT_SECONDS + _SWEPT) // 60} minutes at most; if the server crashes, when one is
started again.

{tasks}

**Limits**: files up to {limits.max_bytes / 1e6:g} MB and {limits.max_seconds:g} s each, {MOST_FILES} and
{UPLOAD_BYTES / MEGABYTE:g} MB in a table;
at most {limits.queue} requests in the queue, {limits.timeout:g} s each.
"""


_URL = "http://127.0.0.1:7860"  # which the browser replaces with the page's address


def _calls(predictor: SpeechPrompt) -> str:
    """Markdown: how to call the API."""
    name = next(iter(predictor.tasks))
    first = json.dumps(name, ensure_ascii=False)
    return f"""
`curl` is enough; leave `tasks` out for all tasks. Errors are `{{"error": ...}}`:

```bash
curl --data-binary @speech.wav "{_URL}/predict?tasks={urllib.parse.quote(name, safe="")}"
```

The same from Python, and a table of several files (`python -m pip install gradio_client`):

```python
from gradio_client import Client, handle_file

client = Client("{_URL}")
print(client.predict(handle_file("speech.wav"), [{first}], api_name="/predict")["answers"])
table, csv_file = client.predict([handle_file("a.wav"), handle_file("b.wav")], [{first}], api_name="/batch")
print(table["data"], csv_file)
```

Other endpoints: `{_URL}/tasks` (labels of every task), `{_URL}/health`, `{_URL}/metrics` (for Prometheus) and
`{_URL}/openapi.json`.
"""
