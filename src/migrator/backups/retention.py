"""Which backups stay: the newest ones, one per day, week or month, and all that are still needed.

No policy removes the newest verified backup of a database, a backup with a name, or the way back for
the current revision, by its ledger (see :func:`read_needed_backups`). Backups of other databases stay
too: a database of this name on another server is another database.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from migrator.backups import exported_snapshot
from migrator.backups.manifest import Backup, human_size
from migrator.backups.storage.interface import BadDump, Store
from migrator.backups.storage.open import open_store
from migrator.config.settings import Settings
from migrator.errors import BackupFailed, SettingsError
from migrator.ledger.needed_backups import read_needed_backups
from migrator.postgres.session import Session

LOGGER = logging.getLogger("migrator.backup")
BAD_DAYS = 30
"""Days for keeping a dump that failed verification, if the policy has no ``daily``."""

_PERIODS: Mapping[str, str] = {
    "hourly": "%Y-%m-%d %H",
    "daily": "%Y-%m-%d",
    "weekly": "%G-W%V",
    "monthly": "%Y-%m",
    "yearly": "%Y",
}


@dataclass(frozen=True)
class Verdict:
    """The decision about a backup: ``reasons`` to keep it, none if it is removed."""

    backup: Backup
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Pruned:
    """The removed backups, or those that would be removed (``dry_run``)."""

    policy: str
    verdicts: tuple[Verdict, ...]
    bad: tuple[BadDump, ...]
    dry_run: bool

    @property
    def removed(self) -> tuple[Backup, ...]:
        """Return the backups to remove."""
        return tuple(verdict.backup for verdict in self.verdicts if not verdict.reasons)

    @property
    def freed(self) -> int:
        """Return the bytes of the dumps to remove."""
        return sum(backup.stored[1] for backup in self.removed)

    @property
    def message(self) -> str:
        """Return the result in one sentence."""
        verb = "would remove" if self.dry_run else "removed"
        bad = f" and {len(self.bad)} that had failed verification" if self.bad else ""
        kept = len(self.verdicts) - len(self.removed)
        return f"{verb} {len(self.removed)} backups ({human_size(self.freed)}){bad}, keeping {kept} ({self.policy})"

    def data(self) -> dict[str, Any]:
        """Return it for JSON; sizes are in bytes."""
        return {
            "policy": self.policy,
            "dry_run": self.dry_run,
            "removed": [
                {"id": item.id, "created": item.created_at, "size": item.stored[1], "place": item.place}
                for item in self.removed
            ],
            "kept": [
                {"id": item.backup.id, "created": item.backup.created_at, "reasons": list(item.reasons)}
                for item in self.verdicts
                if item.reasons
            ],
            "removed_bad": [
                {"id": bad.id, "at": bad.at, "why": bad.why, "place": bad.place} for bad in self.bad
            ],
            "freed": self.freed,
        }


def counts_of(policy: str) -> dict[str, int]:
    """Return ``last=5,daily=7`` as numbers by name."""
    return {
        name: int(number) for name, _, number in (part.partition("=") for part in policy.split(",") if part)
    }


def judge(backups: Iterable[Backup], policy: str, needed: frozenset[str]) -> list[Verdict]:
    """Decide about the backups of one database, newest first; the newest one of a period represents it.

    An unverified one represents no period, and stays until a newer one is verified.
    """
    counts = counts_of(policy)
    seen: dict[str, set[str]] = {name: set() for name in _PERIODS}
    verdicts = []
    number = 0
    for backup in backups:
        if not backup.verified:
            reasons = ["the ledger needs it"] if backup.id in needed else []
            reasons += [] if number else ["not verified, and there is no newer verified one"]
            verdicts.append(Verdict(backup, tuple(reasons)))
            continue
        reasons = [] if number else ["the newest"]
        reasons += ["the ledger needs it"] if backup.id in needed else []
        reasons += [f"named {backup.name}"] if backup.name else []
        reasons += ["last"] if number < counts.get("last", 0) else []
        made = _moment(backup.created_at)
        if made is None:
            reasons.append("its age is not known")
        else:
            for name, pattern in _PERIODS.items():
                period = made.strftime(pattern)
                if period not in seen[name] and len(seen[name]) < counts.get(name, 0):
                    seen[name].add(period)
                    reasons.append(f"{name} {period}")
        number += 1
        verdicts.append(Verdict(backup, tuple(reasons)))
    return verdicts


def too_old(bad: Iterable[BadDump], policy: str, now: datetime) -> list[BadDump]:
    """Return the dumps that failed verification longer ago than the policy has days."""
    days = timedelta(days=counts_of(policy).get("daily") or BAD_DAYS)
    return [item for item in bad if (at := _moment(item.at)) is not None and now - at > days]


def _moment(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def prune(session: Session, settings: Settings, *, dry_run: bool = False) -> Pruned:
    """Remove the backups of the session's database that MIGRATOR_BACKUP_KEEP does not keep.

    Two at once are harmless: backups that the other has removed are gone, and each keeps the newest
    that it saw. Raises :class:`SettingsError`, :class:`RestoreFailed` for a store that cannot be
    listed, and :class:`BackupFailed` for backups that could not be removed, after all others were.
    """
    policy = settings.backup_keep
    if not policy:
        raise SettingsError(
            ["prune does not know which backups to keep"],
            next_step="migrator prune --dry-run --keep last=5,daily=7,weekly=4; or set MIGRATOR_BACKUP_KEEP",
        )
    needed = read_needed_backups(session, settings.role)
    store = open_store(settings.backup_url, settings)
    database = session.facts.database
    identifier, _ = exported_snapshot.identity(session)
    mine = [item for item in store.backups(database) if _is_ours(item, identifier, str(session.target))]
    found = Pruned(
        policy,
        tuple(judge(mine, policy, needed)),
        tuple(too_old(store.bad(database), policy, datetime.now(UTC))),
        dry_run,
    )
    if not dry_run:
        _remove(store, found)
    LOGGER.info("%s: %s", store, found.message)
    return found


def _is_ours(backup: Backup, identifier: str, target: str) -> bool:
    """Tell whether a backup is of this database: of this cluster, or of this address if that is not known."""
    if backup.system_identifier and identifier:
        return backup.system_identifier == identifier
    return backup.target == target


def _remove(store: Store, found: Pruned) -> None:
    failures: list[str] = []
    items: list[Backup | BadDump] = [*found.removed, *found.bad]
    for item in items:
        try:
            store.remove(item)
            LOGGER.info("removed the backup %s", item.id)
        except OSError as error:
            failures.append(f"{item.id}: {error}")
    if failures:
        raise BackupFailed(
            f"{len(failures)} backups could not be removed from {store}: {'; '.join(failures[:3])}.",
            next_step="grant what is denied, and run `migrator prune` again",
        )
