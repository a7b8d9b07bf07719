"""The revision graph: read it, resolve names in it, plan over it, and run ``env.py`` with a plan."""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from migrator.errors import HistoryError
from migrator.history.env_file import version_table
from migrator.history.project import ProjectOptions, make_config, parse_command, tell_address
from migrator.target import Target
from migrator.versions import VersionTable

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

Hook = Callable[["tuple[str, ...]", "MigrationContext"], "Sequence[Any]"]
"""What is called inside ``env.py`` with the database's revisions: returns the steps to run."""

Around = Callable[[Callable[[], None], Callable[[], "MigrationContext"]], None]
"""What is called in the place of ``context.run_migrations``."""


@dataclass(frozen=True)
class Revision:
    """One revision file: its id, its parents, the first line of its message, and its place."""

    revision: str
    parents: tuple[str, ...]
    message: str
    path: str
    is_head: bool = False
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a command will do: the revisions in order, and the version rows before and after."""

    kind: str
    destination: str
    revisions: tuple[Revision, ...]
    before: frozenset[str]
    after: frozenset[str]
    baseline: str = ""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.revisions and self.before == self.after


class History:
    """The revision graph of one project."""

    def __init__(self, options: ProjectOptions, target: Target | None, folder: Path | None = None) -> None:
        self._target = target
        self._options = options
        self.config = make_config(options, folder or Path.cwd())
        self.script = self._read()

    # -- reading ---------------------------------------------------------------------------------------

    def _read(self) -> ScriptDirectory:
        from alembic.script import ScriptDirectory
        from alembic.util import CommandError

        # What a revision file prints when it is imported is no answer of ours: it goes where the logs go.
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("always")
            try:
                script = ScriptDirectory.from_config(self.config)
                heads = script.get_heads()
                script.revision_map._real_heads  # noqa: B018 - builds the rest of the graph, depends_on too
            except CommandError as error:
                raise HistoryError(f"The history cannot be read: {error}.", next_step=_GRAPH_STEP) from error
            except (Exception, SystemExit) as error:  # a revision file may call sys.exit
                raise _unreadable(error, [str(item.message) for item in caught]) from error
        for message in (str(item.message) for item in caught):
            if "is present more than once" in message:
                raise HistoryError(
                    f"The history is ambiguous: {message}.",
                    next_step="give one of the two files an id of its own, or delete the copy",
                )
        if not heads:
            places = ", ".join(str(place) for place in script._version_locations)
            raise HistoryError(
                f"There is no revision in {places}.",
                next_step="check what is mounted there; `migrator alembic revision -m ...` makes a first one",
            )
        return script

    @property
    def location(self) -> Path:
        """Return the folder that holds ``env.py``."""
        return Path(self.script.dir)

    @property
    def heads(self) -> tuple[str, ...]:
        """Return the ids of all heads."""
        return tuple(self.script.get_heads())

    @property
    def config_name(self) -> str:
        """Return the file that the project is configured by, for messages."""
        return str(
            self.config.config_file_name or getattr(self.config, "toml_file_name", None) or self.script.dir
        )

    def walk(self) -> Iterator[Revision]:
        """Yield every revision, newest first."""
        return (self._revision(script) for script in self.script.walk_revisions())

    def find(self, name: str) -> tuple[Revision, ...]:
        """Return the revisions that a name (id, unique prefix, ``head``, ``branch@head``) stands for."""
        with self._errors():
            return tuple(self._revision(script) for script in self.script.get_revisions(name) if script)

    def unknown(self, revisions: Iterable[str]) -> tuple[str, ...]:
        """Return those of ``revisions`` that no file has: ids in full, for a row is never a prefix."""
        known = self.script.revision_map._revision_map
        return tuple(sorted(rev for rev in revisions if known.get(rev) is None))

    def known(self) -> frozenset[str]:
        """Return the ids of all revisions."""
        return frozenset(script.revision for script in self.script.walk_revisions())

    def version_table(self) -> VersionTable | None:
        """Return the version table that ``env.py`` names; None where only running it would tell."""
        return version_table(
            Path(self.script.env_py_location), self.config.get_main_option, self._options.x or ()
        )

    def hints(self) -> frozenset[str]:
        """Return those values of ``-x`` that may name a schema: an ``env.py`` that serves several is told so."""
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
            self._revision(self.script.get_revision(step.revision.revision))
            for step in steps
            if getattr(step, "revision", None) is not None
        )
        return Plan(
            kind, destination, revisions, frozenset(before), _rows_after(steps, before), baseline=baseline
        )

    def steps(self, kind: str, destination: str, current: Sequence[str], baseline: str = "") -> list[Any]:
        """Return Alembic's own steps; ``baseline`` puts a stamp of that revision before them."""
        # Sorted, so that the plan that was judged is the one that is run: rows come in any order.
        heads: Any = tuple(sorted(current))
        if kind == "downgrade" and len(heads) > 1 and re.fullmatch(r"-\d+", destination):
            raise HistoryError(
                f"The database is at several heads ({', '.join(heads)}), so {destination} does not say which to leave.",
                next_step=f"name the branch: `migrator downgrade {heads[0]}@{destination}`, or the revision to go to",
            )
        with self._errors(destination):
            if kind == "stamp":
                return list(self.script._stamp_revs(destination, heads))
            if kind == "downgrade":
                return list(self.script._downgrade_revs(destination, heads))
            if not baseline or baseline == "base":
                return list(self.script._upgrade_revs(destination, heads))
            stamps = list(self.script._stamp_revs(baseline, heads))
            stamped: Any = tuple(sorted(_rows_after(stamps, heads)))
            return [*stamps, *self.script._upgrade_revs(destination, stamped)]

    def steps_done(self, steps: Sequence[Any], before: Iterable[str], rows: Iterable[str]) -> int | None:
        """Return how many of ``steps`` led from ``before`` to the version ``rows``; None where none did."""
        wanted, start = frozenset(rows), tuple(before)
        return next((n for n in range(len(steps) + 1) if _rows_after(steps[:n], start) == wanted), None)

    def _revision(self, script: Any) -> Revision:
        parents = script.down_revision
        return Revision(
            revision=script.revision,
            parents=(parents,) if isinstance(parents, str) else tuple(parents or ()),
            message=(script.doc or "").split("\n")[0].strip(),
            path=str(script.path),
            is_head=bool(script.is_head),
            labels=tuple(sorted(script.branch_labels or ())),
        )

    @contextlib.contextmanager
    def _errors(self, destination: str = "") -> Iterator[None]:
        from alembic.util import CommandError

        try:
            yield
        except CommandError as error:
            text = " ".join(str(error).split()).rstrip(".")
            if "Multiple head" in text or "multiple heads" in text:
                heads = ", ".join(self.heads)
                raise HistoryError(
                    f"The history has several heads ({heads}), so {destination or 'head'!r} names no one revision.",
                    next_step="merge them (`migrator alembic merge heads -m ...`), or run `migrator upgrade heads`",
                ) from error
            raise HistoryError(f"{text}.", next_step="`migrator history` lists the revisions") from error

    # -- running env.py --------------------------------------------------------------------------------

    def run(
        self,
        kind: str,
        destination: str,
        hook: Hook,
        *,
        before_configure: Callable[[], None],
        around: Around = lambda run, get_context: run(),
        export: Sequence[str] = (),
    ) -> None:
        """Load ``env.py`` once, as ``alembic KIND DESTINATION`` does, and let it run the steps that ``hook`` returns.

        The target's address is set as ``sqlalchemy.url``, and in the environment variables that ``env.py``
        may read instead (``export`` names more).  ``before_configure`` is called whenever ``env.py`` calls
        ``context.configure``, by when it has set up its own logging; ``around`` in the place of
        ``context.run_migrations``, with that and a function that returns the context.  Raises whatever ``env.py`` or a
        revision raises.
        """
        from alembic.runtime.environment import EnvironmentContext

        environment = EnvironmentContext(
            self.config,
            self.script,
            fn=cast(Any, hook),  # Alembic's stub speaks of one revision; it passes all of them
            as_sql=False,
            starting_rev=None,
            destination_rev=destination,
            tag=None,
        )
        self.config.cmd_opts = parse_command(self._options, kind, destination)
        configure = environment.configure

        def configure_after(*arguments: Any, **options: Any) -> None:
            before_configure()
            configure(*arguments, **options)

        # On the instance: Alembic's module proxy knows EnvironmentContext itself, and no subclass of it.
        environment.configure = configure_after  # type: ignore[method-assign]
        run_migrations = environment.run_migrations
        environment.run_migrations = lambda **options: around(  # type: ignore[method-assign]
            lambda: run_migrations(**options), environment.get_context
        )
        tell_address(self.config, Path(self.script.env_py_location), self._target, export)
        with environment:
            self.script.run_env()


