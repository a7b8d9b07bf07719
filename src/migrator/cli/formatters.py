"""The answer of each command on stdout: data for ``--format json``, and text for people."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from migrator.config import settings
from migrator.outcome import ExitCode, Outcome
from migrator.runtime.escaping import visible
from migrator.runtime.output import report
from migrator.runtime.output.report import Answer

if TYPE_CHECKING:
    from migrator.backups.manifest import Backup
    from migrator.backups.restore.result import Restored
    from migrator.backups.retention import Pruned
    from migrator.ledger.repair import Repair
    from migrator.pipeline.drift import Drift
    from migrator.project import History, Revision
    from migrator.project.freeze import Frozen
    from migrator.service import State


def of_outcome(outcome: Outcome) -> Answer:
    """Answer with how a run ended."""
    return Answer(outcome.as_dict, report.sentence(outcome), outcome.code)


def of_current(current: Sequence[str], heads: Sequence[str]) -> Answer:
    """Answer with the current revisions of the database."""
    text = "\n".join(f"{rev}{' (head)' if rev in heads else ''}" for rev in current) or "base"
    return Answer({"current": list(current), "heads": list(heads)}, text)


def of_history(history: History) -> Answer:
    """Answer with the graph, newest first."""
    return of_revisions(history.walk())


def of_revisions(found: Iterable[Revision]) -> Answer:
    """Answer with one line a revision."""
    revisions = list(found)
    return Answer([_revision(item) for item in revisions], "\n".join(_line(item) for item in revisions))


def of_show(found: Iterable[Revision]) -> Answer:
    """Answer with everything that a revision file says about itself."""
    revisions = list(found)
    blocks = [
        "\n".join(
            f"{key + ':':<10}{', '.join(value) if isinstance(value, list) else value}"
            for key, value in _revision(item).items()
            if value not in ([], False)
        )
        for item in revisions
    ]
    return Answer([_revision(item) for item in revisions], "\n\n".join(blocks) or "base")


def of_frozen(frozen: Frozen, slow: str) -> Answer:
    """Answer with the manifest's path, content and changes, and with the reason why runs are still ``slow``."""
    manifest = frozen.manifest
    data = {
        "place": str(frozen.place),
        "digest": manifest.digest,
        "heads": list(manifest.heads),
        "revisions": len(manifest.revisions),
        "changes": list(frozen.changes),
        "slow": slow,
    }
    count = f"{len(manifest.revisions)} revision{'' if len(manifest.revisions) == 1 else 's'}"
    what = f"written: {'; '.join(frozen.changes)}" if frozen.changes else "is current"
    note = f"\nThe up-to-date check is still slow: {slow}." if slow else ""
    return Answer(data, f"{frozen.place} ({count}, {', '.join(manifest.heads)}) {what}{note}")


def of_state(state: State, *, exit_code: bool, newest_backup: Mapping[str, Any] | None) -> Answer:
    """Answer with the state of the database; with ``exit_code``, return 3 if revisions are pending."""
    import dataclasses

    data = {
        "target": state.target,
        "server_version": state.server_version,
        "version_table": state.version_table,
        "current": list(state.current),
        "heads": list(state.heads),
        "pending": [_revision(item) for item in state.pending],
        "running": state.running,
        "last_run": dataclasses.asdict(state.last_run) if state.last_run else None,
        "edited": _edited(state),
        "newest_backup": newest_backup,
    }
    several = state.version_tables if len(state.version_tables) > 1 else {}
    if several:
        data["version_tables"] = {name: list(ids) for name, ids in several.items()}
    backup = f"{newest_backup['id']} ({newest_backup['created']})" if newest_backup else "none"
    rows = [
        ("database", f"{state.target} (PostgreSQL {state.server_version.split()[0]})"),
        ("current", ", ".join(state.current) or "base"),
        ("heads", ", ".join(state.heads)),
        ("pending", str(len(state.pending)) if state.pending else "nothing"),
        ("running", state.running or "nobody"),
        ("last run", str(state.last_run or "none in the ledger")),
        ("backup", backup),
    ]
    rows += [("ahead", state.ahead)] if state.ahead else []
    rows += [("branches", state.hint)] if state.hint and state.pending else []
    rows += [("table", f"{name} at {', '.join(ids) or 'base'}") for name, ids in several.items()]
    lines = [f"{name + ':':<10}{visible(value)}" for name, value in rows]
    lines += [f"  {_line(item)}" for item in state.pending]
    lines += [f"edited:   {edit.entry.revision}: {edit.sentence}" for edit in state.edited]
    code = ExitCode.PENDING if exit_code and state.pending else ExitCode.OK
    return Answer(data, "\n".join(lines), code)


