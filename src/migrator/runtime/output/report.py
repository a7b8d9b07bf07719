"""Reports: an outcome as one line for people, as JSON for machines, and as Kubernetes' termination message."""

from __future__ import annotations

import contextlib
import os
from typing import Any, NamedTuple

from migrator.outcome import ExitCode, Outcome
from migrator.runtime.escaping import json_text, visible, visible_lines
from migrator.runtime.logs import Logs, get_logger, redact

log = get_logger("migrator")

TERMINATION_LIMIT = 4096
"""Bytes that Kubernetes keeps of a termination message.

https://kubernetes.io/docs/tasks/debug/debug-application/determine-reason-pod-failure/
"""


class Answer(NamedTuple):
    """One command's answer: JSON-ready data (or a function that makes it), text for people, and the exit code."""

    data: Any
    text: str
    code: int = ExitCode.OK

    def render(self, output_format: str) -> str:
        if output_format == "json":
            data = self.data() if callable(self.data) else self.data
            return json_text(data, indent=2)
        return visible_lines(self.text)


def sentence(outcome: Outcome) -> str:
    """Return in one line what happened, where the database stands, and what to type next."""
    line = outcome.message
    if outcome.code is not ExitCode.OK:
        line = f"{outcome.code.name} ({int(outcome.code)}): {line}"
    return redact(visible(line + (f" Next: {outcome.next_step}" if outcome.next_step else "")))


def say(outcome: Outcome, logs: Logs) -> None:
    """Make the outcome the log's last line; a success on a terminal is only answered, not logged too."""
    failed = outcome.code is not ExitCode.OK
    if failed or logs.is_json:
        logs.say(
            "error" if failed else "info",
            sentence(outcome),
            code=int(outcome.code),
            outcome=outcome.code.name,
            seconds=round(outcome.seconds, 3),
        )


def document(outcome: Outcome) -> str:
    return redact(json_text(outcome.as_dict(), indent=2))


def forget(place: str) -> None:
    """Remove the report of an earlier run: a run that is killed, or that cannot write, has none."""
    if not place:
        return
    from migrator.runtime import files

    try:
        files.remove(place)
    except OSError as error:
        log.warning("%s is the report of an earlier run, and cannot be removed: %s", place, error.strerror)


def write_text(text: str, place: str) -> None:
    """Write a report to a file, whole or not at all; a failure is only logged."""
    from migrator.runtime import files

    try:
        files.replace(place, text + "\n")
    except OSError as error:
        log.warning("cannot write the report to %s: %s", place, error.strerror)
        with contextlib.suppress(OSError):  # the report of an earlier run would look like this one's
            files.remove(place)


def write_termination_line(line: str, place: str) -> None:
    """Write one line to Kubernetes' file for it, if that file exists, cut to the size that Kubernetes keeps."""
    if not place or not os.path.exists(place):
        return
    from migrator.runtime import files

    message = redact(visible(line)).encode()[:TERMINATION_LIMIT].decode(errors="ignore")
    try:
        files.overwrite(place, message.encode())
    except OSError as error:
        log.debug("cannot write the termination message to %s: %s", place, error.strerror)
