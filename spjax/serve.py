"""`python -m spjax.serve --lm=LM --encoder=ENC --kmeans=KM --packs=DIR`: answers over HTTP, and a page for people.

Requests of all clients are batched together. SIGTERM or Ctrl-C: nothing new is taken, what was taken on is answered.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take their time
    from spjax import process

    process.run("spjax.serve", huge_pages=True)

import argparse
import asyncio
import errno
import math
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from spjax.command_line import Parser
from spjax.serving.batcher import MOST_ROWS, Batcher
from spjax.serving.flags import add_predictor_flags, load_predictor
from spjax.serving.limits import MEGABYTE, Limits

BACKLOG = 1024  # connections that the system holds until they are taken
PARTING_SECONDS = 2.0  # for the last answers and refusals to be sent, before open pages are hung up on
PORTS = 65_535  # the highest


def _parser() -> argparse.ArgumentParser:
    known = Limits()
    parser = Parser(
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
    _take_signals()
    try:
        _serve(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"error: {error}. A server needs: python -m pip install -r requirements-serve.txt")


def _take_signals() -> None:
    """SIGTERM ends the process even where its parent ignored or blocked it; `process.run` sees to SIGINT.

    uvicorn raises the signal that ended it once more, for the handler that was there before its own.
    """
    signal.signal(signal.SIGTERM, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _leave(*_: object) -> None:
    """Ends the process before anything is served."""
    print("stopping: what is being compiled is finished first", flush=True)
    sys.exit(0)


def _serve(options: argparse.Namespace) -> None:
    import uvicorn

    from spjax.serving.api import make_app
    from spjax.serving.protocol import make_protocol

    if not 0 < options.max_mb < math.inf:
        raise ValueError(f"--max-mb is {options.max_mb:g}: give a number of megabytes above 0")
    limits = Limits(round(options.max_mb * MEGABYTE), options.max_seconds, options.queue, options.timeout)
    with _place(options) as place, Batcher(load_predictor(options), limits, options.most_rows) as desk:
        desk.warm_up(progress=True)  # whether the place is free was told before; nobody is let in until now
        app: Any = make_app(desk)
        if not options.no_page:
            app = _with_page(app, desk)
        config = uvicorn.Config(
            app, http=make_protocol(), log_level="warning", access_log=False, backlog=BACKLOG,
            timeout_graceful_shutdown=round(limits.timeout),
        )  # fmt: skip
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the server tells of its end itself
        _server(config, desk).run(sockets=[place])


def _place(options: argparse.Namespace) -> socket.socket:
    """A socket at the address that is wanted, which nobody can connect to yet.

    Raises:
      ValueError: it cannot be had; the message says why, and what else there is.
    """
    host, port = options.host, options.port
    if not 0 <= port <= PORTS:
        raise ValueError(f"--port is {port}: give 1 to {PORTS}, or 0 for any that is free")
    place = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
    except (OSError, UnicodeError) as error:  # a name that no address can have is a UnicodeError
        way_out = "give 127.0.0.1 (this machine alone), 0.0.0.0 (whoever reaches it) or one of its own addresses"
        told = f"--host={host} is no address of this machine: {way_out}"
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            told = f"port {port} of {host} is in use: end what uses it, or give another --port (0: any that is free)"
        elif isinstance(error, PermissionError):
            told = f"port {port} is kept for the administrator: give a --port from 1024 on"
        place.close()
        raise ValueError(told) from error
    return place


def _url(place: socket.socket) -> str:
    host, port = place.getsockname()[:2]
    return f"http://[{host}]:{port}" if place.family == socket.AF_INET6 else f"http://{host}:{port}"


def _with_page(app: Any, desk: Batcher) -> Any:
    """The application with the page at "/"."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nobody else is told who is served; read at the import
    from spjax.serving.page import mount_page

    return mount_page(app, desk)


def _server(config: Any, desk: Batcher) -> Any:
    """uvicorn's server, which on its way out lets the desk finish, and then hangs up on pages that stay open."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for place in sockets or ():
                print(f"serving {', '.join(desk.predictor.packs)} on {_url(place)}", flush=True)

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
