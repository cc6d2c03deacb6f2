"""The web page (Gradio): record or upload speech, classify several files, look inside the prompts.

Everything that the browser loads comes from this server, and uploads are deleted after a while.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import urllib.parse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from spjax.encoders.audio import SAMPLE_RATE
from spjax.evaluation import inside_plots
from spjax.extras import needs
from spjax.serving import explain, page_guard, tables
from spjax.serving.api import refuse_place
from spjax.serving.batcher import Batcher, Prediction, as_json
from spjax.serving.limits import Limits
from spjax.serving.predictor import SpeechPrompt
from spjax.serving.uploads import MOST_FILES, PAGE, read_upload
from spjax.types import Encoded

if TYPE_CHECKING:
    import fastapi
    import gradio

TOP = 5  # labels shown for each slot
_URL = "http://127.0.0.1:7860"  # which the browser replaces with the page's address


def mount_page(app: fastapi.FastAPI, batcher: Batcher, path: str = "/") -> fastapi.FastAPI:
    """Mount the page on an app.

    Uploads are written to `page_guard.upload_folder()`; sets $GRADIO_TEMP_DIR for this process.

    Args:
      app: from `make_app`, whose limit on uploads applies; routes that it has already take precedence.
      batcher: computes the predictions; its limits apply.
      path: URL path of the page.

    Returns:
      The app.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(page_guard.upload_folder())  # gradio reads it at every request
    with needs("serve", "the page"):
        import gradio as gr
    from starlette.exceptions import HTTPException

    # Gradio's default fonts come from another host.
    font = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    mono = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=font, font_mono=mono)
    theme.set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")
    page = make_page(batcher)
    # `launch` sets these and mounting does not: without them, gradio accepts the path of any file on this machine as an
    # uploaded file, and anyone could read it.
    page.has_launched = page.is_running = True
    page_guard.refuse_quietly(page)
    page_guard.bound_memory(page)
    page_guard.sweep_uploads(app, page)
    app = gr.mount_gradio_app(
        app, page, path,
        theme=theme, max_file_size=batcher.limits.max_bytes, footer_links=[],
        run_history=False, show_error=False, ssr_mode=False, enable_monitoring=False,
    )  # fmt: skip
    # Unknown paths get the API's errors, except below gradio's routes.
    inner: Any = app.routes[-1]
    refuse = inner.app.exception_handlers[HTTPException]

    async def refused(request: Any, error: Any) -> Any:
        return await (refuse if PAGE in request.url.path else refuse_place)(request, error)

    inner.app.add_exception_handler(HTTPException, refused)
    return app


def make_page(batcher: Batcher) -> gradio.Blocks:
    """Make the page; `mount_page` mounts it.

    Its endpoints for `gradio_client` are `/predict` (a file, tasks) and `/batch` (files, tasks).

    Args:
      batcher: computes the predictions; its limits apply.
    """
    import gradio as gr

    with gr.Blocks(title="Speech prompts", analytics_enabled=False) as page:
        gr.Markdown(
            "# Speech prompts\n"
            "Classify speech with one frozen language model of speech units; each task is a small prompt."
        )
        with gr.Tab("Recording"):
            recording = _recording_tab(batcher)
        with gr.Tab("Files"):
            _files_tab(batcher)
        with gr.Tab("Inside"):
            opened, looking = _inside_tab(batcher.predictor, recording.prediction)
        # The results belong to the recording beside them: a new or trimmed recording clears them and cancels running
        # requests.
        audio, outputs = recording.audio, [*recording.outputs, *opened]
        gr.on(
            [audio.change, audio.input, audio.clear, audio.upload, audio.start_recording], None, outputs=outputs,
            js=_clear(outputs), cancels=[recording.asking, looking],
        )  # fmt: skip
        with gr.Tab("Use via API"):  # gradio's page of that name shows calls with links, which this server refuses
            calls = gr.Markdown(_calls(batcher.predictor), elem_id="calls")
            gr.on(
                page.load, None, [calls], [calls], api_visibility="private",
                js=f"text => text.replaceAll('{_URL}', (location.origin + location.pathname).replace(/\\/+$/, ''))",
            )  # fmt: skip
        with gr.Tab("About"):
            gr.Markdown(_about(batcher.predictor, batcher.limits))
            slots = [
                [name, slot.name, ", ".join(slot.labels)]
                for name, task in batcher.predictor.tasks.items()
                for slot in task.slots
            ]
            gr.Dataframe(slots, headers=["task", "slot", "labels"], interactive=False, wrap=True, max_chars=200)
    return page


def _clear(outputs: Sequence[Any]) -> str:
    """JavaScript that empties components, and hides those that are hidden at first."""
    empty = {"markdown": "", "label": {}}
    values = [
        {"__type__": "update", "value": empty.get(one.get_block_name()), "visible": one.visible} for one in outputs
    ]
    return f"() => ({json.dumps(values)})"


