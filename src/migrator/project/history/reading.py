"""Read the revision graph: import the revision files, after ``env.py`` if they may depend on it."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from migrator.config.database_url import Target
from migrator.errors import HistoryError, MigratorError
from migrator.project.config import ProjectOptions, set_address
from migrator.project.env.bootstrap import prepare_env, sets_locations
from migrator.project.env.runner import load_env
from migrator.project.history.imports import imports_more
from migrator.project.history.load_errors import describe, raised_by_a_file, unreadable
from migrator.project.loading import find_env, reading_only
from migrator.runtime.output import stdio

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

log = logging.getLogger("migrator")

GRAPH_STEP = "fix the revision files; `alembic branches` and `alembic history` show the graph"


def read_graph(config: Config, target: Target | None, options: ProjectOptions) -> ScriptDirectory:
    """Import all revisions of a project; raises :class:`HistoryError`."""
    shaped = sets_locations(options.bootstrap)
    script = _read(_Project(config, target, options), bootstrapped=shaped)
    if not script.get_heads() and options.bootstrap and not shaped:
        script = _read(_Project(config, target, options), bootstrapped=True)
    if not script.get_heads():
        places = ", ".join(str(place) for place in script._version_locations)
        raise HistoryError(
            f"There is no revision in {places}.",
            next_step="check the mount; `migrator revision -m ...` creates the first revision",
        )
    return script


@dataclass(frozen=True)
class _Project:
    """A project that is read; ``said`` gets Alembic's warnings."""

    config: Config
    target: Target | None
    options: ProjectOptions
    said: list[str] = field(default_factory=list)

    def prepare_env(self, env_file: Path) -> contextlib.AbstractContextManager[Config]:
        """Return the context in which ``env.py`` runs."""
        return prepare_env(self.config, env_file, self.target, self.options)


def _read(project: _Project, *, bootstrapped: bool) -> ScriptDirectory:
    from alembic.util import CommandError

    # Output of a revision file's import is not an answer of ours: it goes to the logs.
    with stdio.redirected():
        warnings.simplefilter("ignore")
        try:
            script = _import_revisions(project, bootstrapped=bootstrapped)
        except MigratorError:
            raise
        except CommandError as error:
            raise HistoryError(f"The history cannot be read: {error}.", next_step=GRAPH_STEP) from error
        except (Exception, SystemExit) as error:  # a revision file may call sys.exit
            raise unreadable(error, project.said) from error
    for message in project.said:
        if "is present more than once" in message:
            raise HistoryError(
                f"The history is ambiguous: {message}.",
                next_step="give one of the two files a new id, or delete the copy",
            )
    return script


def _import_revisions(project: _Project, *, bootstrapped: bool) -> ScriptDirectory:
    """Import the revisions, after ``env.py`` if they may depend on it or fail without it."""
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    env_file = find_env(project.config)
    # A revision, or its package, may import the application's settings, which read the address just once.
    set_address(project.config, env_file, project.target, project.options.export)
    script = ScriptDirectory.from_config(project.config)
    env_file = Path(script.env_py_location)
    if _depend_on_env(script):
        return _after_env(project, env_file)
    try:
        return _bootstrapped(project, env_file) if bootstrapped else _loaded(script, project.said)
    except (MigratorError, CommandError):
        raise
    except (Exception, SystemExit) as error:
        if not raised_by_a_file(error):
            raise
        try:
            return _after_env(project, env_file)
        except HistoryError as second:
            log.debug("the revisions cannot be imported after env.py either: %s", second)
        raise


def _depend_on_env(script: ScriptDirectory) -> bool:
    """Tell whether the imports of the revisions may depend on ``env.py``; True if only an import could tell."""
    places = script.version_locations or ()
    if script.sourceless or any(":" in place and not os.path.isabs(place) for place in places):
        return True
    recursive = bool(getattr(script, "recursive_version_locations", False))
    return imports_more(map(str, script._version_locations), recursive=recursive)


def _after_env(project: _Project, env_file: Path) -> ScriptDirectory:
    """Import the revisions where Alembic does, within ``env.py``; after it, if it does not get there."""
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    failures: list[BaseException] = []
    begun = False

    def read() -> None:
        nonlocal begun
        if begun:  # an env.py of several schemas calls it for each
            return
        begun = True
        try:
            _loaded(script, project.said)
        except (Exception, SystemExit) as error:
            failures.append(error)
            raise

    with project.prepare_env(env_file) as config:
        script = ScriptDirectory.from_config(config)
        with reading_only(), _briefly_connecting():
            stopped = load_env(config, script, read)
        if not begun:
            if stopped is not None:
                log.info("env.py was loaded before the revisions and failed: %s", describe(stopped))
            with contextlib.suppress(Exception, SystemExit):  # it is noted
                read()
    for failure in failures:
        if isinstance(failure, CommandError):
            raise failure
        raise unreadable(failure, project.said, None if stopped is failure else stopped) from failure
    return script


@contextlib.contextmanager
def _briefly_connecting() -> Iterator[None]:
    """Let libpq give up soon: the stage ``wait`` comes later, and has a setting."""
    told = {"PGCONNECT_TIMEOUT": "5"} if "PGCONNECT_TIMEOUT" not in os.environ else {}
    os.environ.update(told)
    try:
        yield
    finally:
        for name in told:
            os.environ.pop(name, None)


def _bootstrapped(project: _Project, env_file: Path) -> ScriptDirectory:
    """Import the revisions as ``env.py`` runs: fully prepared, from the bootstrap's folders."""
    from alembic.script import ScriptDirectory

    with project.prepare_env(env_file) as config:
        return _loaded(ScriptDirectory.from_config(config), project.said)


def _loaded(script: ScriptDirectory, said: list[str]) -> ScriptDirectory:
    """Import all revisions, and build the whole graph, depends_on too; add to ``said`` what Alembic warns of."""
    with warnings.catch_warnings(record=True) as caught:  # env.py may have changed the filters
        warnings.simplefilter("always")
        try:
            script.get_heads()
            script.revision_map._real_heads  # noqa: B018 - a property that does it
        finally:
            said += [str(item.message) for item in caught]
    return script
