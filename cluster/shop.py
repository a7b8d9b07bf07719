"""The shipped manifests in a namespace of a test's own, on a database of its own."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

import yaml
from tests.support import ledgers

from cluster.build import ROOT
from cluster.cluster import Cluster
from cluster.control_plane import NODE
from cluster.kubectl import Kubectl, Object, state, terminated, wait_for

K8S = ROOT / "k8s"
OVERLAYS = ROOT / "cluster" / "overlays"
HEADS = set(json.loads((ROOT / "migrations" / "manifest.json").read_text())["heads"])
FINALIZER = "migrator.test/observed"  # keeps the object of a pod that has ended, to be read
SECURITY = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn", "audit")}


@dataclass(frozen=True)
class Shop:
    """One namespace and one database of the same name."""

    cluster: Cluster
    name: str

    @property
    def kubectl(self) -> Kubectl:
        """kubectl in the namespace."""
        return self.cluster.kubectl.within(self.name)

    @property
    def database(self) -> str:
        """The database's name."""
        return self.name.replace("-", "_")

    def create(self) -> None:
        """Create both."""
        self.cluster.psql(f"CREATE DATABASE {self.database}")
        metadata = {"name": self.name, "labels": SECURITY}
        self.kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        has = self.cluster.kubectl.has
        wait_for(lambda: has("serviceaccount", "default", self.name), 30, lambda: "no service account")

    def delete(self) -> None:
        """Delete the namespace and the volumes of its claims."""
        for pod in self.pods():
            if pod["metadata"].get("finalizers"):
                self.let_go(pod["metadata"]["name"])
        kinds = "deployments,cronjobs,jobs,pods"
        self.kubectl.run("delete", kinds, "--all", "--grace-period=2", timeout=180)
        self.kubectl.run("delete", "namespace", self.name, "--wait=false")
        self.kubectl.run("delete", "persistentvolumes", "-l", f"shop={self.name}", "--wait=false")

    def psql(self, sql: str) -> list[str]:
        """Return the rows of a query."""
        return self.cluster.psql(sql, self.database)

    def rendered(self, folder: Path = K8S, address: str = "") -> list[Object]:
        """Return what `kubectl kustomize` makes of a folder; only the Secret's address is this test's."""
        text = self.kubectl.run("kustomize", str(folder)).stdout
        objects = [item for item in yaml.safe_load_all(text) if item]
        for item in objects:
            if item["kind"] == "Secret" and item["metadata"]["name"].startswith("shop-database"):
                item["data"] = {"url": encoded(address or self.cluster.address_of(self.database))}
        return objects

    def apply(self, *objects: Object) -> None:
        """Create or change objects, and a volume on the node for each claim: nothing else makes volumes here."""
        for item in objects:
            if item["kind"] == "PersistentVolumeClaim":
                self.kubectl.apply(self._volume(item))
        self.kubectl.apply(*objects)

    def _volume(self, claim: Object) -> Object:
        name = f"{self.name}-{claim['metadata']['name']}"
        folder = self.cluster.volumes / name
        folder.mkdir(parents=True, exist_ok=True)
        term = {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE]}
        return {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name, "labels": {"shop": self.name}},
            "spec": {
                "accessModes": claim["spec"]["accessModes"],
                "capacity": claim["spec"]["resources"]["requests"],
                "claimRef": {"name": claim["metadata"]["name"], "namespace": self.name},
                "local": {"path": str(folder)},
                "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [term]}]}},
            },
        }

    def standing(self) -> set[str]:
        """Return the revisions that stand in the ledger, whose rows must make sense one after another."""
        rows = self.psql(
            "SELECT event, revision FROM migrator_ledger WHERE revision IS NOT NULL ORDER BY at, number"
        )
        return ledgers.standing([(event, revision) for event, revision in (row.split("|") for row in rows)])

    def versions(self) -> set[str]:
        """Return the revisions in Alembic's own table."""
        return set(self.psql("SELECT version_num FROM alembic_version"))

    def locks(self) -> int:
        """Return how many advisory locks anybody holds in the database."""
        rows = self.psql(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        return int(rows[0])

    def ready(self, deployment: str, replicas: int = 1) -> bool:
        """Tell whether so many of a Deployment's pods are ready."""
        status = self.kubectl.get("deployment", deployment)["status"]
        return bool(status.get("readyReplicas", 0) == replicas)

    def pods(self, selector: str = "") -> list[Object]:
        """Return the namespace's pods, oldest first."""
        return self.kubectl.list("pods", selector)

    def keep(self, pod: str) -> None:
        """Keep the object of a pod when it is deleted, to read how it ended."""
        patch = {"metadata": {"finalizers": [FINALIZER]}}
        self.kubectl.run("patch", "pod", pod, "--type=merge", "-p", json.dumps(patch))

    def let_go(self, pod: str) -> None:
        """Let the object of a pod go that a finalizer keeps."""
        self.kubectl.run("patch", "pod", pod, "--type=merge", "-p", '{"metadata":{"finalizers":null}}')

    def wait_for_exit(self, pod: str, container: str, seconds: float = 120) -> Object:
        """Wait until a container of a pod has ended once; return how."""

        def ended() -> Object:
            return terminated(self.kubectl.get("pod", pod), container)

        return wait_for(ended, seconds, lambda: self.kubectl.describe("pod", pod))

    def wait_until_started(self, pod: str, container: str, seconds: float = 60) -> Object:
        """Wait until a container of a pod runs; return its status."""

        def running() -> Object:
            status = state(self.kubectl.get("pod", pod), container)
            return status if "running" in status.get("state", {}) else {}

        return wait_for(running, seconds, lambda: self.kubectl.describe("pod", pod))

    def explain(self) -> str:
        """Return what the namespace's pods and Jobs say of themselves, for a failure."""
        said = [self.kubectl.run("get", "jobs,pods", "-o", "wide").stdout]
        said += [self.kubectl.run("get", "events", "--sort-by=.lastTimestamp").stdout]
        said += [self.kubectl.describe("pod", pod["metadata"]["name"]) for pod in self.pods()]
        return "\n".join(said)[:12000]


def encoded(text: str) -> str:
    """Return a value as a Secret holds it."""
    return base64.b64encode(f"{text}\n".encode()).decode()


def of_kind(objects: list[Object], kind: str) -> Object:
    """Return the only object of a kind."""
    (found,) = (item for item in objects if item["kind"] == kind)
    return found
