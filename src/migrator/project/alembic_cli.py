"""Alembic's own command line, with this project's preparation and this run's target."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from migrator.config.database_url import Target
from migrator.errors import SettingsError
from migrator.postgres.queries import LEDGER
from migrator.project import loading
from migrator.project.config import ProjectOptions, import_alembic, make_config, set_address
from migrator.project.env.bootstrap import prepare_env
from migrator.project.env.operators import operators_of_the_server

_ALEMBIC_HELP = "migrator alembic --help"


def run_alembic(words: Sequence[str], options: ProjectOptions, target: Target | None) -> str:
    """Run Alembic's own command line against the target; return its error message, or an empty string.

    Raises :class:`SettingsError` for arguments that it rejects, and any error of ``env.py`` or a
    revision.
    """
    import_alembic()
    from alembic.config import CommandLine
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    command_line = CommandLine(prog="migrator alembic")
    try:
        parsed = command_line.parser.parse_args(list(words))
    except SystemExit as error:  # argparse's own: 0 after --help, 2 for a usage error that it has printed
        if error.code in (0, None):
            return ""
        raise SettingsError(
            ["Alembic's own command line rejects this; its reason is above"], next_step=_ALEMBIC_HELP
        ) from None
    if not hasattr(parsed, "cmd"):
        raise SettingsError(["no command for Alembic"], next_step=_ALEMBIC_HELP)
    try:
        if parsed.cmd[0].__name__ in {"init", "list_templates"}:
            command_line.main(list(words))
            return ""
        parsed.x = [*(options.x or ()), *(parsed.x or ())] or None
        parsed.raiseerr = True
        named = parsed.config if isinstance(parsed.config, list) else [parsed.config] if parsed.config else []
        chosen = options._replace(
            config=tuple(named) or options.config,
            name=parsed.name if parsed.name != "alembic" else options.name,
        )
        config = make_config(chosen, Path.cwd(), parsed)
        env_file = loading.find_env(config)
        set_address(
            config, env_file, target, chosen.export
        )  # a script_location may be in the application's package
        ScriptDirectory.from_config(config)  # puts its folders on the path
        with (
            loading.command_line("alembic", words),
            prepare_env(config, env_file, target, chosen) as prepared,
            _ledger_left_out(),
            operators_of_the_server(),
        ):
            command_line.run_cmd(prepared, parsed)
    except CommandError as error:
        return " ".join(str(error).split())
    except SystemExit as error:  # sys.exit in env.py or a revision
        return "" if error.code in (0, None) else f"Alembic ended with {error.code}"
    return ""


@contextlib.contextmanager
def _ledger_left_out() -> Iterator[None]:
    """Hide the ledger from ``--autogenerate`` and ``check``, which would drop every table without a model.

    The filters of ``env.py`` still decide about everything else.
    https://alembic.sqlalchemy.org/en/latest/autogenerate.html#omitting-table-names-from-the-autogenerate-process
    """
    from alembic.runtime.environment import EnvironmentContext

    configure = EnvironmentContext.configure

    def configure_without(self: EnvironmentContext, *arguments: Any, **options: Any) -> None:
        chosen = options.get("include_name")

        def include_name(name: str | None, kind: str, parents: Any) -> bool:
            if kind == "table" and name == LEDGER:
                return False
            return chosen is None or bool(chosen(name, kind, parents))

        configure(self, *arguments, **{**options, "include_name": include_name})

    EnvironmentContext.configure = configure_without  # type: ignore[method-assign]
    try:
        yield
    finally:
        EnvironmentContext.configure = configure  # type: ignore[method-assign]
