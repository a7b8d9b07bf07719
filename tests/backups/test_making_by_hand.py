"""The command that makes a database by hand makes one like the original: its owner and its locales."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import uuid
from collections.abc import Callable

import pytest

from migrator.backups import description
from tests.support.servers import Database, Server

from .conftest import Workbench

Bench = Callable[..., Workbench]

_LIKE = (
    "SELECT pg_get_userbyid(datdba)::text, pg_encoding_to_char(encoding)::text, datcollate::text, datctype::text,"
    " j ->> 'datlocprovider', coalesce(j ->> 'datlocale', j ->> 'daticulocale'), j ->> 'daticurules',"
    " dattablespace::bigint FROM pg_database d, to_jsonb(d) j WHERE datname = %s"
)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("debian", "ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C' LOCALE_PROVIDER icu ICU_LOCALE 'de-DE'"),
        ("debian", "ENCODING 'SQL_ASCII' LOCALE 'C' LOCALE_PROVIDER libc"),
        ("embedded18", "ENCODING 'UTF8' LOCALE 'C' LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'"),
    ],
)
def test_like_the_original(servers: Callable[[str], Server], workbench: Bench, kind: str, how: str) -> None:
    server = servers(kind)
    name = f"made_{uuid.uuid4().hex[:8]}"
    owner = server.create_role(f"owner of {name}")
    server.psql(f'CREATE DATABASE {name} TEMPLATE template0 OWNER "{owner}" {how}')
    try:
        backup = workbench(Database(server, name)).back_up()
        create, *_ = description.by_hand(backup)
        done = subprocess.run(
            shlex.split(create),
            env={"PATH": f"{server.bin}:/usr/bin:/bin", **server.environment()},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, (create, done.stderr)
        assert server.psql(_LIKE, [f"{name}_by_hand"]) == server.psql(_LIKE, [name])
    finally:
        server.drop_database(name)
        server.drop_database(f"{name}_by_hand")
        server.psql(f'DROP ROLE "{owner}"')


def test_what_few_databases_have(database: Database, workbench: Bench) -> None:
    backup = workbench(database).back_up()
    rare = {"tablespace": "fast disk", "provider": "i", "locale": "sv", "icu_rules": "&a < g"}
    create = description.by_hand(
        dataclasses.replace(backup, properties=dataclasses.replace(backup.properties, **rare))
    )[0]
    ending = ["--locale-provider=icu", "--icu-locale=sv", "--icu-rules=&a < g", "--tablespace=fast disk"]
    assert shlex.split(create)[6:10] == ending
    assert "--tablespace" not in description.by_hand(backup)[0]
