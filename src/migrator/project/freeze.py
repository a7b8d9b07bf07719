"""Make the manifest of a history, and keep it beside ``env.py``."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrator.errors import HistoryError, SettingsError
from migrator.project import layout
from migrator.project.config import ProjectOptions
from migrator.project.env.source import version_table
from migrator.project.history.history import History
from migrator.project.history_manifest import (
    FILE_NAME,
    FrozenRevision,
    Manifest,
    NoManifest,
    changes,
    dump,
    file_sums,
    parse,
    sha256_of,
)
from migrator.runtime import files


@dataclass(frozen=True)
class Frozen:
    """A manifest, its file, and its differences to the earlier file."""

    manifest: Manifest
    place: Path
    changes: tuple[str, ...]


def write_manifest(history: History, options: ProjectOptions, folder: Path, *, check: bool = False) -> Frozen:
    """Write the history's manifest; with ``check`` write nothing, and raise if the file would change.

    Raises :class:`HistoryError` for that, and :class:`SettingsError` for a folder that cannot be
    written to.
    """
    manifest = freeze(history, options, folder)
    place = history.location / FILE_NAME
    text = dump(manifest)
    try:
        before = place.read_text(encoding="utf-8") if place.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([f"{place} cannot be read: {error}"]) from None
    different = () if before == text else _changes(before, manifest)
    if different and check:
        more = f"; and {len(different) - 10} more" if len(different) > 10 else ""
        raise HistoryError(
            f"{place} is not current: {'; '.join(different[:10])}{more}.",
            state="",
            next_step="run `migrator freeze` and commit it",
        )
    if different:
        _write(place, text)
    return Frozen(manifest, place, different)


def _changes(before: str, manifest: Manifest) -> tuple[str, ...]:
    if not before:
        return ("there was no manifest",)
    try:
        return changes(parse(before), manifest) or ("its text differs",)
    except NoManifest as error:
        return (str(error),)


def _write(place: Path, text: str) -> None:
    try:
        files.replace(str(place), text)
    except OSError as error:
        raise SettingsError([f"{place} cannot be written: {error.strerror}"]) from None


def freeze(history: History, options: ProjectOptions, folder: Path) -> Manifest:
    """Make the manifest of a history with a configuration found from ``folder``.

    It is the same for every place of the project, every environment and every ``-x``. Raises
    :class:`SettingsError` for a file that cannot be read.
    """
    script = history.script
    root = os.path.realpath(script.dir)
    read_options: set[str] = set(layout.PLACES)

    def get_main_option(name: str) -> str | None:
        read_options.add(name)
        return history.config.get_main_option(name)

    env_file = Path(script.env_py_location)
    table = version_table(env_file, get_main_option, (), environment={})
    found = layout.read(options, folder)
    places = [str(place) for place in script.version_locations or ()]
    relative = [place for place in places if not os.path.isabs(place)]
    located = found.options(read_options) if found else {}
    named = str(located.get("script_location", ""))
    matters = relative or not named.startswith((layout.HERE, "/"))
    # A package can be anywhere, and cannot be found without an import.
    packaged = found is None or any(":" in place for place in relative)
    try:
        revisions = tuple(_frozen(item, root) for item in _oldest_first(script.walk_revisions()))
        env_sha256 = sha256_of(env_file)
    except OSError as error:
        raise SettingsError([f"{error.filename} cannot be read: {error.strerror}"]) from None
    return Manifest(
        revisions=revisions,
        heads=tuple(sorted(history.heads)),
        rows_at_head=tuple(sorted(history.plan("upgrade", "heads", ()).after)),
        env_sha256=env_sha256,
        section=options.name,
        options=located,
        folders=() if packaged else tuple(_relative(item, root) for item in script._version_locations),
        recursive=bool(getattr(script, "recursive_version_locations", False)),
        working_folder=_relative(folder, root) if matters else None,
        version_table=(table.name, table.schema) if table else None,
        runs_once=history.runs_once,
    )


def _relative(path: str | os.PathLike[str], root: str) -> str:
    return Path(os.path.relpath(os.path.realpath(path), root)).as_posix()


def _frozen(script: Any, root: str) -> FrozenRevision:
    sums = file_sums(Path(script.path))
    return FrozenRevision(
        revision=script.revision,
        file=_relative(script.path, root),
        sha256=sums.sha256,
        syntax=sums.syntax,
        parents=_names(script.down_revision),
        depends_on=_names(script.dependencies),
        # Not branch_labels: Alembic adds those of the ancestors to it.
        labels=tuple(sorted(_names(getattr(script.module, "branch_labels", None)))),
        min_compatible=str(getattr(script.module, "migrator_min_compatible", None) or ""),
        message=(script.doc or "").split("\n")[0].strip(),
    )


def _names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _oldest_first(scripts: Iterable[Any]) -> list[Any]:
    """Sort the revisions so that each follows its requirements, otherwise by id."""
    by_id = {script.revision: script for script in scripts}
    waits = {key: set(script._all_down_revisions) & set(by_id) for key, script in by_id.items()}
    needed_by: dict[str, list[str]] = {}
    for key, parents in waits.items():
        for parent in parents:
            needed_by.setdefault(parent, []).append(key)
    ready = [key for key, parents in waits.items() if not parents]
    heapq.heapify(ready)
    ordered = []
    while ready:
        key = heapq.heappop(ready)
        ordered.append(by_id[key])
        for child in needed_by.get(key, ()):
            waits[child].discard(key)
            if not waits[child]:
                heapq.heappush(ready, child)
    return ordered