def of_check(state: State) -> Answer:
    """Answer with the pending revisions; the exit code is 3 if there are any."""
    data = {
        "target": state.target,
        "current": list(state.current),
        "pending": [_revision(item) for item in state.pending],
        "edited": _edited(state),
        "version_table": state.version_table,
    }
    if not state.pending:
        return Answer(data, f"nothing is pending: {', '.join(state.current) or 'base'}")
    lines = "\n".join(f"  {_line(item)}" for item in state.pending)
    hint = f"\n{state.hint}" if state.hint else ""
    return Answer(data, f"{len(state.pending)} pending:\n{lines}{hint}", ExitCode.PENDING)


def of_backups(rows: Sequence[Mapping[str, Any]]) -> Answer:
    """Answer with one row a backup."""
    if not rows:
        return Answer([], "no backups")
    from migrator.backups.manifest import human_size

    folders = {str(row["place"]).rpartition("/")[0] for row in rows}
    shown = [
        {
            "ID": str(row["id"]),
            "REVISION": str(row["revision"]),
            "SIZE": human_size(float(row["size"])),
            "VERIFIED": f"{row['verified'] or 'NOT VERIFIED'} {str(row['verified_at'])[:10]}".strip(),
            **({"PLACE": str(row["place"])} if len(folders) > 1 else {}),
        }
        for row in rows
    ]
    place = f"in {visible(folders.pop())}:\n" if len(folders) == 1 else ""
    return Answer(list(rows), f"{place}{_table(shown)}")


def of_backup(backup: Backup, *, proven: bool = False) -> Answer:
    """Answer with all details of a backup, and the command that restores it without migrator."""
    from migrator.backups import description

    data = description.data(backup)
    if proven:
        how = "is verified" if backup.verified else "is NOT verified"
        return Answer(data, f"{backup.id} {how}: {description.proofs(backup)[-1]}")
    return Answer(data, description.text(backup, _table))


def of_pruned(pruned: Pruned) -> Answer:
    """Answer with what happens to each backup, and why."""
    verb = "would go" if pruned.dry_run else "removed"
    shown = [
        {
            "ID": verdict.backup.id,
            "CREATED": verdict.backup.created_at[:19],
            "WHAT": ("kept: " if verdict.reasons else verb) + ", ".join(verdict.reasons),
        }
        for verdict in pruned.verdicts
    ]
    shown += [
        {"ID": bad.id, "CREATED": bad.at[:19], "WHAT": f"{verb}: it is damaged ({bad.why})"}
        for bad in pruned.bad
    ]
    text = pruned.message[0].upper() + pruned.message[1:] + "."
    return Answer(pruned.data(), f"{_table(shown)}\n{text}" if shown else text)


def of_restored(restored: Restored) -> Answer:
    """Answer with what was restored, and where the replaced database is now."""
    from migrator.backups.manifest import summary

    data = {
        "backup": summary(restored.backup),
        **{name: getattr(restored, name) for name in ("database", "kept", "dropped", "safety", "schema")},
        **{name: getattr(restored, name) for name in ("tables", "counted", "rows")},
        "seconds": round(restored.seconds, 3),
        "notes": list(restored.notes),
        "next_step": restored.next_step,
    }
    return Answer(data, f"{restored.message} Next: {restored.next_step}")


