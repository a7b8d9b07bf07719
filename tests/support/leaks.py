"""Search for a planted password in everything that a run of migrator leaves or shows."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

from tests.support import PLANTED
from tests.support.servers import Database

POLL_SECONDS = 0.005


def forms(secret: str = PLANTED) -> list[bytes]:
    """Return the spellings by which a secret gets out: whole, encoded, escaped, and half redacted.

    Half, because a redaction that takes the first `@` for the end of the password leaves the rest in sight.
    """
    whole = {secret, quote(secret, safe=""), quote(secret), quote_plus(secret), secret.replace("%", "%%")}
    for mark in "@:/":
        whole |= {secret.rpartition(mark)[2], secret.partition(mark)[0]}
        whole |= {quote(secret, safe="").rpartition(quote(mark, safe=""))[2]}
        whole |= {quote(secret, safe="").partition(quote(mark, safe=""))[0]}
    whole |= {base64.b64encode(secret.encode()).decode()}
    distinctive = {form for form in whole if len(form) >= 5}
    return sorted(form.lower().encode() for form in distinctive)


def find(text: str | bytes, secret: str = PLANTED) -> str | None:
    """Return the line of `text` that gives the secret away, or None."""
    raw = text if isinstance(text, bytes) else text.encode(errors="surrogateescape")
    wanted = forms(secret)
    for line in raw.splitlines():
        if any(form in line.lower() for form in wanted):
            return line.decode(errors="replace")
    return None


def find_in_files(paths: Iterable[Path], secret: str = PLANTED) -> list[str]:
    """Return a sentence for each file (or file below a folder) that gives the secret away."""
    found = []
    for path in paths:
        for file in _files(path):
            line = find(file.read_bytes(), secret)
            if line is not None:
                found.append(f"{file}: {line[:300]}")
    return found


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (file for file in sorted(path.rglob("*")) if file.is_file())
    elif path.is_file():
        yield path


def find_in_tables(database: Database, pattern: str = "migrator%") -> list[str]:
    """Return a sentence for each row of migrator's own tables that gives the secret away."""
    tables = database.psql(
        "SELECT quote_ident(schemaname) || '.' || quote_ident(tablename) FROM pg_tables WHERE tablename LIKE %s",
        (pattern,),
    )
    found = []
    for (table,) in tables:
        rows = database.psql(f"SELECT t::text FROM {table} t")
        found += [f"{table}: {row[:300]}" for (row,) in rows if find(row) is not None]
    return found


class ArgumentWatch:
    """Note the arguments of a process and of everything it starts, for as long as it lives.

    It looks every few milliseconds, so what lives for less than that can pass unseen.
    """

    def __init__(self, pid: int) -> None:
        self.seen: set[bytes] = set()
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()

    def leaks(self, secret: str = PLANTED) -> list[str]:
        """Return a sentence for each argument list that held the secret."""
        lines = (arguments.replace(b"\0", b" ") for arguments in sorted(self.seen))
        return [f"process arguments: {line[:300]!r}" for line in lines if find(line, secret) is not None]

    def _poll(self) -> None:
        while not self._stop.is_set():
            for pid in process_tree(self._pid):
                arguments = _read(Path(f"/proc/{pid}/cmdline"))
                if arguments:
                    self.seen.add(arguments)
            self._stop.wait(POLL_SECONDS)


def process_tree(pid: int) -> list[int]:
    """Return a process and its living descendants (proc(5), `task/TID/children`)."""
    tree = [pid]
    for parent in tree:
        for task in _glob(Path(f"/proc/{parent}/task")):
            tree.extend(int(child) for child in _read(task / "children").split())
    return tree


def _glob(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
