"""The Pod Security Standards' `restricted` profile as rules, and what we ask of a pod beyond it.

The profile: https://kubernetes.io/docs/concepts/security/pod-security-standards/ (as of Kubernetes 1.37, for Linux).
It contains the `baseline` profile. Where it lets Windows pods or user namespaces do more, it is applied as if
there were none: what passes here passes there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Pod = Mapping[str, Any]  # a pod, or a template of one: metadata and spec
VOLUME_TYPES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
}
SELINUX_TYPES = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
APPARMOR_ANNOTATION = "container.apparmor.security.beta.kubernetes.io/"
PROBES = ("livenessProbe", "readinessProbe", "startupProbe")


def pod_of(document: Mapping[str, Any]) -> Pod | None:
    """Return the pod, or the template of one, that an object has; None where it has none."""
    kind, spec = document["kind"], document.get("spec", {})
    if kind == "Pod":
        return document
    if kind == "CronJob":
        return dict(spec["jobTemplate"]["spec"]["template"])
    if kind in {"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "ReplicationController", "Job"}:
        return dict(spec["template"])
    return None


def restricted_violations(document: Mapping[str, Any]) -> list[str]:
    """Return what an object's pod breaks of the `restricted` profile, a sentence each; nothing for other objects."""
    pod = pod_of(document)
    return [] if pod is None else [sentence for rule in RULES for sentence in rule(pod)]


def hardening_violations(document: Mapping[str, Any]) -> list[str]:
    """Return what an object's pod lacks beyond the profile: what every pod that we ship has.

    A read-only root filesystem, no service account token, a limit and a request of memory, and no secret in an
    environment variable.
    """
    pod = pod_of(document)
    if pod is None:
        return []
    found = [] if pod["spec"].get("automountServiceAccountToken") is False else ["a service account token"]
    for container in _containers(pod):
        name, resources = container["name"], container.get("resources", {})
        if _context(container).get("readOnlyRootFilesystem") is not True:
            found.append(f"{name}: its root filesystem can be written to")
        for kind in ("requests", "limits"):
            if not resources.get(kind, {}).get("memory"):
                found.append(f"{name}: no {kind} of memory")
        if any("secretRef" in source for source in container.get("envFrom", [])):
            found.append(f"{name}: a whole secret in its environment")
        found += [
            f"{name}: the secret {variable['name']} in its environment"
            for variable in container.get("env", [])
            if "secretKeyRef" in variable.get("valueFrom", {})
        ]
    return found


def _containers(pod: Pod) -> Iterator[Mapping[str, Any]]:
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        yield from pod["spec"].get(kind, [])


def _context(of: Mapping[str, Any]) -> Mapping[str, Any]:
    return of.get("securityContext") or {}


