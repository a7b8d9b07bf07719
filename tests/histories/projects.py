"""The projects whose histories are run, each installed unmodified in an environment of its own."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.servers import Database

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "histories"


@dataclass(frozen=True)
class History:
    """A project on PyPI that ships its migrations.

    name: the project, its pins in `<name>.txt`. ini: its Alembic configuration, below site-packages; empty where it
    ships none.
    head and revisions: what its history ends in and how many there are. address_variable: the variable in
    which its env.py expects the address; None where it reads Alembic's `sqlalchemy.url`.
    """

    name: str
    ini: str
    head: str
    revisions: int
    address_variable: str | None = None
    home_variable: str | None = None

    def install(self) -> Installation:
        """Return the project installed with migrator beside it, from an earlier run if nothing changed."""
        pins = ROOT / "tests" / "histories" / f"{self.name}.txt"
        venv = CACHE / self.name
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / f"{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            if _changed(venv / "pinned", pins):
                run(sys.executable, "-m", "venv", "--clear", str(venv))
                # What is imported is compiled then: a small part of it.
                run(*pip, "--only-binary=:all:", "--no-deps", "--no-compile", "-r", str(pins))
                _note(venv / "pinned", pins)
            if _changed(venv / "project", ROOT / "pyproject.toml"):
                run(*pip, "-c", str(pins), "--editable", str(ROOT))
                _note(venv / "project", ROOT / "pyproject.toml")
        (site_packages,) = (venv / "lib").glob("python3.*/site-packages")
        return Installation(self, venv / "bin", site_packages, site_packages / self.ini)


@dataclass(frozen=True)
class Installation:
    """A project with its programs (`alembic`, `migrator`) and its configuration file."""

    history: History
    bin: Path
    site_packages: Path
    ini: Path

    def variables(self, database: Database, folder: Path) -> Mapping[str, str]:
        """Return what the project itself wants to be told; the same for plain Alembic and for migrator."""
        history = self.history
        variables = {}
        if history.address_variable:
            variables[history.address_variable] = _with_driver(database.url)
        if history.home_variable:
            variables[history.home_variable] = str(folder / "home")
        return variables

    def plain_upgrade(self, database: Database, folder: Path) -> None:
        """Bring the database to head with Alembic's own command."""
        env = {**os.environ, **self.variables(database, folder)}
        alembic = str(self.bin / "alembic")
        run(alembic, "-c", str(self._plain_ini(database, folder)), "upgrade", "head", cwd=folder, env=env)

    def _plain_ini(self, database: Database, folder: Path) -> Path:
        """Write the project's alembic.ini with the address put in, as its users do by hand."""
        address = _with_driver(database.url).replace("%", "%%")
        lines = {"sqlalchemy.url": address, "script_location": str(self._script_location())}
        text = self.ini.read_text()
        for name, value in lines.items():
            line = f"{name} = {value}".replace("\\", "\\\\")
            text, count = re.subn(rf"(?m)^{re.escape(name)} = .*$", line, text)
            assert count == 1, f"{name} stands {count} times in {self.ini}"
        ini = folder / "alembic.ini"
        ini.write_text(text)
        return ini

    def _script_location(self) -> Path:
        (found,) = re.findall(r"(?m)^script_location = (.*)$", self.ini.read_text())
        return self.ini.parent / str(found).replace("%(here)s", str(self.ini.parent))


def _with_driver(url: str) -> str:
    """Name the driver: SQLAlchemy 2.1 takes psycopg 3 where none is named."""
    return url.replace("postgresql://", "postgresql+psycopg2://", 1)


def _stamp(file: Path) -> str:
    return hashlib.sha256(f"{sys.version} {ROOT}".encode() + file.read_bytes()).hexdigest()


def _note(stamp: Path, file: Path) -> None:
    stamp.write_text(_stamp(file))


def _changed(stamp: Path, file: Path) -> bool:
    """Whether `file` is not what `stamp` was noted for."""
    return not stamp.exists() or stamp.read_text() != _stamp(file)


def run(*command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
    """Run a command to its end; fail with what it said if it fails."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


HISTORIES = (
    # Ids with dots and letters, a script_location relative to the working directory, SQLAlchemy 2.1.
    History("optuna", "optuna/storages/_rdb/alembic.ini", head="v3.2.0.a", revisions=10),
    # The env.py hands the engine to the application, and its revisions read Alembic's configuration.
    History("ckan", "ckan/migration/alembic.ini", head="9445ce34fc23", revisions=109),
    # The env.py never looks at Alembic's address, sets up logging of its own, one transaction a revision.
    History(
        "apache-airflow-core",
        "airflow/alembic.ini",
        head="d2f4e1b3c5a7",
        revisions=124,
        address_variable="AIRFLOW__DATABASE__SQL_ALCHEMY_CONN",
        home_variable="AIRFLOW_HOME",
    ),
)
