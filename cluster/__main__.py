"""Run the cluster until Ctrl-C, with the example's images and a Postgres: `bin/k8s-cluster --stay`."""

from __future__ import annotations

import contextlib
import threading

from cluster.cluster import cluster
from cluster.services import end_on_sigterm

if __name__ == "__main__":
    end_on_sigterm()
    with contextlib.suppress(KeyboardInterrupt), cluster() as it:
        print(f"export KUBECONFIG={it.kubectl.access}")
        print(f"alias kubectl={it.kubectl.program}", flush=True)
        threading.Event().wait()
