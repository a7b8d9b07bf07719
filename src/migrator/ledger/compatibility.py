"""An older image on a newer schema: whether it may start, and who applied the unknown revisions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from migrator.config.database_url import Target
from migrator.errors import DatabaseAhead, HistoryError
from migrator.ledger.queries import Standing
from migrator.postgres.version_table import VersionTable

if TYPE_CHECKING:
    from migrator.project import History, Plan


def refuse_unknown_floors(history: History, plan: Plan) -> None:
    """Raise :class:`HistoryError` for a pending revision with an unknown ``migrator_min_compatible``.

    The error must come now, and not from the older image after a rollback.
    """
    for item in plan.revisions if plan.kind == "upgrade" and not plan.stored_downgrades else ():
        floor = history.min_compatible(item.revision)
        if floor and history.unknown([floor]):
            raise HistoryError(
                f"{item.revision} sets migrator_min_compatible = {floor!r}, and there is no such revision.",
                next_step="set it to the full id of the oldest revision whose image can work on this schema",
            )


def refuse_or_allow(
    history: History,
    unknown: tuple[str, ...],
    standing: Standing,
    *,
    allow_ahead: bool,
    target: Target,
    table: VersionTable | None,
) -> str:
    """Return why an image may start on a schema with revisions that are ``unknown`` to it.

    A revision may declare ``migrator_min_compatible = "REV"``. The ledger keeps it, and an image with
    that revision is new enough. ``allow_ahead`` (MIGRATOR_ALLOW_AHEAD) applies if nothing is declared.
    It never overrides a declared floor that this image does not reach. Raises :class:`DatabaseAhead`.
    """
    floors = {name: _floor(standing, name) for name in unknown}
    # Also the floors of revisions below them: each may have removed something that an older image needs.
    declared = {*floors.values(), *(_floor(standing, name) for name in history.unknown(standing.entries))} - {
        ""
    }
    too_old = history.unknown(declared)
    lacking = sorted(history.known() - set(standing.entries)) if standing.entries else []
    if not too_old and not lacking:
        if all(floors.values()):
            return f"images from {_some(sorted(set(floors.values())))} on are declared compatible"
        if allow_ahead:
            return "MIGRATOR_ALLOW_AHEAD is set"
    reason = ""
    if too_old:
        reason = (
            f" The schema declares that images need at least {_some(too_old)}, which this image does "
            "not have."
        )
    elif lacking:
        reason = f" This image's {_some(lacking)} is not applied either: the two histories have diverged."
    raise _ahead(history, unknown, standing, reason, target, table)


def _floor(standing: Standing, name: str) -> str:
    entry = standing.entries.get(name)
    return entry.min_compatible if entry else ""


def _ahead(
    history: History,
    unknown: tuple[str, ...],
    standing: Standing,
    reason: str,
    target: Target,
    table: VersionTable | None,
) -> DatabaseAhead:
    entries = [standing.entries[name] for name in unknown if name in standing.entries]
    newest = max(entries, key=lambda entry: entry.at, default=None)
    by = f" {newest.revision} was {newest.event} on {newest.by}." if newest else ""
    image = newest.image_version if newest else ""
    heads = _some(history.heads)
    deploy = f"deploy image {image} or newer" if image else "deploy the image that has the revision"
    other = f"with image {image}" if image else "with that image"
    return DatabaseAhead(
        f"{target} is at revision {_some(unknown)}, which this image does not have (its newest is "
        f"{heads}). The image is older than the schema, or it belongs to another project.{by}{reason}",
        next_step=f"{deploy}; to go back {other}: `migrator downgrade {history.heads[0]}`"
        + (" (with this image, it shows the SQL from the ledger and asks first)" if newest else "")
        + f"; if {table} belongs to another project, set MIGRATOR_VERSION_TABLE to this project's table",
    )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")
