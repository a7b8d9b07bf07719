"""Ports for servers that a test starts a while after it has chosen them."""

from __future__ import annotations

import os
import random
import re
import socket
from pathlib import Path

_SHARES = 16
_given: set[int] = set()


def free_port() -> int:
    """Return a TCP port that nothing listens on, and that nobody else will be given before it is used.

    Not from the range that the kernel takes ports from by itself, for outgoing connections and for servers that ask for
    any: one of these may get it in between.  Each worker of a test run has a share of the others.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    share = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 0) % _SHARES
    candidates = range(max(2048, lowest - 16000) // _SHARES * _SHARES + share, lowest, _SHARES)
    for port in random.sample(candidates, len(candidates)):
        if port not in _given and _is_free(port):
            _given.add(port)
            return port
    with socket.socket() as probe:  # the kernel takes all of them
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104 - podman binds there, too; nothing listens
        except OSError:
            return False
        return True