class _Recording(NamedTuple):
    """Components of the first tab: the recording, the outputs that belong to it, the prediction, and the request."""

    audio: Any
    outputs: list[Any]
    prediction: Any
    asking: Any


def _recording_tab(batcher: Batcher) -> _Recording:
    import gradio as gr

    predictor = batcher.predictor
    slots = [(name, slot.name) for name, task in predictor.tasks.items() for slot in task.slots]
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            audio = page_guard.without_links(
                gr.Audio(sources=["upload", "microphone"], type="filepath", label="Speech", buttons=[])
            )
            chosen = _task_choice(predictor)
            ask = gr.Button("Answer", variant="primary")
        with gr.Column(scale=3, min_width=300, elem_id="answers"):
            with gr.Row():
                labels = [
                    gr.Label(num_top_classes=TOP, show_heading=False, visible=False, min_width=220) for _ in slots
                ]
            caption = gr.Markdown(elem_id="caption")
            drawn = gr.Plot(show_label=False, visible=False, elem_id="units")
            with gr.Accordion("As JSON", open=False):
                prediction = gr.JSON(show_label=False, elem_id="json")

    async def answered(audio: str | None, tasks: Sequence[str] | None) -> Prediction:
        if not audio:
            raise _error("There is no recording yet: record or upload one.")
        if not tasks:
            raise _error("No task is chosen: choose at least one.")
        try:
            return await tables.ask(batcher, audio, tasks)
        except tables.REPORTED as error:
            raise _error(str(error)) from error

    async def show(audio: str | None, tasks: list[str]) -> list[Any]:
        one = await answered(audio, tasks)
        caption, plot = await asyncio.to_thread(_utterance_plot, str(audio), one.encoded, batcher)
        shown = [_label_update(f"{task} · {slot}", one.answers.get(task), slot) for task, slot in slots]
        return [*shown, caption, plot, as_json(one)]

    async def predict(audio: str | None, tasks: list[str]) -> dict[str, Any]:
        return as_json(await answered(audio, tasks))

    outputs = [*labels, caption, drawn, prediction]
    asking = ask.click(
        show, [audio, chosen], outputs, api_visibility="private", concurrency_limit=None, show_progress_on=[ask]
    )
    plain = gr.Button(visible=False)  # the API endpoint: no drawing
    plain.click(
        predict, [audio, chosen], gr.JSON(visible=False), api_name="predict", concurrency_limit=None,
        api_description="Labels and probabilities for a recording, and its units.",
    )  # fmt: skip
    return _Recording(audio, outputs, prediction, asking)


def _files_tab(batcher: Batcher) -> None:
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            files = page_guard.without_links(
                gr.File(file_count="multiple", label=f"Recordings, up to {MOST_FILES}", height=180)
            )
        with gr.Column(scale=3, min_width=300):
            several = _task_choice(batcher.predictor)
            run = gr.Button("Answer all", variant="primary")
    listed = gr.Dataframe(
        headers=list(tables.COLUMNS), type="array", interactive=False, show_label=False, wrap=True,
        column_widths=[160, 130, 110, 240, 120, 380],
        elem_id="table",
    )  # fmt: skip
    download = gr.File(label="As CSV", interactive=False, elem_id="csv", height=80)

    async def batch(
        files: list[str] | None,
        tasks: list[str],
        progress: Any = gr.Progress(),  # noqa: B008  gradio's way to ask for a progress bar
    ) -> tuple[list[list[Any]], str]:
        if not files or not tasks:
            lacking = "There are no files yet: choose some." if not files else "No task is chosen: choose at least one."
            raise _error(lacking)
        if len(files) > MOST_FILES:
            raise _error(f"{len(files)} files are too many, a table holds at most {MOST_FILES}: split them.")
        rows = await tables.answer_files(batcher, files, tasks, progress)
        content = await asyncio.to_thread(tables.to_csv, rows)
        # In gradio's cache, from which it is deleted like an upload.
        return rows, gr.processing_utils.save_bytes_to_cache(content, "answers.csv", download.GRADIO_CACHE)

    running = run.click(
        batch, [files, several], [listed, download], api_name="batch", concurrency_limit=None,
        show_progress_on=[listed], api_description="A table of predictions for several files, also as CSV.",
    )  # fmt: skip
    # The results belong to the files above: a change of files clears them and cancels running requests.
    empty = {"headers": list(tables.COLUMNS), "data": [], "metadata": None}
    gr.on(
        [files.upload, files.clear, files.delete, files.change], None, outputs=[listed, download],
        js=f"() => [{json.dumps(empty)}, null]", cancels=[running],
    )  # fmt: skip


