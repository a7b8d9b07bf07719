"""Start `migrator sidecar` on a port of its own, ask its pages, and search every answer for the planted password."""

from __future__ import annotations

import http.client
import json
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import leaks
from tests.support.pace import Stopwatch
from tests.support.runner import Result, Runner, Running
from tests.support.servers import Database

QUICK = {
    "MIGRATOR_SIDECAR_LISTEN": "127.0.0.1:0",
    "MIGRATOR_SIDECAR_INTERVAL": "200ms",
    "MIGRATOR_SIDECAR_VERIFY_INTERVAL": "none",
    "MIGRATOR_BACKUP": "off",
}
PATIENCE = 60.0  # seconds, for machines that have other things to do


@dataclass(frozen=True)
class Reply:
    """One answer."""

    status: int
    headers: Mapping[str, str]
    body: str

    @property
    def document(self) -> Any:
        """The body's JSON."""
        return json.loads(self.body)


class Sidecar:
    """A running `migrator sidecar`."""

    def __init__(self, running: Running) -> None:
        self.running = running
        running.wait_for("listening on ")
        found = re.search(r"listening on (?:\[.*?\]|[^\s:]+):(\d+)", running.stderr)
        assert found, running.stderr
        self.port = int(found[1])

    def ask(
        self,
        path: str = "/readyz",
        method: str = "GET",
        *,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
    ) -> Reply:
        """Ask for a page; fails if the answer gives the planted password away."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body=body, headers=dict(headers or {}))
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        assert leaks.find(text) is None
        assert leaks.find(str(answer.headers)) is None
        return Reply(answer.status, dict(answer.headers.items()), text)

    def wait_for(self, wanted: Callable[[], object], what: str) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + PATIENCE
        while not wanted():
            assert self.running.process.poll() is None, f"it has ended: {self.running.finish()}"
            assert time.monotonic() < deadline, (
                f"{what} did not come: {self.ask().body}\n{self.running.stderr}"
            )
            time.sleep(0.05)

    def wait_until_ready(self) -> Reply:
        """Wait for a 200 of /readyz, and return it."""
        self.wait_for(lambda: self.ask().status == 200, "ready")
        return self.ask()

    def wait_until_not_ready(self, code: int) -> Reply:
        """Wait for a 503 of /readyz for a reason with this exit code, and return it."""
        self.wait_for(
            lambda: self.ask().status == 503 and self.ask().document["code"] == code, f"not ready ({code})"
        )
        return self.ask()

    def metrics(self) -> dict[str, float]:
        """Return what /metrics says, by name and labels as written there."""
        lines = (line for line in self.ask("/metrics").body.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def stop(self) -> Result:
        """Send SIGTERM, and return how it ended, within what Kubernetes waits for."""
        with Stopwatch() as watch:
            self.running.send(signal.SIGTERM)
            result = self.running.finish()
        assert watch.within(20), result
        return result


def start(
    runner: Runner,
    folder: Path,
    database: Database | None,
    *words: str,
    env: Mapping[str, str | None] | None = None,
) -> Sidecar:
    """Start one that looks five times a second, and return once it listens."""
    return Sidecar(
        runner.start(*words, "sidecar", cwd=folder, database=database, env={**QUICK, **(env or {})})
    )
