"""Secrets in files that may be replaced during a run: they are read again before each connection.

Kubernetes updates the volumes of running pods a minute or two after a Secret changes. It does so with
one rename (``..data``), so a file is never half written.
https://kubernetes.io/docs/concepts/configuration/secret/#mounted-secrets-are-updated-automatically
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping

from migrator.config.database_url import Target, secrets_in
from migrator.runtime.redaction import redact

_PASSWORDS = {"PG*": "PGPASSWORD", "POSTGRES_*": "POSTGRES_PASSWORD"}
_READ_BY_LIBPQ = ("passfile", "sslcert", "sslkey", "sslrootcert", "sslcrl")

State = tuple[tuple[int, int, int, int] | None, ...]
"""For each file: device, inode, size in bytes and time of change in nanoseconds; None if it does not exist.
"""


def watched(
    target: Target, source: str, environment: Mapping[str, str], variables: Mapping[str, str]
) -> Target:
    """Return the target, with its files if it has any.

    ``source`` is the origin of its address, a variable or ``PG*``. ``variables`` are those of
    ``environment`` with every ``NAME_FILE`` read.
    """
    name = _PASSWORDS.get(source, source)
    place = environment.get(f"{name}_FILE", "")
    password = environment.get("PGPASSWORD_FILE", "")
    if not place and password and target.password == variables.get("PGPASSWORD"):
        name, place = "PGPASSWORD", password  # of an address without one
    others = tuple(value for key, value in target.parameters if key in _READ_BY_LIBPQ and value)
    if not place and not others:
        return target
    return SecretFiles(target, name, place, others, variables).now()


class SecretFiles:
    """The files of one target: its address or password (``place``), and ``others`` that libpq reads itself."""

    def __init__(
        self, target: Target, name: str, place: str, others: tuple[str, ...], variables: Mapping[str, str]
    ) -> None:
        self._target = target._replace(source=self)
        self._name, self._place = name, place
        # A copy: env.py and its imports may change the variables of the process.
        self._variables = dict(variables)
        self._read: State = ()
        self._lock = threading.Lock()
        self.places = (*((place,) if place else ()), *others)

    def state(self) -> State:
        """Return a value that changes whenever one of the files does."""
        return _state(self.places)

    def now(self) -> Target:
        """Return the target from the current content of its file; the last known one if the file cannot be
        read.
        """
        if not self._place:
            return self._target
        with self._lock:
            state = _state(
                (self._place,)
            )  # before the read: a later replacement is then noticed the next time
            if state != self._read:
                found = self._find()
                if found is not None:
                    self._target, self._read = found._replace(source=self), state
            return self._target

    def _find(self) -> Target | None:
        from migrator.config.sources import find_target

        try:
            with open(self._place, encoding="utf-8") as file:
                text = file.read().rstrip("\r\n")
        except (OSError, UnicodeDecodeError):
            return None
        if not text:
            return None
        redact.add({text} if self._name in _PASSWORDS.values() else secrets_in(text))
        return find_target(self._variables | {self._name: text}, {}, [])

    def renewed(self, target: Target) -> Target:
        """Return a target of this server and role with the current password; return any other target
        unchanged.

        The database of the target is kept.
        """
        now = self.now()
        if (now.host, now.port, now.user) != (target.host, target.port, target.user):
            return target
        passwords = {key: value for key, value in now.parameters if key.endswith("password")}
        parameters = tuple((key, passwords.get(key, value)) for key, value in target.parameters)
        return target._replace(password=now.password, parameters=parameters)

    @property
    def kept_up(self) -> bool:
        """Tell whether a file is in a Kubernetes volume, which is kept up to date in folders
        ``..2026_11_21_22_06...``.
        """
        return any(
            part.startswith("..") for place in self.places for part in os.path.realpath(place).split(os.sep)
        )


def _state(places: tuple[str, ...]) -> State:
    return tuple(_state_of(place) for place in places)


def _state_of(place: str) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(place)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
