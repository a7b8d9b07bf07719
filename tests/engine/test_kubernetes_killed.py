"""Promise 2 for the Job's pod: killed in each stage, or cut off by its node's network, and the next pod finishes it.

A history with gates (projects/stages) holds a run in a stage for as long as a session of the test holds a lock.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from migrator.outcome import ExitCode
from migrator.pipeline.stages.lock import LOCK_CLASS, RUN_LOCK
from tests.engine.containers import wait_for
from tests.engine.engine import Engine, as_root, call
from tests.engine.pods import Pods, playable
from tests.engine.test_projects import PROJECTS
from tests.support.kubernetes import ROOT, documents, kustomize, of_kind

pytestmark = pytest.mark.engine

IMAGE = "migrator-test-stages:latest"
SEEDED = "seeded_at_r1"
GATES = {
    "lock": f"SELECT pg_advisory_lock({LOCK_CLASS}, {RUN_LOCK})",
    "backup": "LOCK TABLE items IN ACCESS EXCLUSIVE MODE",
    "apply": "SELECT pg_advisory_lock(4711, 1)",
    "verify": "SELECT pg_advisory_lock(4711, 2)",
}
ASKS_FOR_THE_LOCK = "waiting for the run lock"
WAITING = """
    SELECT count(*) FROM pg_stat_activity
    WHERE wait_event_type = 'Lock' AND datname = current_database() AND {}
"""
AT = {  # how it is seen that a run stands before the gate
    "backup": "application_name LIKE '% backup'",
    "apply": "query LIKE '%(4711, 1)%'",
    "verify": "query LIKE '%migrator_assertion%'",
}
OUR_LOCKS = f"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = {LOCK_CLASS}"


@dataclass
class Shop:
    """A database at r1 whose history has r2, and the Job that brings it there."""

    pods: Pods
    database: str
    made: int = 0

    @property
    def secret(self) -> str:
        """The secret's name."""
        return f"shop-database-{self.database}"

    def psql(self, sql: str) -> list[str]:
        """Return the rows of a query."""
        return self.pods.psql(sql, self.database)

    def start(self, *arguments: str, wait_timeout: str = "30s") -> str:
        """Play the Job's next pod; return its container's name."""
        objects = documents(_text())
        self.made += 1
        name = f"{self.database}-{self.made}"
        pod = playable(
            of_kind(objects, "Job"),
            name,
            {"shop-migrations:latest": IMAGE},
            claim=f"backups-{self.database}",
            secret=self.secret,
        )
        if arguments:
            pod["spec"]["containers"][0]["args"] = [*arguments]
        settings = of_kind(objects, "ConfigMap")
        settings["data"] |= {"MIGRATOR_WAIT_TIMEOUT": wait_timeout, "MIGRATOR_RUN_LOCK_TIMEOUT": "60s"}
        claim = of_kind(objects, "PersistentVolumeClaim")
        claim["metadata"]["name"] = f"backups-{self.database}"
        claims = [claim] if self.made == 1 else []  # podman makes a volume, and refuses to find it there
        self.pods.play(settings, *claims, pod)
        return f"{name}-migrator"

    def files(self) -> list[str]:
        """Return the names of the files among the backups."""
        found = call(*as_root("find", self.volume, "-type", "f", "-printf", "%P\n")).stdout
        return sorted(found.splitlines())

    @property
    def volume(self) -> str:
        """Where the backups' volume lies on this machine."""
        name = f"backups-{self.database}"
        return self.pods.podman.run("volume", "inspect", "--format", "{{.Mountpoint}}", name).stdout.strip()

    def is_whole(self) -> None:
        """Check what must be true whatever has happened: one truth, no lock of ours, no half backup."""
        wait_for(lambda: self.psql(OUR_LOCKS) == ["0"], 60, "the killed run's locks are gone")
        version = self.psql("SELECT version_num FROM alembic_version")
        booked = self.psql(
            "SELECT revision FROM migrator_ledger WHERE event = 'applied' ORDER BY at DESC, number DESC LIMIT 1"
        )
        assert version == booked
        columns = self.psql(
            "SELECT count(*) FROM information_schema.columns WHERE table_name = 'items' AND column_name = 'done'"
        )
        assert columns == ["1" if version == ["r2"] else "0"]
        described = {name.removesuffix(".json") for name in self.files() if name.endswith(".json")}
        for (
            name
        ) in self.files():  # what looks like a backup has its manifest; what is left of one does not look so
            if re.fullmatch(r".*\.(dump|dir)(\.age)?", name):
                assert name.rsplit(".dump")[0] in described, self.files()

    def is_finished(self) -> None:
        """Let the next pod do the rest, and check that the work was done once."""
        container = self.start()
        assert self.pods.wait(container) == 0, self.pods.podman.logs(container)
        self.is_whole()
        assert self.psql("SELECT version_num FROM alembic_version") == ["r2"]
        applied = "SELECT count(*) FROM migrator_ledger WHERE event = 'applied' AND revision = 'r2'"
        assert self.psql(applied) == ["1"]
        proof = self.start("verify-backup", "latest")
        assert self.pods.wait(proof) == 0, self.pods.podman.logs(proof)


