"""A version table that an ordinary role planted, or put a trigger on: writing it calls no function of the role."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.ledger import table as ledger
from tests.security import canaries, world
from tests.security.scenario import Scenario, Step
from tests.security.world import World

VERSION_TABLE = "CREATE TABLE public.alembic_version (version_num varchar(32) PRIMARY KEY)"
COLUMNS = re.sub(r"(?s)^.*?\((.*)\).*?$", r"\1", ledger._CREATE)
TYPE = """
CREATE TYPE app.revision AS ENUM ('r001', 'r002', 'r003');
CREATE FUNCTION app.as_json(given app.revision) RETURNS json LANGUAGE plpgsql AS
  $$ BEGIN PERFORM app.saw('cast to json'); RETURN '"r001"'; END $$;
CREATE FUNCTION app.as_words(given app.revision) RETURNS varchar LANGUAGE plpgsql AS
  $$ BEGIN PERFORM app.saw('cast to varchar'); RETURN 'r001'; END $$;
CREATE CAST (app.revision AS json) WITH FUNCTION app.as_json(app.revision);
CREATE CAST (app.revision AS varchar) WITH FUNCTION app.as_words(app.revision) AS IMPLICIT;
CREATE TABLE public.alembic_version (version_num app.revision)
"""
PLANTED = {
    "a version table that is a view": "CREATE VIEW public.alembic_version AS"
    " SELECT 'r001'::varchar(32) AS version_num WHERE app.saw('version table')",
    "a version table with a trigger": f"""{VERSION_TABLE};
      CREATE TRIGGER planted BEFORE INSERT OR UPDATE OR DELETE ON public.alembic_version
      FOR EACH ROW EXECUTE FUNCTION app.fired()""",
    "a version table with a rule": f"""{VERSION_TABLE};
      CREATE RULE planted AS ON INSERT TO public.alembic_version DO ALSO SELECT app.saw('rule')""",
    "a version table with a check": """CREATE TABLE public.alembic_version
      (version_num varchar(32) PRIMARY KEY CHECK (app.saw('check')))""",
    "a version table with an index": f"""{VERSION_TABLE};
      CREATE INDEX ON public.alembic_version (app.seen('index', length(version_num)))""",
    "a version table with a check by an operator": """
      CREATE FUNCTION app.alike(a text, b text) RETURNS boolean LANGUAGE plpgsql AS
        $$ BEGIN RETURN app.saw('operator'); END $$;
      CREATE OPERATOR app.=== (LEFTARG = text, RIGHTARG = text, FUNCTION = app.alike);
      CREATE TABLE public.alembic_version
        (version_num varchar(32) PRIMARY KEY CHECK (version_num OPERATOR(app.===) 'r001'))""",
    "a version table of a domain with a check": """
      CREATE DOMAIN app.revised AS varchar(32) CHECK (app.saw('domain'));
      CREATE TABLE public.alembic_version (version_num app.revised)""",
    "a version table with a rule that writes a table of theirs": f"""{VERSION_TABLE};
      CREATE TABLE app.bait (i integer);
      CREATE TRIGGER planted BEFORE INSERT ON app.bait FOR EACH ROW EXECUTE FUNCTION app.fired();
      CREATE RULE planted AS ON INSERT TO public.alembic_version DO ALSO INSERT INTO app.bait VALUES (1)""",
    "a version table with a child that has a trigger": f"""{VERSION_TABLE};
      CREATE TABLE app.child () INHERITS (public.alembic_version);
      CREATE TRIGGER planted BEFORE UPDATE OR DELETE ON app.child FOR EACH ROW EXECUTE FUNCTION app.fired();
      INSERT INTO app.child VALUES ('r001')""",
    "a ledger with a trigger, by who owns the version table": f"""{VERSION_TABLE};
      CREATE TABLE public.migrator_ledger ({COLUMNS});
      CREATE TRIGGER planted BEFORE INSERT ON public.migrator_ledger FOR EACH ROW EXECUTE FUNCTION app.fired()""",
    "a version table with a check that has the server run SQL": """CREATE TABLE public.alembic_version (version_num
      varchar(32) CHECK (query_to_xml('SELECT app.saw(''SQL in a check'')', true, true, '') IS NOT NULL))""",
    "a version table of a type with casts": TYPE + "; INSERT INTO public.alembic_version VALUES ('r001')",
}
REFUSED = [kind for kind in PLANTED if kind.split()[-1] not in ("view", "casts")]
SETTINGS = {"MIGRATOR_BACKUP": "off", "MIGRATOR_BASELINE": "base"}
"""What `app` makes in `public`, where everybody may, in a database in which migrator has not been."""


@pytest.fixture(scope="module")
def place() -> Iterator[World]:
    with world.make("debian", templates=()) as made:
        yield made


@pytest.mark.parametrize("kind", PLANTED)
def test_what_was_planted_is_no_code(kind: str, place: World, tmp_path: Path) -> None:
    database = place.copy("harmless", world.SUPERUSER)
    canaries.run_as_app(place.server, database.name, PLANTED[kind])
    place.server.psql("GRANT ALL ON ALL TABLES IN SCHEMA public TO PUBLIC", dbname=database.name)
    scenario = Scenario(place, database, world.SUPERUSER, tmp_path)
    scenario.prepare()
    wrong: list[str] = []
    for words in ("status", "upgrade", "upgrade", "downgrade -1 --yes"):
        answer = scenario.run(Step(words, SETTINGS))
        wrong += [f"$ migrator {words} ({answer.code}): {call}" for call in dict.fromkeys(answer.calls)]
        assert answer.code != 70, answer
        if kind in REFUSED and words == "upgrade":
            assert answer.code == 30, answer
    gained = place.server.psql("SELECT rolsuper FROM pg_roles WHERE rolname = 'app'") == [(True,)]
    place.reset()
    assert not wrong, "\n".join(wrong)
    assert not gained


@pytest.mark.parametrize("login", [world.SUPERUSER, world.OWNER])
def test_a_trigger_on_our_version_table_is_named_and_dropped(
    login: str, place: World, tmp_path: Path
) -> None:
    """`GRANT ALL ON ALL TABLES` lets a role make triggers; what the message says to type helps.

    Also where the login is a member of that role: it can become the role, and the role cannot become the login.
    """
    database = place.copy("harmless", login)
    scenario = Scenario(place, database, login, tmp_path)
    scenario.prepare()
    assert scenario.run(Step("upgrade r001", SETTINGS)).code == 0
    place.server.psql("GRANT ALL ON ALL TABLES IN SCHEMA public TO app", dbname=database.name)
    trigger = "CREATE TRIGGER t BEFORE UPDATE ON alembic_version FOR EACH ROW EXECUTE FUNCTION app.fired()"
    canaries.run_as_app(place.server, database.name, trigger)
    answer = scenario.run(Step("upgrade", SETTINGS))
    assert (answer.code, answer.calls) == (30, []), answer
    assert "trigger t on table alembic_version calls a function of app" in answer.said, answer
    place.server.psql("DROP TRIGGER t ON alembic_version", dbname=database.name)
    place.server.psql("REVOKE ALL ON TABLE public.alembic_version FROM app", dbname=database.name)
    answer = scenario.run(Step("upgrade", {**SETTINGS, "MIGRATOR_LEDGER": "false"}))
    assert (answer.code, answer.calls) == (0, []), answer


FOLLOWS = """
CREATE TABLE app.bait (v varchar(32) REFERENCES public.alembic_version ON UPDATE CASCADE);
INSERT INTO app.bait VALUES ('r001');
CREATE TRIGGER planted AFTER UPDATE ON app.bait FOR EACH ROW EXECUTE FUNCTION app.fired()
"""
WAITS = """
CREATE TABLE app.later (i integer);
CREATE CONSTRAINT TRIGGER planted AFTER INSERT ON app.later DEFERRABLE INITIALLY DEFERRED
  FOR EACH ROW EXECUTE FUNCTION app.fired();
