"""The page: speech recorded or uploaded, answered by the desk; several files to a table; a look inside the prompts.

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
from spjax.serving import drawing
from spjax.serving.api import refuse_place
from spjax.serving.batcher import Answered, Batcher, Busy, as_json, timed_out
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
_AT_ONCE = 16  # files of a table that are on the desk: others want to be answered too
_SWEPT = 600  # seconds between looks for uploads that are old
_SESSIONS, _STATES, _EVENTS = 1000, 32, 200  # of the latest visitors: answers not fetched yet, states, times of calls
_SESSION_NAME = 64  # characters
_MOST_EXPLAINED = 256  # units: attributions take some 20 passes over them, forth and back
_STEPS = 16  # points of integrated gradients
_MOST_WAITING = 4  # who may wait for a look inside
_TOLD = (Busy, ValueError, TimeoutError, RuntimeError)  # errors of the desk, whose messages are for who asks
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # the wide ones too, as spreadsheets do
_TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # turn the direction of what follows


def mount_page(app: fastapi.FastAPI, desk: Batcher, path: str = "/") -> fastapi.FastAPI:
    """Puts the page on an app, with its looks and its limits on uploads.

    Uploads lie in `upload_folder()`: $GRADIO_TEMP_DIR is set to it, for this process.

    Args:
      app: where to; its own routes go first if they were added before.
      desk: what answers, and its limits.
      path: of the page.

    Returns:
      The app.
    """
    folder = upload_folder()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # gradio looks there at every request
    import gradio as gr
    from starlette.exceptions import HTTPException

    font = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    mono = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=font, font_mono=mono)
    theme.set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")
    page = make_page(desk)
    # What gradio's own `launch` sets and mounting forgets: without, it takes files for inputs that nobody uploaded, so
    # that anyone might read whatever lies on this machine.
    page.has_launched = page.is_running = True
    _bound_memory(page)
    _sweep_uploads(app, folder, page)
    app.add_middleware(UploadGate, folder=folder)
    app = gr.mount_gradio_app(
        app, page, path,
        theme=theme, css=drawing.STYLE + _STYLE, max_file_size=desk.limits.max_bytes, footer_links=[],
        run_history=False, show_error=False, ssr_mode=False, enable_monitoring=False,
    )  # fmt: skip
    # Places that are none are refused as the API refuses them, but for those of gradio's own programs.
    inner: Any = app.routes[-1]
    refuse = inner.app.exception_handlers[HTTPException]

    async def refused(request: Any, error: Any) -> Any:
        return await (refuse if "/gradio_api/" in request.url.path else refuse_place)(request, error)

    inner.app.add_exception_handler(HTTPException, refused)
    return app


def _bound_memory(page: gradio.Blocks) -> None:
    """Bounds what gradio keeps of every caller: some 100 kB each of 10,000, and a little more of all that ever came.

    The page has no state of a visitor, so that what is given up is made anew when it is wanted.
    """
    from gradio.utils import LRUCache

    page.state_session_capacity = _STATES
    queue = page._queue
    queue.pending_messages_per_session, queue.pending_event_ids_session = LRUCache(_SESSIONS), LRUCache(_SESSIONS)
    queue.ANALYTICS_MAX_EVENTS = _EVENTS
    take = queue.push

    async def push(body: Any, **more: Any) -> Any:
        if len(body.session_hash or "") > _SESSION_NAME:  # it is kept, up to all that a call may bring
            return False, f"session_hash is longer than {_SESSION_NAME} characters: give a shorter one", "error"
        return await take(body=body, **more)

    queue.push = push  # type: ignore[assignment]


def _sweep_uploads(app: fastapi.FastAPI, folder: Path, page: gradio.Blocks) -> None:
    """While the app runs, deletes old uploads, and folders of servers that died. Gradio forgets what broke off."""
    inner = app.router.lifespan_context

    async def sweep() -> None:
        while True:
            await asyncio.to_thread(delete_old, folder)
            await asyncio.to_thread(delete_orphans, folder.parent)
            for names in page.temp_file_sets:  # gradio keeps the names of all uploads, for a sweep of its own
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


def make_page(desk: Batcher) -> gradio.Blocks:
    """The page, to be mounted by `mount_page`.

    Its endpoints for `gradio_client` are `/predict` (a file, tasks) and `/batch` (files, tasks).

    Args:
      desk: what answers, and its limits.
    """
    import gradio as gr

    predictor = desk.predictor
    every = list(predictor.tasks)
    alone = _Alone()

    async def answered(audio: str | None, tasks: Sequence[str] | None) -> Answered:
        if not audio:
            raise gr.Error("There is no recording yet: record or upload one.", print_exception=False)
        if not tasks:
            raise gr.Error("No task is chosen: choose one at least.", print_exception=False)
        try:
            return await _ask(desk, audio, tasks)
        except _TOLD as error:
            raise gr.Error(str(error), print_exception=False) from error

    async def predict(audio: str | None, tasks: list[str]) -> dict[str, Any]:
        return as_json(await answered(audio, tasks))

    @_errors_in_place("", None)
    async def show(audio: str | None, tasks: list[str]) -> tuple[str, str, dict[str, Any]]:
        one = await answered(audio, tasks)
        strip = await asyncio.to_thread(_drawn, str(audio), one.encoded, desk)
        return drawing.answers(one.answers), strip, as_json(one)

    async def batch(
        files: list[str] | None,
        tasks: list[str],
        progress: Any = gr.Progress(),  # noqa: B008  how gradio wants to be asked for one
    ) -> tuple[list[list[Any]], str]:
        if not files or not tasks:
            lacking = "There are no files yet: choose some." if not files else "No task is chosen: choose one at least."
            raise gr.Error(lacking, print_exception=False)
        if len(files) > MOST_FILES:
            told = f"{len(files)} files are too many, at most {MOST_FILES} make a table: split them."
            raise gr.Error(told, print_exception=False)
        rows = await _table(desk, files, tasks, progress)
        content = await asyncio.to_thread(_csv, rows)
        # In the cache, where gradio keeps uploads and deletes them in time.
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
    async def look(task: str, said: dict[str, Any] | None) -> tuple[str, str, str]:
        try:
            return await alone(_look, predictor, task, said)
        except (Busy, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title="Speech prompts", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(
            "# Speech prompts\n"
            "Tasks on speech, answered by one frozen language model of speech units: each of them is a small prompt."
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
                told = gr.JSON(show_label=False, elem_id="json")
            shown: list[Any] = [labels, drawn, told]
            asking = ask.click(
                show,
                [audio, chosen],
                shown,
                api_visibility="private",
                concurrency_limit=None,
                show_progress_on=[labels],
            )
            plain = gr.Button(visible=False)  # what programs call: answers alone, nothing drawn
            plain.click(
                predict, [audio, chosen], gr.JSON(visible=False), api_name="predict", concurrency_limit=None,
                api_description="Labels and probabilities of a recording, and its units.",
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
            # Answers are of the files above them: other ones take them away, and those that are on their way.
            gr.on(
                [files.upload, files.clear, files.delete, files.change], None, outputs=[listed, download],
                js="() => ['', null]", cancels=[running],
            )  # fmt: skip
            plain_run = gr.Button(visible=False)
            plain_run.click(
                batch, [files, several],
                [gr.Dataframe(headers=list(COLUMNS), type="array", visible=False), gr.File(visible=False)],
                api_name="batch", concurrency_limit=None,
                api_description="A table of the answers for several files, and it as CSV.",
            )  # fmt: skip
        with gr.Tab("Inside"):
            with gr.Row(equal_height=False):
                task = gr.Dropdown(every, value=every[0], label="Task", scale=3, min_width=200)
                open_up = gr.Button("Look", variant="primary", scale=1, min_width=120, elem_id="look")
            gr.Markdown("The first look at a prompt, or at a longer recording, takes half a minute: it is compiled.")
            opened = []
            for title, about in (
                ("What it listens for", "Of each label the units whose logits speak for it, against the slot's mean."),
                ("What decided", "What each unit of the last recording did for the answer (integrated gradients)."),
                ("How alike the prompts are", "Between all tasks whose prompts are in every layer of the model."),
            ):
                gr.Markdown(f"### {title}\n{about}")
                opened.append(gr.HTML(elem_id="inside-" + title.split()[-1]))
            looking = open_up.click(
                look,
                [task, told],
                opened,
                api_visibility="private",
                concurrency_limit=None,
                show_progress_on=opened[:1],
            )
        # Answers are of the recording beside them: another one, or a part cut out of it, takes them away, and those
        # that are on their way.
        gr.on(
            [audio.change, audio.input, audio.clear, audio.upload, audio.start_recording], None,
            outputs=[*shown, opened[1]], js="() => ['', '', null, '']", cancels=[asking, looking],
        )  # fmt: skip
        with gr.Tab("Use via API"):  # gradio's own page of that name shows calls with files that this server refuses
            calls = gr.Markdown(_calls(predictor), elem_id="calls")
            gr.on(
                page.load, None, [calls], [calls], api_visibility="private",
                js=f"text => text.replaceAll('{_URL}', (location.origin + location.pathname).replace(/\\/+$/, ''))",
            )  # fmt: skip
        with gr.Tab("About"):
            gr.Markdown(_about(predictor, desk.limits))
    _refuse_quietly(page)
    return page


def _errors_in_place(*others: Any) -> Callable[..., Any]:
    """Shows what is wrong in the place of a handler's first result, where it stays, and clears its `others`."""

    def wrapped(handler: Callable[..., Any]) -> Callable[..., Any]:
        import gradio as gr

        @functools.wraps(handler)  # gradio looks for arguments of its own
        async def shown(*arguments: Any) -> Any:
            try:
                return await handler(*arguments)
            except gr.Error as error:
                return drawing.error(error.message), *others

        return shown

    return wrapped


