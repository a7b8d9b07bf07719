"""Run verify as the pipeline does, on a little schema with a verify.toml that is true of it."""

from __future__ import annotations

from typing import Any

from migrator.outcome import Finding, Severity
from migrator.pipeline.stages.verify import verify
from migrator.postgres.session import Session
from migrator.schema.expectations import parse

SCHEMA = """
CREATE SCHEMA accounts;
CREATE TABLE accounts.orgs (id bigserial PRIMARY KEY, region int NOT NULL, UNIQUE (id, region));
CREATE TABLE accounts.users (
    id bigserial PRIMARY KEY, email text NOT NULL, nickname varchar(40), org_id bigint, region int,
    FOREIGN KEY (org_id, region) REFERENCES accounts.orgs (id, region)
);
CREATE UNIQUE INDEX users_email_key ON accounts.users (email);
CREATE TABLE lines (order_id int, position int, note text, PRIMARY KEY (order_id, position));
INSERT INTO lines VALUES (1, 1, 'a'), (1, 2, 'a');
"""
EXPECTED = """
[tables."accounts.users"]
columns = { id = "bigserial", email = "text not null", nickname = "varchar(40)" }
indexes = ["users_email_key", "users_pkey"]
foreign_keys = ["region, org_id -> accounts.orgs(region, id)"]
primary_key = ["id"]

[tables.lines]
primary_key = ["order_id", "position"]

[[assertions]]
name = "two lines"
sql = "SELECT count(*) FROM lines"
expect = 2
"""


def check(
    session: Session, text: str = "", *, before: frozenset[str] = frozenset(), **options: Any
) -> tuple[Finding, ...]:
    """Run verify at the target revision against the text of a verify.toml."""
    at = frozenset({"r1"})
    arguments = {
        "expected": at,
        "actual": at,
        "not_valid_before": before,
        "expectations": parse(text) if text else None,
    }
    findings = verify(session, **{**arguments, **options})
    assert all(finding.severity is Severity.ERROR for finding in findings)
    assert all(finding.place and finding.sentence and finding.remedy for finding in findings)
    return findings


def rules(findings: tuple[Finding, ...]) -> list[tuple[str, str]]:
    """Return rule and place of each finding."""
    return [(finding.rule, finding.place) for finding in findings]
