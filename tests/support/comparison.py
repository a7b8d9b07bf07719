"""Run a project under migrator and under plain Alembic, and compare the databases that they leave."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tests.support import plain_alembic
from tests.support.runner import Result, Runner
from tests.support.servers import LEDGER, Database


class Comparison:
    """Two databases, one for each; call it to upgrade both and to demand that they are the same."""

    def __init__(self, run: Runner, database: Database, plain: Database) -> None:
        self.run = run
        self.database = database
        self.plain = plain

    def __call__(
        self,
        folder: Path,
        *options: str,
        destination: str = "head",
        environment: Mapping[str, str] | None = None,
        driver: str = "psycopg2",
        every: bool = True,
    ) -> Result:
        """Upgrade both, side by side; return migrator's result once all was found as it should be.

        The databases must be the same as pg_dump writes them, rows included; with `every`, each revision must
        have its one line in the log; and the log's last line must be the outcome.
        """
        env = dict(environment or {})
        words = (*options, "upgrade", destination)
        running = self.run.start(*words, cwd=folder, env=env, database=self.database)
        other = plain_alembic.start(*words, cwd=folder, database=self.plain, env=env, driver=driver)
        said, _ = other.communicate(timeout=180)
        result = running.finish()
        assert other.returncode == 0, said
        assert result.code == 0, result
        assert self.database.dump(LEDGER) == self.plain.dump(), result
        assert not every or applied(result) == revisions_of(folder), result
        assert result.logs[-1]["outcome"] == "OK", result
        return result


def applied(result: Result) -> list[str]:
    """Return the revisions that the log says were applied, each as often as it says so, sorted."""
    return sorted(line["revision"] for line in result.logs if line["message"].startswith("applied "))


def revisions_of(folder: Path) -> list[str]:
    """Return the ids of all revisions below a folder, sorted."""
    texts = (file.read_text() for file in folder.rglob("versions/*.py"))
    found = (re.search(r"^revision = ['\"](.*)['\"]", text, re.M) for text in texts)
    return sorted(match[1] for match in found if match)