def _contexts(pod: Pod) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the pod's security context, then each container's."""
    yield "pod", _context(pod["spec"])
    for container in _containers(pod):
        yield container["name"], _context(container)


def _host_process(pod: Pod) -> Iterator[str]:
    for place, context in _contexts(pod):
        if context.get("windowsOptions", {}).get("hostProcess"):
            yield f"{place}: hostProcess"


def _host_namespaces(pod: Pod) -> Iterator[str]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod["spec"].get(name):
            yield f"pod: {name}"


def _privileged(pod: Pod) -> Iterator[str]:
    for place, context in _contexts(pod):
        if context.get("privileged"):
            yield f"{place}: privileged"


def _capabilities(pod: Pod) -> Iterator[str]:
    for container in _containers(pod):
        capabilities = _context(container).get("capabilities") or {}
        if "ALL" not in (capabilities.get("drop") or []):
            yield f"{container['name']}: does not drop ALL capabilities"
        for name in sorted(set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}):
            yield f"{container['name']}: adds the capability {name}"


def _volumes(pod: Pod) -> Iterator[str]:
    """Hold to the permitted types; a hostPath, which baseline forbids, is none of them."""
    for volume in pod["spec"].get("volumes", []):
        for kind in sorted(set(volume) - {"name"} - VOLUME_TYPES):
            yield f"volume {volume['name']}: {kind}"


def _host_ports(pod: Pod) -> Iterator[str]:
    for container in _containers(pod):
        for port in container.get("ports", []):
            if port.get("hostPort"):
                yield f"{container['name']}: hostPort {port['hostPort']}"


def _host_probes(pod: Pod) -> Iterator[str]:
    """Refuse probes and lifecycle hooks that ask another host (since 1.34)."""
    for container in _containers(pod):
        hooks = container.get("lifecycle", {})
        asked = {name: container.get(name, {}) for name in PROBES} | {name: hooks[name] for name in hooks}
        for name, handler in asked.items():
            if any(handler.get(kind, {}).get("host") for kind in ("httpGet", "tcpSocket")):
                yield f"{container['name']}: {name} names a host"


def _apparmor(pod: Pod) -> Iterator[str]:
    for place, context in _contexts(pod):
        if context.get("appArmorProfile", {}).get("type") not in {None, "RuntimeDefault", "Localhost"}:
            yield f"{place}: AppArmor {context['appArmorProfile']['type']}"
    for name, value in (pod.get("metadata", {}).get("annotations") or {}).items():
        allowed = value == "runtime/default" or value.startswith("localhost/")
        if name.startswith(APPARMOR_ANNOTATION) and not allowed:
            yield f"{name.removeprefix(APPARMOR_ANNOTATION)}: AppArmor {value}"


def _selinux(pod: Pod) -> Iterator[str]:
    for place, context in _contexts(pod):
        options = context.get("seLinuxOptions") or {}
        if options.get("type") not in SELINUX_TYPES or options.get("user") or options.get("role"):
            yield f"{place}: SELinux options"


def _proc_mount(pod: Pod) -> Iterator[str]:
    for place, context in _contexts(pod):
        if context.get("procMount") not in {None, "Default"}:
            yield f"{place}: procMount {context['procMount']}"


def _sysctls(pod: Pod) -> Iterator[str]:
    for sysctl in _context(pod["spec"]).get("sysctls", []):
        if sysctl["name"] not in SYSCTLS:
            yield f"pod: sysctl {sysctl['name']}"


def _escalation(pod: Pod) -> Iterator[str]:
    for container in _containers(pod):
        if _context(container).get("allowPrivilegeEscalation") is not False:
            yield f"{container['name']}: allowPrivilegeEscalation is not false"


def _non_root(pod: Pod) -> Iterator[str]:
    """Want runAsNonRoot from the pod or from each container, contradicted by none; and no user 0 anywhere."""
    general = _context(pod["spec"]).get("runAsNonRoot")
    for container in _containers(pod):
        if _context(container).get("runAsNonRoot", general) is not True:
            yield f"{container['name']}: runAsNonRoot is not true"
    for place, context in _contexts(pod):
        if context.get("runAsUser") == 0:
            yield f"{place}: runAsUser 0"


def _seccomp(pod: Pod) -> Iterator[str]:
    """Want a profile from the pod or from each container, never Unconfined."""
    general = _context(pod["spec"]).get("seccompProfile", {}).get("type")
    if general == "Unconfined":
        yield "pod: seccomp Unconfined"
    for container in _containers(pod):
        profile = _context(container).get("seccompProfile", {}).get("type", general)
        if profile not in {"RuntimeDefault", "Localhost"}:
            yield f"{container['name']}: seccomp {profile}"


RULES: tuple[Callable[[Pod], Iterator[str]], ...] = (
    _host_process,
    _host_namespaces,
    _privileged,
    _capabilities,
    _volumes,
    _host_ports,
    _host_probes,
    _apparmor,
    _selinux,
    _proc_mount,
    _sysctls,
    _escalation,
    _non_root,
    _seccomp,
)
