"""docs/howto/disaster.md, followed word for word: each section's commands run on a database that was just broken so."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.outcomes import done
from tests.support.projects import Revision
from tests.support.runner import Runner, migrator_command
from tests.support.servers import Database, Server

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "disaster.md"
Project = Callable[..., Path]

ROWS = "INSERT INTO orders SELECT g, 'order ' || g FROM generate_series(1, 1000) g; SELECT lo_from_bytea(7, 'large')"
HISTORY = [
    Revision("r001", None, f"CREATE TABLE orders (id int PRIMARY KEY, note text); {ROWS}"),
    Revision("r002", "r001", "DELETE FROM orders WHERE id > 10"),
]
DESTROYED, GONE = "destroyed", "gone"
SECTIONS = {
    "Data was destroyed": DESTROYED,
    "One table is wanted back": DESTROYED,
    "The database is gone": GONE,
    "Data was destroyed, and there is no migrator": DESTROYED,
    "The database is gone, and there is no migrator": GONE,
}


def commands() -> dict[str, str]:
    """Return the fenced commands of each section, as one script."""
    found = {}
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        blocks = re.findall(r"^```sh\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        if blocks:
            found[title.strip()] = "".join(blocks)
    return found


def test_every_section_with_commands_is_followed() -> None:
    assert set(commands()) == set(SECTIONS)


@pytest.fixture(scope="module")
def disaster_server(servers: Callable[[str], Server]) -> Server:
    return servers("debian")


@pytest.mark.parametrize("section", SECTIONS)
def test_the_section_leads_back_into_service(
    section: str, disaster_server: Server, project: Project, run_migrator: Runner
) -> None:
    server = disaster_server
    server.psql("CREATE DATABASE shop")
    shop = Database(server, "shop")
    try:
        folder = project(revisions=HISTORY[:1])
        done(run_migrator(cwd=folder, database=shop))
        project(revisions=HISTORY)
        done(run_migrator(cwd=folder, database=shop))  # with a backup, and then it destroys
        assert shop.psql("SELECT count(*) FROM orders") == [(10,)]
        if SECTIONS[section] is GONE:
            server.drop_database("shop")
        finished = follow(commands()[section], shop, folder, run_migrator.backups)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert "transaction in progress" not in finished.stderr, (
            "something ended the transaction that all is in"
        )
        assert shop.psql("SELECT count(*), max(note) FROM orders") == [(1000, "order 999")]
        one_table = section == "One table is wanted back"
        assert shop.psql("SELECT version_num FROM alembic_version") == [("r002" if one_table else "r001",)]
        left = server.psql("SELECT datname::text FROM pg_database WHERE datname LIKE 'shop%%' ORDER BY 1")
        assert left == [("shop",)] + [("shop_broken",)] * ("destroyed, and there is no" in section)
    finally:
        for (name,) in server.psql("SELECT datname::text FROM pg_database WHERE datname LIKE 'shop%%'"):
            server.drop_database(name)


def follow(script: str, shop: Database, folder: Path, backups: Path) -> subprocess.CompletedProcess[str]:
    """Run the commands in bash, which ends at the first one that fails."""
    command = migrator_command()
    environment = {
        **shop.environment(),
        "PATH": f"{Path(command[0]).parent}:{shop.server.bin}:{os.environ['PATH']}",
        "DATABASE_URL": shop.url,
        "MIGRATOR_BACKUP_URL": backups.as_uri(),
        "BACKUPS": str(backups),
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
