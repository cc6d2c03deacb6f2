"""`python -m spjax.serve --lm=LM --encoder=ENC --kmeans=KM --packs=DIR`: an HTTP API and a web page.

Requests of all clients are batched together. On SIGTERM or Ctrl-C new requests are refused, and queued ones answered.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
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
from spjax.extras import needs, require
from spjax.serving.batcher import MOST_ROWS, Batcher
from spjax.serving.flags import add_predictor_flags, load_predictor
from spjax.serving.limits import MEGABYTE, Limits

BACKLOG = 1024  # connections that the system queues until they are accepted
PARTING_SECONDS = 2.0  # for the last responses to be sent, before open connections are closed
PORTS = 65_535  # the highest port


def _parser() -> argparse.ArgumentParser:
    known = Limits()
    parser = Parser(
        prog="python -m spjax.serve",
        description="""  %(prog)s --lm=tiny --encoder=tiny --packs=PACK
  %(prog)s --lm=LM --encoder=HUBERT --kmeans=KM100 --packs=PACKS --port=8000
  curl --data-binary @FILE.wav 'http://127.0.0.1:7860/predict?tasks=fsc'

Serve every task of the given prompt packs: an HTTP API (/predict, /tasks, /health, /metrics) and a page
(docs/serving.md).""",
    )
    add_predictor_flags(parser)
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host", metavar="IP", default="127.0.0.1", help="address to listen on (%(default)s: this machine)"
    )
    server.add_argument("--port", metavar="N", type=int, default=7860, help="0 for any free port (%(default)s)")
    server.add_argument("--no-page", action="store_true", help="only the API")
    bounds = parser.add_argument_group("limits")
    for name, kind, default, text in (
        ("max-mb", float, known.max_bytes / MEGABYTE, "most megabytes of an upload"),
        ("max-seconds", float, known.max_seconds, "most seconds of audio in it"),
        ("queue", int, known.queue, "most utterances in the queue"),
        ("timeout", float, known.timeout, "most seconds until an answer"),
        ("most-rows", int, MOST_ROWS, "most rows (an utterance and a task each) of a batch"),
    ):
        bounds.add_argument(f"--{name}", metavar="N", type=kind, default=default, help=f"{text} (%(default)g)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until a signal ends the process.

    Args:
      arguments: command-line arguments; None for sys.argv.

    Raises:
      MissingExtraError: a package of the server is not installed.
      SystemExit: with a message, if serving is impossible; with status 0 after SIGTERM, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    _take_signals()
    try:
        _serve(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _take_signals() -> None:
    """Handle SIGTERM even if the parent ignored or blocked it; `process.run` handles SIGINT.

    uvicorn re-raises the signal that ended it, for the handler that was installed before its own.
    """
    signal.signal(signal.SIGTERM, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _leave(*_: object) -> None:
    """Signal handler until the server is started."""
    print("stopping after the current compilation", flush=True)
    sys.exit(0)


def _serve(options: argparse.Namespace) -> None:
    with needs("serve", "a server"):
        import uvicorn
    if not options.no_page:
        require("serve", "the page (--no-page serves without it)", "gradio")

    from spjax.serving.api import make_app
    from spjax.serving.protocol import make_protocol

    if not 0 < options.max_mb < math.inf:
        raise ValueError(f"--max-mb is {options.max_mb:g}: give a number of megabytes above 0")
    limits = Limits(round(options.max_mb * MEGABYTE), options.max_seconds, options.queue, options.timeout)
    with _bind(options) as bound, Batcher(load_predictor(options), limits, options.most_rows) as batcher:
        batcher.warm_up(progress=True)  # the address is bound already, but connections are not accepted yet
        app: Any = make_app(batcher)
        if not options.no_page:
            app = _with_page(app, batcher)
        config = uvicorn.Config(
            app, http=make_protocol(), log_level="warning", access_log=False, backlog=BACKLOG,
            timeout_graceful_shutdown=round(limits.timeout),
        )  # fmt: skip
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the server prints its own message
        _server(config, batcher).run(sockets=[bound])


def _bind(options: argparse.Namespace) -> socket.socket:
    """A socket bound to the address, which does not accept connections yet.

    Raises:
      ValueError: the address cannot be used.
    """
    host, port = options.host, options.port
    if not 0 <= port <= PORTS:
        raise ValueError(f"--port is {port}: give 1 to {PORTS}, or 0 for any free port")
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be a host name
        fix = "give 127.0.0.1 (only this machine), 0.0.0.0 (all that can reach it) or one of this machine's addresses"
        message = f"--host={host} is not an address of this machine: {fix}"
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            message = (
                f"port {port} of {host} is in use: stop the other program, or give another --port (0: any free port)"
            )
        elif isinstance(error, PermissionError):
            message = f"port {port} is reserved for the administrator: give a --port from 1024 on"
        bound.close()
        raise ValueError(message) from error
    return bound


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"


def _with_page(app: Any, batcher: Batcher) -> Any:
    """The application with the page at "/"."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no telemetry; read when gradio is imported
    from spjax.serving.page import mount_page

    return mount_page(app, batcher)


def _server(config: Any, batcher: Batcher) -> Any:
    """A uvicorn server which, when it stops, answers queued requests and then closes connections of open pages."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for one in sockets or ():
                print(f"serving {', '.join(batcher.predictor.packs)} on {_url(one)}", flush=True)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            print("stopping after the queued requests are answered", flush=True)
            batcher.refuse()
            closing = asyncio.create_task(self._close_connections())
            await super().shutdown(sockets)
            closing.cancel()

        async def _close_connections(self) -> None:
            while (stats := batcher.stats()).waiting or stats.working:
                await asyncio.sleep(0.1)
            await asyncio.sleep(PARTING_SECONDS)
            for connection in list(self.server_state.connections):
                connection.transport.abort()  # type: ignore[union-attr]  # open connections have a transport

    return Server(config)
