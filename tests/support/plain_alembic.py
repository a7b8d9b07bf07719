"""Plain Alembic's own command line, as a user without migrator runs it, on a database of its own.

    python -m tests.support.plain_alembic upgrade head

The address comes from PLAIN_URL and becomes `sqlalchemy.url`, which users write into their alembic.ini by hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.servers import Database

ROOT = Path(__file__).resolve().parents[2]


def start(
    *arguments: str, cwd: Path, database: Database, env: Mapping[str, str], driver: str = "psycopg2"
) -> subprocess.Popen[str]:
    """Start `alembic ...` in `cwd` against `database`; DATABASE_URL names it, too."""
    url = database.url.replace("postgresql://", f"postgresql+{driver}://", 1)
    return subprocess.Popen(
        [sys.executable, "-c", "from tests.support.plain_alembic import main; main()", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DATABASE_URL": url, **env, "PLAIN_URL": url},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def main() -> None:
    """Run Alembic's command line with `sqlalchemy.url` set."""
    from alembic.config import CommandLine, Config

    sys.path.remove(str(ROOT))
    make = Config.__init__

    def make_with_address(self: Config, *arguments: object, **options: object) -> None:
        make(self, *arguments, **options)  # type: ignore[arg-type]
        self.set_main_option("sqlalchemy.url", os.environ["PLAIN_URL"].replace("%", "%%"))

    Config.__init__ = make_with_address  # type: ignore[method-assign]
    CommandLine(prog="alembic").main(sys.argv[1:])
