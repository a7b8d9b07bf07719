"""The commands: one short function each, from parsed arguments to an answer. catalogue.py says what they do."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from migrator.cli import formatters
from migrator.config.settings import Settings
from migrator.errors import HistoryError, MigratorError
from migrator.outcome import Outcome
from migrator.pipeline.record import new_run_id
from migrator.project import ProjectOptions
from migrator.runtime.logs import Logs, get_logger
from migrator.runtime.output import report
from migrator.runtime.output.report import Answer
from migrator.runtime.signals import Interruption
from migrator.service import MigrationService

if TYPE_CHECKING:
    import argparse

__all__ = ["HANDLERS", "make_service", "new_run_id"]

log = get_logger("migrator")


def make_service(
    settings: Settings, arguments: argparse.Namespace, logs: Logs, interruption: Interruption, run_id: str
) -> MigrationService:
    """Return the service that a command works with."""
    project = ProjectOptions(
        config=tuple(settings.config.split(os.pathsep)) if settings.config else (),
        name=getattr(arguments, "section", "alembic"),
        x=(*getattr(arguments, "x_before", ()), *getattr(arguments, "x", ())),
    )
    return MigrationService(settings, project, logs=logs, interruption=interruption, run_id=run_id)


def upgrade(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    return _finish(service, service.upgrade(getattr(arguments, "revision", "")))


def downgrade(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    return _finish(service, service.downgrade(arguments.revision, yes=arguments.yes))


def stamp(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    return _finish(service, service.stamp(arguments.revision))


def verify(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    return _finish(service, service.verify())


def _finish(service: MigrationService, outcome: Outcome) -> Answer:
    """Send the outcome to every destination. Nothing can change the result of the run after this."""
    service.interruption.settle(int(outcome.code))
    return tell(service, outcome)


def tell(service: MigrationService, outcome: Outcome) -> Answer:
    """Write the outcome to every destination and return it as an answer. The log, which may be full, comes
    last.
    """
    settings = service.settings
    if settings.report_file:
        report.write_text(report.document(outcome), settings.report_file)
    report.write_termination_line(report.sentence(outcome), settings.termination_log)
    report.say(outcome, service.logs)
    return formatters.of_outcome(outcome)


def current(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    return formatters.of_current(service.current(), service.history().heads)


def history(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    return formatters.of_history(service.history())


def heads(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    return formatters.of_revisions(service.history().find("heads"))


def show(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    return formatters.of_show(service.history().find(arguments.revision))


def freeze(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    from migrator.pipeline.fast_path.up_to_date import why_not

    frozen = service.freeze(check=arguments.check)
    return formatters.of_frozen(frozen, why_not(service.settings, service.project))


def check(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    from migrator.ledger.edited_files import judge

    for one in service.all():
        state = one.state()
        judge(state.edited, service.settings.edited)
        if state.pending:
            break
    return formatters.of_check(state)


def status(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    state = service.state()
    database = service.settings.required_target.database
    mine = [row for row in _backups(service) if row["database"] == database and row["verified"]]
    return formatters.of_state(state, exit_code=arguments.exit_code, newest_backup=mine[0] if mine else None)


def _backups(service: MigrationService) -> list[dict[str, Any]]:
    try:
        return service.backups()
    except MigratorError as error:
        log.debug("cannot list the backups: %s", error)
        return []


def wait(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    session, attempts = service.wait()
    with session:
        data = {"target": str(session.target), "server_version": session.facts.version, "attempts": attempts}
    return Answer(data, f"{data['target']} answers (PostgreSQL {data['server_version']}).")


def wait_for_current(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    found = service.wait_for_current()
    text = (
        f"{service.settings.required_target.database} is at {', '.join(found) or 'base'}: nothing is pending."
    )
    return Answer({"target": str(service.settings.target), "current": list(found)}, text)


def sidecar(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    from migrator.sidecar.stay import stay

    return stay(service, arguments)


def backup(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    from migrator.backups.manifest import summary

    made = summary(service.backup(arguments.backup_name))
    return Answer(made, f"{made['id']}: {made['place']}")


def verify_backup(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    return formatters.of_backup(service.verify_backup(arguments.backup_id, arguments.how or ""), proven=True)


def backups(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    if arguments.backups_action:
        return formatters.of_backup(service.show_backup(arguments.backup_id or "latest"))
    return formatters.of_backups(service.backups())


def prune(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    return formatters.of_pruned(service.prune(dry_run=arguments.dry_run))


def restore(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    restored = service.restore(
        arguments.backup_id,
        to=arguments.to,
        replace=arguments.yes,
        drop_old=arguments.drop_old,
        incomplete=arguments.incomplete,
        tables=arguments.tables,
        into_schema=arguments.into_schema,
    )
    return formatters.of_restored(restored)


def ledger(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    return formatters.of_ledger(service.ledger(max(1, arguments.limit)))


def repair(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    if arguments.accept_schema:
        return formatters.of_accepted_schema(service.accept_schema())
    return formatters.of_repair(service.repair(arguments.accept))


def settings(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    return formatters.of_settings(service.settings)


def alembic(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    return _hand_over(service, list(arguments.arguments))


def revision(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    return _hand_over(service, ["revision", *arguments.arguments])


def merge(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    return _hand_over(service, ["merge", *arguments.arguments])


def _hand_over(service: MigrationService, words: list[str]) -> Answer:
    from migrator.pipeline.unexpected import outside_of_stages
    from migrator.project import run_alembic

    changes = bool({"upgrade", "downgrade", "stamp"} & set(words)) and "--sql" not in words
    if changes:
        log.warning(
            "Alembic's own command runs without lock, backup and verify; use `migrator %s` to have them",
            words[0],
        )
    try:
        problem = run_alembic(words, service.project, service.settings.target)
    except MigratorError:
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not changes:  # the reader closed the pipe: `| head`
            log.warning("part of the answer was not read: Broken pipe")
            return Answer({}, "")
        log.debug("Alembic's own command failed", exc_info=True)
        raise outside_of_stages(error, changes=changes) from error
    if problem:
        raise HistoryError(f"Alembic reports: {problem.rstrip('.')}.", next_step="migrator alembic --help")
    return Answer({}, "")


_ALL = (
    upgrade, downgrade, stamp, verify, current, history, heads, show, freeze, check, status, wait, wait_for_current,
    sidecar, backup, verify_backup, backups, prune, restore, ledger, repair, settings, revision, merge, alembic,
)  # fmt: skip
HANDLERS: Mapping[str, Callable[[MigrationService, argparse.Namespace], Answer]] = {
    handler.__name__.replace("_", "-"): handler for handler in _ALL
}
