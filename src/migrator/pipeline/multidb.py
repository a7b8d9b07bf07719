"""One command for all databases of an ``env.py`` that migrates several: a run for each, one outcome for all.

See docs/why/adr/0014-several-databases.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from migrator.config.settings import Settings
from migrator.errors import HistoryError, Interrupted, MigratorError
from migrator.outcome import ExitCode, Outcome
from migrator.pipeline.unexpected import outside_of_stages
from migrator.runtime.signals import Interrupt, Interruption

log = logging.getLogger("migrator")


class OneDatabase(Protocol):
    """A function that runs a request on one of the databases."""

    settings: Settings


Service = TypeVar("Service", bound=OneDatabase)


def run_others(
    first: Outcome,
    find: Callable[[], Sequence[Service]],
    run: Callable[[Service], Outcome],
    interruption: Interruption,
) -> Outcome:
    """Run for each of the other databases, until one fails; return the outcome of all, ``first`` included."""
    outcomes: list[Outcome] = []

    def interrupted() -> Outcome:
        error = Interrupted(f"Interrupted by {interruption.received}.", next_step="run it again")
        return combined(first, outcomes, error)

    interruption.outcome = interrupted
    interruption.whole = lambda outcome: combined(first, [*outcomes, outcome])
    try:
        for service in find():
            log.info("%s: next", service.settings.required_target)
            outcomes.append(run(service))
            interruption.outcome = interrupted
            if outcomes[-1].code is not ExitCode.OK:
                break
    except MigratorError as error:
        return combined(first, outcomes, error)
    except Interrupt:
        return interrupted()
    except SystemExit as error:
        failed = HistoryError(f"env.py failed: it called sys.exit({error.code!r}).", next_step="fix env.py")
        return combined(first, outcomes, failed)
    except Exception as error:  # an env.py may raise anything
        log.debug("env.py failed", exc_info=True)
        return combined(first, outcomes, outside_of_stages(error, changes=False, who="env.py"))
    return combined(first, outcomes)


def combined(first: Outcome, others: Sequence[Outcome], trouble: MigratorError | None = None) -> Outcome:
    """Return the outcome of a command from the outcomes of its runs, the target's first.

    ``trouble`` is the error that hid the other databases. A failure after a change is PARTIAL, even if
    the run alone has another code: codes below 40 say that nothing was changed.
    """
    runs = [first, *others]
    last = runs[-1]
    code, message, next_step = last.code, last.message, last.next_step
    if trouble is not None:
        code, message, next_step = trouble.code, trouble.message, trouble.next_step
    done = [run.message for run in runs if run.code is ExitCode.OK]
    if code is ExitCode.OK:
        message = " ".join(done)
    else:
        where = last.target.rpartition("/")[2] if trouble is None else "The other databases"
        before = f" Before that: {' '.join(done)}" if done else ""
        message = f"{where}: {message}{before}"
        changed = any(run.before != run.after for run in runs)
        code = ExitCode.PARTIAL if changed and code < ExitCode.PARTIAL else code
    return first._replace(
        code=code,
        message=message,
        next_step=next_step,
        seconds=sum(run.seconds for run in runs),
        findings=tuple(finding for run in runs for finding in run.findings),
        others=tuple(run.as_dict() for run in others),
    )
