"""What is done to a run, and when: one injection for each number, the same again for the same seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.support.env_shapes import SHAPES

FAULTS = (
    "SIGKILL",
    "SIGTERM",
    "SIGINT",
    "terminate control",
    "terminate applying",
    "terminate dump",
    "terminate all",
    "restart fast",
    "restart immediate",
    "stall",
    "drop",
    "reset",
    "refuse",
    "busy",
)
"""What is done to a run; ``busy`` does nothing to it, but a table that it needs stays locked for some time."""
NETWORK = frozenset({"stall", "drop", "reset", "refuse", "cut"})
SIGNALS = frozenset({"SIGKILL", "SIGTERM", "SIGINT"})

MOMENTS: dict[str, tuple[tuple[str, ...], float]] = {
    "start": ((), 0.15),
    "inspect": (("wait done",), 0.01),
    "lock": (("waiting for the run lock",), 0.4),
    "guard": (("lock done",), 0.01),
    "backup": (("guard done",), 0.4),
    "env.py": (("backup done", "no backup: "), 0.1),
    "apply, early": (("backup done", "no backup: "), 0.4),
    "apply": (("applied 1 of",), 0.5),
    "index build": (("applied 2 of",), 0.2),
    "apply, in the middle": (("applied 2 of",), 0.4),
    "apply, late": (("applied 4 of",), 0.2),
    "lock wait": (("applied 5 of",), 0.4),
    "verify": (("apply done",), 0.2),
}
"""Lines of the run's log, and up to how many seconds after one of them the fault comes.

One fewer than there are faults, and an odd number: so each fault comes to each moment (see :func:`injection`).
"""

OWN_TRANSACTION = frozenset(name for name in SHAPES if name.startswith("its own transaction"))
"""Shapes of env.py that begin a transaction around Alembic: there is no autocommit_block in it, or in their history."""
CUT_EVERY = 60
CUTS = ("backup", "apply", "index build", "verify", "inspect")
"""A network that stays cut is given up after half a minute, so it is tried more rarely than the rest."""


@dataclass(frozen=True)
class Injection:
    """One fault at one moment of one run; all times in seconds."""

    number: int
    fault: str
    moment: str
    delay: float
    lasts: float
    env_file: str
    backup: bool
    at_once: bool

    @property
    def whole(self) -> bool:
        """Whether the history of this run leaves no transaction."""
        return self.env_file in OWN_TRANSACTION

    @property
    def lines(self) -> tuple[str, ...]:
        """The texts in the run's log, either of which `delay` counts from; none for its start."""
        return MOMENTS[self.moment][0]

    def __str__(self) -> str:
        return (
            f"injection {self.number}: {self.fault} at {self.moment} + {self.delay:.3f} s (lasts {self.lasts:.1f} s),"
            f" env.py {self.env_file!r}, backup {'on' if self.backup else 'off'},"
            f" next run {'at once' if self.at_once else 'after a look'}"
        )


def injection(seed: int, number: int) -> Injection:
    """Return the injection of this number: faults and moments in turn, everything else by chance."""
    chance = random.Random(f"{seed}/{number}")  # noqa: S311 - no secret, and the same again for the same seed
    fault = FAULTS[number % len(FAULTS)]
    moment = list(MOMENTS)[(number // len(FAULTS) + number) % len(MOMENTS)]
    moment = {"terminate dump": "backup", "busy": "lock wait"}.get(fault, moment)
    if number % CUT_EVERY == CUT_EVERY - 1:
        fault, moment = "cut", CUTS[number // CUT_EVERY % len(CUTS)]
    backup = moment == "backup" or chance.random() < 0.2
    return Injection(
        number=number,
        fault=fault,
        moment=moment,
        delay=chance.uniform(0, MOMENTS[moment][1]),
        lasts=chance.uniform(0.2, 2.5),
        env_file=chance.choice(list(SHAPES)),
        backup=backup,
        at_once=chance.random() < 0.5,
    )
