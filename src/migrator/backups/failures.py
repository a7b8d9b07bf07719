"""Why a restore stops."""

from __future__ import annotations

import re

from migrator.backups.manifest import Backup
from migrator.errors import RestoreFailed
from migrator.runtime.logs import redact

_OF_A_ROLE = re.compile(
    r"Command was: (ALTER .* OWNER TO|GRANT|REVOKE|ALTER DEFAULT PRIVILEGES|SET SESSION AUTH|CREATE EVENT TRIGGER)"
)


class WouldLose(Exception):
    """Others have written since the backup, or may have; the message says which."""


def failed(backup: Backup, message: str, next_step: str) -> RestoreFailed:
    """Return the error of a restore that has changed nothing."""
    state = f"The database was not changed; the backup is {backup.place}."
    return RestoreFailed(message, next_step=next_step, state=state)


class RestoreStopped(Exception):
    """pg_restore failed; ``said`` is its last words, ``of_a_role`` whether an owner or a grant was the cause."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = redact(" ".join(said.split()))[:800]
        self.of_a_role = bool(_OF_A_ROLE.search(self.said))