CREATE FUNCTION app.leaves() RETURNS integer LANGUAGE plpgsql AS
  $$ BEGIN INSERT INTO app.later VALUES (1); RETURN 1; EXCEPTION WHEN OTHERS THEN RETURN 1; END $$;
CREATE FUNCTION app.planned(given integer) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS
  $$ BEGIN PERFORM app.leaves(); RETURN given; END $$;
CREATE TABLE app.bait (v varchar(32) REFERENCES public.alembic_version);
CREATE INDEX ON app.bait (v) WHERE app.planned(1) = 1 AND v IS NOT NULL
"""
SQL = """
CREATE TRIGGER planted BEFORE UPDATE ON public.alembic_version FOR EACH ROW
  WHEN (query_to_xml('SELECT app.saw(''SQL in a trigger'')', true, true, '') IS NOT NULL)
  EXECUTE FUNCTION suppress_redundant_updates_trigger()
"""
BUILTIN = """
CREATE FUNCTION app.alike(a text, b text) RETURNS boolean LANGUAGE plpgsql AS
  $$ BEGIN RETURN app.saw('operator'); END $$;
CREATE OPERATOR app.=== (LEFTARG = text, RIGHTARG = text, FUNCTION = app.alike);
CREATE TRIGGER planted BEFORE UPDATE ON public.alembic_version FOR EACH ROW
  WHEN (NEW.version_num OPERATOR(app.===) 'r002') EXECUTE FUNCTION suppress_redundant_updates_trigger()
