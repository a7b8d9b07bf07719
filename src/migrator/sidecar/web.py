"""The four pages, and their server; only this module imports waitress.

No request changes anything: methods are GET and HEAD, and query and body are ignored.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from migrator.errors import SettingsError
from migrator.runtime.escaping import json_text
from migrator.runtime.logs import redact
from migrator.sidecar.board import Board

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

log = logging.getLogger("migrator.sidecar")

_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
_HEADERS = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
)
_LIMITS: dict[str, Any] = {
    "threads": 2,
    "connection_limit": 100,
    "channel_timeout": 5,  # seconds that a connection may be silent
    "cleanup_interval": 1,
    "max_request_header_size": 16 * 1024,
    "max_request_body_size": 1024,
    "asyncore_use_poll": True,
    "ident": None,
}


@dataclass(frozen=True)
class _Page:
    status: str
    kind: str
    body: str


class Application:
    """The pages as a WSGI application.

    ``metrics`` returns the metrics' content type and text. ``loopback`` says that only this host can
    connect. A browser on it could be led here by a foreign DNS name (DNS rebinding), so all names but
    localhost are refused.
    """

    def __init__(self, board: Board, metrics: Callable[[], tuple[str, bytes]], *, loopback: bool) -> None:
        self._board, self._loopback, self._metrics = board, loopback, metrics
        self._pages: Mapping[str, Callable[[], _Page]] = {
            "/": self._all,
            "/livez": lambda: _Page("200 OK", _TEXT, "ok\n"),
            "/readyz": self._readyz,
            "/metrics": self._numbers,
        }

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        page, more = self._answer(environ), []
        if page.status.startswith("405"):
            more.append(("Allow", "GET, HEAD"))
        body = redact(page.body).encode()
        headers = [("Content-Type", page.kind), ("Content-Length", str(len(body))), *_HEADERS, *more]
        start_response(page.status, headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _answer(self, environ: WSGIEnvironment) -> _Page:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _Page("405 Method Not Allowed", _TEXT, "only GET and HEAD are allowed\n")
        if self._loopback and not _is_here(environ.get("HTTP_HOST", "")):
            return _Page("421 Misdirected Request", _TEXT, "use localhost or an IP address as host\n")
        page = self._pages.get(environ.get("PATH_INFO", ""))
        if page is None:
            return _Page("404 Not Found", _TEXT, "the paths are /livez, /readyz, /metrics and /\n")
        return page()

    def _readyz(self) -> _Page:
        readiness = self._board.readiness()
        status = "200 OK" if readiness.ready else "503 Service Unavailable"
        return _Page(status, _JSON, json_text(asdict(readiness), indent=2) + "\n")

    def _numbers(self) -> _Page:
        kind, text = self._metrics()
        return _Page("200 OK", kind, text.decode())

    def _all(self) -> _Page:
        now = self._board.now
        document = {
            **asdict(self._board.readiness()),
            "report": now.report,
            "check": asdict(now.check) if now.check else None,
            "verification": asdict(now.verification) if now.verification else None,
        }
        return _Page("200 OK", _JSON, json_text(document, indent=2) + "\n")


def is_loopback(listen: str) -> bool:
    """Tell whether only this host can reach an address to listen on."""
    name = listen.rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost"


def _is_here(host: str) -> bool:
    """Tell whether a Host header has no name that somebody else may have given this host."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name.strip("[]"))
        return True
    return name.lower() in {"", "localhost"}


@contextlib.contextmanager
def serving(application: Application, listen: str) -> Iterator[threading.Thread]:
    """Serve within the block, in the yielded thread; raises :class:`SettingsError` if that is not possible."""
    import waitress

    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it would warn for each two requests at once
    try:
        server = waitress.create_server(application, listen=listen, **_LIMITS)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise SettingsError([f"MIGRATOR_SIDECAR_LISTEN: cannot listen on {listen}: {reason}"]) from None
    places = getattr(server, "effective_listen", None) or [(server.effective_host, server.effective_port)]
    log.info("listening on %s", ", ".join(_written(host, port) for host, port in places))
    thread = threading.Thread(target=server.run, name="web", daemon=True)
    thread.start()
    yield thread


def _written(host: str, port: str) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def library() -> None:
    """Raise :class:`SettingsError` if the libraries of the sidecar are not installed."""
    for name in ("waitress", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            problem = f"the sidecar needs {name}, which is not installed"
            raise SettingsError([problem], next_step="pip install 'migrator[sidecar]'")
