"""uvicorn's HTTP/1.1 protocol with the API's error format and a timeout for request heads."""

from __future__ import annotations

import asyncio
import http
import json
from typing import Any

HEAD_SECONDS = 20.0  # from a new connection, or its last response, to the end of a request's head
LINGER_SECONDS = 1.0  # before a refused connection closes, so that a client which is still sending gets the response


def make_protocol() -> type[asyncio.Protocol]:
    """A protocol class for `uvicorn.Config(http=)`."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        """A connection. Malformed HTTP gets 400, a head that takes too long 408, each as `{"error": sentence}`."""

        refused = False
        waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.wait()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.waiting is not None:
                self.waiting.cancel()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.wait()

        def data_received(self, data: bytes) -> None:
            if not self.refused:
                super().data_received(data)

        def shutdown(self) -> None:
            if self.refused:
                self.transport.close()
            else:
                super().shutdown()

        def send_400_response(self, msg: str) -> None:
            self.refuse(400, "the request cannot be read: it is not HTTP/1.1, or its head is larger than 64 kB")

        def wait(self) -> None:
            """Start the timeout of the next request's head."""
            if self.waiting is not None:
                self.waiting.cancel()
            if not self.transport.is_closing():
                self.waiting = self.loop.call_later(HEAD_SECONDS, self.late)

        def late(self) -> None:
            at_work = self.cycle is not None and not self.cycle.response_complete
            if not (at_work or self.refused or self.transport.is_closing()):
                self.refuse(408, f"the request's head did not come within {HEAD_SECONDS:g} s: send it again")

        def refuse(self, status: int, sentence: str) -> None:
            self.refused = True
            body = json.dumps({"error": sentence})
            head = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            self.transport.write((head + body).encode())
            # Closing with unread bytes would reset the connection, and the client would lose the response.
            self.loop.call_later(LINGER_SECONDS, self.transport.close)

    return Protocol
