"""A Kubernetes cluster of one node on this machine, and tests of the shipped manifests on it.

Not part of CI: the API server, the controllers, the scheduler and the kubelet are built from their published
Go modules, which takes minutes. `bin/k8s-cluster` does all of it.
"""