_NO_SCHEMAS = frozenset({"true", "false", "yes", "no", "on", "off"})

_GRAPH_STEP = "mend the revision files; `alembic branches` and `alembic history` show the graph"


def _unreadable(error: BaseException, said: Sequence[str]) -> HistoryError:
    """Name the file that cannot be imported, the parent that is missing, or the revisions in a circle."""
    from alembic.script.revision import CycleDetected

    if isinstance(error, CycleDetected):
        return HistoryError(
            f"The revisions go in a circle: {', '.join(error.revisions)}.",
            next_step="correct down_revision (or depends_on) in one of their files",
        )
    missing = [message for message in said if "is not present" in message]
    if isinstance(error, KeyError) and missing:
        return HistoryError(
            f"A parent is missing: {missing[0]}.",
            next_step="add the missing file to the image, or correct down_revision in the file that names it",
        )
    if isinstance(error, KeyError) and _raised_by_alembic(error):
        return HistoryError(
            f"A dependency is missing: a revision's depends_on names {error.args[0]!r}, which no file has.",
            next_step="add the missing file to the image, or correct depends_on in the file that names it",
        )
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{Path(error.filename).name}, line {error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "versions" in Path(frame.filename).parts] or list(frames)
        place = f"{Path(own[-1].filename).name}, line {own[-1].lineno}"
    reason = " ".join(str(error).split())
    return HistoryError(
        f"A revision file does not import: {place}: {type(error).__name__}: {reason}.",
        next_step=f"mend {place.split(',')[0]}, or put what it imports into the image",
    )


def _raised_by_alembic(error: BaseException) -> bool:
    """Whether Alembic's own graph raised this, and not a revision file."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).parts[-3:] == ("alembic", "script", "revision.py")


def _rows_after(steps: Iterable[Any], before: Iterable[str]) -> frozenset[str]:
    """Return the version rows that Alembic will leave, by letting its own bookkeeping run without a database."""
    from alembic.runtime.migration import HeadMaintainer

    class Rehearsal(HeadMaintainer):
        def _insert_version(self, version: str) -> None:
            self.heads.add(version)

        def _delete_version(self, version: str) -> None:
            self.heads.discard(version)

        def _update_version(self, from_: str, to_: str) -> None:
            self.heads.discard(from_)
            self.heads.add(to_)

    nothing: Any = None
    maintainer = Rehearsal(nothing, before)
    for step in steps:
        maintainer.update_to_step(step)
    return frozenset(maintainer.heads)
