"""Alembic's own move of the version row, without making its statement anew for every revision.

Alembic writes both ids into the text of an UPDATE, so SQLAlchemy finds none of them in its cache, and compiles each:
a third of the time that Alembic itself takes.  Here it is compiled once, and the very same text is sent, on the same
connection, past the same events, and its row count is checked in the same way.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

_USUAL = re.compile(r"[A-Za-z0-9_.-]+")
_FROM, _TO = "migrator_moves_from", "migrator_moves_to"


@contextlib.contextmanager
def quick_moves() -> Iterator[None]:
    """Let version rows be moved so for the block; where anything is not as usual, Alembic does it."""
    from alembic.runtime.migration import HeadMaintainer
    from alembic.util import CommandError

    theirs = getattr(HeadMaintainer, "_update_version", None)
    if theirs is None:  # an Alembic of the project's own, which moves rows in another way
        yield
        return

    def update(maintainer: Any, from_: str, to_: str) -> None:
        context, heads = maintainer.context, maintainer.heads
        usual = _USUAL.fullmatch(from_) and _USUAL.fullmatch(to_) and from_ in heads and to_ not in heads
        text = _text(maintainer) if usual else ""
        if not text:
            theirs(maintainer, from_, to_)
            return
        heads.remove(from_)
        heads.add(to_)
        result = context.impl.connection.exec_driver_sql(text.replace(_TO, to_).replace(_FROM, from_))
        if context.dialect.supports_sane_rowcount and result.rowcount != 1:
            raise CommandError(
                f"Online migration expected to match one row when updating '{from_}' to '{to_}' in"
                f" '{context.version_table}'; {result.rowcount} found"
            )

    HeadMaintainer._update_version = update  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        HeadMaintainer._update_version = theirs  # type: ignore[method-assign]


def _text(maintainer: Any) -> str:
    """Return the statement with our words in the place of the ids, compiled once; "" where it should not be used."""
    known: str | None = vars(maintainer).get("_migrator_text")
    if known is None:
        try:
            known = _compiled(maintainer.context)
        except AttributeError:  # as above
            known = ""
        maintainer._migrator_text = known
    return known


def _compiled(context: Any) -> str:
    from alembic.ddl.impl import DefaultImpl
    from sqlalchemy import literal_column

    connection = context.impl.connection
    if context.as_sql or connection is None or type(context.impl)._exec is not DefaultImpl._exec:
        return ""
    if connection.get_execution_options().get("schema_translate_map"):
        return ""
    table = context._version
    move = table.update().values(version_num=literal_column(f"'{_TO}'"))
    move = move.where(table.c.version_num == literal_column(f"'{_FROM}'"))
    text = str(move.compile(dialect=connection.dialect))
    # A driver may take either for the beginning of a parameter.
    return "" if "%" in text or ":" in text else text