def _text() -> str:
    return kustomize(ROOT / "k8s" / "overlays" / "job")


@pytest.fixture(scope="module")
def seeded(engine: Engine, image: str, playground: Pods) -> str:
    """Return a database at r1, to be copied."""
    engine.build(PROJECTS / "stages", IMAGE, f"--build-arg=MIGRATOR_IMAGE={image}")
    playground.podman.load(engine, IMAGE)
    playground.psql(f"CREATE DATABASE {SEEDED}")
    first = Shop(playground, SEEDED)
    playground.secret(first.secret, playground.address(SEEDED))
    container = first.start("upgrade", "r1")
    assert playground.wait(container) == 0, playground.podman.logs(container)
    playground.remove_all()
    return SEEDED


@pytest.fixture
def shop(pods: Pods, seeded: str) -> Shop:
    """A copy of it, with a secret that says where."""
    made = Shop(pods, pods.create_database(seeded))
    pods.secret(made.secret, pods.address(made.database))
    return made


def stands(shop: Shop, stage: str, container: str) -> Callable[[], Any]:
    """Return what tells whether a run has come to a stage."""
    if stage == "lock":
        return lambda: ASKS_FOR_THE_LOCK in shop.pods.podman.logs(container)
    return lambda: shop.psql(WAITING.format(AT[stage])) != ["0"]


@pytest.mark.parametrize("stage", GATES)
def test_killed_in_a_stage(shop: Shop, stage: str) -> None:
    with shop.pods.gate(shop.database, GATES[stage]):
        container = shop.start()
        wait_for(stands(shop, stage, container), 30, f"the run is in {stage}")
        shop.pods.podman.run("kill", "--signal=KILL", container)
        assert shop.pods.wait(container) == 137
    shop.is_whole()
    assert shop.psql("SELECT version_num FROM alembic_version") == ["r2" if stage == "verify" else "r1"]
    shop.is_finished()


def test_killed_while_it_waits_for_postgres(shop: Shop) -> None:
    shop.pods.secret(shop.secret, shop.pods.address(shop.database, host="not-there"))
    container = shop.start(wait_timeout="5m")
    wait_for(lambda: "waiting for" in shop.pods.podman.logs(container), 30, "it waits")
    shop.pods.podman.run("kill", "--signal=KILL", container)
    assert shop.pods.wait(container) == 137
    shop.is_whole()
    shop.pods.secret(shop.secret, shop.pods.address(shop.database))
    shop.is_finished()


def test_killed_while_a_dump_is_written(shop: Shop) -> None:
    row = "repeat(md5(n::text), 2) || repeat(md5((-n)::text), 2)"
    shop.psql(f"INSERT INTO items SELECT n, {row} FROM generate_series(10000, 700000) AS n")
    with shop.pods.gate(shop.database, GATES["backup"]):
        container = shop.start()
        wait_for(stands(shop, "backup", container), 30, "the run is in backup")
        process = shop.pods.inspect(container)["State"]["Pid"]
        # Beforehand, and in one go: by the time that podman has been asked twice, the dump may be over.
        written = f'[ -n "$(find {shop.volume} -type f -size +64k)" ]'
        until = f"while [ -e /proc/{process} ] && ! {written}; do :; done"
        killer = subprocess.Popen(as_root("sh", "-c", f"{until}; kill -9 {process}"))
    assert killer.wait(180) == 0
    assert shop.pods.wait(container) == 137
    left = shop.files()
    assert left
    assert not any(name.endswith(".json") for name in left), left
    shop.is_whole()
    shop.is_finished()


@pytest.mark.parametrize("stage", ["backup", "apply"])
def test_a_node_loses_its_network(shop: Shop, stage: str) -> None:
    """Nothing comes through any more, and nobody says so: the server lets go, and another node's pod finishes."""
    with shop.pods.gate(shop.database, GATES[stage]):
        container = shop.start(wait_timeout="10s")
        wait_for(stands(shop, stage, container), 30, f"the run is in {stage}")
        process = str(shop.pods.inspect(container)["State"]["Pid"])
        for chain in ("INPUT", "OUTPUT"):
            call(*as_root("nsenter", "-t", process, "-n", "iptables", "-I", chain, "-j", "DROP"))
    shop.is_whole()
    shop.is_finished()
    # The pod without a network is not left hanging: nothing was committed, so that trying again is what helps.
    assert shop.pods.wait(container) in {ExitCode.UNREACHABLE, ExitCode.BACKUP_FAILED}
    shop.is_whole()
