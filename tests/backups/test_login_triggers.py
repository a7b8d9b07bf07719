"""A trigger on login (PostgreSQL 17) writes of who comes; what it writes of us is not in a copy that is compared."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.servers import Server

from .conftest import Workbench

Bench = Callable[..., Workbench]

AUDITED = (
    "CREATE TABLE audit (at timestamptz DEFAULT now(), who text);"
    " CREATE FUNCTION note() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER"
    " AS 'BEGIN INSERT INTO public.audit (who) VALUES (session_user); END';"
    " CREATE EVENT TRIGGER noted ON login EXECUTE FUNCTION note(); ALTER EVENT TRIGGER noted ENABLE ALWAYS"
)


def test_it_comes_back(servers: Callable[[str], Server], workbench: Bench) -> None:
    """Beside, and in place; and the copy has no setting of ours that keeps triggers from firing."""
    server = servers("embedded18")
    database = server.create_database()
    try:
        database.execute(AUDITED)
        bench = workbench(database, MIGRATOR_BACKUP_VERIFY="restore")
        backup = bench.back_up()
        assert backup.verified == "restore"
        written = backup.tables["public.audit"].rows
        assert written
        bench.restore(to=f"{database.name}_look")
        connection = server.connect(f"{database.name}_look")
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM audit")
            assert cursor.fetchone() == (written + 1,)  # this login, and none of ours
        connection.close()
        bench.restore()
        assert database.psql("SELECT evtname, evtenabled FROM pg_event_trigger") == [("noted", "A")]
        assert server.psql("SELECT count(*) FROM pg_db_role_setting") == [(0,)]
    finally:
        server.drop_database(database.name)
