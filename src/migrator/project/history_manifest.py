"""The manifest: the history frozen at build time, so that a run knows the image's history without Alembic.

``migrator freeze`` writes ``manifest.json`` beside ``env.py``. It has no content that differs between
two builds: no time, no absolute path. Each revision is one line, oldest first, so a new revision is one
more line in a review. This module uses only the standard library, and little of it, because the
up-to-date check reads it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "manifest.json"
FORMAT = 1


def _sha256() -> Callable[..., Any]:
    """Return the small sha256 module if there is one, as the standard library's random.py does.

    hashlib loads OpenSSL, which takes longer than all hashing of an up-to-date check.
    """
    for name in ("_sha2", "_sha256"):  # from Python 3.12 on, and before
        with contextlib.suppress(ImportError, AttributeError):
            lean: Callable[..., Any] = importlib.import_module(name).sha256
            return lean
    import hashlib

    return hashlib.sha256


_sum = _sha256()


def _hex(data: bytes) -> str:
    return str(_sum(data).hexdigest())


class NoManifest(Exception):
    """There is no manifest in that place, or this version cannot read it; the text says which."""


class FileSums(NamedTuple):
    """A file's checksums, hexadecimal: the sha256 of its bytes, and that of its syntax tree (empty: no
    Python).
    """

    sha256: str
    syntax: str

    def edited_from(self, other: FileSums) -> str:
        """Return the kind of edit from ``other`` to this: none (an empty string), ``cosmetic`` or ``real``."""
        if self.sha256 == other.sha256:
            return ""
        return "cosmetic" if self.syntax and self.syntax == other.syntax else "real"


def file_sums(path: Path) -> FileSums:
    """Return both checksums of a file; raises OSError."""
    source = path.read_bytes()
    return FileSums(_hex(source), syntax_of(source))


def sha256_of(path: str | Path) -> str:
    """Return the sha256 of a file's bytes; raises OSError.

    Without a file object: for small files, creating it takes longer than reading and hashing.
    """
    found = _sum()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while data := os.read(descriptor, _AT_ONCE):
            found.update(data)
            if len(data) < _AT_ONCE:
                break
    finally:
        os.close(descriptor)
    return str(found.hexdigest())


_AT_ONCE = 65536


def syntax_of(source: bytes) -> str:
    """Return the digest of a source text's syntax tree; see :mod:`migrator.project.syntax`."""
    from migrator.project import syntax

    return syntax.digest(source)


def digest_of(sums: Mapping[str, str]) -> str:
    """Return one digest over a history: ``sums`` are the sha256 of each revision's file by the revision's id."""
    lines = "".join(f"{revision} {sums[revision]}\n" for revision in sorted(sums))
    return _hex(lines.encode())


class FrozenRevision(NamedTuple):
    """One frozen revision; ``file`` is relative to the manifest's folder, with forward slashes.

    ``syntax`` is empty for a file without source. ``min_compatible`` is the file's
    ``migrator_min_compatible``, or empty.
    """

    revision: str
    file: str
    sha256: str
    syntax: str = ""
    parents: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    min_compatible: str = ""
    message: str = ""

    @property
    def sums(self) -> FileSums:
        """Return the file's checksums."""
        return FileSums(self.sha256, self.syntax)


class Manifest(NamedTuple):
    """A frozen history.

    ``rows_at_head`` are the version rows of a fully upgraded database; with ``depends_on`` they are
    fewer than ``heads``. ``options`` are the values that locate the revisions and the version table, as
    :mod:`migrator.project.layout` reads them. ``folders`` are the version locations relative to the
    manifest. ``working_folder`` is the folder in which freeze ran, if it matters for them.
    ``version_table`` is (name, schema), or None if only running ``env.py`` can tell. ``runs_once`` says
    that ``env.py`` has no other one.
    """

    revisions: tuple[FrozenRevision, ...]
    heads: tuple[str, ...]
    rows_at_head: tuple[str, ...]
    env_sha256: str
    section: str
    options: Mapping[str, Any]
    folders: tuple[str, ...]
    recursive: bool = False
    working_folder: str | None = None
    version_table: tuple[str, str] | None = None
    runs_once: bool = False

    @property
    def digest(self) -> str:
        """Return the digest over all revisions and their files."""
        return digest_of({item.revision: item.sha256 for item in self.revisions})


def rows_at(manifest: Manifest, destination: str) -> frozenset[str] | None:
    """Return the version rows of a database that was upgraded to ``destination``; None if only Alembic can
    tell.
    """
    if destination == "heads" or (destination == "head" and len(manifest.heads) == 1):
        return frozenset(manifest.rows_at_head)
    by_id = {item.revision: item for item in manifest.revisions}
    label, at, end = destination.rpartition("@")
    if not at:  # everything that was applied for a revision is below it
        return frozenset({end}) if end in by_id else None
    labelled = {item.revision for item in manifest.revisions if label in item.labels}
    for item in manifest.revisions:  # each follows its parents
        if labelled.intersection(item.parents):
            labelled.add(item.revision)
    found = labelled.intersection(manifest.heads)
    return frozenset(found) if end == "head" and len(found) == 1 else None


