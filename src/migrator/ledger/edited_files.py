"""Decide whether the file of an applied revision was edited (exit code 34), and whether that is cosmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from migrator.errors import Tampered
from migrator.ledger.queries import Entry, Standing
from migrator.outcome import Finding, Severity
from migrator.project.history_manifest import FileSums

if TYPE_CHECKING:
    from migrator.project import History


EDITED = "edited-revision"
"""The prefix of these findings' rules."""


@dataclass(frozen=True)
class Edit:
    """One applied revision with a file that no longer matches the ledger; ``kind`` is cosmetic or real."""

    entry: Entry
    file: str
    now: FileSums
    kind: str

    @property
    def sentence(self) -> str:
        """Return the difference, and the author of the applied row."""
        what = "comments or formatting" if self.kind == "cosmetic" else "statements"
        return (
            f"{self.file} was edited ({what}): its checksum is {self.now.sha256[:12]} and was "
            f"{self.entry.checksum[:12]} when it was {self.entry.event} on {self.entry.by}"
        )


def find_edits(history: History, standing: Standing) -> tuple[Edit, ...]:
    """Compare the file of every applied revision with its checksum in the ledger, oldest first."""
    entries = standing.entries
    if not entries:
        return ()
    edits = []
    for item in reversed([item for item in history.walk() if item.revision in entries]):
        entry = entries[item.revision]
        if not entry.checksum or history.sha256(item) == entry.checksum:
            continue
        now = history.sums(item.revision)
        kind = now.edited_from(FileSums(entry.checksum, entry.syntax))
        edits.append(Edit(entry, history.file_name(item), now, kind))
    return tuple(edits)


def judge(edits: Sequence[Edit], policy: str) -> tuple[Finding, ...]:
    """Return a warning for each edit that the policy (MIGRATOR_EDITED) accepts.

    Raises :class:`Tampered` for the others.
    """
    passing = {"refuse": frozenset[str](), "cosmetic": frozenset({"cosmetic"})}.get(
        policy, frozenset({"cosmetic", "real"})
    )
    refused = [edit for edit in edits if edit.kind not in passing]
    if refused:
        names = " ".join(edit.entry.revision for edit in refused)
        harmless = all(edit.kind == "cosmetic" for edit in refused)
        raise Tampered(
            "The file of an applied revision was edited: "
            + "; ".join(f"{edit.entry.revision}: {edit.sentence}" for edit in refused[:5])
            + (f"; and {len(refused) - 5} more" if len(refused) > 5 else "")
            + ".",
            next_step="put the file back, and make the change in a new revision; to accept the edit: "
            f"`migrator repair --accept {names}`"
            + (" (MIGRATOR_EDITED=cosmetic accepts such edits)" if harmless else ""),
            findings=[_finding(edit, Severity.ERROR) for edit in refused],
        )
    return tuple(_finding(edit, Severity.WARNING) for edit in edits)


def _finding(edit: Edit, severity: Severity) -> Finding:
    return Finding(
        rule=f"{EDITED}-{edit.kind}",
        severity=severity,
        place=edit.entry.revision,
        sentence=edit.sentence,
        remedy=f"migrator repair --accept {edit.entry.revision}",
    )
