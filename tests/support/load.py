"""Traffic on a table: short requests of several clients, each request's latency kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from tests.support.servers import Database


@dataclass(frozen=True)
class Request:
    """One request: when it began (on the monotonic clock), how long it took in seconds, and what went wrong."""

    client: str
    began: float
    seconds: float
    error: str = ""


class Load:
    """Clients that work for as long as the block lasts, each with a thread and a connection of its own.

    A client is a name and the SQL of its one request, which runs in autocommit, `pause` seconds after the last one.
    """

    def __init__(self, database: Database, clients: dict[str, str], pause: float = 0.02) -> None:
        self._database = database
        self._pause = pause
        self._stop = threading.Event()
        self.requests: list[Request] = []
        self._threads = [
            threading.Thread(target=self._work, args=(name, sql), name=name, daemon=True)
            for name, sql in clients.items()
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _work(self, name: str, sql: str) -> None:
        session = self._database.connect(application_name=name)
        session.autocommit = True
        with session.cursor() as cursor:
            while not self._stop.is_set():
                began = time.monotonic()
                problem = ""
                try:
                    cursor.execute(sql)
                except Exception as error:  # noqa: BLE001 - what a request failed with is what is asked for
                    problem = str(error)
                self.requests.append(Request(name, began, time.monotonic() - began, problem))
                if session.closed:
                    return
                self._stop.wait(self._pause)
        session.close()

    def errors(self) -> list[str]:
        """Return what went wrong with any request."""
        return [f"{item.client}: {item.error}" for item in self.requests if item.error]

    def slowest(self, where: Callable[[Request], bool] = lambda request: True) -> float:
        """Return the longest latency in seconds."""
        return max((item.seconds for item in self.requests if where(item)), default=0.0)
