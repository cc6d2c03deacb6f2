"""The page in a browser and for programs: a real server, headless chromium, and `gradio_client`."""

from __future__ import annotations

import csv
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from spjax import SpeechPrompt
from spjax.serving import page, page_guard
from spjax.serving.api import make_app
from spjax.serving.batcher import Batcher
from spjax.serving.limits import Limits
from tests.serving import page_world

httpx = pytest.importorskip("httpx", reason="httpx is a test dependency")
gradio_client = pytest.importorskip("gradio_client", reason="gradio is in the extra serve")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is in the extra serve")
pytestmark = pytest.mark.usefixtures("quick_compile")

LIMITS = Limits(max_bytes=300_000, max_seconds=6, queue=64, timeout=600)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
)  # fmt: skip


@pytest.fixture(scope="module")
def app(batcher: Batcher) -> Iterator[Any]:
    """The API and the page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.delenv("GRADIO_TEMP_DIR", raising=False)  # the page sets it
        yield page.mount_page(make_app(batcher), batcher)


@pytest.fixture(scope="module")
def url(app: Any) -> Iterator[str]:
    """Address of a server of the app."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_world.recording(tmp_path_factory.mktemp("speech") / "speech.wav", 1.2)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.wav"
    path.write_bytes(b"RIFF and no more than that")
    return path


# ---- in the browser


@pytest.fixture(scope="module")
def browser(speech: Path) -> Iterator[Any]:
    """Chromium with `speech` as its microphone's input."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is a test dependency")
    names = ("chromium", "chromium-browser", "google-chrome")
    with playwright.sync_playwright() as driver:
        chromium = next(filter(None, map(shutil.which, names)), driver.chromium.executable_path)
        if not Path(chromium).exists():
            pytest.skip("no Chromium: apt-get install chromium, or python -m playwright install chromium")
        flags = [*FLAGS, f"--use-file-for-fake-audio-capture={speech}"]
        browser = driver.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any, url: str) -> Iterator[Any]:
    """A new tab with the page; all requests must go to its server."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(120_000)
    view = context.new_page()
    asked: list[str] = []
    failures: list[str] = []
    view.on("request", lambda request: asked.append(request.url))
    view.on("pageerror", lambda error: failures.append(str(error)))
    view.goto(url)
    view.get_by_role("button", name="Answer", exact=True).wait_for()
    yield view
    assert not failures
    assert not [one for one in asked if not re.match(rf"(blob:)?{re.escape(url)}/|data:", one)]
    context.close()


def upload(tab: Any, path: Path) -> None:
    """Select a file in the first tab, and wait until it is uploaded."""
    with tab.expect_response(lambda response: "/upload" in response.url and response.request.method == "POST"):
        tab.locator("input[type=file]:not([multiple])").first.set_input_files(path)
    tab.get_by_label("Clear").first.wait_for()


def answer(tab: Any) -> None:
    """Press the button, and wait for the answer."""
    with tab.expect_response(lambda response: "/queue/join" in response.url):
        tab.get_by_role("button", name="Answer", exact=True).click()
    tab.locator("#units img").wait_for()


def open_tab(tab: Any, name: str) -> None:
    """Open a tab, which on a phone may be in the menu beside the tabs."""
    found = tab.get_by_role("tab", name=name)
    if found.count() and found.last.is_visible():
        found.last.click()
    else:
        tab.locator(".overflow-menu > button").first.click()
        tab.locator(".overflow-dropdown button", has_text=name).first.click()


def labels(tab: Any) -> dict[str, str]:
    """The predicted label and the largest probability by task and slot, as the page shows them."""
    found = {}
    for block in tab.locator("#answers [data-testid=label]:visible").all():
        name, _, label = block.locator("label").first.inner_text().strip().partition(": ")
        found[name] = f"{label} {block.locator('.confidence').first.inner_text()}"
    return found


def expected(predictor: SpeechPrompt, path: Path, tasks: list[str] | None = None) -> dict[str, str]:
    (answers,) = predictor.predict([path], tasks)
    return {
        f"{task} · {slot}": f"{label} {100 * max(one['probabilities'][slot].values()):.0f}%"
        for task, one in answers.items()
        for slot, label in one["labels"].items()
    }


