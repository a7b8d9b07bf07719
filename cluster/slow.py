"""A history of two revisions that sleep for as long as the database is told, to end a run in the middle of one."""

from __future__ import annotations

from collections.abc import Callable

from cluster.build import ROOT
from cluster.kubectl import Object

NAME = "slow-history"
HEAD = "r002"
_REVISION = """\
from alembic import op

revision = "{revision}"
down_revision = {parent}
branch_labels = None
depends_on = None


def upgrade():
    op.execute("CREATE TABLE made_by_{revision} (id int)")
    op.execute("{statement}")


def downgrade():
    op.execute("DROP TABLE made_by_{revision}")
"""
_SLEEP = "SELECT pg_sleep(coalesce(nullif(current_setting('shop.hold_{}', true), ''), '0')::int)"


def history(*, failing: bool = False) -> Object:
    """Return the history as a ConfigMap; its second revision may be one that fails."""
    second = "SELECT no_such_column" if failing else _SLEEP.format("r002")
    files = {
        "env.py": (ROOT / "migrations" / "env.py").read_text(),
        "r001.py": _REVISION.format(revision="r001", parent=None, statement=_SLEEP.format("r001")),
        "r002.py": _REVISION.format(revision="r002", parent='"r001"', statement=second),
    }
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": NAME}, "data": files}


def mounted(pod: Object) -> Object:
    """Have a pod's migrator use the history, mounted over the one of its image; return the pod."""
    keys = {"env.py": "env.py", "r001.py": "versions/r001.py", "r002.py": "versions/r002.py"}
    items = [{"key": key, "path": path} for key, path in keys.items()]
    volume = {"name": NAME, "configMap": {"name": NAME, "items": items}}
    pod["spec"].setdefault("volumes", []).append(volume)
    for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
        if container["name"] == "migrator":
            container["volumeMounts"].append({"name": NAME, "mountPath": "/app/migrations"})
    return pod


def sleeping(psql: Callable[[str], list[str]], database: str) -> bool:
    """Tell whether a session is in a revision that sleeps."""
    sessions = "SELECT datname, state FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(coalesce%'"
    return f"{database}|active" in psql(sessions)


def hold(database: str, revision: str, seconds: int) -> str:
    """Return the SQL that says how long a revision sleeps in sessions that begin from now on."""
    return f"ALTER DATABASE {database} SET shop.hold_{revision} = '{seconds}'"
