"""uvicorn's HTTP/1.1 protocol with the API's error format."""

from __future__ import annotations

import asyncio
import json

LINGER_SECONDS = 1.0  # before a refused connection closes, so that a client which is still sending gets the response


def make_protocol() -> type[asyncio.Protocol]:
    """A protocol class for `uvicorn.Config(http=)`."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        """A connection. Malformed HTTP gets 400, as `{"error": sentence}`."""

        refused = False

        def data_received(self, data: bytes) -> None:
            if not self.refused:
                super().data_received(data)

        def shutdown(self) -> None:
            if self.refused:
                self.transport.close()
            else:
                super().shutdown()

        def send_400_response(self, msg: str) -> None:
            self.refused = True
            body = json.dumps(
                {"error": "the request cannot be read: it is not HTTP/1.1, or its head is larger than 64 kB"}
            )
            head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            self.transport.write((head + body).encode())
            # Closing with unread bytes would reset the connection, and the client would lose the response.
            self.loop.call_later(LINGER_SECONDS, self.transport.close)

    return Protocol