def _refuse_quietly(page: Any) -> None:
    """What is no input of the page is refused with a sentence, not with gradio's whole traceback in the log."""
    import gradio as gr

    take = page.preprocess_data

    async def told(*arguments: Any, **options: Any) -> Any:
        try:
            return await take(*arguments, **options)
        except gr.Error as error:  # it has a sentence
            raise gr.Error(error.message, print_exception=False) from error
        except Exception as error:
            sentence = "This is no input of the page: upload files first, and name what the upload answered."
            raise gr.Error(sentence, print_exception=False) from error

    page.preprocess_data = told


def _without_links(component: Any) -> Any:
    """The component, which refuses links: gradio would fetch what they lead to, of whatever size."""
    import gradio as gr

    move = component.async_move_resource_to_block_cache

    async def refuse_links(place: Any) -> Any:
        if urllib.parse.urlsplit(str(place)).scheme in ("http", "https"):
            raise gr.Error("Links are not followed: send the file itself.", print_exception=False)
        return await move(place)

    component.async_move_resource_to_block_cache = refuse_links
    example = {"path": "speech.wav", "meta": {"_type": "gradio.FileData"}}  # gradio's are links
    component.example_payload = lambda: [example] if isinstance(component, gr.File) else example
    return component


class _Alone:
    """Work that is done one at a time, in a thread: it must not take the machine from those who want answers."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0

    async def __call__(self, work: Callable[..., Any], *arguments: Any) -> Any:
        if self.waiting >= _MOST_WAITING:
            raise Busy(f"{self.waiting} others are looking inside already: try again in a minute.")
        self.waiting += 1
        try:
            async with self.lock:
                return await asyncio.to_thread(work, *arguments)
        finally:
            self.waiting -= 1


async def _ask(desk: Batcher, audio: str, tasks: Sequence[str]) -> Answered:
    """What the desk answers, waited for without holding a thread, so that as many may wait as it takes."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(desk.submit(audio, tasks)), desk.limits.timeout)
    except TimeoutError:
        raise TimeoutError(timed_out(desk.limits)) from None


