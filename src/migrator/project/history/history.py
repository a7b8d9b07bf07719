"""The revision graph: read it, resolve names in it, plan over it, and run ``env.py`` with a plan."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from migrator.config.database_url import Target
from migrator.errors import HistoryError
from migrator.postgres import connection_limit
from migrator.postgres.version_table import VersionTable
from migrator.project.config import (
    ProjectOptions,
    alembic_words,
    import_alembic,
    make_config,
    sibling_tables,
)
from migrator.project.downgrade.offline_sql import OfflineDowngrade, offline_downgrade
from migrator.project.env.runner import Around, Command, Hook, run_env
from migrator.project.env.source import can_run_twice, runs_once, version_table
from migrator.project.history.functions import is_one_way, runnable
from migrator.project.history.plan import Plan, Revision, revision_of, rows_after
from migrator.project.history.plan_errors import planning_errors
from migrator.project.history.reading import read_graph
from migrator.project.history_manifest import FileSums, NoManifest, digest_of, file_sums, sha256_of
from migrator.project.history_manifest import load as load_manifest
from migrator.project.layout import migrates_several
from migrator.project.loading import command_line, reading_only


class History:
    """The revision graph of one project."""

    def __init__(
        self,
        options: ProjectOptions,
        target: Target | None,
        folder: Path | None = None,
        *,
        read_only: bool = False,
    ) -> None:
        """Read the history; with ``read_only``, the loaded application code may not write."""
        self._target = options.env_target or target
        self._options = options
        self._read_only = read_only
        self._sha256: dict[str, str] = {}
        self._read_before: dict[str, Revision] = {}
        import_alembic()
        self.config = make_config(options, folder or Path.cwd())
        with self._loading("upgrade", "head"):
            self.script = read_graph(self.config, self._target, options)

    @contextlib.contextmanager
    def _loading(self, kind: str, destination: str) -> Iterator[None]:
        """Show the arguments of Alembic's own command to the code that the block loads; read-only if
        requested.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(command_line("alembic", alembic_words(self._options, kind, destination)))
            if self._read_only:
                stack.enter_context(reading_only())
            yield

    # -- reading ---------------------------------------------------------------------------------------

    @property
    def location(self) -> Path:
        """Return the folder that holds ``env.py``."""
        return Path(self.script.dir)

    @property
    def heads(self) -> tuple[str, ...]:
        """Return the ids of all heads."""
        return tuple(self.script.get_heads())

    def walk(self) -> Iterator[Revision]:
        """Yield every revision, newest first."""
        return (self._revision(script) for script in self.script.walk_revisions())

    def find(self, name: str) -> tuple[Revision, ...]:
        """Return the revisions behind a name (id, unique prefix, ``head``, ``branch@head``)."""
        with planning_errors(self):
            return tuple(self._revision(script) for script in self.script.get_revisions(name) if script)

    def unknown(self, revisions: Iterable[str]) -> tuple[str, ...]:
        """Return those of ``revisions`` that no file has: full ids, because a row is never a prefix."""
        known = self.script.revision_map._revision_map
        return tuple(sorted(rev for rev in revisions if known.get(rev) is None))

    def known(self) -> frozenset[str]:
        """Return the ids of all revisions."""
        return frozenset(script.revision for script in self.script.walk_revisions())

    def applied(self, rows: Iterable[str]) -> tuple[str, ...]:
        """Return the revisions that version rows stand for, with their dependencies, oldest first."""
        known = self.script.revision_map._revision_map
        seen: set[str] = set()
        waiting = [row for row in rows if known.get(row) is not None]
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += cast(Any, known[name])._all_down_revisions  # parents and dependencies, as ids
        order = [script.revision for script in self.script.walk_revisions() if script.revision in seen]
        return tuple(reversed(order))

    def revision(self, name: str) -> Revision:
        """Return the revision with this very id."""
        return self._revision(self.alembic_revision(name))

    def alembic_revision(self, name: str) -> Any:
        """Return Alembic's own revision; a full id needs only a lookup."""
        found = self.script.revision_map._revision_map.get(name)
        return found if found is not None and found.revision == name else self.script.get_revision(name)

    def dependencies(self, name: str) -> tuple[str, ...]:
        """Return the ids of what a revision depends on (``depends_on``), its parents aside."""
        script = self.alembic_revision(name)
        return tuple(sorted(set(script._all_down_revisions) - set(script._versioned_down_revisions)))

    def sha256(self, revision: Revision) -> str:
        """Return the checksum of a revision's file, which is read once."""
        if revision.path not in self._sha256:
            self._sha256[revision.path] = sha256_of(Path(revision.path))
        return self._sha256[revision.path]

    def sums(self, name: str) -> FileSums:
        """Return the checksums of a revision's file; those of the manifest if it has this same file."""
        item = self.revision(name)
        frozen = self._frozen.get(name)
        if frozen and frozen.sha256 == self.sha256(item):
            return frozen
        return file_sums(Path(item.path))

    @functools.cached_property
    def _frozen(self) -> dict[str, FileSums]:
        try:
            frozen = load_manifest(self.location / "manifest.json")
        except (OSError, NoManifest):
            return {}
        return {item.revision: item.sums for item in frozen.revisions}

    def file_name(self, revision: Revision) -> str:
        """Return a revision's file for people: relative to the folder of ``env.py`` if it is below it."""
        path, place = os.path.abspath(revision.path), self._place
        return path[len(place) + 1 :] if path.startswith(place + os.sep) else os.path.basename(path)

    @functools.cached_property
    def _place(self) -> str:
        return os.path.abspath(self.location)

    def min_compatible(self, name: str) -> str:
        """Return the ``migrator_min_compatible`` that a revision declares, or an empty string."""
        module = self.alembic_revision(name).module
        return str(getattr(module, "migrator_min_compatible", None) or "")

    def offline_downgrade(self, name: str) -> OfflineDowngrade:
        """Return the SQL that reverts a revision, for images without its file."""
        return offline_downgrade(self.alembic_revision(name))

    @functools.cached_property
    def digest(self) -> str:
        """Return one sha256 over every revision's id and file."""
        return digest_of({item.revision: self.sha256(item) for item in self.walk()})

    def version_table(self) -> VersionTable | None:
        """Return the version table that ``env.py`` names; None if only running it can tell."""
        return version_table(
            Path(self.script.env_py_location), self.config.get_main_option, self._options.x or ()
        )

    @functools.cached_property
    def env_can_run_twice(self) -> bool:
        """Tell whether ``env.py`` can run twice."""
        return can_run_twice(Path(self.script.env_py_location))

    @functools.cached_property
    def runs_once(self) -> bool:
        """Tell whether ``env.py`` has one version table in a database, as far as its text shows."""
        return self.migrates_several or runs_once(Path(self.script.env_py_location))

    def siblings(self) -> frozenset[str]:
        """Return the version tables of the histories in the ini's other sections."""
        return sibling_tables(self.config)

    @functools.cached_property
    def migrates_several(self) -> bool:
        """Tell whether ``env.py`` migrates several databases (Alembic's ``multidb`` template)."""
        return migrates_several(Path(self.script.env_py_location))

    def hints(self) -> frozenset[str]:
        """Return the values of ``-x`` that may name a schema, for an ``env.py`` that serves several."""
        values = (item.partition("=")[2] or item for item in self._options.x or ())
        return frozenset(
            value for value in values if value.isidentifier() and value.lower() not in _NO_SCHEMAS
        )

    # -- planning --------------------------------------------------------------------------------------

    def plan(self, kind: str, destination: str, current: Iterable[str], baseline: str = "") -> Plan:
        """Work out the steps of ``upgrade``, ``downgrade`` or ``stamp`` from ``current``.

        Raises :class:`HistoryError`.
        """
        before = tuple(sorted(current))
        steps = self.steps(kind, destination, before, baseline)
        revisions = tuple(
            self._revision(self.alembic_revision(step.revision.revision))
            for step in steps
            if getattr(step, "revision", None) is not None
        )
        with planning_errors(self, destination, kind, before):
            after = rows_after(steps, before)
        return Plan(
            kind,
            destination,
            revisions,
            frozenset(before),
            after,
            baseline=baseline,
            one_way=tuple(
                item.revision for item in revisions if is_one_way(self.alembic_revision(item.revision).module)
            ),
        )

    def steps(self, kind: str, destination: str, current: Sequence[str], baseline: str = "") -> list[Any]:
        """Return Alembic's own steps; ``baseline`` puts a stamp of that revision before them."""
        # Sorted, so that the judged plan is the one that runs: rows come in any order.
        heads: Any = tuple(sorted(current))
        if kind == "downgrade" and len(heads) > 1 and re.fullmatch(r"-\d+", destination):
            raise HistoryError(
                f"The database is at several heads ({', '.join(heads)}), so {destination} is ambiguous.",
                next_step=f"name the branch: `migrator downgrade {heads[0]}@{destination}`, or name the "
                "revision",
            )
        with planning_errors(self, destination, kind, heads):
            if kind == "stamp":
                return list(self.script._stamp_revs(destination, heads))
            if kind == "downgrade":
                return runnable(self.script._downgrade_revs(destination, heads))
            if not baseline or baseline == "base":
                return runnable(self.script._upgrade_revs(destination, heads))
            stamps = list(self.script._stamp_revs(baseline, heads))
            stamped: Any = tuple(sorted(rows_after(stamps, heads)))
            return [*stamps, *runnable(self.script._upgrade_revs(destination, stamped))]

    def rows_after(self, steps: Iterable[Any], before: Iterable[str]) -> frozenset[str]:
        """Return the version rows after the steps."""
        return rows_after(steps, before)

    def _revision(self, script: Any) -> Revision:
        known = self._read_before.get(script.revision)
        if known is None:
            known = self._read_before[script.revision] = revision_of(script)
        return known

    def branch_hint(self, destination: str) -> str:
        """Name the labels of the heads, if there are several and ``destination`` chooses none."""
        heads = [self.revision(name) for name in self.heads]
        labelled = [f"{item.revision} is {label}@head" for item in heads for label in item.labels]
        if destination or len(heads) < 2 or not labelled:
            return ""
        return f"to choose one branch, set MIGRATOR_DESTINATION ({', '.join(labelled)})"

    def set_target(self, target: Target) -> None:
        """Give ``env.py`` a new address of the target: its file was replaced since the history was read."""
        self._target = self._options.env_target or target

    # -- running env.py --------------------------------------------------------------------------------

    def run(
        self,
        kind: str,
        destination: str,
        hook: Hook,
        *,
        before_configure: Callable[[], None],
        around: Around = lambda run, get_context: run(),
        transaction: str = "env.py",
    ) -> None:
        """Load ``env.py`` as ``alembic KIND DESTINATION`` does: :func:`migrator.project.env.runner.run_env`.

        Once, and again only if the server had no free connection.
        """
        command = Command(kind, destination, self._options, self._target)
        entered = False

        def enter(*arguments: Any) -> Any:
            nonlocal entered
            entered = True
            return hook(*arguments)

        with self._loading(kind, destination):
            connection_limit.run_env(
                lambda: run_env(
                    self.config,
                    self.script,
                    command,
                    enter,
                    before_configure=before_configure,
                    around=around,
                    transaction=transaction,
                ),
                lambda: entered,
            )


_NO_SCHEMAS = frozenset({"true", "false", "yes", "no", "on", "off"})
