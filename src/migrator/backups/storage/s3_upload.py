"""A dump on its way into a bucket: a multipart upload, two parts at a time, in bounded memory.

An upload takes at most 10,000 parts, and some servers (Cloudflare's R2) require the same size for all
but the last one. So the expected size sets the part size, which grows only after 4,000 parts, if more
came than expected. https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import queue
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from migrator.backups.storage import files
from migrator.backups.storage.s3_client import S3Failure

if TYPE_CHECKING:
    from migrator.backups.storage.s3 import S3Store

LOGGER = logging.getLogger("migrator.backup")
PART = 16 * 1024 * 1024
"""Bytes of a part; up to three are in memory: one being filled, and two on their way."""
_STEADY = 4000
_AT_ONCE = 2
_POLL = 0.2
_GOODBYE = 6.0  # seconds for running requests to end before an upload is aborted
_RIGHTS = "s3:PutObject and s3:AbortMultipartUpload"


def first_size(expected: int) -> int:
    """Return the size of the first parts for ``expected`` bytes: 4,000 of them suffice, if that is right."""
    mebibyte = 1024 * 1024
    return max(PART, -(-expected // _STEADY // mebibyte) * mebibyte)


def part_size(number: int, first: int) -> int:
    """Return the size of part ``number`` (from 1): from 4,001 on it doubles every thousand parts."""
    return first << max(0, (number - _STEADY + 999) // 1000)


class _Slab:
    """A part's bytes, in reused memory: freed and allocated again, megabytes would pile up in between.

    A file-like object for boto3, which reads it in small pieces and would otherwise copy it as a whole.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.filled = 0
        self._at = 0
        self._memory = mmap.mmap(-1, size)

    def append(self, view: memoryview) -> int:
        """Take as many bytes as there is room for; return how many."""
        taken = min(self.size - self.filled, len(view))
        self._memory[self.filled : self.filled + taken] = view[:taken]
        self.filled += taken
        return taken

    def clear(self) -> None:
        """Make it empty."""
        self.filled = self._at = 0

    def read(self, size: int = -1) -> bytes:
        """Return the next ``size`` bytes."""
        end = self.filled if size < 0 else min(self.filled, self._at + size)
        content = self._memory[self._at : end]
        self._at = end
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a byte."""
        self._at = offset + (0, self._at, self.filled)[whence]
        return self._at

    def tell(self) -> int:
        """Return where it is."""
        return self._at


class S3Part:
    """An object on its way: hashed as it is written; removed on leaving unless it was kept."""

    encrypted_to: tuple[str, ...] = ()

    def __init__(self, store: S3Store, name: str, backup_id: str, expected: int) -> None:
        self.id = backup_id
        self.name = name
        self.size = 0
        self.kept = False
        self.tag = ""
        self._store = store
        self._first = first_size(expected)
        self._slab = _Slab(self._first)
        self._free: queue.Queue[_Slab] = queue.Queue()
        self._hash = hashlib.sha256()
        self._number = 0
        self._etags: dict[int, str] = {}
        self._queue: queue.Queue[tuple[int, _Slab] | None] = queue.Queue()
        self._failure: BaseException | None = None
        self._giving_up = threading.Event()
        self._threads: list[threading.Thread] = []
        self._complete = False
        with store.asking(_RIGHTS):
            made = store.client.create_multipart_upload(Bucket=store.bucket, Key=store.key(name))
        self._upload: str = made["UploadId"]

    def __enter__(self) -> S3Part:
        return self

    def __exit__(self, *_: object) -> None:
        self._giving_up.set()
        if self.kept:
            return
        try:
            if not self._complete:
                self._abort()
            # Also if it is not complete: the answer to the completion may be lost.
            self._store.delete(self.name, quick=True)
        except OSError as failure:
            LOGGER.warning(
                "%s could not be removed (%s): without a manifest it is not a backup, and a later run "
                "removes it",
                self._store.place(self.name),
                failure,
            )

    def _abort(self) -> None:
        """Let the server drop the parts; repeat if some were still on their way."""
        deadline = time.monotonic() + _GOODBYE
        self._drop_upload()
        late = [thread for thread in self._threads if thread.is_alive()]
        for thread in late:
            thread.join(max(0.0, deadline - time.monotonic()))
        if late:
            self._drop_upload()

    def _drop_upload(self) -> None:
        store = self._store
        try:
            with store.asking(_RIGHTS):
                store.quick_client.abort_multipart_upload(
                    Bucket=store.bucket, Key=store.key(self.name), UploadId=self._upload
                )
        except S3Failure as failure:
            if failure.code != "NoSuchUpload":
                raise

    @property
    def sha256(self) -> str:
        """Return the checksum of the plain content."""
        return self._hash.hexdigest()

    @property
    def stored(self) -> tuple[str, int]:
        """Return the checksum and the size of the stored content, here the plain content."""
        return self.sha256, self.size

    def write(self, chunk: bytes) -> None:
        """Append to it; raises OSError."""
        self._hash.update(chunk)
        self.size += len(chunk)
        view = memoryview(chunk)
        while view:
            view = view[self._slab.append(view) :]
            if self._slab.filled == self._slab.size:
                self._send()
                self._slab = self._next_slab()

    def _send(self) -> None:
        """Pass the slab on for sending."""
        self._number += 1
        if len(self._threads) < _AT_ONCE:
            name = f"upload {len(self._threads) + 1}"
            self._free.put(_Slab(self._slab.size))
            self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
            self._threads[-1].start()
        self._queue.put((self._number, self._slab))

    def _next_slab(self) -> _Slab:
        """Wait for a sent slab; raise its error."""
        size = part_size(self._number + 1, self._first)
        while self._failure is None:
            with contextlib.suppress(queue.Empty):
                slab = self._free.get(timeout=_POLL)
                slab.clear()
                return slab if slab.size == size else _Slab(size)
        raise self._failure

    def _work(self) -> None:
        """Send parts until the last one, or until one fails."""
        while not self._giving_up.is_set() and self._failure is None:
            try:
                item = self._queue.get(timeout=_POLL)
            except queue.Empty:
                continue
            if item is None:
                return
            try:
                self._send_one(*item)
            except BaseException as error:  # noqa: BLE001 - raised in the writing thread
                self._failure = self._failure or error
            self._free.put(item[1])

    def _send_one(self, number: int, slab: _Slab) -> None:
        store = self._store
        with store.asking(_RIGHTS):
            answer = store.client.upload_part(
                Bucket=store.bucket,
                Key=store.key(self.name),
                UploadId=self._upload,
                PartNumber=number,
                Body=slab,
            )
        self._etags[number] = answer["ETag"]

    def sync(self) -> None:
        """Send the rest and let the server join the parts; raises OSError."""
        if self._complete:
            return
        if self._slab.filled or not self._number:
            self._send()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            while thread.is_alive():
                thread.join(_POLL)
        if self._failure is not None:
            raise self._failure
        self._put_together()
        self._complete = True

    def _put_together(self) -> None:
        store = self._store
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(self._etags.items())]
        try:
            with store.asking(_RIGHTS):
                store.client.complete_multipart_upload(
                    Bucket=store.bucket,
                    Key=store.key(self.name),
                    UploadId=self._upload,
                    MultipartUpload={"Parts": parts},
                )
        except S3Failure as failure:
            # If an answer was lost and the request was repeated, it has been done already.
            if failure.code != "NoSuchUpload" or store.size(self.name) != self.size:
                raise

    def chunks(self) -> Iterator[bytes]:
        """Yield the stored content, read back from the bucket; raises OSError."""
        return self._store.read(self.name, self._note_tag)

    def _note_tag(self, tag: str) -> None:
        self.tag = tag

    @contextlib.contextmanager
    def local(self) -> Iterator[Path]:
        """Yield a path on this machine with the stored content; raises OSError."""
        with downloaded(self._store, self.name, self.size) as path:
            yield path


@contextlib.contextmanager
def downloaded(store: S3Store, name: str, size: int) -> Iterator[Path]:
    """Yield a private file with the stored content; removed on leaving. Raises OSError."""
    try:
        folder = files.folder(size, name)
    except files.NoRoom as error:
        raise S3Failure(str(store), str(error), error.next_step) from error
    with tempfile.NamedTemporaryFile(prefix="migrator-", suffix=f"-{name}", dir=folder) as file:
        for chunk in store.read(name):
            file.write(chunk)
        file.flush()
        yield Path(file.name)
