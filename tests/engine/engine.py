"""A container engine for the tests: the one that answers, or Debian's own, installed and started here.

`Engine.provision()` is all that the fixtures call. An engine started here has its own socket and data, in
the tree's git-ignored cache, and is stopped by its process id; an engine found running is left alone.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import installations

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "engine"
SEARCH_PATH = "/usr/bin:/usr/sbin:/bin:/sbin:/usr/local/bin:/usr/local/sbin"
# Debian 12 ships one package; Debian 13 splits the client and BuildKit's front end off.
PACKAGES = ("docker.io", "docker-cli", "docker-buildx", "docker-compose")
START_SECONDS = 60
PIP_ROOTS = "_vendor/certifi/cacert.pem"


class CommandFailed(Exception):
    """A program ended with a status that was not expected; carries what it wrote."""

    def __init__(self, result: subprocess.CompletedProcess[str]) -> None:
        self.result = result
        text = f"{' '.join(map(str, result.args))}\nexit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        super().__init__(text[-6000:])


def call(
    *command: str,
    expect: int | None = 0,
    timeout: float = 300,
    environment: dict[str, str] | None = None,
    stdin: str | None = None,
    folder: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; `expect=None` accepts any exit code."""
    result = subprocess.run(
        command,
        text=True,
        capture_output=True,
        timeout=timeout,
        env={**os.environ, **(environment or {})},
        cwd=folder,
        check=False,
        **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}),
    )
    if expect is not None and result.returncode != expect:
        raise CommandFailed(result)
    return result


def as_root(*command: str) -> list[str]:
    """Prefix a command so that it runs as root."""
    return list(command) if os.geteuid() == 0 else ["sudo", "-n", *command]


