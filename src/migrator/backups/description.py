"""A backup for people: its facts, its content, and how to restore it without this program."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from migrator.backups import pg_restore
from migrator.backups.manifest import Backup, human_size, summary
from migrator.postgres.quoting import quote_identifier

_PROVIDERS = {"c": ("libc", ""), "i": ("icu", "--icu-locale"), "b": ("builtin", "--builtin-locale")}
_VERBS = {"read": "read whole", "restore": "restored and compared", "checksum": "unchanged (checksum only)"}
Layout = Callable[[Sequence[Mapping[str, str]]], str]


def data(backup: Backup) -> dict[str, Any]:
    """Return the manifest, with the backup's place and the commands that restore it."""
    document = dataclasses.asdict(backup)
    return {
        **document,
        **summary(backup),
        "by_hand": by_hand(backup),
        "by_hand_why": pg_restore.not_plain(backup),
    }


def by_hand(backup: Backup) -> list[str]:
    """Return the commands that create a new database and restore a backup into it; libpq's variables set the
    server.
    """
    name = f"{backup.database}_by_hand"
    create = shlex.join(["createdb", *_like(backup), "--", name])
    return [create, *_settings(backup, name), pg_restore.by_hand(backup, name, clean=False)]


def _settings(backup: Backup, name: str) -> list[str]:
    """Return the command that gives the new database the old one's settings: checks and views may read them."""
    if not backup.own_settings:
        return []
    feeds = pg_restore.read_with(backup)
    source = [] if feeds else [backup.place]
    old = re.sub(r"([][\\.*^$/+?(){}|])", r"\\\1", backup.database.replace('"', '""'))
    new = re.sub(r"([\\/&])", r"\\\1", quote_identifier(name))
    edit = f's/^(ALTER (DATABASE|ROLE .* IN DATABASE)) "?{old}"? SET /\\1 {new} SET /p'
    commands = (
        shlex.join(("pg_restore", "--create", "--schema-only", "--file=-", *source)),
        shlex.join(("sed", "-nE", edit)),
        "psql --quiet --dbname=postgres",
    )
    return [" | ".join((*feeds, *commands))]


def _like(backup: Backup) -> list[str]:
    """Return createdb's options for a database like the original; locale providers are known since 15."""
    made = backup.properties
    options = ["--template=template0", f"--owner={made.owner}", f"--encoding={made.encoding}"]
    options += [f"--lc-collate={made.collate}", f"--lc-ctype={made.ctype}"]
    if backup.server_major >= 15:
        provider, locale = _PROVIDERS.get(made.provider, _PROVIDERS["c"])
        options.append(f"--locale-provider={provider}")
        options += [f"{locale}={made.locale}"] if locale else []
    options += [f"--icu-rules={made.icu_rules}"] if made.icu_rules else []
    return options + ([f"--tablespace={made.tablespace}"] if made.tablespace else [])


def proofs(backup: Backup) -> list[str]:
    """Return a sentence for each verification, successful or not."""
    told = []
    for proof in backup.proofs:
        where = f" on PostgreSQL {proof.server_version}" if proof.server_version else ""
        why = f" ({proof.why})" if proof.why else ""
        verb = _VERBS.get(proof.how, proof.how) if proof.ok else f"NOT {_VERBS.get(proof.how, proof.how)}"
        told.append(f"{proof.at[:19]} {verb}{where} in {proof.seconds:.1f} s{why}")
    return told


def text(backup: Backup, table: Layout) -> str:
    """Return the description as text; ``table`` lays out rows in columns."""
    facts = {
        "id": backup.id,
        "name": backup.name,
        "created": backup.created_at[:19],
        "database": f"{backup.database} of {backup.target}",
        "revision": ", ".join(backup.revisions) or "base",
        "size": f"{human_size(backup.size_bytes)} ({human_size(backup.database_size_bytes)} in the database)",
        "written by": f"pg_dump {backup.client_version} from PostgreSQL {backup.server_version}, "
        f"{backup.dump_format} format{', ' + backup.compression if backup.compression else ''}",
        "encrypted to": ", ".join(backup.encrypted_to),
        "without rows of": ", ".join(backup.excluded_table_data),
        "left out": ", ".join(backup.not_dumped),
        "not verified": ""
        if backup.verified
        else "not used as a backup until `migrator verify-backup` verifies it",
        "place": backup.place,
        "sha256": backup.stored[0],
    }
    lines = [f"{key + ':':16} {value}" for key, value in facts.items() if value]
    lines += [f"{'verified:':16} {line}" for line in proofs(backup)]
    rows = [
        {"TABLE": name, "ROWS": _rows(item.rows, item.estimated_rows), "SIZE": _size(item.size_bytes)}
        for name, item in backup.tables.items()
    ]
    if rows:
        lines += ["", table(rows)]
    lines += ["", "without migrator, into a new database:", *(f"  {command}" for command in by_hand(backup))]
    why = pg_restore.not_plain(backup)
    return "\n".join(lines + ([f"  # {why}"] if why else []))


def _rows(rows: int | None, estimated: int | None) -> str:
    if rows is not None:
        return str(rows)
    return "not counted" if estimated is None else f"about {estimated}"


def _size(size: int | None) -> str:
    return "" if size is None else human_size(size)
