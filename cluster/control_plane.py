"""etcd, the API server, the controllers and the scheduler: all on the loopback, all with RBAC as in production."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from tests.support.certificates import Authority
from tests.support.ports import free_port

from cluster.kubectl import Kubectl
from cluster.services import listens, running

NODE = "node"
SERVICES = "10.96.0.0/16"
START_SECONDS = 120
USERS = {
    "admin": "system:masters",
    "system:kube-controller-manager": "",
    "system:kube-scheduler": "",
    f"system:node:{NODE}": "system:nodes",
}


@dataclass(frozen=True)
class ControlPlane:
    """A running control plane: its authority, and an access for each of its users."""

    authority: Authority
    kubectl: Kubectl
    folder: Path

    def access(self, user: str) -> Path:
        """Return a user's kubeconfig."""
        return _access(self.folder, user)


@contextlib.contextmanager
def control_plane(programs: Path, folder: Path, address: str) -> Iterator[ControlPlane]:
    """Run a control plane with its data in `folder`; `address` is the node's."""
    authority = Authority(folder / "certificates", "migrator-cluster")
    port = free_port()
    _write_accesses(folder, f"https://127.0.0.1:{port}", authority.file)
    plane = ControlPlane(authority, Kubectl(programs / "kubectl", _access(folder, "admin")), folder)
    with contextlib.ExitStack() as stack:
        etcd = stack.enter_context(_etcd(programs, folder))
        command = _api_server(programs, folder, authority, address, port, etcd)
        ready = plane.kubectl.is_ready
        stack.enter_context(
            running("kube-apiserver", *command, logs=folder, ready=ready, seconds=START_SECONDS)
        )
        stack.enter_context(_controllers(programs, plane))
        stack.enter_context(_scheduler(programs, plane))
        yield plane


@contextlib.contextmanager
def _etcd(programs: Path, folder: Path) -> Iterator[str]:
    client, peer = free_port(), free_port()
    address, peers = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
    command = [
        str(programs / "etcd"),
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls={address}",
        f"--advertise-client-urls={address}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=default={peers}",
        "--unsafe-no-fsync",
    ]
    with running("etcd", *command, logs=folder, ready=lambda: listens(client), seconds=START_SECONDS):
        yield address


def _api_server(
    programs: Path, folder: Path, authority: Authority, address: str, port: int, etcd: str
) -> list[str]:
    server = authority.issue("kube-apiserver", hosts=("127.0.0.1", address, "10.96.0.1", "kubernetes"))
    client = authority.issue("kube-apiserver-kubelet-client")
    accounts = authority.issue("service-accounts")
    (folder / "service-accounts.key").write_bytes(accounts.key.read_bytes())
    return [
        str(programs / "kube-apiserver"),
        f"--etcd-servers={etcd}",
        "--bind-address=127.0.0.1",
        f"--advertise-address={address}",
        f"--secure-port={port}",
        f"--tls-cert-file={server.certificate}",
        f"--tls-private-key-file={server.key}",
        f"--token-auth-file={folder / 'tokens.csv'}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        f"--service-cluster-ip-range={SERVICES}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={accounts.certificate}",
        f"--service-account-signing-key-file={accounts.key}",
        f"--kubelet-client-certificate={client.certificate}",
        f"--kubelet-client-key={client.key}",
        "--kubelet-preferred-address-types=InternalIP",
        "--endpoint-reconciler-type=none",
    ]


def _controllers(programs: Path, plane: ControlPlane) -> contextlib.AbstractContextManager[None]:
    command = [
        str(programs / "kube-controller-manager"),
        f"--kubeconfig={plane.access('system:kube-controller-manager')}",
        f"--service-account-private-key-file={plane.folder / 'service-accounts.key'}",
        f"--root-ca-file={plane.authority.file}",
        "--use-service-account-credentials",
        "--leader-elect=false",
        "--secure-port=0",
    ]
    return running(
        "kube-controller-manager",
        *command,
        logs=plane.folder,
        ready=lambda: plane.kubectl.has("serviceaccount", "default", "default"),
        seconds=START_SECONDS,
    )


def _scheduler(programs: Path, plane: ControlPlane) -> contextlib.AbstractContextManager[None]:
    command = [
        str(programs / "kube-scheduler"),
        f"--kubeconfig={plane.access('system:kube-scheduler')}",
        "--leader-elect=false",
        "--secure-port=0",
    ]
    return running("kube-scheduler", *command, logs=plane.folder, ready=lambda: True, seconds=START_SECONDS)


def _access(folder: Path, user: str) -> Path:
    return folder / f"{user.replace(':', '-')}.kubeconfig"


def _write_accesses(folder: Path, server: str, authority: Path) -> None:
    """Write the API server's table of tokens, and a kubeconfig for each user."""
    lines = []
    for user, group in USERS.items():
        token = secrets.token_hex(16)
        lines.append(",".join([token, user, user, *([f'"{group}"'] if group else [])]))
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "c", "cluster": {"server": server, "certificate-authority": str(authority)}}
            ],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": user}}],
            "current-context": "c",
        }
        path = _access(folder, user)
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(config))
    tokens = folder / "tokens.csv"
    tokens.touch(mode=0o600)
    tokens.write_text("\n".join(lines) + "\n")
