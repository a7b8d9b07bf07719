"""The steps before ``env.py``: the project's bootstrap, and Flask's application context.

A project with its own command (``prefect server database upgrade``, ``flask db upgrade``) prepares its
``env.py``. It sets options and attributes of Alembic's Config, loads settings, or pushes a context.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrator.config.database_url import Target
from migrator.errors import HistoryError, MigratorError, SettingsError
from migrator.project import loading
from migrator.project.config import ProjectOptions, set_address

if TYPE_CHECKING:
    from alembic.config import Config

_SHAPES = re.compile(r"\b(?:recursive_)?version_locations\b|\bversion_path_separator\b")
_WANTS_FLASK = re.compile(r"\bcurrent_app\b|\bflask_migrate\b")

_LOCATIONS = ("script_location", "version_locations", "recursive_version_locations")


@contextlib.contextmanager
def prepare_env(
    config: Config, env_file: Path, target: Target | None, options: ProjectOptions
) -> Iterator[Config]:
    """Do every step before ``env.py``, and undo it after: the address, the bootstrap, Flask's context.

    Yields the prepared Config. Raises :class:`SettingsError` and :class:`HistoryError`.
    """
    wants_flask = _read_flask_variables(env_file)
    set_address(config, env_file, target, options.export)
    with contextlib.ExitStack() as stack:
        if wants_flask:
            stack.enter_context(loading.command_line("flask", loading.flask_arguments(sys.argv[1:])))
        stack.enter_context(_entered(config, options.bootstrap))
        yield stack.enter_context(_flask_context(config)) if wants_flask else config


def locations(config: Config) -> tuple[str | None, ...]:
    """Return the options of the Config that locate the revisions."""
    return tuple(config.get_main_option(name) for name in _LOCATIONS)


def refuse_other_locations(before: tuple[str | None, ...], config: Config, bootstrap: str) -> None:
    """Raise :class:`HistoryError` if the prepared Config has other revisions than those that were read."""
    if locations(config) != before:
        raise HistoryError(
            f"The code that prepares env.py{f' ({bootstrap})' if bootstrap else ''} changed the folders "
            "of the revisions after they were read.",
            next_step="name the folders in alembic.ini (version_locations), or set version_locations in the "
            "bootstrap's own module, where it takes effect in time",
        )


def sets_locations(name: str) -> bool:
    """Tell whether the bootstrap also sets the folders of the revisions, as far as its source shows.

    It is then entered before the revisions are read, and not only before ``env.py``. Its module is
    found without an import, which may load the application.
    """
    if not name:
        return False
    spec = loading.find_module(name.partition(":")[0])
    if spec is None:
        return False
    try:
        text = Path(spec.origin or "").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return bool(_SHAPES.search(text))


@contextlib.contextmanager
def _entered(config: Config, name: str) -> Iterator[None]:
    """Enter the context manager that ``name`` (module:callable) returns for Alembic's Config; leave it at the
    end.

    Raises :class:`SettingsError` if it does not exist, and :class:`HistoryError` for its own errors.
    """
    if not name:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.callback(_restore_path, list(sys.path))
        sys.path.append(str(Path.cwd()))  # last, so that a folder there hides no package
        with _named(name):
            manager = _load(name)(config)
            if not (hasattr(type(manager), "__enter__") and hasattr(type(manager), "__exit__")):
                raise _bad(
                    name,
                    f"returns {type(manager).__name__}, not a context manager: decorate it with "
                    "contextlib.contextmanager",
                )
            leave = type(manager).__exit__
            type(manager).__enter__(manager)
        stack.push(lambda *raised: _leave(name, leave, manager, raised))
        yield


def _leave(name: str, leave: Callable[..., Any], manager: Any, raised: tuple[Any, ...]) -> bool:
    """Leave the context manager; an error that it passes on is not its own failure."""
    failure: BaseException | None = None
    with _named(name):
        try:
            return bool(leave(manager, *raised))
        except BaseException as error:
            if error is not raised[1]:
                raise
            failure = error
    raise failure


def _restore_path(path: list[str]) -> None:
    """Remove the working directory from the path, unless the application has changed the path too."""
    if sys.path == [*path, str(Path.cwd())]:
        sys.path[:] = path


def _load(name: str) -> Callable[[Config], Any]:
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise _bad(name, f"there is no module {missing}") from None
        raise
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise _bad(name, f"{module_name} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise _bad(name, f"{attribute} is {type(found).__name__}, which cannot be called")
    function: Callable[[Config], Any] = found
    return function


def _bad(name: str, reason: str) -> SettingsError:
    return SettingsError(
        [f"MIGRATOR_BOOTSTRAP={name}: {reason}"],
        next_step="name it as module:callable; the module is imported like the imports of env.py",
    )


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Report an application error here as the bootstrap's, not as ``env.py``'s."""
    try:
        yield
    except MigratorError:
        raise
    except (Exception, SystemExit) as error:
        text = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else " ".join(str(error).split())
        raise HistoryError(
            f"The bootstrap {name} failed: {type(error).__name__}: {text.rstrip('.')}.",
            next_step=loading.remedy(error, "fix the cause, or add the bootstrap's imports to the image"),
        ) from error