def _drawn(audio: str, encoded: Encoded, desk: Batcher) -> str:
    assert desk.predictor.encoder is not None
    wave, encoder = read_upload(audio, desk.limits).wave, desk.predictor.encoder
    return drawing.utterance(wave, encoded.units.tolist(), encoded.durations.tolist(), encoder.hop, encoder.center)


async def _table(
    desk: Batcher, files: Sequence[str], tasks: Sequence[str], progress: Callable[..., Any]
) -> list[list[Any]]:
    """Rows of COLUMNS, in the order of the files; of one that cannot be answered a row with its error."""
    turn, done = asyncio.Semaphore(_AT_ONCE), 0
    progress((0, len(files)), unit="files")

    async def one(path: str, name: str) -> list[list[Any]]:
        nonlocal done
        async with turn:
            try:
                _, answers = await _patiently(desk, path, tasks)
            except _TOLD as error:
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
    """What a table calls files, in their order: no two the same, in one line each, and nothing that turns the text."""
    names: dict[str, None] = {}
    for path in files:
        plain = name = _one_line(Path(path).name)
        number = 1
        while name in names:
            number += 1
            name = f"{plain} ({number})"
        names[name] = None
    return list(names)


async def _patiently(desk: Batcher, path: str, tasks: Sequence[str]) -> Answered:
    """Asks again while the desk is busy: a table is in no hurry."""
    loop = asyncio.get_running_loop()
    until = loop.time() + desk.limits.timeout
    while True:
        try:
            return await _ask(desk, path, tasks)
        except Busy:
            if loop.time() > until:
                raise
            await asyncio.sleep(0.25)


def _csv(rows: Sequence[Sequence[Any]]) -> bytes:
    """CSV as spreadsheets want it: with a mark that says UTF-8, and nothing that they take for a formula.

    All is quoted: some split at semicolons instead of commas, and would find a formula behind one.
    """
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([COLUMNS, *([_harmless(cell) for cell in row] for row in rows)])
    return text.getvalue().encode("utf-8-sig")


def _harmless(cell: Any) -> Any:
    """The cell; an apostrophe in front of text that a spreadsheet would run, as names of files may be made to be."""
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip().startswith(_FORMULA) else cell


