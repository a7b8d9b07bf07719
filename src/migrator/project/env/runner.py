"""Run ``env.py`` as Alembic's own command does, with migrator's hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from migrator.config.database_url import Target
from migrator.project.config import ProjectOptions, parse_command
from migrator.project.env.bootstrap import locations, prepare_env, refuse_other_locations
from migrator.project.env.operators import operators_of_the_server
from migrator.project.env.source import can_run_twice
from migrator.project.env.transactions import configure_in
from migrator.project.layout import migrates_several

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

Hook = Callable[["tuple[str, ...]", "MigrationContext"], "Sequence[Any]"]
"""Called inside ``env.py`` with the database's revisions: returns the steps to run."""

Around = Callable[[Callable[[], None], Callable[[], "MigrationContext"]], None]
"""Called in place of ``context.run_migrations``."""


@dataclass(frozen=True)
class Command:
    """Alembic's command: ``upgrade``, ``downgrade`` or ``stamp``, its destination, project and database."""

    kind: str
    destination: str
    options: ProjectOptions
    target: Target | None


def run_env(
    config: Config,
    script: ScriptDirectory,
    command: Command,
    hook: Hook,
    *,
    before_configure: Callable[[], None],
    around: Around,
    transaction: str,
) -> None:
    """Load ``env.py`` once, and let it run the steps that ``hook`` returns.

    The target's address is set as ``sqlalchemy.url``, and in the environment variables that ``env.py``
    may read instead. Then come the project's bootstrap and Flask's context. ``before_configure`` is
    called whenever ``env.py`` calls ``context.configure``, after it has set up its own logging.
    ``around`` is called in place of ``context.run_migrations``, with that and a function that returns
    the context. ``transaction`` is one of :data:`migrator.project.env.transactions.MODES`. Raises any error
    of ``env.py`` or a revision.
    """
    config.cmd_opts = parse_command(command.options, command.kind, command.destination)
    known = locations(config)
    with (
        contextlib.chdir(Path.cwd()),  # env.py may change it, and may run again
        prepare_env(config, Path(script.env_py_location), command.target, command.options) as prepared,
    ):
        refuse_other_locations(known, prepared, command.options.bootstrap)
        before_configure()  # an earlier step may have set up its own logging
        environment = _environment(prepared, script, command.destination, hook)
        configure = configure_in(transaction, environment.configure, environment.get_context)

        def configure_after(*arguments: Any, **options: Any) -> None:
            before_configure()
            configure(*arguments, **options)

        # On the instance: Alembic's module proxy knows EnvironmentContext itself, and no subclass of it.
        environment.configure = configure_after  # type: ignore[method-assign]
        run_migrations = environment.run_migrations
        environment.run_migrations = lambda **options: around(  # type: ignore[method-assign]
            lambda: run_migrations(**options), environment.get_context
        )
        with operators_of_the_server(), environment:
            script.run_env()


def load_env(config: Config, script: ScriptDirectory, read: Callable[[], None]) -> BaseException | None:
    """Load ``env.py`` in Alembic's offline mode, and call ``read`` where it calls ``context.run_migrations``.

    That is where Alembic imports the revisions.  Nothing is run or printed.  Returns what ``env.py`` raised.
    """
    import io

    from alembic.operations import Operations
    from alembic.runtime.environment import EnvironmentContext

    place = Path(script.env_py_location)
    environment = EnvironmentContext(config, script, as_sql=True, destination_rev="head")
    configure = environment.configure

    def configure_silently(*arguments: Any, **options: Any) -> None:
        if not (arguments or options.get("connection") or options.get("url")):  # nobody has said where it is
            options["dialect_name"] = options.get("dialect_name") or "postgresql"
        configure(*arguments, **{**options, "output_buffer": io.StringIO()})

    def read_here(**_: Any) -> None:
        with Operations.context(environment.get_context()):
            read()
        if not can_run_twice(place):
            raise _Enough  # an import that fails is forgotten, so that the module is imported again

    def enough() -> bool:
        raise _Enough

    environment.configure = configure_silently  # type: ignore[method-assign]
    environment.run_migrations = read_here  # type: ignore[method-assign]
    if migrates_several(place):  # it would write a file for each database
        environment.is_offline_mode = enough  # type: ignore[method-assign]
    try:
        with contextlib.chdir(Path.cwd()), environment:
            script.run_env()
    except _Enough:
        pass
    except (Exception, SystemExit) as error:  # noqa: BLE001 - an env.py may raise anything
        return error
    return None


class _Enough(BaseException):
    """Ends an ``env.py`` that has done what it was loaded for."""


def _environment(config: Config, script: ScriptDirectory, destination: str, hook: Hook) -> EnvironmentContext:
    from alembic.runtime.environment import EnvironmentContext

    return EnvironmentContext(
        config,
        script,
        fn=cast(Any, hook),  # Alembic's stub expects one revision; Alembic passes all of them
        as_sql=False,
        starting_rev=None,
        destination_rev=destination,
        tag=None,
    )
