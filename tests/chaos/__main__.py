"""Run a campaign from the command line, as long as one likes."""

from __future__ import annotations

import argparse
import secrets
import sys

from tests.chaos.campaign import WORKERS, campaign


def main() -> int:
    """Return 0 where every invariant held."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--injections", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--only", type=int, help="the number of one injection")
    parser.add_argument("--workers", type=int, default=WORKERS)
    given = parser.parse_args()
    if not given.injections and not given.seconds and given.only is None:
        given.seconds = 3600.0
    print(f"seed {given.seed}", flush=True)
    report = campaign(
        given.seed, injections=given.injections, seconds=given.seconds, only=given.only, workers=given.workers
    )
    print(report)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
