"""The pods of k8s/, played by podman, each against a database of its own.

podman knows pods, not what makes them: a Deployment's or a Job's template becomes a pod here. The rest that is
different is in `playable`, and nothing else.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from tests.engine.containers import wait_for
from tests.engine.podman import Podman
from tests.engine.standins import POSTGRES_IMAGE
from tests.support import PLANTED, leaks
from tests.support.kubernetes import containers_of, pod_of

POSTGRES = "postgres"
USER = "shop"
ENDED = ("exited", "stopped")


def playable(
    item: Mapping[str, Any], name: str, images: Mapping[str, str], *, claim: str, secret: str
) -> dict[str, Any]:
    """Return an object's pod as podman can play it.

    podman takes the pod's restart policy for init containers, too, and removes them by default; it publishes a
    container's port on the host, where no cluster would; podman 4.3 crashes where a secret's volume does not say
    whether it is optional.
    """
    template = copy.deepcopy(pod_of(item))
    assert template is not None
    metadata = {"name": name, "annotations": {"io.podman.annotations.init.container.type": "always"}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    pod["spec"]["restartPolicy"] = "Never"
    for container in containers_of(pod):
        container["image"] = images.get(container["image"], container["image"])
        container.pop("ports", None)
    for volume in pod["spec"]["volumes"]:
        if "secret" in volume:
            volume["secret"] = {"secretName": secret, "optional": False}
        if "persistentVolumeClaim" in volume:
            volume["persistentVolumeClaim"]["claimName"] = claim
    return pod


@dataclass
class Pods:
    """Pods on one network with one Postgres; removed one by one, and their logs searched for the password."""

    podman: Podman
    network: str
    folder: Path
    playing: list[str] = field(default_factory=list)

    def start_postgres(self) -> None:
        """Run Postgres as `postgres` on the pods' network, and wait until it answers."""
        settings = {"POSTGRES_USER": USER, "POSTGRES_DB": USER, "POSTGRES_PASSWORD": PLANTED}
        variables = [f"--env={name}={value}" for name, value in settings.items()]
        self.podman.run("network", "create", self.network)
        options = (f"--name={POSTGRES}", f"--network={self.network}", "--shm-size=256m")
        self.podman.run("run", "-d", *options, *variables, POSTGRES_IMAGE)
        ready = ("exec", POSTGRES, "pg_isready", "-q", "-h", "127.0.0.1")
        wait_for(lambda: self.podman.run(*ready, expect=None).returncode == 0, 60, "Postgres answers")

    def psql(self, sql: str, database: str = USER) -> list[str]:
        """Return the rows of a query, `|` between columns."""
        command = ("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-U", USER, "-d", database)
        return self.podman.run("exec", "-i", POSTGRES, *command, stdin=sql).stdout.splitlines()

    def create_database(self, template: str = "template1") -> str:
        """Create a database; return its name."""
        name = f"d{uuid.uuid4().hex[:8]}"
        self.psql(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def address(self, database: str, password: str = PLANTED, host: str = POSTGRES) -> str:
        """Return the address that pods connect to."""
        return f"postgresql://{USER}:{quote(password, safe='')}@{host}:5432/{database}"

    def secret(self, name: str, address: str) -> None:
        """Make a secret with the address in the key `url`, or replace it.

        As podman keeps the secrets that it makes of manifests; 4.3 does not decode one's data when it mounts it.
        """
        text = f"{address}\n"
        raw = self.podman.version < (4, 4)
        data = {"url": text if raw else base64.b64encode(text.encode()).decode()}
        document = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}
        self.podman.run("secret", "rm", name, expect=None)
        self.podman.run("secret", "create", name, "-", stdin=json.dumps(document))

    def play(self, *objects: Mapping[str, Any], start: bool = True, expect: int | None = 0) -> None:
        """Play a manifest; returns when the init containers have ended and the others run."""
        manifest = self.folder / f"{uuid.uuid4().hex[:8]}.yaml"
        manifest.write_text(yaml.safe_dump_all(objects))
        self.playing += [str(item["metadata"]["name"]) for item in objects if item["kind"] == "Pod"]
        options = () if start else ("--start=false",)
        command = ("play", "kube", f"--network={self.network}", *options, str(manifest))
        self.podman.run(*command, expect=expect, timeout=180)

    def start(self, *pods: str) -> list[subprocess.Popen[str]]:
        """Start pods that were made with `start=False`, all at once; each returned process ends when its pod runs."""
        return [
            subprocess.Popen(
                [*self.podman.command, "pod", "start", pod],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for pod in pods
        ]

    def inspect(self, container: str) -> dict[str, Any]:
        """Return what podman knows of a container."""
        return dict(json.loads(self.podman.run("inspect", container).stdout)[0])

    def wait(self, container: str, seconds: float = 60) -> int:
        """Wait for a container's end; return its exit code."""
        wait_for(
            lambda: self.inspect(container)["State"]["Status"] in ENDED, seconds, f"{container} has ended"
        )
        return int(self.inspect(container)["State"]["ExitCode"])

    @contextlib.contextmanager
    def gate(self, database: str, sql: str) -> Iterator[None]:
        """Hold what a statement takes, in a session of its own, until the end of the block."""
        held = f"BEGIN; {sql}; SELECT pg_sleep(300)"
        name = f"gate {database}"
        command = ("exec", "-d", "-e", f"PGAPPNAME={name}", POSTGRES, "psql", "-qU", USER, "-d", database)
        self.podman.run(*command, "-c", held)
        mine = f"FROM pg_stat_activity WHERE application_name = '{name}'"
        wait_for(lambda: self.psql(f"SELECT wait_event {mine}") == ["PgSleep"], 20, "the gate is shut")
        try:
            yield
        finally:
            self.psql(f"SELECT pg_terminate_backend(pid) {mine}")

    def remove(self, *pods: str) -> None:
        """Remove pods, having searched what their containers logged, and their settings, for the password."""
        if not pods:
            return
        listed = self.podman.run(
            "ps", "-a", "--pod", "--format", "{{.PodName}} {{.Names}}"
        ).stdout.splitlines()
        names = [line.split()[-1] for line in listed if line.split()[0] in pods]
        assert len(names) > len(pods)  # each has its own, and podman's
        text = self.podman.run("inspect", *names).stdout + "".join(map(self.podman.logs, names))
        assert leaks.find(text) is None, "a container gives the password away"
        self.podman.run("pod", "rm", "-f", "-t", "0", *pods)
        self.playing = [pod for pod in self.playing if pod not in pods]

    def remove_all(self) -> None:
        """Remove what a test has left playing."""
        left = self.podman.run("pod", "ls", "--format", "{{.Name}}").stdout.split()
        self.playing = [pod for pod in self.playing if pod in left]
        self.remove(*dict.fromkeys(self.playing))