def _look(predictor: SpeechPrompt, task: str, said: dict[str, Any] | None) -> tuple[str, str, str]:
    """HTML of what a verbalizer listens for, what decided the last answer, and how alike the prompts are."""
    pack = predictor.packs[task]
    weights = drawing.verbalizer(pack.task, inside.verbalizer_weights(pack))
    return weights, _decided(predictor, task, said), _alike(predictor)


def _decided(predictor: SpeechPrompt, task: str, said: dict[str, Any] | None) -> str:
    if not said:
        return _hint("Have a recording answered first.")
    utterance = _utterance(predictor, said)
    left = max(0, len(utterance.units) - _MOST_EXPLAINED)
    pack, compute = predictor.packs[task], KINDS[predictor.compute]
    kept = utterance.cut(_MOST_EXPLAINED)
    lm = _differentiable(predictor)
    found = inside.attribute(lm, predictor.config, pack, kept, steps=_STEPS, compute=compute)
    return drawing.attribution(pack.task, found, left)


def _differentiable(predictor: SpeechPrompt) -> Params:
    """The LM's weights, int8 kernels multiplied out for as long as it takes: gradients want plain ones."""
    if predictor.compute != "int8":
        return predictor.params
    dtype = KINDS["int8"].dtype
    layers = {
        name: {leaf: value.astype(dtype) if leaf == "kernel" else value for leaf, value in weights.items()}
        for name, weights in predictor.params["layers"].items()
    }
    return {**predictor.params, "layers": layers}


def _utterance(predictor: SpeechPrompt, said: dict[str, Any]) -> UnitSet:
    """The utterance that a page shows, as the LM takes it."""
    rows = {name: said[name] for name in ("units", "durations", "f0") if isinstance(said, dict) and name in said}
    whole = all(isinstance(row, list) and all(type(x) in (int, float) for x in row) for row in rows.values())
    if not whole or not {"units", "durations"} <= set(rows) or len({len(row) for row in rows.values()}) != 1:
        raise ValueError("this is no answer of this page: give an object with units and durations, lists of one length")
    if any(type(x) is not int or not 0 <= x < 2**31 for name in ("units", "durations") for x in rows[name]):
        raise ValueError("units and durations must be whole numbers, 0 or more")
    f0 = np.asarray(rows["f0"], np.float32) if "f0" in rows else None
    units, durations = (np.asarray(rows[name], np.int32) for name in ("units", "durations"))
    return unit_set([Encoded(units, durations, f0)], predictor.config)


@functools.lru_cache(maxsize=4)
def _alike(predictor: SpeechPrompt) -> str:
    deep = {
        name: pack for name, pack in predictor.packs.items() if "key" in pack.params and pack.params["key"].shape[1]
    }
    if len(deep) < 2:
        return _hint("It takes two tasks at least whose prompts are in the layers.")
    layers = predictor.params["layers"]
    kernels = {name: {"kernel": layers[name]["kernel"].astype("float32")} for name in ("key", "value")}
    return drawing.similarity(list(deep), inside.prompt_similarity({"layers": kernels}, list(deep.values())))


def _one_line(text: str) -> str:
    """A text without what breaks its line or turns the direction of what follows."""
    kept = (sign for sign in " ".join(text.split()) if unicodedata.category(sign) != "Cc")
    return "".join(sign for sign in kept if unicodedata.bidirectional(sign) not in _TURNING)


def _plain(name: str) -> str:
    """A name in a Markdown table, where it means nothing but itself."""
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
    heard = (
        "" if encoder is None else f" Speech becomes units by {encoder.name}, {SAMPLE_RATE / encoder.hop:g} a second."
    )
    return f"""
Unit language model `{lm["hash"]}`, {lm["layers"]} layers of {lm["dim"]}, frozen, in {predictor.compute}.{heard}
Nothing that is uploaded is kept longer than {(KEPT_SECONDS + _SWEPT) // 60} minutes; should the server break down,
until one is started again.

{tasks}

**Limits**: files up to {limits.max_bytes / 1e6:g} MB and {limits.max_seconds:g} s each, {MOST_FILES} and
{UPLOAD_BYTES / MEGABYTE:g} MB in a table;
{limits.queue} requests may wait, each {limits.timeout:g} s.
"""


_URL = "http://127.0.0.1:7860"  # which the browser replaces by the page's address


def _calls(predictor: SpeechPrompt) -> str:
    """Markdown: how programs ask."""
    name = next(iter(predictor.tasks))
    first = json.dumps(name, ensure_ascii=False)
    return f"""
`curl` is enough; leave `tasks` out for all. What is wrong is said as `{{"error": ...}}`:

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

Also there: `{_URL}/tasks` (labels of every task), `{_URL}/health`, `{_URL}/metrics` (for Prometheus) and
`{_URL}/openapi.json`.
"""
