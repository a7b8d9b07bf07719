"""The node: containerd with a bridge for its pods, and a kubelet; what they change on the machine is put back."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from tests.engine.engine import Engine, call, find_program, install, reach
from tests.support.ports import free_port

from cluster.control_plane import NODE, ControlPlane
from cluster.kubectl import is_true
from cluster.services import running

PACKAGES = ("containerd", "runc", "containernetworking-plugins", "catatonit", "iproute2", "iptables")
START_SECONDS = 120
PAUSE = "docker.io/library/pause:local"
BRIDGE = "cni-migrator"
PODS = "10.244.0.0/16"
# The kubelet sets these for the whole machine when it starts.
SYSCTLS = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops")
CONTAINERD = """\
version = 2
root = "{state}/containerd"
state = "{run}/containerd"
[grpc]
  address = "{run}/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{state}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  netns_mounts_under_state_dir = true
  # Without CAP_SYS_RESOURCE, as in some virtual machines, nobody may lower it.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{state}/cni"
"""
NETWORK = """\
{{
  "cniVersion": "0.4.0",
  "name": "migrator",
  "plugins": [
    {{"type": "bridge", "bridge": "{bridge}", "isGateway": true, "hairpinMode": true,
      "ipam": {{"type": "host-local", "dataDir": "{state}/addresses", "ranges": [[{{"subnet": "{pods}"}}]],
               "routes": [{{"dst": "0.0.0.0/0"}}]}}}},
    {{"type": "firewall"}}
  ]
}}
"""


@dataclass(frozen=True)
class Node:
    """A running node."""

    plane: ControlPlane
    socket: Path

    def ctr(self, *arguments: str, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a command of containerd's own client, where the pods' containers are."""
        program = str(find_program("ctr"))
        return call(program, f"--address={self.socket}", "--namespace=k8s.io", *arguments, expect=expect)

    def load(self, engine: Engine, image: str, *names: str) -> None:
        """Copy an image from the engine, under the names that manifests use."""
        save = [*reach(engine.docker, engine.settings), "save", image]
        load = [str(find_program("ctr")), f"--address={self.socket}", "--namespace=k8s.io"]
        with subprocess.Popen(save, stdout=subprocess.PIPE, env=engine.process_environment) as source:
            subprocess.run([*load, "images", "import", "-"], stdin=source.stdout, check=True, timeout=300)
        for name in names:
            self.ctr("images", "tag", "--force", _full(image), _full(name))

    def process(self, container: str) -> int:
        """Return the process id, as the machine sees it, of a container (`containerd://ID` as a pod's status says)."""
        lines = self.ctr("tasks", "list").stdout.splitlines()
        identity = container.rpartition("/")[2]
        return next(int(line.split()[1]) for line in lines if line.startswith(identity))


