"""Secrets in files that somebody may replace while a run lasts: read again before each connection.

Kubernetes writes the new content of a Secret into the volumes of pods that run already, a minute or two after it was
changed, by one rename (``..data``), so that no file is ever seen half written.
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
"""Of each file its device, inode, size in bytes and time of change in nanoseconds; None for one that is not there."""


def watched(
    target: Target, source: str, environment: Mapping[str, str], variables: Mapping[str, str]
) -> Target:
    """Return the target, with its files where there are any.

    ``source`` is where its address comes from, a variable or ``PG*``; ``variables`` are those of ``environment`` with
    every ``NAME_FILE`` read.
    """
    name = _PASSWORDS.get(source, source)
    place = environment.get(f"{name}_FILE", "")
    password = environment.get("PGPASSWORD_FILE", "")
    if not place and password and target.password == variables.get("PGPASSWORD"):
        name, place = "PGPASSWORD", password  # of an address that has none
    others = tuple(value for key, value in target.parameters if key in _READ_BY_LIBPQ and value)
    if not place and not others:
        return target
    return SecretFiles(target, name, place, others, variables).now()


class SecretFiles:
    """The files of one target: that of its address or password (``place``), and ``others`` that libpq reads itself."""

    def __init__(
        self,
        target: Target,
        name: str,
        place: str,
        others: tuple[str, ...],
        variables: Mapping[str, str],
    ) -> None:
        self._target = target._replace(source=self)
        self._name, self._place = name, place
        # As they were: env.py, and what it imports, may change the process's own.
        self._variables = dict(variables)
        self._read: State = ()
        self._lock = threading.Lock()
        self.places = (*((place,) if place else ()), *others)

    def state(self) -> State:
        """Return what changes whenever one of the files does."""
        return _state(self.places)

    def now(self) -> Target:
        """Return the target as its file says it now; as it was known last where that cannot be read just now."""
        if not self._place:
            return self._target
        with self._lock:
            state = _state(
                (self._place,)
            )  # before it is read: what is replaced meanwhile is read the next time
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
        """Return a target of this server and role with the password of now; one of another as it is.

        The database may be another one, and stays.
        """
        now = self.now()
        if (now.host, now.port, now.user) != (target.host, target.port, target.user):
            return target
        passwords = {key: value for key, value in now.parameters if key.endswith("password")}
        parameters = tuple((key, passwords.get(key, value)) for key, value in target.parameters)
        return target._replace(password=now.password, parameters=parameters)

    @property
    def kept_up(self) -> bool:
        """Whether one is in a volume of Kubernetes, which keeps it up to date: in folders ``..2026_11_21_22_06...``."""
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