def of_ledger(rows: Sequence[Mapping[str, Any]]) -> Answer:
    """Answer with a block for each run, and a line for each of its rows, newest first; the data has every column."""
    if not rows:
        return Answer([], "the ledger is empty: migrator has not changed this database yet")
    blocks = [
        "\n".join([visible(_of_run(group[0])), *(_of_row(row) for row in group)])
        for group in ([*found] for _, found in itertools.groupby(rows, key=lambda row: row["run_id"]))
    ]
    return Answer(list(rows), "\n\n".join(blocks))


def _of_run(row: Mapping[str, Any]) -> str:
    by = "@".join(part for part in (row["actor"] or row["role"], row["host"]) if part)
    image = f", image {row['image_version']}" if row["image_version"] else ""
    return f"run {row['run_id']} by {by}{image}"


def _of_row(row: Mapping[str, Any]) -> str:
    seconds = "" if row["seconds"] is None else f" ({row['seconds']:.2f} s)"
    said = f"{row['outcome']}: {row['message']}" if row["event"] == "run" else str(row["message"] or "")
    start = f"  {str(row['at'])[:19]}  {row['event']:<9} "
    what = f"{row['revision']}: {said}" if row["revision"] else said
    from migrator.runtime import terminal  # not for an up-to-date check

    return terminal.wrapped(f"{start}{visible(what)}{seconds}", len(start))


def of_repair(repair: Repair) -> Answer:
    """Answer with what was accepted."""
    data = {
        "accepted": [
            {
                "revision": edit.entry.revision,
                "file": edit.file,
                "edit": edit.kind,
                "checksum": edit.now.sha256,
            }
            for edit in repair.accepted
        ],
        "unchanged": list(repair.unchanged),
    }
    lines = [f"accepted {edit.entry.revision}: {edit.sentence}" for edit in repair.accepted]
    lines += [f"{name}: the file is the applied one; nothing to accept" for name in repair.unchanged]
    return Answer(data, "\n".join(lines))


def of_accepted_schema(drift: Drift) -> Answer:
    """Answer with the differences to the schema that the last run left."""
    found = [{"place": str(item.item), "difference": item.sentence} for item in drift.differences]
    lines = [f"accepted {item['place']}: {item['difference']}" for item in found]
    return Answer(
        {"differences": found, "unknown": drift.unknown},
        "\n".join([*lines, f"The schema as it is now is the expected schema. Before, {drift}."]),
    )


def of_settings(loaded: settings.Settings) -> Answer:
    """Answer with every setting, its value and its source."""
    rows = settings.table(loaded)
    address = str(loaded.target) if loaded.target else ""
    data = {"target": address, "settings": rows, "warnings": list(loaded.warnings)}
    shown = [
        {"SETTING": row["variable"], "VALUE": row["value"], "FROM": row["source"], "MEANING": row["help"]}
        for row in rows
    ]
    target = f"target: {address or 'none'} (from {loaded.sources.get('target', 'nothing')})"
    warnings = "".join(f"warning: {warning}\n" for warning in loaded.warnings)
    return Answer(data, f"{warnings}{target}\n{_table(shown)}")


def _edited(state: State) -> list[dict[str, str]]:
    return [
        {
            "revision": edit.entry.revision,
            "file": edit.file,
            "edit": edit.kind,
            "checksum": edit.now.sha256,
            "checksum_applied": edit.entry.checksum,
            "applied": edit.entry.by,
        }
        for edit in state.edited
    ]


def _revision(item: Revision) -> dict[str, Any]:
    return {
        "revision": item.revision,
        "parents": list(item.parents),
        "message": item.message,
        "path": item.path,
        "head": item.is_head,
        "labels": list(item.labels),
    }


def _line(item: Revision) -> str:
    marks = [*(["head"] if item.is_head else []), *item.labels]
    mark = f" ({', '.join(marks)})" if marks else ""
    return f"{', '.join(item.parents) or '<base>'} -> {item.revision}{mark}: {item.message}"


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """Lay out rows in columns."""
    from migrator.runtime import terminal

    return terminal.table([{name: visible(value) for name, value in row.items()} for row in rows])
