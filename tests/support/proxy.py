"""A loopback TCP proxy in front of a server, which can stall, drop and reset: the network that gets cut.

    with Proxy(database.server.port) as proxy:
        run = start_migrator(cwd=folder, database=database, env=proxy.environment(database))
        ...
        proxy.stall()       # everything is acknowledged, nothing is passed on, on new connections neither
        proxy.resume()      # what was held back goes on
        proxy.throttle(4e6) # from now on no connection gets more bytes per second, in either direction
        proxy.drop()        # every connection ends as if the peer had closed it
        proxy.reset()       # ... or had crashed
        proxy.refuse()      # new connections are refused until resume()

With `watch=`, a function sees all that clients send, piece by piece (one query each, as psycopg2 and libpq send them),
before it is passed on, and may let the network fall silent there: see `Watch`.

The server sees each connection under a port of the proxy's: `pg_stat_activity.client_port`. Given such ports, `stall`,
`drop` and `reset` are about these connections only.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from typing import Literal
from urllib.parse import urlsplit

from tests.support.servers import Database

Direction = Literal["up", "down", "both"]
"""up: what goes to the server; down: what comes from it."""

Watch = Callable[[int, bytes], str]
"""Gets a connection's number and what its client sends.  What it returns holds everything from then on: "question"
before this reaches the server, "answer" afterwards; "" passes it on."""

_TICK = 0.02  # seconds after which a pump looks again whether it is stalled


class _Link:
    """One connection through the proxy: two sockets, and two threads that carry bytes between them."""

    def __init__(
        self,
        client: socket.socket,
        server: socket.socket,
        stalled: Iterable[str],
        rate: float,
        watch: Callable[[_Link, bytes], bool],
    ) -> None:
        self.client, self.server = client, server
        self.port: int = server.getsockname()[1]
        self.stalled = set(stalled)
        self.rate = rate
        self.watch = watch
        self.over = threading.Event()
        for source, sink, way in ((client, server, "up"), (server, client, "down")):
            threading.Thread(target=self._pump, args=(source, sink, way), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            while not self.over.is_set():
                if way in self.stalled:
                    self.over.wait(_TICK)
                    continue
                if not select.select([source], [], [], _TICK)[0]:
                    continue
                if way in self.stalled:  # since the last look
                    continue
                data = source.recv(65536)
                if not data:
                    break
                if way == "up" and not self.watch(self, data):
                    continue
                sink.sendall(data)
                self.over.wait(len(data) / self.rate)
        self.close()

    def close(self, *, reset: bool = False) -> None:
        """End both sides, with a FIN or with an RST."""
        self.over.set()
        for side in (self.client, self.server):
            with contextlib.suppress(OSError):
                if reset:
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    side.shutdown(socket.SHUT_RDWR)
            side.close()


class Proxy:
    """Passes connections to its own port on to a server's; use it as a context manager."""

    def __init__(
        self, server_port: int, host: str = "127.0.0.1", *, watch: Watch = lambda _number, _data: ""
    ) -> None:
        self._server = (host, server_port)
        self._host = host
        self._watch = watch
        self._numbers: dict[_Link, int] = {}
        self._links: list[_Link] = []
        self._stalled: set[str] = set()
        self._rate = math.inf
        self._mutex = threading.Lock()
        self._listener: socket.socket | None = None
        self._closed = False
        self.port = 0
        self._listen()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def environment(self, database: Database) -> dict[str, str]:
        """Return the variables with which a run reaches the database through the proxy."""
        port = urlsplit(database.url).port
        return {"MIGRATOR_DATABASE_URL": database.url.replace(f":{port}/", f":{self.port}/")}

    def _look(self, link: _Link, data: bytes) -> bool:
        """Ask the watch about what a client sends; whether it is passed on."""
        with self._mutex:
            held = "up" in link.stalled
            verdict = self._watch(self._numbers.setdefault(link, len(self._numbers)), data)
        if verdict:
            self.stall()
        return not held and verdict != "question"

    def stall(self, *ports: int, direction: Direction = "both") -> None:
        """Hold back what comes in from now on, on all connections and new ones, or on these alone."""
        ways = {"up", "down"} if direction == "both" else {direction}
        with self._mutex:
            if not ports:
                self._stalled |= ways
            for link in self._chosen(ports):
                link.stalled |= ways

    def resume(self) -> None:
        """Pass on what was held back, and accept connections again."""
        with self._mutex:
            self._stalled.clear()
            for link in self._links:
                link.stalled.clear()
        if self._listener is None:
            self._listen()

    def throttle(self, bytes_per_second: float) -> None:
        """Pass on no more than this on any connection, from now on."""
        with self._mutex:
            self._rate = bytes_per_second
            for link in self._links:
                link.rate = bytes_per_second

    def drop(self, *ports: int) -> None:
        """Close connections on both sides; new ones are passed on."""
        self._end(ports, reset=False)

    def reset(self, *ports: int) -> None:
        """Reset connections on both sides; new ones are passed on."""
        self._end(ports, reset=True)

    def refuse(self) -> None:
        """Refuse new connections until `resume`; what there is goes on."""
        if self._listener is not None:
            listener, self._listener = self._listener, None
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def close(self) -> None:
        """End everything."""
        self._closed = True
        self.refuse()
        self.drop()

    def _chosen(self, ports: tuple[int, ...]) -> list[_Link]:
        self._links = [link for link in self._links if not link.over.is_set()]
        chosen = [link for link in self._links if not ports or link.port in ports]
        assert len(chosen) == len(ports) or not ports, f"no connection through the proxy has port {ports}"
        return chosen

    def _end(self, ports: tuple[int, ...], *, reset: bool) -> None:
        with self._mutex:
            chosen = self._chosen(ports)
        for link in chosen:
            link.close(reset=reset)

    def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self._host, self.port))
        listener.listen(64)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # refused from now on
            try:
                server = socket.create_connection(self._server, timeout=10)
            except OSError:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()  # as a server that is not there
                continue
            server.settimeout(None)
            with self._mutex:
                link = _Link(client, server, self._stalled, self._rate, self._look)
                self._links.append(link)
            if self._closed:
                link.close()