_LISTS = frozenset({"heads", "rows_at_head", "folders", "version_table"})
_NOT_SHOWN: frozenset[Any] = frozenset({"", ()})


def dump(manifest: Manifest) -> str:
    """Return the manifest as text: always the same for the same history."""
    head: dict[str, Any] = {"format": FORMAT, "digest": manifest.digest}
    head |= {name: value for name, value in manifest._asdict().items() if name != "revisions"}
    head["options"] = dict(sorted(manifest.options.items()))
    lines = [f"{_json(key)}: {_json(value)}," for key, value in head.items()]
    revisions = [
        _json({name: value for name, value in revision._asdict().items() if value not in _NOT_SHOWN})
        for revision in manifest.revisions
    ]
    return "\n".join(["{", *lines, '"revisions": [', ",\n".join(revisions), "]", "}", ""])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def load(place: str | Path) -> Manifest:
    """Read a manifest; raises :class:`NoManifest`."""
    try:
        with open(place, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        raise NoManifest("it does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise NoManifest(f"it cannot be read: {error}") from None
    return parse(text)


def parse(text: str) -> Manifest:
    """Parse a manifest's text; raises :class:`NoManifest`, also if its digest does not match its lines."""
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise NoManifest(f"it has the format {document['format']!r}, not {FORMAT}")
        del document["format"]
        digest = document.pop("digest")
        values: dict[str, Any] = {
            key: tuple(value) if key in _LISTS and value is not None else value
            for key, value in document.items()
        }
        values["revisions"] = tuple(_revision(line) for line in document["revisions"])
        found = Manifest(**values)
        if found.digest != digest:
            raise NoManifest("its digest does not match its revisions: it was merged or edited by hand")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NoManifest(f"it is not valid: {type(error).__name__}: {error}") from None
    return found


def _revision(line: dict[str, Any]) -> FrozenRevision:
    for key in ("parents", "depends_on", "labels"):
        if key in line:
            line[key] = tuple(line[key])
    return FrozenRevision(**line)


def problems(manifest: Manifest, folder: str | Path) -> tuple[str, ...]:
    """Compare the files below ``folder`` with the manifest; return the differences."""
    root = os.path.realpath(folder)
    found = []
    listed = {_place(root, item.file): item for item in manifest.revisions}
    for path, item in [*listed.items()]:
        try:
            if sha256_of(path) != item.sha256:
                found.append(f"{item.file} was edited")
        except OSError:
            found.append(f"{item.file} is missing")
    for path in revision_files([os.path.join(root, item) for item in manifest.folders], manifest.recursive):
        if path not in listed and os.path.realpath(path) not in listed:
            found.append(f"{os.path.relpath(path, root)} is not in it")
    try:
        if sha256_of(os.path.join(root, "env.py")) != manifest.env_sha256:
            found.append("env.py was edited")
    except OSError:
        found.append("env.py is missing")
    return tuple(found)


def _place(root: str, file: str) -> str:
    """Return a file's normal path; as freeze writes it, only one in another folder is not yet normal."""
    return os.path.normpath(os.path.join(root, file)) if file.startswith((".", "/")) else f"{root}/{file}"


def revision_files(folders: list[str], recursive: bool) -> Iterator[str]:
    """Yield the files that are revisions for Alembic, as its ScriptDirectory lists them."""
    for folder in folders:
        for root, below, names in os.walk(os.path.normpath(folder)):
            if not recursive:
                below.clear()
            if not root.endswith("__pycache__"):
                yield from (os.path.join(root, name) for name in names if _is_revision(name))


def _is_revision(name: str) -> bool:
    return name.endswith(".py") and not name.startswith((".#", "__init__"))


def changes(old: Manifest, new: Manifest) -> tuple[str, ...]:
    """Return the differences between two manifests for people: revisions first."""
    before = {item.revision: item for item in old.revisions}
    after = {item.revision: item for item in new.revisions}
    found = [f"{item.revision} ({item.file}) is new" for key, item in after.items() if key not in before]
    found += [f"{item.revision} ({item.file}) is gone" for key, item in before.items() if key not in after]
    for key, item in after.items():
        was = before.get(key)
        if was is None or was == item:
            continue
        edit = item.sums.edited_from(was.sums)
        what = f"has {'a' if edit == 'real' else 'a cosmetic'} change" if edit else "has moved"
        found.append(f"{item.revision} ({item.file}) {what}")
    for name in new._fields[1:]:
        if getattr(old, name) != getattr(new, name) and not (found and name in {"heads", "rows_at_head"}):
            found.append(f"{name} differs")
    return tuple(found)
