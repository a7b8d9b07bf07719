"""One command for all databases of an ``env.py`` that migrates several: a run for each, one outcome for all.

See docs/adr/0014-several-databases.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from migrator.aftermath import outside_of_stages
from migrator.errors import HistoryError, Interrupted, MigratorError
from migrator.interruption import Interrupt
from migrator.outcome import ExitCode, Outcome

if TYPE_CHECKING:
    from migrator.service import MigrationService

log = logging.getLogger("migrator")


def run_others(
    first: Outcome,
    find: Callable[[], Sequence[MigrationService]],
    run: Callable[[MigrationService], Outcome],
) -> Outcome:
    """Run for each of the other databases, until one fails; returns the outcome of the whole, ``first`` included."""
    outcomes: list[Outcome] = []
    try:
        for service in find():
            log.info("%s: next", service.settings.required_target)
            outcomes.append(run(service))
            if outcomes[-1].code is not ExitCode.OK:
                break
    except MigratorError as error:
        return combined(first, outcomes, error)
    except Interrupt as error:
        interrupted = Interrupted(f"Interrupted by {error.name}.", next_step="run it again")
        return combined(first, outcomes, interrupted)
    except SystemExit as error:
        failed = HistoryError(f"env.py failed: it called sys.exit({error.code!r}).", next_step="mend env.py")
        return combined(first, outcomes, failed)
    except Exception as error:  # an env.py may raise anything
        log.debug("env.py failed", exc_info=True)
        return combined(first, outcomes, outside_of_stages(error, changes=False, who="env.py"))
    return combined(first, outcomes)


def combined(first: Outcome, others: Sequence[Outcome], trouble: MigratorError | None = None) -> Outcome:
    """Return the outcome of a command, given those of the runs that it took, the target's first.

    ``trouble`` is what kept the others from being found.  A failure after something was changed is PARTIAL, whatever
    it would have been alone: codes below 40 say that nothing was changed.
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
