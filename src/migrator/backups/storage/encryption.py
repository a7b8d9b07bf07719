"""Encrypt dumps to public keys on the way to a store, and decrypt them on the way back (age, by pyrage).

The migrating container has only public keys: it cannot read its own backups. The format is age's
(https://age-encryption.org/v1), so ``age -d -i KEY ID.dump.age`` opens a backup without migrator.

pyrage reads and writes file-like objects until the first ends, so it works in its own thread, between
two ends with a few chunks each.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent import futures
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from migrator.backups import clients
from migrator.backups.storage.interface import SEALED, WritablePart
from migrator.errors import SettingsError
from migrator.runtime.threads import Gone, Pipe, background

_QUEUED = 4
_GOODBYE = 10.0  # seconds
_POLL = 0.1  # seconds between two looks whether the other side is still there


class CannotOpen(Exception):
    """Encrypted content cannot be decrypted; the message says why."""


class SealedPart:
    """A part that is encrypted while it is written; ``size`` and ``sha256`` are of the plain content."""

    def __init__(self, inner: WritablePart, recipients: tuple[str, ...]) -> None:
        self.inner = inner
        self.id = inner.id
        self.size = 0
        self.encrypted_to = recipients
        self._hash = hashlib.sha256()
        self._plain = Pipe(_QUEUED)
        self._failure: BaseException | None = None
        self._synced = False
        keys = read_recipients(recipients)
        self._thread = threading.Thread(target=self._encrypt, args=(keys,), name="encryption", daemon=True)
        self._thread.start()

    def _encrypt(self, keys: list[Any]) -> None:
        import pyrage

        part = self

        class Sink:
            """The target of pyrage's writes; pyrage would turn an exception into a text, so the exception is
            kept.
            """

            def write(self, chunk: bytes) -> int:
                try:
                    if part._plain.abandoned.is_set():
                        raise Gone("given up")
                    part.inner.write(chunk)
                except BaseException as error:
                    part._failure = error
                    raise
                return len(chunk)

            def flush(self) -> None:
                """Do nothing."""

        try:
            pyrage.encrypt_io(self._plain, Sink(), keys)
        except BaseException as error:  # noqa: BLE001 - passed to the writing thread
            self._failure = self._failure or error
        finally:
            self._plain.abandoned.set()

    def __enter__(self) -> SealedPart:
        self.inner.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._plain.abandoned.set()
        self._thread.join(_POLL * 4)
        self.inner.__exit__(*error)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    @property
    def stored(self) -> tuple[str, int]:
        return self.inner.stored

    def write(self, chunk: bytes) -> None:
        try:
            self._plain.put(chunk)
        except Gone:
            self._fail()
        self._hash.update(chunk)
        self.size += len(chunk)

    def sync(self) -> None:
        if not self._synced:
            with contextlib.suppress(Gone):
                self._plain.put(None)
            while self._thread.is_alive():
                self._thread.join(_POLL)
            if self._failure is not None:
                self._fail()
            self._synced = True
        self.inner.sync()

    def _fail(self) -> None:
        self._thread.join(_POLL * 4)
        if isinstance(self._failure, OSError):
            raise self._failure
        raise OSError(f"the encryption failed: {self._failure}") from self._failure

    @property
    def tag(self) -> str:
        return self.inner.tag

    def chunks(self) -> Iterator[bytes]:
        return self.inner.chunks()

    def local(self) -> AbstractContextManager[Path]:
        return self.inner.local()


def sealed(part: WritablePart, recipients: tuple[str, ...]) -> SealedPart:
    """Return a part that encrypts its content on the way to ``part``; ``part`` is removed if this fails."""
    try:
        return SealedPart(part, recipients)
    except BaseException as error:
        with part:
            raise error


def seal_all(files: Mapping[str, bytes], recipients: tuple[str, ...]) -> dict[str, bytes]:
    """Return small files by ending, encrypted if there are recipients; their endings then show that."""
    if not recipients:
        return dict(files)
    pyrage = _library()
    keys = read_recipients(recipients)
    return {ending + SEALED: bytes(pyrage.encrypt(content, keys)) for ending, content in files.items()}


def opened(chunks: Iterable[bytes], identity: Path) -> Iterator[bytes]:
    """Yield the decrypted ``chunks`` with the keys in a file, as a stream.

    A truncated or changed stream raises at that place, after the valid content before it. Raises
    :class:`CannotOpen`, :class:`SettingsError` for the file, and errors of ``chunks``.
    """
    keys = read_identities(identity)
    source, plain = Pipe(_QUEUED), Pipe(_QUEUED)

    def feed() -> None:
        try:
            for chunk in chunks:
                if chunk:
                    source.put(chunk)
            source.put(None)
        except Gone:
            return  # the decryption has failed, or the reader is gone
        except BaseException:
            source.abandoned.set()
            raise

    def decrypt() -> None:
        import pyrage

        try:
            pyrage.decrypt_io(source, plain, keys)
        finally:
            source.abandoned.set()
            with contextlib.suppress(Gone):
                plain.put(None)

    fed, decrypted = (background("decryption", work) for work in (feed, decrypt))
    try:
        while (chunk := plain.get()) is not None:
            yield chunk
        error = decrypted.exception()
        futures.wait([fed], _GOODBYE)
        if fed.done() and (unread := fed.exception()):
            raise unread
        if error:
            raise _cannot_open(error)
    finally:
        source.abandoned.set()
        plain.abandoned.set()
        futures.wait([fed, decrypted], _GOODBYE)  # the next reader of ``chunks`` must be the only one


def _cannot_open(error: BaseException) -> CannotOpen:
    """Return the reason; pyrage raises its own error for the head of a stream, and an OSError for the rest."""
    said = str(error)
    why = "it is damaged or cut off"
    if "No matching keys" in said:
        why = "it was encrypted to other keys than those in the identity file"
    return CannotOpen(f"{why} ({said})")


def read_recipients(recipients: Iterable[str]) -> list[Any]:
    """Return pyrage's public keys; raises :class:`SettingsError`."""
    pyrage = _library()
    keys, problems = [], []
    for text in recipients:
        kind = pyrage.ssh if text.startswith("ssh-") else pyrage.x25519
        try:
            keys.append(kind.Recipient.from_str(text))
        except pyrage.RecipientError as error:
            problems.append(f"MIGRATOR_BACKUP_RECIPIENTS: {text!r} is not a public key: {error}")
    if problems:
        raise SettingsError(problems)
    return keys