# -- Flask -------------------------------------------------------------------------------------------------

_APPLICATIONS: dict[str, Any] = {}
"""The application of FLASK_APP, created once: many applications cannot be created twice in one process."""


def _read_flask_variables(env_file: Path) -> bool:
    """Tell whether ``env.py`` needs Flask's application context, and ``FLASK_APP`` names the application.

    Reads ``.flaskenv`` and ``.env`` first, as the ``flask`` command does.
    """
    try:
        wanted = bool(_WANTS_FLASK.search(env_file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError):
        return False
    if not wanted or importlib.util.find_spec("flask") is None:
        return False
    if os.environ.get("FLASK_SKIP_DOTENV", "").lower() not in {"1", "true", "yes"}:
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module("flask.cli").load_dotenv()
    return bool(os.environ.get("FLASK_APP", "").strip())


@contextlib.contextmanager
def _flask_context(config: Config) -> Iterator[Config]:
    """Push the application context as ``flask db`` does, and let Flask-Migrate's callbacks prepare the
    Config.

    An existing application context (a bootstrap's) stays.
    https://flask.palletsprojects.com/en/stable/cli/#application-discovery
    """
    flask, flask_cli = importlib.import_module("flask"), importlib.import_module("flask.cli")
    with contextlib.ExitStack() as stack:
        if not flask.has_app_context():
            name = os.environ["FLASK_APP"].strip()
            os.environ["FLASK_RUN_FROM_CLI"] = "true"  # app.run() in a module then does nothing
            try:
                if name not in _APPLICATIONS:
                    _APPLICATIONS[name] = flask_cli.ScriptInfo(name).load_app()
                application = _APPLICATIONS[name]
            except flask_cli.NoAppException as error:
                raise SettingsError(
                    [f"FLASK_APP={name}: {' '.join(str(error).split()).rstrip('.')}"],
                    next_step="set FLASK_APP to the value that `flask db` uses, such as shop:create_app",
                ) from error
            except MigratorError:
                raise
            except (Exception, SystemExit) as error:
                raise HistoryError(
                    f"The Flask application failed to load: {type(error).__name__}: {' '.join(str(error).split())}.",
                    next_step=loading.remedy(
                        error, "fix the cause, or add the application's imports to the image"
                    ),
                ) from error
            stack.enter_context(application.app_context())
        extension = flask.current_app.extensions.get("migrate")
        callbacks = getattr(getattr(extension, "migrate", None), "call_configure_callbacks", None)
        yield (callbacks(config) or config) if callable(callbacks) else config
