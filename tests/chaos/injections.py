"""What is done to a run, and when: one injection for each number, the same again for the same seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

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
)
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
    "verify": (("apply done",), 0.2),
}
"""Lines of the run's log, and up to how many seconds after one of them the fault comes."""

ENV_FILES = ("plain_url", "per_migration", "async_engine")
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
    def lines(self) -> tuple[str, ...]:
        """The texts in the run's log, either of which `delay` counts from; none for its start."""
        return MOMENTS[self.moment][0]

    def __str__(self) -> str:
        return (
            f"injection {self.number}: {self.fault} at {self.moment} + {self.delay:.3f} s (lasts {self.lasts:.1f} s),"
            f" env.py {self.env_file}, backup {'on' if self.backup else 'off'},"
            f" next run {'at once' if self.at_once else 'after a look'}"
        )


def injection(seed: int, number: int) -> Injection:
    """Return the injection of this number: faults and moments in turn, everything else by chance."""
    chance = random.Random(f"{seed}/{number}")  # noqa: S311 - no secret, and the same again for the same seed
    fault = FAULTS[number % len(FAULTS)]
    moment = list(MOMENTS)[(number // len(FAULTS) + number) % len(MOMENTS)]
    if fault == "terminate dump":
        moment = "backup"
    if number % CUT_EVERY == CUT_EVERY - 1:
        fault, moment = "cut", CUTS[number // CUT_EVERY % len(CUTS)]
    backup = moment == "backup" or chance.random() < 0.2
    return Injection(
        number=number,
        fault=fault,
        moment=moment,
        delay=chance.uniform(0, MOMENTS[moment][1]),
        lasts=chance.uniform(0.2, 2.5),
        env_file=chance.choice(ENV_FILES),
        backup=backup,
        at_once=chance.random() < 0.5,
    )
