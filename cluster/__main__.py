"""Run the cluster until Ctrl-C, with the example's images and a Postgres: `bin/k8s-cluster --stay`."""

from __future__ import annotations

import signal

from cluster.cluster import cluster

if __name__ == "__main__":
    with cluster() as it:
        print(f"export KUBECONFIG={it.kubectl.access}")
        print(f"alias kubectl={it.kubectl.program}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
