"""`python -m spjax.serve --lm=LM --encoder=ENC --kmeans=KM --packs=DIR`: answers over HTTP, and a page for people.

Requests of all clients are batched together. SIGTERM or Ctrl-C: nothing new is taken, what was taken on is answered.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from spjax.huge_pages import with_huge_pages
from spjax.serving.batcher import MOST_ROWS, Batcher
from spjax.serving.flags import add_predictor_flags, load_predictor
from spjax.serving.limits import MEGABYTE, Limits

BACKLOG = 1024  # connections that the system holds until they are taken
PARTING_SECONDS = 1.0  # for what was answered last to be sent, before open pages are hung up on


def _parser() -> argparse.ArgumentParser:
    known = Limits()
    parser = argparse.ArgumentParser(
        prog="python -m spjax.serve",
        description="Serve every task of the given prompt packs: an HTTP API (/predict, /tasks, /health, /metrics) and "
        "a page.",
        epilog="example: python -m spjax.serve --lm=lms/gslm --encoder=huberts/hubert_base_ls960 "
        "--kmeans=kmeans/km100 --packs=packs; then: curl --data-binary @turn_on_the_lights.wav "
        "'http://127.0.0.1:7860/predict?tasks=fsc'",
    )
    add_predictor_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="0 for any that is free (%(default)s)")
    parser.add_argument(
        "--max-mb", type=float, default=known.max_bytes / MEGABYTE, help="most megabytes of an upload (%(default)g)"
    )
    parser.add_argument(
        "--max-seconds", type=float, default=known.max_seconds, help="most seconds of sound in it (%(default)g)"
    )
    parser.add_argument("--queue", type=int, default=known.queue, help="most utterances that wait (%(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=known.timeout, help="most seconds until an answer (%(default)g)"
    )
    parser.add_argument(
        "--most-rows", type=int, default=MOST_ROWS,
        help="most rows, an utterance and a task each, that are computed together (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--no-page", action="store_true", help="the API alone")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves what the command line says until a signal ends it.

    Args:
      arguments: of the command line; the process's own if None.

    Raises:
      SystemExit: with a message, if it cannot be served; with status 0 after SIGTERM, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        _serve(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"error: {error}. A server needs: python -m pip install -r requirements-serve.txt")
    except KeyboardInterrupt:
        sys.exit(130)


def _serve(options: argparse.Namespace) -> None:
    import uvicorn

    from spjax.serving.api import make_app

    limits = Limits(round(options.max_mb * MEGABYTE), options.max_seconds, options.queue, options.timeout)
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family) as place, Batcher(load_predictor(options), limits, options.most_rows) as desk:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind((options.host, options.port))  # whether it is free is told before all is compiled; nobody is let in
        desk.warm_up(progress=True)
        app: Any = make_app(desk)
        if not options.no_page:
            app = _with_page(app, desk)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, backlog=BACKLOG, timeout_graceful_shutdown=round(limits.timeout)
        )
        _server(config, desk).run(sockets=[place])


def _with_page(app: Any, desk: Batcher) -> Any:
    """The application with the page at "/"."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nobody else is told who is served; read at the import
    from spjax.serving.page import mount_page

    return mount_page(app, desk, desk.limits)


def _server(config: Any, desk: Batcher) -> Any:
    """uvicorn's server, which on its way out lets the desk finish, and then hangs up on pages that stay open."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for place in sockets or ():
                host, port = place.getsockname()[:2]
                print(f"serving {', '.join(desk.predictor.packs)} on http://{host}:{port}", flush=True)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            print("stopping: what was taken on is answered first", flush=True)
            desk.refuse()
            hanging_up = asyncio.create_task(self._hang_up())
            await super().shutdown(sockets)
            hanging_up.cancel()

        async def _hang_up(self) -> None:
            while (stats := desk.stats()).waiting or stats.working:
                await asyncio.sleep(0.1)
            await asyncio.sleep(PARTING_SECONDS)
            for connection in list(self.server_state.connections):
                connection.transport.abort()  # type: ignore[union-attr]  # it has one, or it would not be among them

    return Server(config)


if __name__ == "__main__":
    with_huge_pages()
    main()