def read_identities(path: Path) -> list[Any]:
    """Return the private keys in a file, of age or SSH; raises :class:`SettingsError`, which shows none."""
    pyrage = _library()
    try:
        content = path.read_bytes()
    except OSError as error:
        problem = f"MIGRATOR_BACKUP_IDENTITY_FILE: cannot read {path}: {error.strerror}"
        raise SettingsError([problem]) from error
    try:
        if b"-----BEGIN" in content:
            return [pyrage.ssh.Identity.from_buffer(content)]
        lines = [line.strip() for line in io.StringIO(content.decode("utf-8", "replace"))]
        keys = [pyrage.x25519.Identity.from_str(line) for line in lines if line and not line.startswith("#")]
    except pyrage.IdentityError:
        keys = []
    if not keys:
        problem = f"MIGRATOR_BACKUP_IDENTITY_FILE: {path} has no usable private key of age or SSH"
        raise SettingsError(
            [problem],
            next_step="set it to the file that age-keygen wrote (AGE-SECRET-KEY-1...), without a passphrase",
        )
    return keys


def _library() -> Any:
    try:
        import pyrage
    except ImportError as error:
        problem = "MIGRATOR_BACKUP_RECIPIENTS: encryption needs pyrage, which is not installed"
        remedy = f"use {clients.full_image()}, the full image, or pip install 'migrator[encryption]'"
        raise SettingsError([problem], next_step=remedy) from error
    return pyrage
