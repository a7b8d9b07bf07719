"""A server that takes S3 uploads of any size without keeping them: it checks them against a pattern that it knows."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

PART = 16 * 1024 * 1024
PATTERN = bytes(range(256)) * 4096
"""What uploads must consist of, again and again: 1 MiB."""


class Sink:
    """What was uploaded, by name: the sizes of the parts; ``wrong`` are those that were not the pattern."""

    def __init__(self, anything: bool) -> None:
        self.kept = tempfile.TemporaryFile() if anything else None  # noqa: SIM115 - it goes with us
        self.parts: dict[str, dict[int, int]] = {}
        self.small: dict[str, bytes] = {}
        self.wrong: list[str] = []
        self.address = ""

    def variables(self) -> dict[str, str]:
        """Return the environment of a run that keeps its backups here."""
        return {
            "MIGRATOR_BACKUP_URL": "s3://sink/x",
            "MIGRATOR_S3_ENDPOINT": self.address,
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "s",
        }

    def size(self, name: str) -> int:
        """Return the size of what was uploaded."""
        return sum(self.parts[name].values())

    def sha256(self, name: str) -> str:
        """Return the checksum of what was uploaded, if it is the pattern."""
        assert not self.wrong, self.wrong
        digest = hashlib.sha256()
        for _ in range(self.size(name) // len(PATTERN)):
            digest.update(PATTERN)
        return digest.hexdigest()

    def take(self, name: str, number: int, body: Any, length: int) -> None:
        """Read a part and compare it."""
        left = length
        while left:
            piece = body.read(min(left, len(PATTERN)))
            if self.kept is not None:
                os.pwrite(self.kept.fileno(), piece, (number - 1) * PART + length - left)
            elif piece != PATTERN[: len(piece)]:
                self.wrong.append(f"{name} part {number}")
            left -= len(piece)
        self.parts.setdefault(name, {})[number] = length


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    sink: Sink

    def do_POST(self) -> None:
        _, query = self._asked()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "uploadId" in query:
            self._answer(b"<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>")
        else:
            self._answer(
                b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
            )

    def do_PUT(self) -> None:
        name, query = self._asked()
        if self.headers.get("Expect"):
            self.send_response_only(100)
            self.end_headers()
        length = int(self.headers["Content-Length"])
        if "partNumber" in query:
            self.sink.take(name, int(query["partNumber"][0]), self.rfile, length)
        else:
            self.sink.small[name] = self.rfile.read(length)
        self._answer(b"", ETag='"e"')

    def do_GET(self) -> None:
        name, _ = self._asked()
        size = self.sink.size(name)
        self.send_response_only(200)
        self.send_header("Content-Length", str(size))
        self.send_header("ETag", '"e"')
        self.end_headers()
        for start in range(0, size, len(PATTERN)):
            count = min(len(PATTERN), size - start)
            kept = self.sink.kept
            self.wfile.write(PATTERN[:count] if kept is None else os.pread(kept.fileno(), count, start))

    def do_DELETE(self) -> None:
        self._asked()
        self.send_response_only(204)
        self.end_headers()

    def _asked(self) -> tuple[str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        return parts.path.rpartition("/")[2], parse_qs(parts.query)

    def _answer(self, content: bytes, **headers: str) -> None:
        self.send_response_only(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def sink(*, anything: bool = False) -> Iterator[Sink]:
    """Run such a server on the loopback; with ``anything``, it does not compare, and gives back what it was given."""
    made = Sink(anything)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"sink": made}))
    server.daemon_threads = True
    made.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