def sudo(*command: str, timeout: float = 300, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program as root."""
    return call(*as_root(*command), timeout=timeout, stdin=stdin)


def find_program(name: str) -> str | None:
    """Find a program, Debian's own before another of the same name on PATH."""
    return shutil.which(name, path=f"{SEARCH_PATH}:{os.environ.get('PATH', '')}")


def install(*packages: str, recommends: bool = False) -> None:
    """Install those of Debian's packages that exist in this release and are missing."""
    listed = call(
        "dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", expect=None
    ).stdout.splitlines()
    missing = [package for package in packages if f"{package} installed" not in listed]
    if not missing:
        return
    with installations.apt_lock():
        _apt_install(missing, recommends=recommends)


def _apt_install(missing: list[str], *, recommends: bool) -> None:
    sudo("apt-get", "-o", "DPkg::Lock::Timeout=300", "update", "-qq", timeout=300)
    known = [name for name in missing if call("apt-cache", "show", name, expect=None).returncode == 0]
    options = [
        "-o",
        "DPkg::Lock::Timeout=300",
        "-y",
        "-qq",
        *([] if recommends else ["--no-install-recommends"]),
    ]
    sudo("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", *options, "install", *known, timeout=600)


@dataclass(frozen=True)
class Engine:
    """One container engine, addressed by its socket."""

    docker: str
    host: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, str]:
        """The environment that makes docker and docker-compose talk to this engine."""
        chosen = {"DOCKER_BUILDKIT": "1", "COMPOSE_INTERACTIVE_NO_CLI": "1", **self.environment}
        return {**chosen, "DOCKER_HOST": self.host} if self.host else chosen

    @property
    def process_environment(self) -> dict[str, str]:
        """The whole environment of a client process."""
        return {**os.environ, **self.settings}

    def run(
        self, *arguments: str, expect: int | None = 0, timeout: float = 300, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a docker command."""
        return call(
            *reach(self.docker, self.settings),
            *arguments,
            expect=expect,
            timeout=timeout,
            environment=self.settings,
            stdin=stdin,
        )

    def answers(self) -> bool:
        """Tell whether a server is behind the socket."""
        try:
            result = self.run("version", "--format", "{{.Server.Version}}", expect=None, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return result.returncode == 0 and bool(result.stdout.strip())

    def has_image(self, name: str) -> bool:
        """Tell whether the engine has an image of this name."""
        return self.run("image", "inspect", name, expect=None).returncode == 0

    def build(
        self, context: Path, tag: str, *options: str, roots: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Build an image as a user would; `roots` (else this machine's) are the TLS roots that the build may see."""
        secret = [f"--secret=id=ca_certificates,src={roots or tls_roots()}"]
        return self.run("build", "--progress=plain", "-t", tag, *secret, *options, str(context), timeout=900)

    def started(self, *arguments: str, timeout: float = 120) -> str:
        """Start a container in the background; return its id."""
        return self.run("run", "-d", *arguments, timeout=timeout).stdout.strip()

    def wait(self, container: str, timeout: float = 300) -> int:
        """Wait for a container to end; return its exit code."""
        return int(self.run("wait", container, timeout=timeout).stdout)

    def logs(self, container: str) -> str:
        """Return all that a container wrote, both streams."""
        result = self.run("logs", container)
        return result.stdout + result.stderr

    def remove(self, *containers: str) -> None:
        """Remove containers and their anonymous volumes, whatever their state."""
        self.run("rm", "-f", "-v", *containers, expect=None)

    @classmethod
    @contextlib.contextmanager
    def provision(cls) -> Iterator[Engine]:
        """Yield an engine that answers, installing and starting one where there is none."""
        install_missing_programs()
        engine = cls(str(find_program("docker")), os.environ.get("DOCKER_HOST", ""))
        if engine.answers():
            yield engine
        else:
            with started_engine() as own:
                yield own


def reach(program: str, settings: dict[str, str]) -> list[str]:
    """Prefix a client with sudo, and hand it its environment, where the socket belongs to another user."""
    socket = settings.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
    if os.geteuid() == 0 or not os.path.exists(socket) or os.access(socket, os.W_OK):
        return [program]
    return as_root("env", *(f"{name}={value}" for name, value in settings.items()), program)


def tls_roots() -> str:
    """Find the TLS roots that this machine trusts: its environment's, else the system's, else pip's own."""
    names = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    known = [os.environ.get(name, "") for name in names] + ["/etc/ssl/certs/ca-certificates.crt"]
    return next(
        (path for path in known if Path(path).is_file()), str(importlib.resources.files("pip") / PIP_ROOTS)
    )


def install_missing_programs() -> None:
    """Install Debian's engine and compose unless both are there."""
    if not find_program("docker") or not (find_program("docker-compose") or has_compose_plugin()):
        install(*PACKAGES)
    if not find_program("dockerd"):
        install("docker.io")


def has_compose_plugin() -> bool:
    """Tell whether `docker compose` works."""
    docker = find_program("docker")
    return docker is not None and call(docker, "compose", "version", expect=None).returncode == 0


@contextlib.contextmanager
def started_engine() -> Iterator[Engine]:
    """Start a daemon of our own; stop it, and only it, at the end."""
    state = Path(tempfile.mkdtemp(prefix="migrator-engine-"))
    CACHE.mkdir(parents=True, exist_ok=True)
    host = f"unix://{state}/docker.sock"
    command = as_root(
        str(find_program("dockerd")),
        f"--host={host}",
        f"--data-root={CACHE / 'docker'}",
        f"--exec-root={state / 'exec'}",
        f"--pidfile={state / 'docker.pid'}",
    )
    log = state / "dockerd.log"
    with log.open("wb") as output:
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    engine = Engine(str(find_program("docker")), host)
    try:
        wait_until_it_answers(engine, daemon, log)
        yield engine
    finally:
        stop(daemon)
        sudo("rm", "-rf", "--one-file-system", str(state))


def wait_until_it_answers(engine: Engine, daemon: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the daemon, or say why it did not start."""
    deadline = time.monotonic() + START_SECONDS
    while not engine.answers():
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"dockerd does not answer:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.3)


def stop(daemon: subprocess.Popen[bytes]) -> None:
    """Ask the daemon to end, and wait: it unmounts what it mounted."""
    if daemon.poll() is None:
        sudo("sh", "-c", f"kill -TERM {daemon.pid}")  # the shell's own: a minimal machine has no other
    daemon.wait(timeout=60)
