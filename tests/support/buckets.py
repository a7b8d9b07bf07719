"""A server that speaks S3 (moto's), a bucket on it, and a proxy before it in which things go wrong."""

from __future__ import annotations

import http.client
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import boto3

KEY_ID, SECRET = "AKIATESTTESTTESTTEST", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


class Bucket:
    """A bucket of its own, looked at without migrator's code."""

    def __init__(self, address: str, name: str) -> None:
        self.address = address
        self.name = name
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=address,
            region_name="us-east-1",
            aws_access_key_id="look",
            aws_secret_access_key="look",
        )
        self.client.create_bucket(Bucket=name)

    def names(self) -> list[str]:
        """Return the keys of all objects."""
        return sorted(
            item["Key"] for item in self.client.list_objects_v2(Bucket=self.name).get("Contents", ())
        )

    def uploads(self) -> list[str]:
        """Return the keys of uploads that are neither complete nor given up."""
        found = self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", ())
        return sorted(item["Key"] for item in found)

    def content(self, key: str) -> bytes:
        """Return an object."""
        body: bytes = self.client.get_object(Bucket=self.name, Key=key)["Body"].read()
        return body

    def put(self, key: str, content: bytes) -> None:
        """Put an object."""
        self.client.put_object(Bucket=self.name, Key=key, Body=content)

    def variables(self, address: str = "", prefix: str = "/pre/fix") -> dict[str, str]:
        """Return the environment of a run that keeps its backups here, through ``address``."""
        return {
            "MIGRATOR_BACKUP_URL": f"s3://{self.name}{prefix}",
            "MIGRATOR_S3_ENDPOINT": address or self.address,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def server(ip_address: str = "127.0.0.1") -> Iterator[str]:
    """Run moto's server on a free port of an address of this machine; yields its URL."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address=ip_address, port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        running.stop()


@dataclass
class Asked:
    """One request as it came to the proxy."""

    method: str
    path: str
    query: str
    headers: dict[str, str]

    def is_a(self, kind: str) -> bool:
        """Whether it is a ``part``, ``complete``, ``create``, ``abort``, ``get``, ``put``, ``delete``, ``list``."""
        query = self.query
        kinds = {
            "part": self.method == "PUT" and "partNumber=" in query,
            "create": self.method == "POST" and "uploads" in query,
            "complete": self.method == "POST" and "uploadId=" in query,
            "abort": self.method == "DELETE" and "uploadId=" in query,
            "get": self.method == "GET" and not query,
            "put": self.method == "PUT" and not query,
            "delete": self.method == "DELETE" and not query,
            "list": self.method == "GET" and "list-type=2" in query,
            "any": True,
        }
        return kinds[kind]


@dataclass
class Fault:
    """What goes wrong with requests of a kind, how often, and with keys that end so.

    ``status`` and ``code`` are answered instead of asking the server; ``ask`` asks it all the same before;
    ``cut`` breaks the connection: ``before`` an answer, or after ``half`` of it; ``delay`` is in seconds.
    """

    kind: str
    status: int = 0
    code: str = ""
    times: float = float("inf")
    ending: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "as the test wants it"
    region: str = ""
    ask: bool = False
    cut: str = ""
    delay: float = 0.0
    when: Callable[[Asked], bool] = lambda asked: True

    def hits(self, asked: Asked) -> bool:
        if self.times <= 0 or not asked.is_a(self.kind) or not asked.path.endswith(self.ending):
            return False
        if not self.when(asked):
            return False
        self.times -= 1
        return True

    @property
    def document(self) -> bytes:
        region = f"<Region>{self.region}</Region>" if self.region else ""
        text = f"<Error><Code>{self.code}</Code><Message>{self.message}</Message>{region}</Error>"

        return b'<?xml version="1.0" encoding="UTF-8"?>\n' + text.encode()


class FaultyProxy:
    """Hands requests on to a server, but for those that a fault hits; remembers them all."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target).netloc
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                proxy.handle(self)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()

    def count(self, kind: str) -> int:
        """Return how many requests of a kind came."""
        return sum(asked.is_a(kind) for asked in self.asked)

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        if request.headers.get("Expect", "").lower() == "100-continue":
            request.send_response_only(100)
            request.end_headers()
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        parts = urlsplit(request.path)
        headers = {name.lower(): value for name, value in request.headers.items()}
        asked = Asked(request.command, parts.path, parts.query, headers)
        self.asked.append(asked)
        fault = next((fault for fault in self.faults if fault.hits(asked)), None)
        if fault is not None and fault.delay:
            time.sleep(fault.delay)
        if fault is None or fault.ask or (not fault.status and fault.cut != "before"):
            status, answered, content = self._ask(asked, request.path, body)
        else:
            status, answered, content = fault.status, [("Content-Type", "application/xml")], fault.document
            answered += list(fault.headers.items())
        if fault is not None and fault.cut == "before":
            self._hang_up(request)
            return
        self._answer(request, status, answered, content, half=fault is not None and fault.cut == "half")

    def _ask(self, asked: Asked, path: str, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.target, timeout=30)
        try:
            headers = {
                name: value for name, value in asked.headers.items() if name not in ("expect", "connection")
            }
            connection.request(asked.method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
        *,
        half: bool,
    ) -> None:
        request.send_response_only(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() in ("transfer-encoding", "connection"):
                continue
            if name.lower() == "content-length":
                length = value  # an answer to HEAD has one without a body
                continue
            request.send_header(name, value)
        if status != 204:
            request.send_header("Content-Length", length)
        request.end_headers()
        request.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self._hang_up(request)

    def _hang_up(self, request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        request.connection.shutdown(socket.SHUT_RDWR)
