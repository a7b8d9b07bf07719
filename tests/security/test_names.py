"""What is locked, dropped or restored into is what was found: a name that was taken meanwhile names nothing of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrator.backups import databases
from migrator.backups.clients import Login, WouldLose
from migrator.backups.restore import write_detection
from migrator.backups.restore.tables import restore_tables
from migrator.errors import RestoreFailed
from migrator.pipeline.stages import invalid_indexes
from migrator.pipeline.stages.backup import back_up
from migrator.postgres.errors import QueryFailed
from migrator.postgres.session import connect
from migrator.schema import catalog

from .test_relations import APPLICATION, Hostile, settings_of, working
from .test_relations import database_of as database_of
from .test_relations import hostile as hostile


def test_a_table_that_was_renamed_meanwhile_is_not_taken_for_locked(hostile: Hostile, tmp_path: Path) -> None:
    """Whoever writes to it would lose that by the restore."""
    hostile.execute("CREATE TABLE t (a int)")
    settings = settings_of(hostile.database, tmp_path / "backups")
    target = settings.required_target
    with connect(target, APPLICATION, 60) as session:
        backup = back_up(session, settings, run_id="run1", revisions=("r1",), application_name=APPLICATION)
    hostile.execute("LOCK TABLE t", commit=False)

    def hold() -> None:
        with write_detection.nobody_writes(Login(target, APPLICATION, 60), backup, frozenset):
            pass

    with working(hold) as result:
        hostile.plant_when_somebody_waits("ALTER TABLE t RENAME TO was_t; CREATE TABLE t (a int)")
    assert isinstance(result["error"], WouldLose)
    assert "was_t was renamed or dropped" in str(result["error"])


def test_an_index_that_took_the_name_meanwhile_stays(hostile: Hostile) -> None:
    hostile.execute("CREATE TABLE t (a int, b int); CREATE INDEX left_over ON t (a)")
    with connect(settings_of(hostile.database, Path("/tmp")).required_target, APPLICATION, 60) as session:
        (found,) = catalog.indexes_named(session, ["left_over"])
        hostile.execute("ALTER INDEX left_over RENAME TO other; CREATE INDEX left_over ON t (b)")
        with pytest.raises(QueryFailed, match="it was renamed or dropped"):
            invalid_indexes._drop(session, found)
        assert {str(index) for index in catalog.indexes_named(session, ["left_over", "other"])} == {
            "public.left_over",
            "public.other",
        }


def test_a_database_of_another_role_is_not_one_that_a_restore_set_aside(hostile: Hostile) -> None:
    server, name = hostile.database.server, hostile.database.name
    names = [databases.shorten(name, f"_before_20200101T00000{number}Z-abcdef") for number in (1, 2)]
    server.psql(f'CREATE DATABASE "{names[0]}"')
    server.psql(f'CREATE DATABASE "{names[1]}" OWNER "{hostile.role}"')
    try:
        with connect(settings_of(hostile.database, Path("/tmp")).required_target, APPLICATION, 60) as session:
            assert databases.expired(session, name, 60) == [names[0]]
    finally:
        for item in names:
            server.drop_database(item)


def test_no_table_is_restored_into_the_schema_of_another_role(hostile: Hostile, tmp_path: Path) -> None:
    """Its owner could rename it, and put a view with a trigger of its own under the name that rows are copied to."""
    hostile.database.execute("CREATE TABLE t AS SELECT 1 AS a")
    settings = settings_of(hostile.database, tmp_path / "backups")
    target = settings.required_target
    with connect(target, APPLICATION, 60) as session:
        back_up(session, settings, run_id="run1", revisions=("r1",), application_name=APPLICATION)
    hostile.execute("CREATE SCHEMA trap")

    def restored(schema: str) -> None:
        restore_tables(
            target, settings, "latest", ["t"], schema=schema, run_id="run2", application_name=APPLICATION
        )

    with pytest.raises(RestoreFailed, match="schema trap belongs to another role"):
        restored("trap")
    assert hostile.database.psql("SELECT to_regclass('trap.t') IS NULL") == [(True,)]
    restored("fresh")
    restored_again = hostile.database.psql("SELECT a FROM fresh.t")
    assert restored_again == [(1,)]