def test_an_upload_is_answered_and_its_units_are_drawn(tab: Any, predictor: SpeechPrompt, speech: Path):
    upload(tab, speech)
    answer(tab)
    assert labels(tab) == expected(predictor, speech)
    (encoded,) = predictor.encode([speech])
    count = f"{len(encoded.units)} units, {encoded.durations.sum()} frames of 10 ms"
    assert count in tab.locator("#caption").inner_text()
    drawn = tab.locator("#units img").evaluate("x => [x.naturalWidth, x.naturalHeight]")
    assert drawn == [1152, 144 * -(-int(encoded.durations.sum()) // 50)], "a line of the drawing has 50 frames"
    assert tab.locator("img[onerror]").count() == 0, "labels are text"

    # Fewer tasks for the same recording.
    tab.get_by_label("mood", exact=True).first.uncheck()
    answer(tab)
    tab.wait_for_function("!document.querySelector('#answers').innerText.includes('mood · mood')")
    assert labels(tab) == expected(predictor, speech, [name for name in predictor.tasks if name != "mood"])

    # Attribution for this recording.
    open_tab(tab, "Inside")
    tab.get_by_role("button", name="Look").click()
    tab.locator("#inside-attribution-0").wait_for()
    shown = tab.locator("#inside-attribution-0").inner_text().split()
    assert shown[-len(encoded.units) :] == list(map(str, encoded.units))
    assert "stop" in tab.locator("#inside-units").inner_text()
    tab.locator("#inside-similarity").get_by_text("1.00").locator("visible=true").first.wait_for()


def test_a_bad_upload_is_reported_and_the_page_works_on(tab: Any, predictor: SpeechPrompt, speech: Path, broken: Path):
    tab.get_by_role("button", name="Answer", exact=True).click()
    tab.get_by_text("There is no recording yet").wait_for()
    upload(tab, broken)
    tab.get_by_role("button", name="Answer", exact=True).click()
    tab.get_by_text("broken.wav is no audio").wait_for()
    assert "Traceback" not in tab.content()
    open_tab(tab, "Files")
    tab.get_by_role("button", name="Answer all").click()
    tab.get_by_text("There are no files yet").wait_for()
    open_tab(tab, "Recording")
    tab.get_by_label("Clear").first.click()
    upload(tab, speech)
    answer(tab)
    assert labels(tab) == expected(predictor, speech)


def test_a_too_large_file_is_refused_in_the_browser(tab: Any, tmp_path: Path):
    large = page_world.recording(tmp_path / "large.wav", 11)
    tab.locator("input[type=file]:not([multiple])").first.set_input_files(large)
    tab.get_by_text(re.compile("exceed the maximum allowed size")).first.wait_for()


def test_the_servers_upload_errors_are_shown(tab: Any, speech: Path):
    message = "the server's upload folder is full: try again later"
    tab.route("**/gradio_api/upload*", lambda route: route.fulfill(status=507, body=message))
    tab.locator("input[type=file]:not([multiple])").first.set_input_files(speech)
    tab.get_by_text(message).first.wait_for()


def test_speech_is_recorded(tab: Any, speech: Path):
    tab.get_by_label("Record audio").click()
    tab.locator("button.record-button").click()
    tab.wait_for_timeout(1500)
    with tab.expect_response(lambda response: "/upload" in response.url):
        tab.locator("button.stop-button:visible").click()
    answer(tab)
    units, frames = map(int, re.findall(r"(\d+) (?:units|frames)", tab.locator("#caption").inner_text()))
    assert units > 10, "the microphone was recorded"
    assert 80 < frames < 400
    # Trimming clears the results, and so does a new recording.
    tab.get_by_label("Trim audio to selection").click()
    tab.get_by_role("button", name="Trim").click()
    tab.locator("#units img").wait_for(state="detached")
    assert labels(tab) == {}
    answer(tab)
    tab.get_by_label("Clear").first.click()
    tab.locator("#units img").wait_for(state="detached")


def test_several_files_become_a_table_and_csv(tab: Any, predictor: SpeechPrompt, speech: Path, broken: Path):
    open_tab(tab, "Files")
    with tab.expect_response(lambda response: "/upload" in response.url and response.request.method == "POST"):
        tab.locator("input[type=file][multiple]").set_input_files([broken, speech])
    tab.get_by_label("Clear").last.wait_for()
    tab.get_by_role("button", name="Answer all").click()
    link = tab.locator("#csv a").first
    with tab.expect_download() as download:
        link.click()
    with open(download.value.path(), newline="", encoding="utf-8-sig") as file:
        bad, *rows = csv.DictReader(file)
    assert bad["file"] == "broken.wav"
    assert "no audio" in bad["error"]
    assert {f"{row['task']}/{row['slot']}": row["label"] for row in rows} == {
        name.replace(" · ", "/"): shown.rsplit(" ", 1)[0] for name, shown in expected(predictor, speech).items()
    }
    for row in ("broken.wav", "speech.wav"):
        tab.wait_for_function("name => document.querySelector('#table').innerText.includes(name)", arg=row)


def test_choosing_other_files_clears_the_table(tab: Any, speech: Path, broken: Path):
    open_tab(tab, "Files")
    tab.locator("input[type=file][multiple]").set_input_files([broken, speech])
    tab.get_by_label("Clear").last.wait_for()
    tab.get_by_role("button", name="Answer all").click()
    tab.locator("#csv a").first.wait_for()
    tab.locator("#table").get_by_text("speech.wav").first.wait_for()
    tab.get_by_label("Remove this file").first.click()
    tab.locator("#table").get_by_text("speech.wav").first.wait_for(state="detached")
    tab.locator("#csv a").first.wait_for(state="detached")


def test_a_late_answer_is_not_shown_for_another_recording(tab: Any, batcher: Batcher, speech: Path):
    gate, entered = threading.Event(), threading.Event()
    predict = batcher.predictor.predict_units

    def slow(*arguments: Any, **options: Any) -> Any:
        entered.set()
        gate.wait(30)
        return predict(*arguments, **options)

    object.__setattr__(batcher.predictor, "predict_units", slow)
    try:
        upload(tab, speech)
        tab.get_by_role("button", name="Answer", exact=True).click()
        assert entered.wait(30)
        tab.get_by_label("Clear").first.click()
        tab.wait_for_timeout(500)
        gate.set()
        until = time.monotonic() + 60
        while (stats := batcher.stats()).waiting + stats.working and time.monotonic() < until:
            time.sleep(0.05)
        tab.wait_for_timeout(1500)
        assert labels(tab) == {}
        assert not tab.locator("#units img").count()
    finally:
        gate.set()
        object.__delattr__(batcher.predictor, "predict_units")
    upload(tab, speech)
    answer(tab)  # still works


def test_it_fits_a_phone(browser: Any, url: str, speech: Path, broken: Path):
    """Also in the dark."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    view = context.new_page()
    view.goto(url)
    view.get_by_role("button", name="Answer", exact=True).wait_for()
    upload(view, speech)
    answer(view)
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    seen = "all => all.map(x => x.getBoundingClientRect()).every(x => 0 <= x.left && x.right <= 390 && x.height)"
    assert view.locator("#units img").evaluate_all(seen)
    assert view.locator("#answers .confidence").evaluate_all(seen)
    for name, button, done in (("Files", "Answer all", "#csv a"), ("Inside", "Look", "#inside-attribution-0")):
        open_tab(view, name)
        if name == "Files":
            view.locator("input[type=file][multiple]").set_input_files([broken, speech])
            view.get_by_label("Clear").last.wait_for()
        view.get_by_role("button", name=button).click()
        view.locator(done).first.wait_for()
        assert view.evaluate("document.documentElement.scrollWidth") <= 390, name
    context.close()


def test_the_keyboard_is_enough(tab: Any, predictor: SpeechPrompt, speech: Path):
    upload(tab, speech)
    tab.get_by_label("word", exact=True).first.focus()
    tab.keyboard.press("Space")  # leaves the task out
    tab.get_by_role("button", name="Answer", exact=True).focus()
    with tab.expect_response(lambda response: "/queue/join" in response.url):
        tab.keyboard.press("Enter")
    tab.locator("#units img").wait_for()
    assert labels(tab) == expected(predictor, speech, [name for name in predictor.tasks if name != "word"])


def test_the_calls_that_the_page_shows_work(tab: Any, predictor: SpeechPrompt, speech: Path, tmp_path: Path):
    """Exactly as shown, copied into a folder with recordings of those names."""
    open_tab(tab, "Use via API")
    tab.locator("#calls pre").nth(1).wait_for()
    calls = [one.inner_text() for one in tab.locator("#calls pre").all()]
    assert len(calls) == 2
    for name in ("speech.wav", "a.wav", "b.wav"):
        shutil.copy(speech, tmp_path / name)
    (answers,) = predictor.predict([speech], ["word"])
    label = answers["word"]["labels"]["word"]
    if shutil.which("curl"):
        done = subprocess.run(["bash", "-c", calls[0]], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert json.loads(done.stdout)["answers"]["word"]["labels"]["word"] == label, done
    done = subprocess.run([sys.executable, "-c", calls[1]], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{{'word': '{label}'}}" in done.stdout
    assert f"['b.wav', 'word', 'word', '{label}'" in done.stdout
    assert not tab.locator("footer").get_by_text("Use via API").count(), "gradio's examples use links"


# ---- from programs


def test_programs_are_offered_two_stable_endpoints(app: Any, predictor: SpeechPrompt):
    made = app.routes[-1].app.get_blocks()
    named = made.get_api_info()["named_endpoints"]
    assert set(named) == {"/predict", "/batch"}
    predict, batch = ([one["label"] for one in named[name]["parameters"]] for name in ("/predict", "/batch"))
    assert predict == ["Speech", "Tasks"]
    assert batch == ["Recordings, up to 500", "Tasks"]
    assert named["/predict"]["parameters"][1]["parameter_default"] == list(predictor.tasks)
    assert not made.analytics_enabled
    limits = {fn.concurrency_limit for fn in made.fns.values() if fn.fn is not None}
    assert limits == {None}, "gradio's queue has no limit: the batcher has"


def test_session_memory_is_bounded(app: Any, url: str, caplog: pytest.LogCaptureFixture):
    """A request without a session gets one: only the latest ones are kept."""
    blocks = app.routes[-1].app.get_blocks()
    with httpx.Client(base_url=f"{url}/gradio_api", timeout=60) as client:
        for _ in range(40):
            event = client.post("/call/predict", json={"data": [None, ["mood"]]}).json()["event_id"]
            assert "There is no recording yet" in client.get(f"/call/predict/{event}").text
        queue = blocks._queue
        assert len(blocks.state_holder.session_data) <= 33
        assert queue.ANALYTICS_MAX_EVENTS == 200
        for kept in (queue.pending_messages_per_session, queue.pending_event_ids_session):
            assert kept.max_size == 1000
        asked = {"data": [None, ["mood"]], "session_hash": "x" * 10_000}
        reply = client.post("/call/predict", json=asked)
        assert (reply.status_code, "give a shorter one" in reply.text) == (400, True)
        shown = client.get("/info").json()["named_endpoints"]
        given = [one["example_input"] for name in ("/predict", "/batch") for one in shown[name]["parameters"][:1]]
        assert "http" not in json.dumps(given), "links are refused"
    assert "Traceback" not in caplog.text


def test_the_api_beside_the_page_has_the_same_errors(url: str):
    for method, place, status in (
        ("GET", "/nowhere", 404), ("POST", "/tasks/", 405), ("PUT", "/predict/", 405), ("POST", "/predict/", 400),
        ("GET", "/static/%2e%2e/%2e%2e/etc/passwd", 403),
    ):  # fmt: skip
        reply = httpx.request(method, url + place)
        assert (reply.status_code, list(reply.json())) == (status, ["error"])
    assert httpx.get(f"{url}/tasks/").json() == httpx.get(f"{url}/tasks").json()
    for hidden in ("/etc/passwd", "../../../etc/passwd", "%2fetc%2fpasswd"):
        assert httpx.get(f"{url}/gradio_api/file={hidden}").status_code in (403, 404)


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    downloads = tmp_path_factory.mktemp("downloads")
    return gradio_client.Client(url, verbose=False, analytics_enabled=False, download_files=downloads)


def test_a_program_is_answered(client: Any, predictor: SpeechPrompt, speech: Path):
    body = client.predict(gradio_client.handle_file(str(speech)), ["order", "mood"], api_name="/predict")
    (answers,) = predictor.predict([speech], ["order", "mood"])
    assert list(body["answers"]) == ["order", "mood"]
    assert body["answers"]["order"]["labels"] == answers["order"]["labels"]
    for slot, shares in answers["order"]["probabilities"].items():
        assert body["answers"]["order"]["probabilities"][slot] == pytest.approx(shares, abs=1e-5)
    assert body["units"] == predictor.encode([speech])[0].units.tolist()
    every = client.predict(gradio_client.handle_file(str(speech)), api_name="/predict")
    assert list(every["answers"]) == list(predictor.tasks)


def test_a_program_gets_error_messages(client: Any, speech: Path, broken: Path, tmp_path: Path):
    long = page_world.recording(tmp_path / "long.wav", 7)
    for path, tasks, message in (
        (broken, ["mood"], "broken.wav is no audio"),
        (long, ["mood"], "at most 6 s"),
        (speech, [], "No task is chosen"),
        (speech, ["moood"], "moood"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=message):
            client.predict(gradio_client.handle_file(str(path)), tasks, api_name="/predict")


def test_a_program_gets_a_table(client: Any, speech: Path, broken: Path):
    files = [gradio_client.handle_file(str(path)) for path in (speech, broken)]
    table, file = client.predict(files, ["order"], api_name="/batch")
    assert table["headers"] == ["file", "task", "slot", "label", "probability", "error"]
    assert [row[:3] for row in table["data"]] == [
        ["speech.wav", "order", "do"], ["speech.wav", "order", "what"], ["broken.wav", "", ""],
    ]  # fmt: skip
    with open(file, newline="", encoding="utf-8-sig") as opened:
        read = list(csv.reader(opened))
    assert [row[3] for row in read[1:]] == [row[3] for row in table["data"]]


def test_uploads_are_in_the_folder_that_is_cleaned(client: Any, speech: Path):
    files = [gradio_client.handle_file(str(speech))]
    client.predict(*files, ["mood"], api_name="/predict")
    client.predict(files, ["mood"], api_name="/batch")
    kept = {path.name for path in page_guard.upload_folder().rglob("*") if path.is_file()}
    assert kept >= {"speech.wav", "answers.csv"}


def test_too_large_and_interrupted_uploads_leave_no_file(url: str, capfd: pytest.CaptureFixture[str]):
    place = f"{url}/gradio_api/upload"
    before = {path.name for path in page_guard.upload_folder().rglob("*")}
    response = httpx.post(place, files={"files": ("large.wav", bytes(300_001))}, timeout=60)
    assert (response.status_code, "maximum allowed size" in response.text) == (413, True)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as left:  # disconnects in the middle
        left.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n")
        left.sendall(b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n")
        left.sendall(b'Content-Disposition: form-data; name="files"; filename="a.wav"\r\n\r\nhalf')
        time.sleep(0.3)
    time.sleep(0.3)
    assert httpx.get(f"{url}/health").status_code == 200
    assert {path.name for path in page_guard.upload_folder().rglob("*")} == before
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("SERVER", "upload files first"),
        ("file://SERVER", "no file that is there|upload files first"),
        ("http://example.org/speech.wav", "Links are not followed"),
        ("HTTPS://example.org/speech.wav", "Links are not followed|upload files first"),
    ],
)
def test_files_of_the_server_and_links_are_refused(
    url: str, tmp_path: Path, place: str, message: str, capfd: pytest.CaptureFixture[str]
):
    """A client that calls the server directly may name any file in place of an upload."""
    own = page_world.recording(tmp_path / "own.wav", 0.3)
    given = {"path": place.replace("SERVER", str(own)), "meta": {"_type": "gradio.FileData"}}
    asked = httpx.post(f"{url}/gradio_api/call/predict", json={"data": [given, ["mood"]]}).json()["event_id"]
    text = httpx.get(f"{url}/gradio_api/call/predict/{asked}", timeout=30).text
    assert text.startswith("event: error")
    assert re.search(message, text)
    assert not list(page_guard.upload_folder().rglob("own.wav"))
    assert "Traceback" not in "".join(capfd.readouterr())


def test_programs_that_ask_at_once_are_batched(client: Any, batcher: Batcher, speech: Path):
    before = batcher.stats()
    gate = threading.Event()
    predict = batcher.predictor.predict_units

    def slow(*arguments: Any, **options: Any) -> Any:
        gate.wait(30)
        return predict(*arguments, **options)

    object.__setattr__(batcher.predictor, "predict_units", slow)
    try:
        with ThreadPoolExecutor(12) as pool:
            file = gradio_client.handle_file(str(speech))
            futures = [pool.submit(client.predict, file, ["mood"], api_name="/predict") for _ in range(12)]
            until = time.monotonic() + 30
            while (stats := batcher.stats()).waiting + stats.working < 12 and time.monotonic() < until:
                time.sleep(0.05)
            gate.set()
            answers = [one.result(60)["answers"] for one in futures]
    finally:
        gate.set()
        object.__delattr__(batcher.predictor, "predict_units")
    stats = batcher.stats()
    sizes = {size: n - before.utterances.get(size, 0) for size, n in stats.utterances.items()}
    assert stats.answered - before.answered == 12
    assert sum(sizes.values()) <= 4, "those that waited are one batch"
    (alone,) = batcher.predictor.predict([speech], ["mood"])
    for one in answers:
        shares = one["mood"]["probabilities"]["mood"]
        assert shares == pytest.approx(alone["mood"]["probabilities"]["mood"], abs=1e-5)
