"""Limits that Gradio lacks: what it keeps on disk and in memory, and files that a client may name."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
import time
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import fastapi
    import gradio

KEPT_SECONDS = 1800  # for which an upload is kept on disk
SWEPT_SECONDS = 600  # between deletions of old uploads
_SESSIONS, _STATES, _EVENTS = 1000, 32, 200  # most recent ones kept: unfetched results, session states, call times
_PREFIX, _STARTING_SECONDS = "spjax-uploads-", 10  # for which a new folder may not be locked yet
_SESSION_NAME = 64  # characters


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # a running server has locked it, or it is another user's
            if time.time() - left.stat().st_mtime > _STARTING_SECONDS:
                _lock(left)
                shutil.rmtree(left, ignore_errors=True)  # of a server that was killed
    made = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
    _lock(Path(made.name))
    return made


def _lock(folder: Path) -> None:
    """Lock a folder until this process ends, however it ends.

    Raises:
      OSError: another process has locked it, or it cannot be opened.
    """
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(number)
        raise


def upload_folder() -> Path:
    """The folder of this process for uploads, created on the first call (in $TMPDIR), deleted at exit."""
    return Path(_folder().name)


def delete_old(folder: Path, seconds: float = KEPT_SECONDS) -> None:
    """Delete files and empty folders below `folder` that have not changed for `seconds`."""
    for path in sorted(folder.rglob("*"), reverse=True):  # files before the folder that holds them
        with contextlib.suppress(OSError):  # already deleted, or a folder that is not empty
            if time.time() - path.lstat().st_mtime > seconds:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def sweep_uploads(app: fastapi.FastAPI, page: gradio.Blocks) -> None:
    """While the app runs, delete old uploads. Gradio's `delete_cache` would keep the names of all that ever came."""
    inner = app.router.lifespan_context

    async def sweep() -> None:
        while True:
            await asyncio.to_thread(delete_old, upload_folder())
            for names in page.temp_file_sets:
                names.clear()
            await asyncio.sleep(SWEPT_SECONDS)

    @contextlib.asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[Any]:
        sweeping = asyncio.create_task(sweep())
        try:
            async with inner(app) as state:
                yield state
        finally:
            sweeping.cancel()

    app.router.lifespan_context = lifespan


def bound_memory(page: gradio.Blocks) -> None:
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


def refuse_quietly(page: gradio.Blocks) -> None:
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

    page.preprocess_data = checked  # type: ignore[method-assign]


def without_links(component: Any) -> Any:
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
