"""Counts what a PostgreSQL client waits for: a relay between it and the server that knows who spoke last."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Final

__all__ = ["Relay", "relay"]

_SOCKET: Final = ".s.PGSQL.5432"  #: a server's unix socket, in the folder that clients take for their host


class Relay:
    """A unix socket that passes everything on to a server's."""

    def __init__(self, listener: socket.socket, server: Path, host: Path) -> None:
        self.host = host  #: for clients
        self.round_trips = 0  #: so far, of all connections
        self._listener, self._server = listener, server

    def serve(self) -> None:
        """Accept connections until the listener is shut down."""
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, DefaultSelector() as selector, suppress(OSError):
            server.connect(str(self._server))
            selector.register(client, EVENT_READ, server)
            selector.register(server, EVENT_READ, client)
            last = server
            while True:
                for key, _ in selector.select():
                    source: socket.socket = key.fileobj  # type: ignore[assignment]
                    content = source.recv(65536)
                    if not content:
                        return
                    # What a client sends without having read an answer in between belongs to the same round trip.
                    self.round_trips += source is client and last is server
                    last = source
                    key.data.sendall(content)


@contextmanager
def relay(host: str) -> Iterator[Relay]:
    """A relay to the server whose unix socket is in a folder."""
    with tempfile.TemporaryDirectory(prefix="relay-") as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(Path(folder) / _SOCKET))
        listener.listen()
        found = Relay(listener, Path(host) / _SOCKET, Path(folder))
        threading.Thread(target=found.serve, daemon=True).start()
        try:
            yield found
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
