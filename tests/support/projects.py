"""Write small Alembic projects, each as a real user might have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.servers import Database

ENV_FILES = Path(__file__).with_name("env_files")

ALEMBIC_INI = """\
[alembic]
script_location = %(here)s/migrations
prepend_sys_path = .
"""

PYPROJECT = """\
[tool.alembic]
script_location = "%(here)s/migrations"
prepend_sys_path = ["."]
"""

REVISION = '''\
"""{message}"""

import sqlalchemy as sa
from alembic import op

revision = {id!r}
down_revision = {down!r}
branch_labels = None
depends_on = None


def upgrade():
{upgrade}


def downgrade():
{downgrade}
'''


@dataclass(frozen=True)
class Revision:
    """One revision; `upgrade` and `downgrade` are SQL, or Python if the text calls `op.` or says `raise`."""

    id: str
    down: str | tuple[str, ...] | None
    upgrade: str = ""
    downgrade: str = ""
    message: str = "a change"

    def render(self) -> str:
        """Return the text of the revision's file."""
        return REVISION.format(
            id=self.id,
            down=self.down,
            message=self.message,
            upgrade=_body(self.upgrade),
            downgrade=_body(self.downgrade),
        )


def _body(text: str) -> str:
    text = text.strip()
    if not text:
        return "    pass"
    if not any(mark in text for mark in ("op.", "raise ", "import ")):
        text = f"op.execute({text!r})"
    return "\n".join(f"    {line}" if line else line for line in text.splitlines())


def linear_history(n: int, prefix: str = "r") -> list[Revision]:
    """Return `n` revisions in a row, `r001` to `r<n>`, the k-th of which makes the table `t<k>`."""
    ids = [f"{prefix}{number:03d}" for number in range(1, n + 1)]
    parents = [None, *ids[:-1]]
    return [
        Revision(id, down, f"CREATE TABLE t{k} (id int PRIMARY KEY, note text)", f"DROP TABLE t{k}")
        for k, (id, down) in enumerate(zip(ids, parents, strict=True), start=1)
    ]


def bring_to(database: Database, n: int) -> None:
    """Make a database as `linear_history(n)` leaves it, in a fraction of the time that a run takes."""
    tables = "; ".join(revision.upgrade for revision in linear_history(n))
    database.execute(
        f"{tables}; CREATE TABLE alembic_version"
        " (version_num varchar(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num));"
        f" INSERT INTO alembic_version VALUES ('r{n:03d}')"
    )


def write_project(
    folder: Path,
    files: Mapping[str, str] | None = None,
    *,
    revisions: Sequence[Revision] = (),
    config: str | None = "alembic.ini",
    env: str = "plain_url",
) -> Path:
    """Write a project into `folder` and return it; call it again to add revisions or replace files.

    config: `alembic.ini`, `pyproject.toml`, or None for a bare `migrations/`.
    env: a file of `env_files/`. files: whatever else (or instead) shall be there, by relative path.
    """
    written = {"migrations/env.py": (ENV_FILES / f"{env}.py").read_text()}
    written["migrations/script.py.mako"] = (ENV_FILES / "script.py.mako").read_text()
    if config == "alembic.ini":
        logging = ENV_FILES / f"{env}.ini"
        written["alembic.ini"] = ALEMBIC_INI + (logging.read_text() if logging.exists() else "")
    elif config == "pyproject.toml":
        written["pyproject.toml"] = PYPROJECT
    for revision in revisions:
        written[f"migrations/versions/{revision.id}.py"] = revision.render()
    (folder / "migrations" / "versions").mkdir(parents=True, exist_ok=True)
    for name, text in {**written, **(files or {})}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder
