"""docs/howto/migrating-from: its YAML is valid, its settings are accepted, and databases end as it says."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from migrator.cli.parser import make_parser
from migrator.config import settings
from migrator.outcome import ExitCode
from tests.chart.checks import check, check_pod
from tests.support import plain_alembic
from tests.support.helm import Helm
from tests.support.kubernetes import hardening_violations, policy_violations, restricted_violations
from tests.support.projects import linear_history, write_project
from tests.support.runner import Result, Runner
from tests.support.servers import Database, Server

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "howto" / "migrating-from").glob("*.md"))
SECTIONS = {
    text.splitlines()[0].removeprefix("# "): text
    for text in (page.read_text(encoding="utf-8") for page in PAGES if page.name != "README.md")
}
"""The pages by their titles, one for each origin."""
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
# `shop` is the database in the page; its own tables, and those that are not compared.
SHOP = """
CREATE TABLE customers (id int PRIMARY KEY, mail text NOT NULL CHECK (mail LIKE '%@%'));
CREATE TABLE orders (id int PRIMARY KEY, customer int NOT NULL REFERENCES customers, total numeric(12, 2));
CREATE VIEW totals AS SELECT customer, sum(total) AS "total: 100%" FROM orders GROUP BY customer;
CREATE FUNCTION twice(x int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN x * 2; END $$;
"""
FLYWAY = """
CREATE TABLE flyway_schema_history (installed_rank int PRIMARY KEY, version text, script text, success bool);
INSERT INTO flyway_schema_history VALUES (1, '1', 'V1__customers.sql', true), (2, '2', 'V2__orders.sql', true);
"""
GOLANG_MIGRATE = """
CREATE TABLE schema_migrations (version bigint PRIMARY KEY, dirty boolean NOT NULL);
INSERT INTO schema_migrations VALUES (2, false);
"""
NEXT = '''
from alembic import op

revision = "next"
down_revision = "baseline"


def upgrade() -> None:
    op.execute("""ALTER TABLE orders ADD COLUMN note text""")


def downgrade() -> None:
    op.execute("ALTER TABLE orders DROP COLUMN note")
'''


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks in a language, without the indentation of the list that they stand in."""
    found = [(len(indent), body) for indent, name, body in FENCE.findall(text) if name == language]
    return ["".join(line[width:] for line in body.splitlines(keepends=True)) for width, body in found]


def part(section: str, heading: str) -> str:
    """Return what stands below one of a page's headings."""
    return SECTIONS[section].partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def after() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the documents that people are to come to, with the section that they are in."""
    for section in SECTIONS:
        for block in blocks(part(section, "After"), "yaml"):
            yield section, yaml.safe_load(block)


def migrators() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each of our containers: a compose service, or a container of a pod, as `environment` and the rest."""
    for section, document in after():
        if "services" in document:
            yield section, document["services"]["migrator"]
            continue
        spec = document.get("spec", {}).get("template", {}).get("spec", document)
        for container in [*spec.get("initContainers", []), *spec.get("containers", [])]:
            if container["name"] == "migrator":
                environment = {item["name"]: item["value"] for item in container["env"]}
                yield section, {**container, "environment": environment}


# -- what is written --------------------------------------------------------------------------------------


def test_every_way_is_told_whole() -> None:
    assert len(SECTIONS) == 5
    for section, text in SECTIONS.items():
        for heading in ("Before", "After", "What changes", "Going back"):
            assert text.count(f"\n## {heading}\n") == 1, (section, heading)
        assert blocks(part(section, "Before"), "yaml"), section
        assert blocks(part(section, "After"), "yaml"), section
    assert {section for section, _ in migrators()} == set(SECTIONS)


@pytest.mark.parametrize("number", range(len(list(migrators()))))
def test_the_settings_are_accepted(number: int, tmp_path: Path) -> None:
    _, container = list(migrators())[number]
    secret = tmp_path / "secret"
    secret.write_text("postgresql://shop:secret@db/shop")
    environment = {
        name: str(secret) if name.endswith("_FILE") else value
        for name, value in container["environment"].items()
    }
    found = settings.load({}, environment, tmp_path)
    assert found.target is not None
    assert not found.warnings
    make_parser().parse_args(container.get("args", []))


def test_nothing_waits_for_what_is_not_there() -> None:
    for section, document in after():
        services = document.get("services", {})
        for name, service in services.items():
            assert set(service.get("depends_on", {})) <= set(services), (section, name)
            named = {text.split(":")[0] for text in service.get("volumes", []) if not text.startswith(".")}
            assert named <= set(document.get("volumes", {})), (section, name)
        if services:
            assert "migrator" in str(services["backend"]["depends_on"]) or "seed" in services


def test_the_job_is_restricted_and_fails_by_the_codes_bands() -> None:
    (job,) = (document for _, document in after() if document.get("kind") == "Job")
    assert restricted_violations(job) == hardening_violations(job) == policy_violations(job) == []
    check_pod(job)


def test_the_jobs_that_people_come_from_are_neither() -> None:
    (job,) = (yaml.safe_load(text) for text in blocks(part("From a Helm hook Job", "Before"), "yaml"))
    assert restricted_violations(job)
    assert policy_violations(job)


def test_the_charts_values_render(tmp_path: Path) -> None:
    (values,) = (document for _, document in after() if "mode" in document)
    check(Helm(tmp_path).template(values))


def test_the_script_is_one(tmp_path: Path) -> None:
    (script,) = blocks(part("From an entrypoint script", "Before"), "sh")
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)


# -- what it does -----------------------------------------------------------------------------------------


def alembic(folder: Path, database: Database, *arguments: str) -> None:
    """Run plain Alembic to its end, which has to be a success."""
    process = plain_alembic.start(*arguments, cwd=folder, database=database, env={})
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said


def test_from_alembic_and_back(database: Database, tmp_path: Path, run_migrator: Runner) -> None:
    folder = write_project(tmp_path / "shop", revisions=linear_history(2))
    alembic(folder, database, "upgrade", "head")
    write_project(folder, revisions=linear_history(3))
    assert run_migrator("status", cwd=folder, database=database).code == 0
    assert run_migrator("check", cwd=folder, database=database).code == ExitCode.PENDING

    assert run_migrator("upgrade", cwd=folder, database=database).code == 0
    assert database.psql("SELECT revision FROM migrator_ledger WHERE event = 'applied'") == [("r003",)]
    assert list(run_migrator.backups.glob("*.json"))

    write_project(folder, revisions=linear_history(4))
    alembic(folder, database, "upgrade", "head")
    assert database.psql("SELECT version_num FROM alembic_version") == [("r004",)]
    database.execute("DROP TABLE migrator_ledger")
    assert run_migrator("upgrade", cwd=folder, database=database).code == 0


@pytest.fixture
def adopted(
    server: Server, tmp_path: Path, run_migrator: Runner
) -> Iterator[Callable[[str, str], tuple[Database, Path]]]:
    """Make a database as another tool leaves it, and the project that the page tells to make from it."""
    made: list[Database] = []

    def make(history: str, table: str) -> tuple[Database, Path]:
        database = server.create_database()
        made.append(database)
        database.execute(SHOP + history)
        folder = tmp_path / "shop"
        folder.mkdir()
        words = ("alembic", "init", "migrations")
        result = run_migrator(*words, cwd=folder, database=database)
        assert result.code == 0, result
        (folder / "alembic.ini").unlink()  # what compose mounts is migrations/ alone
        (folder / "migrations" / "baseline.sql").write_text(schema_of(database, table))
        (revision,) = blocks(SECTIONS["From Flyway"], "python")
        (folder / "migrations" / "versions" / "baseline.py").write_text(revision)
        return database, folder

    yield make
    for database in made:
        server.drop_database(database.name)


def schema_of(database: Database, table: str) -> str:
    """Return what the page's pg_dump prints, without the lines that the page takes out."""
    (line,) = (text for text in blocks(SECTIONS["From Flyway"], "sh") if text.startswith("pg_dump"))
    words = shlex.split(line.partition(">")[0].replace("flyway_schema_history", table))
    assert words[-1] == "shop"
    done = subprocess.run(
        [str(database.server.bin / words[0]), *words[1:-1], database.name],
        env={**database.environment()},
        capture_output=True,
        text=True,
        check=True,
    )
    return "".join(line for line in done.stdout.splitlines(keepends=True) if not line.startswith("\\"))


HISTORIES: Mapping[str, tuple[str, str]] = {
    "flyway": (FLYWAY, "flyway_schema_history"),
    "golang-migrate": (GOLANG_MIGRATE, "schema_migrations"),
}


@pytest.mark.parametrize("tool", HISTORIES)
def test_from_another_tool_and_back(
    tool: str,
    adopted: Callable[[str, str], tuple[Database, Path]],
    database: Database,
    run_migrator: Runner,
) -> None:
    sql, table = HISTORIES[tool]
    theirs, folder = adopted(sql, table)
    before, kept = theirs.dump(), theirs.dump(f"--table={table}")

    def run(*arguments: str, on: Database = theirs, **environment: str | None) -> Result:
        return run_migrator(*arguments, cwd=folder, database=on, env=environment)

    assert run("upgrade").code == ExitCode.UNVERSIONED
    assert theirs.dump() == before

    adoption = run("upgrade", MIGRATOR_BASELINE="baseline")
    assert adoption.code == 0, adoption
    (folder / "migrations" / "versions" / "next.py").write_text(NEXT)
    assert run("upgrade", MIGRATOR_BASELINE="baseline").code == 0
    assert theirs.psql("SELECT note FROM orders") == []
    assert theirs.dump(f"--table={table}") == kept

    fresh = run("upgrade", on=database, MIGRATOR_BASELINE="baseline")
    assert fresh.code == 0, fresh.stderr
    ours = ("--exclude-table=migrator_ledger*", f"--exclude-table={table}")
    assert database.schema_dump(*ours) == theirs.schema_dump(*ours)

    assert run("downgrade", "baseline").code == 0
    assert theirs.schema_dump(f"--exclude-table={table}").count("note text") == 0
    theirs.execute("DROP TABLE migrator_ledger, alembic_version")
    assert theirs.dump() == before