"""


@pytest.mark.parametrize(
    ("planted", "named"),
    [
        (FOLLOWS, "table app.bait"),
        (WAITS, "table app.bait"),
        (SQL, "trigger planted on table alembic_version calls query_to_xml, and may have been made by app"),
        (BUILTIN, "trigger planted on table alembic_version calls an operator"),
    ],
    ids=[
        "a table that follows by a foreign key",
        "a foreign key's check that leaves a trigger for the COMMIT",
        "a builtin trigger that has the server run SQL",
        "a builtin trigger with their operator",
    ],
)
def test_all_rights_on_our_version_table_bring_no_code(
    planted: str, named: str, place: World, tmp_path: Path
) -> None:
    """`GRANT ALL` has REFERENCES and TRIGGER in it."""
    database = place.copy("harmless", world.SUPERUSER)
    scenario = Scenario(place, database, world.SUPERUSER, tmp_path)
    scenario.prepare()
    assert scenario.run(Step("upgrade r001", SETTINGS)).code == 0
    place.server.psql("GRANT ALL ON TABLE public.alembic_version TO app", dbname=database.name)
    canaries.run_as_app(place.server, database.name, planted)
    answer = scenario.run(Step("upgrade", SETTINGS))
    assert (answer.code, answer.calls) == (30, []), answer
    assert named in answer.said, answer


def test_a_version_table_that_only_env_py_names_is_looked_at(place: World, tmp_path: Path) -> None:
    """An empty one is not found by the revisions in it."""
    database = place.copy("harmless", world.SUPERUSER)
    canaries.run_as_app(place.server, database.name, PLANTED["a version table with a trigger"])
    scenario = Scenario(place, database, world.SUPERUSER, tmp_path)
    scenario.prepare()
    for env in tmp_path.rglob("env.py"):
        text = env.read_text()
        assert "context.configure(" in text, text
        env.write_text(
            text.replace(
                "context.configure(", "context.configure(version_table='alembic_' + chr(118) + 'ersion', "
            )
        )
    answer = scenario.run(Step("upgrade", SETTINGS))
    assert (answer.code, answer.calls) == (30, []), answer


@pytest.mark.parametrize("revision", ["r002", "r003"])
def test_a_trigger_that_comes_while_a_revision_runs_is_not_called(
    revision: str, place: World, tmp_path: Path
) -> None:
    """What was looked at before the migration is looked at again, before the version row is written.

    Also where a revision has rolled back the transaction in which it was looked at, with the lock that kept it so.
    """
    database = place.copy("harmless", world.SUPERUSER)
    scenario = Scenario(place, database, world.SUPERUSER, tmp_path)
    scenario.prepare()
    assert scenario.run(Step("upgrade r001", SETTINGS)).code == 0
    place.server.psql("GRANT ALL ON TABLE public.alembic_version TO app", dbname=database.name)
    trigger = (
        "CREATE TRIGGER t BEFORE INSERT OR UPDATE ON public.alembic_version"
        " FOR EACH STATEMENT EXECUTE FUNCTION app.fired()"
    )
    (file,) = (tmp_path / "project").rglob(f"{revision}*.py")
    plants = f"""
import psycopg2
runs = upgrade
def upgrade():
    runs()
    if {revision != "r002"}:
        op.execute("ROLLBACK")
    other = psycopg2.connect({place.server.url(database.name, "app")!r})
    other.cursor().execute({trigger!r})
    other.commit()
"""
    file.write_text(file.read_text() + plants)
    answer = scenario.run(Step(f"upgrade {revision}", SETTINGS))
    # 40 and not 30: what the revision did on its own connection may be committed, and is.
    assert (answer.code, answer.calls) == (40, []), answer
    assert "trigger t on table alembic_version calls a function of app" in answer.said, answer
    assert place.server.psql("SELECT to_regclass('public.t2')", dbname=database.name) == [(None,)]
