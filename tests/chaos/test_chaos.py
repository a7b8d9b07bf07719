"""Three hundred injections: nothing is half told, and the next run finishes the work without help."""

from __future__ import annotations

import os
import secrets

from tests.chaos.campaign import campaign
from tests.chaos.injections import FAULTS, MOMENTS, SIGNALS, injection

INJECTIONS = 300


def test_whatever_happens_to_a_run_the_next_one_finishes_the_work() -> None:
    seed = int(os.environ.get("CHAOS_SEED", secrets.randbelow(10**6)))
    print(f"seed {seed}: CHAOS_SEED={seed} repeats it")
    report = campaign(seed, injections=INJECTIONS)
    print(report)
    assert not report.failures, str(report)
    assert report.done == INJECTIONS
    # What came too late to hit anything shows nothing: it must be the exception, with every fault.
    assert report.missed < INJECTIONS / 10
    assert {fault for fault, _ in report.codes} == {*FAULTS, "cut"}


def test_each_signal_comes_to_each_moment() -> None:
    """What SIGTERM leaves is to be compared with what SIGKILL leaves at the same place."""
    drawn = {(one.fault, one.moment) for one in (injection(1, number) for number in range(INJECTIONS))}
    assert {(fault, moment) for fault in SIGNALS for moment in MOMENTS} <= drawn
