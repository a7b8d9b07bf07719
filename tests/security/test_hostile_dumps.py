r"""A dump that gives orders to psql: `\!` runs a shell on the client, with all that migrator has.

pg_dump before 17.6, 16.10, 15.14 wrote names with line ends into comments (CVE-2025-8715), and nothing kept psql from
obeying what a dump says (CVE-2025-8714). A client that old may be in an image.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.backups import psql
from migrator.backups.clients import RestoreStopped
from tests.support.projects import linear_history
from tests.support.runner import Runner
from tests.support.servers import Database

Project = Callable[..., Path]

ORDERS = {
    "at the start of a line": r"\! touch {owned}",
    "after SQL": r"SELECT 1 \! touch {owned}",
    "in place of a semicolon": r"SELECT 1 \g |touch {owned}",
    "after a comment that hides a COPY": "/*\nCOPY public.t1 (id) FROM stdin;\n*/ \\! touch {owned}",
    "from another server": r"\copy public.t1 from program 'touch {owned}'",
    "after a name of two lines": "-- Name: x\n\\! touch {owned}\n; Type: TABLE; Schema: public",
}


@pytest.mark.parametrize("kind", ORDERS)
def test_a_dump_gives_no_orders_to_psql(
    kind: str, database: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    folder, owned = project(revisions=linear_history(1)), tmp_path / "owned"
    assert run_migrator("upgrade", cwd=folder, database=database, env={"MIGRATOR_BACKUP": "off"}).code == 0
    assert run_migrator("backup", cwd=folder, database=database).code == 0
    order = tmp_path / "order"
    order.write_text(ORDERS[kind].format(owned=owned) + "\n")
    env: dict[str, str | None] = {
        "MIGRATOR_PG_BIN": str(old_client(tmp_path / "old", database.server.bin, order))
    }
    words = ("restore", "latest", "--table", "t1", "--into-schema", "beside")
    result = run_migrator(*words, cwd=folder, database=database, env=env)
    assert not owned.exists()
    assert result.code == 43, result
    assert database.psql("SELECT to_regnamespace('beside')::text") == [(None,)]


def old_client(folder: Path, bin: Path, order: Path) -> Path:
    """Return programs of which pg_restore writes no protection, and an order behind its settings."""
    folder.mkdir()
    for name in ("pg_dump", "pg_dumpall", "psql"):
        (folder / name).symlink_to(bin / name)
    program = folder / "pg_restore"
    edit = f"sed -e '/^.\\(un\\)\\{{0,1\\}}restrict /d' -e '/^SET row_security/r {order}'"
    program.write_text(
        f'#!/bin/sh\ncase " $* " in\n*\' --file=- \'*) {bin}/pg_restore "$@" | {edit} ;;\n'
        f'*) exec {bin}/pg_restore "$@" ;;\nesac\n'
    )
    program.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    "line",
    [
        r"\restrict abc \! id",
        "\\restrict abc\r",
        r" \restrict abc",
        r"\unrestrict",
        r"\connect other",
        r"\i /etc/passwd",
    ],
)
def test_only_the_protection_itself_passes(line: str) -> None:
    kept = b"".join(psql.statements([b"\\restrict abc\n", b"\\unrestrict abc\n"], bytes))
    assert kept == b"\\restrict abc\n\\unrestrict abc\n"
    with pytest.raises(RestoreStopped):
        b"".join(psql.statements([f"{line}\n".encode()], bytes))


def test_a_backslash_in_a_quotation_is_data() -> None:
    lines = [
        b"SELECT '\\! id', E'\\\\! id', $$\\! id$$, \"\\! id\"; -- \\! id\n",
        b"COPY t FROM stdin;\n",
        b"\\! id\n",
        b"\\.\n",
    ]
    assert b"".join(psql.statements(lines, bytes)) == b"".join(lines)
