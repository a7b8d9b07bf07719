"""What pg_restore writes as SQL, on its way to psql: which lines are statements, and which are parts of a text."""

from __future__ import annotations

import pytest

from migrator.backups import psql
from migrator.backups.clients import RestoreStopped

BLOBS = "-- Data for Name: 1..2; Type: BLOBS; Schema: -; Owner: me\n"


def through(script: str) -> tuple[str, list[str]]:
    """Return what is left of a script, and its lines that were seen as SQL."""
    seen = []

    def change(line: bytes) -> bytes:
        seen.append(line.decode())
        return line

    left = b"".join(psql.statements((f"{line}\n".encode() for line in script.split("\n")[:-1]), change))
    return left.decode(), seen


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 'a\nCOMMIT;\n';\n",
        "SELECT E'\\'\nCOMMIT;\n';\n",
        "SELECT e'it''s\\\nCOMMIT;\n\\\\';\n",
        "SELECT name'\\', 'a\nCOMMIT;\n';\n",
        'SELECT 1 AS "it\'s\nCOMMIT;\n""";\n',
        "DO $$\n'COMMIT;\nCOMMIT;\n$a$\n$$;\n",
        "DO $_a1$\nCOMMIT;\n$$\n$_a1$;\n",
        "SELECT a$1, 'b$$\nCOMMIT;\n';\n",
        "SET standard_conforming_strings = off;\nSELECT '\\'\nCOMMIT;\n';\n",
    ],
)
def test_a_quotation_is_one_line(text: str) -> None:
    script = f"-- it's a comment with a $$\n{text}SELECT 2;\n"
    left, seen = through(script)
    assert left == script
    assert [line for line in seen if "COMMIT" in line] == [seen[-2]]
    assert seen[-1] == "SELECT 2;\n"


def test_only_the_transaction_round_large_objects_goes() -> None:
    left, _ = through(f"{BLOBS}--\n\nBEGIN;\nSELECT 1;\nCOMMIT;\n")
    assert left == f"{BLOBS}--\n\nSELECT 1;\n"
    for script in (f"{BLOBS}-- Name: t; Type: TABLE; Schema: public\nCOMMIT;\n", "BEGIN;\n"):
        with pytest.raises(RestoreStopped, match=r"unexpected: (BEGIN|COMMIT);"):
            through(script)


def test_rows_are_no_statements() -> None:
    script = 'COPY public."a\nb" (x) FROM stdin;\nit\'s\nCOMMIT;\n\\.\nSELECT 1;\n'
    left, seen = through(script)
    assert left == script
    assert seen == ['COPY public."a\nb" (x) FROM stdin;\n', "SELECT 1;\n"]
