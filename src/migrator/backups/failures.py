"""Why a restore stops."""

from __future__ import annotations

import re

from migrator.backups.manifest import Backup
from migrator.errors import RestoreFailed
from migrator.runtime.logs import redact

_OF_A_ROLE = re.compile(
    r"Command was: (ALTER .* OWNER TO|GRANT|REVOKE|ALTER DEFAULT PRIVILEGES|SET SESSION AUTH|CREATE EVENT TRIGGER)"
)

_OF_RIGHTS = re.compile(r"permission denied|[Mm]ust be (superuser|owner|member|able)|[Oo]nly superuser")
AS_SUPERUSER = "restore as a superuser (a superuser's name in MIGRATOR_DATABASE_URL)"


class WouldLose(Exception):
    """Others have written since the backup, or may have; the message says which."""


def failed(backup: Backup, message: str, next_step: str) -> RestoreFailed:
    """Return the error of a restore that has changed nothing."""
    state = f"The database was not changed; the backup is {backup.place}."
    return RestoreFailed(message, next_step=next_step, state=state)


class RestoreStopped(Exception):
    """pg_restore failed; ``said`` is its last words.

    ``of_a_role``: whether an owner or a grant was the cause. ``of_rights``: whether the role may not do it.
    """

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = redact(" ".join(said.split()))[:800]
        self.of_a_role = bool(_OF_A_ROLE.search(self.said))
        self.of_rights = bool(_OF_RIGHTS.search(self.said))