def _inside_tab(predictor: SpeechPrompt, prediction: Any) -> tuple[list[Any], Any]:
    """Returns the components that belong to the recording, and the request that fills them."""
    import gradio as gr

    every = list(predictor.tasks)
    alone = explain.OneAtATime()
    with gr.Row(equal_height=False):
        task = gr.Dropdown(every, value=every[0], label="Task", scale=3, min_width=200)
        look = gr.Button("Look", variant="primary", scale=1, min_width=120)
    gr.Markdown("The first use of a prompt, or of a longer recording, takes half a minute to compile.")
    gr.Markdown("### Units of each label\nThe units with the largest logits for each label, against the slot's mean.")
    units = gr.Dataframe(
        headers=["slot", "label", "units"], interactive=False, show_label=False, wrap=True, elem_id="inside-units"
    )
    gr.Markdown("### Attribution\nEffect of each unit of the last recording on the prediction (integrated gradients).")
    note = gr.Markdown(elem_id="inside-note")
    most = max(len(one.slots) for one in predictor.tasks.values())
    decided = [
        gr.HighlightedText(visible=False, show_legend=True, elem_id=f"inside-attribution-{n}") for n in range(most)
    ]
    gr.Markdown("### Similarity of prompts\nBetween all tasks with prompts in every layer of the model.")
    chance = gr.Markdown()
    alike = gr.Dataframe(interactive=False, show_label=False, pinned_columns=1, elem_id="inside-similarity")

    def explained(task: str, shown: dict[str, Any] | None) -> list[Any]:
        found = explain.attribution(predictor, task, shown)
        texts = [gr.update(value=units, label=title, visible=True) for title, units in found.slots]
        texts += [gr.update(value=None, visible=False)] * (most - len(texts))
        headers, rows, about = explain.similarity(predictor)
        table = gr.update(value={"headers": headers, "data": rows}, visible=bool(rows))
        return [explain.label_units(predictor, task), found.note, *texts, about, table]

    async def run(task: str, shown: dict[str, Any] | None) -> list[Any]:
        try:
            found: list[Any] = await alone(explained, task, shown)
        except tables.REPORTED as error:
            raise _error(str(error)) from error
        return found

    looking = look.click(
        run, [task, prediction], [units, note, *decided, chance, alike],
        api_visibility="private", concurrency_limit=None, show_progress_on=[units],
    )  # fmt: skip
    return [note, *decided], looking


def _task_choice(predictor: SpeechPrompt) -> Any:
    import gradio as gr

    every = list(predictor.tasks)
    return gr.CheckboxGroup(every, value=every, label="Tasks", show_select_all=len(every) > 3)


def _label_update(title: str, answer: dict[str, Any] | None, slot: str) -> dict[str, Any]:
    """Update of a Label: the predicted label in its title, and the most probable ones; hidden without an answer.

    The two may differ: the predicted labels of several slots are the most probable combination. So a Label's heading,
    which is the most probable label, is not shown.
    """
    import gradio as gr

    if answer is None:
        return gr.update(value=None, visible=False)
    return gr.update(value=answer["probabilities"][slot], label=f"{title}: {answer['labels'][slot]}", visible=True)


def _utterance_plot(audio: str, encoded: Encoded, batcher: Batcher) -> tuple[str, dict[str, Any]]:
    """A caption, and the update of the plot of an utterance and its units."""
    import gradio as gr
    from gradio.components.plot import PlotData

    encoder = batcher.predictor.encoder
    assert encoder is not None
    wave, units, durations = read_upload(audio, batcher.limits).wave, encoded.units.tolist(), encoded.durations.tolist()
    png = inside_plots.utterance(wave, units, durations, encoder.hop, encoder.center)
    frames, seconds = sum(durations), encoder.hop / SAMPLE_RATE
    caption = f"{len(units)} units, {frames} frames of {1000 * seconds:g} ms"
    if frames > inside_plots.UTTERANCE_FRAMES:
        caption += f"; the first {inside_plots.UTTERANCE_FRAMES * seconds:.1f} s are drawn"
    plot = PlotData(type="matplotlib", plot="data:image/png;base64," + base64.b64encode(png).decode())
    return caption, gr.update(value=plot, visible=True)


def _error(message: str) -> Exception:
    """An error that the page shows, without a traceback in the log."""
    import gradio as gr

    return gr.Error(message, print_exception=False)


def _about(predictor: SpeechPrompt, limits: Limits) -> str:
    """Markdown: the model and the limits."""
    lm = next(iter(predictor.packs.values())).card["lm"]
    encoder = predictor.encoder
    encoding = (
        "" if encoder is None else f" Speech encoder: {encoder.name}, {SAMPLE_RATE / encoder.hop:g} frames a second."
    )
    kept = (page_guard.KEPT_SECONDS + page_guard.SWEPT_SECONDS) // 60
    return f"""
Unit language model `{lm["hash"]}`, {lm["layers"]} layers of {lm["dim"]}, frozen, in {predictor.compute}.{encoding}
Uploads are deleted after {kept} minutes at most.

**Limits**: files up to {limits.max_bytes / 1e6:g} MB and {limits.max_seconds:g} s each, {MOST_FILES} in a table;
at most {limits.queue} requests in the queue, {limits.timeout:g} s each.
"""


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