def address() -> str:
    """Return this machine's own address, under which the API server reaches the kubelet; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


@contextlib.contextmanager
def node(programs: Path, plane: ControlPlane, state: Path, run: Path, engine: Engine) -> Iterator[Node]:
    """Run a node with its data in `state` and its sockets in `run`, whose path is short."""
    install(*PACKAGES)
    with contextlib.ExitStack() as stack:
        stack.callback(_restore, {name: _sysctl(name).read_text() for name in SYSCTLS})
        stack.callback(_unmount, state, run)
        stack.enter_context(_containerd(state, run))
        it = Node(plane, run / "containerd.sock")
        _load_pause(it, engine, state)
        stack.callback(_end_all, it)
        stack.enter_context(_kubelet(programs, plane, state, run))
        stack.callback(_delete_pods, plane)
        yield it


@contextlib.contextmanager
def _containerd(state: Path, run: Path) -> Iterator[None]:
    (state / "cni").mkdir()
    network = NETWORK.format(bridge=BRIDGE, state=state, pods=PODS)
    (state / "cni" / "migrator.conflist").write_text(network)
    config = state / "containerd.toml"
    config.write_text(CONTAINERD.format(state=state, run=run, pause=PAUSE))
    ctr = (str(find_program("ctr")), f"--address={run / 'containerd.sock'}", "version")
    with running(
        "containerd",
        str(find_program("containerd")),
        f"--config={config}",
        logs=state,
        ready=lambda: call(*ctr, expect=None).returncode == 0,
        seconds=START_SECONDS,
    ):
        yield


@contextlib.contextmanager
def _kubelet(programs: Path, plane: ControlPlane, state: Path, run: Path) -> Iterator[None]:
    own = address()
    server = plane.authority.issue("kubelet", hosts=(own, "127.0.0.1"))
    settings = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": False},
            "x509": {"clientCAFile": str(plane.authority.file)},
        },
        "authorization": {"mode": "AlwaysAllow"},
        "tlsCertFile": str(server.certificate),
        "tlsPrivateKeyFile": str(server.key),
        "port": free_port(),
        "healthzPort": free_port(),
        "containerRuntimeEndpoint": f"unix://{run / 'containerd.sock'}",
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        "podLogsDir": str(state / "pods"),
        "volumePluginDir": str(state / "plugins"),
        # An image that is deleted cannot be pulled again, and other programs share the disk.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "syncFrequency": "10s",
    }
    config = state / "kubelet.yaml"
    config.write_text(yaml.safe_dump(settings))
    with running(
        "kubelet",
        str(programs / "kubelet"),
        f"--config={config}",
        f"--kubeconfig={plane.access(f'system:node:{NODE}')}",
        f"--root-dir={run / 'kubelet'}",
        f"--cert-dir={state / 'kubelet-certificates'}",
        f"--hostname-override={NODE}",
        f"--node-ip={own}",
        logs=state,
        ready=lambda: (
            plane.kubectl.has("node", NODE, "default") and is_true(plane.kubectl.get("node", NODE), "Ready")
        ),
        seconds=START_SECONDS,
    ):
        yield


def _load_pause(node: Node, engine: Engine, state: Path) -> None:
    """Make the image that holds a pod together: catatonit, which is one static program, and nothing else."""
    root = state / "pause"
    root.mkdir()
    (root / "pause").write_bytes(Path(str(find_program("catatonit"))).read_bytes())
    (root / "pause").chmod(0o755)
    archive = state / "pause.tar"
    call("tar", "-C", str(root), "-cf", str(archive), "pause")
    tag = "migrator-k8s-cluster-pause:local"
    engine.run("import", "-c", 'ENTRYPOINT ["/pause", "-P"]', str(archive), tag)
    node.load(engine, tag, PAUSE)
    engine.run("rmi", tag, expect=None)


def _full(image: str) -> str:
    return image if "/" in image else f"docker.io/library/{image}"


def _sysctl(name: str) -> Path:
    return Path("/proc/sys") / name


def _restore(sysctls: dict[str, str]) -> None:
    """Put the machine's settings back, and remove the bridge, its rules and the pods' empty control groups."""
    for name, value in sysctls.items():
        _sysctl(name).write_text(value)
    call("ip", "link", "delete", BRIDGE, expect=None)
    jump = ["-m", "comment", "--comment", "CNI firewall plugin rules", "-j", "CNI-FORWARD"]
    for arguments in (["-D", "FORWARD", *jump], *([option, "CNI-FORWARD"] for option in ("-F", "-X"))):
        call("iptables", "-w", *arguments, expect=None)
    call("iptables", "-w", "-X", "CNI-ADMIN", expect=None)
    for group in Path("/sys/fs/cgroup").glob("*/kubepods"):
        for folder in [*sorted(group.rglob("*"), reverse=True), group]:
            with contextlib.suppress(OSError):  # a file, or still in use
                folder.rmdir()


def _delete_pods(plane: ControlPlane) -> None:
    """Have the kubelet end every pod, so that networks and mounts are undone by those who made them."""
    kubectl = plane.kubectl
    kinds = "deployments,statefulsets,jobs,cronjobs"
    kubectl.run("delete", kinds, "--all", "--all-namespaces", "--wait=false", expect=None)
    kubectl.run(
        *("delete", "pods", "--all", "--all-namespaces", "--grace-period=2", "--timeout=90s"),
        expect=None,
        timeout=120,
    )


def _end_all(node: Node) -> None:
    """End what the kubelet has left running."""
    for line in node.ctr("tasks", "list", expect=None).stdout.splitlines()[1:]:
        node.ctr("tasks", "delete", "--force", line.split()[0], expect=None)
    for identity in node.ctr("containers", "list", "--quiet", expect=None).stdout.split():
        node.ctr("containers", "delete", identity, expect=None)


def _unmount(*folders: Path) -> None:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    points = [line.split()[1] for line in lines]
    for point in sorted(points, key=len, reverse=True):
        if any(point.startswith(f"{folder}/") for folder in folders):
            call("umount", "-l", point, expect=None)
