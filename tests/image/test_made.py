"""How the image is made, from outside: its weight, that another build is the same, what it is made of."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.engine.engine import ROOT, Engine, call
from tests.engine.fixtures import VERSION
from tests.engine.images import figures, look, python, refused_build

pytestmark = pytest.mark.engine

OURS = "migrator and its dependencies"
LIMITS = {"full": 70.0, "slim": 45.0}
"""MB that migrator's layer may have (issue: over its base and the Postgres client)."""
BACKUP_TOOLS = {"boto3", "botocore", "s3transfer", "jmespath", "pyrage", "urllib3", "python-dateutil", "six"}


@pytest.fixture(scope="module")
def images(image: str, slim_image: str) -> dict[str, str]:
    """Both variants."""
    return {"full": image, "slim": slim_image}


@pytest.fixture(scope="module")
def another_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the image is made of, as somebody with another umask has them, at another time."""
    folder = tmp_path_factory.mktemp("checkout")
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ["Dockerfile", ".dockerignore", *(line[1:] for line in lines if line.startswith("!"))]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, copy_function=shutil.copy, ignore=skip)
        else:
            shutil.copy(ROOT / name, folder)
    for path in folder.rglob("*"):
        path.chmod(path.stat().st_mode | 0o020)
    return folder


@pytest.fixture(scope="module")
def another_build(engine: Engine, image: str, another_checkout: Path) -> Iterator[str]:
    """The same commit, built from nothing."""
    tag = "migrator-test-again:latest"
    engine.build(another_checkout, tag, "--no-cache", f"--build-arg=MIGRATOR_VERSION={VERSION}")
    yield tag
    engine.run("rmi", "-f", tag, expect=None)


# -- its weight ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", LIMITS)
def test_it_weighs_no_more_than_promised(engine: Engine, images: dict[str, str], variant: str) -> None:
    found = figures(look(engine, "size", images[variant]))
    assert 10 < found[OURS][0] <= LIMITS[variant], found
    if variant == "full":  # in the stricter reading too: what comes with Debian's Python is migrator's
        size, replaced = found["Python and the roots of TLS"]
        assert found[OURS][0] + size - replaced <= LIMITS[variant], found


@pytest.mark.parametrize("variant", LIMITS)
def test_every_layer_is_accounted_for(engine: Engine, images: dict[str, str], variant: str) -> None:
    table = look(engine, "size", images[variant])
    found = figures(table)
    assert set(found) >= {"the base image", "Python and the roots of TLS", OURS}
    assert ("PostgreSQL's client programs" in found) == (variant == "full")
    known = json.loads(engine.run("image", "inspect", images[variant]).stdout)[0]["Size"] / 1e6
    assert sum(size for size, _ in found.values()) == pytest.approx(known, rel=0.02)


@pytest.mark.parametrize(("variant", "command"), [("full", "migrator"), ("slim", "migrator:slim")])
def test_the_page_has_the_command_and_its_figures(
    engine: Engine, images: dict[str, str], variant: str, command: str
) -> None:
    page = (ROOT / "docs" / "reference" / "image.md").read_text()
    documented = figures(
        page.partition(f"<!-- measured: bin/image size {command} -->")[2].partition("<!-- end")[0]
    )
    found = figures(look(engine, "size", images[variant]))
    assert documented.keys() == found.keys()
    assert documented[OURS][0] == pytest.approx(found[OURS][0], abs=1.5), "bin/image document FULL SLIM"


# -- another build ---------------------------------------------------------------------------------------------


def test_another_build_has_the_same_files_to_the_byte(engine: Engine, image: str, another_build: str) -> None:
    said = look(engine, "same", image, another_build, expect=None)
    last = said.splitlines()[-1]
    assert last.endswith(": 0 differ"), f"{said}\n(is a cached layer older than Debian's archive?)"
    assert int(last.split()[0]) > 5000


def test_a_difference_would_be_found(engine: Engine, image: str, slim_image: str) -> None:
    assert "opt/migrator/sbom.cdx.json\n" in look(engine, "same", image, slim_image, expect=1)


def test_every_locked_wheel_exists_for_both_architectures(tmp_path: Path) -> None:
    for machine in ("x86_64", "aarch64"):
        options = ["--dry-run", "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
        options += ["--implementation", "cp", "--python-version", "3.13", "--target", str(tmp_path / machine)]
        options += [f"--platform=manylinux_{glibc}_{machine}" for glibc in ("2_28", "2_17")]
        options += [f"--platform=manylinux2014_{machine}", "--report", str(tmp_path / f"{machine}.json")]
        lock = str(ROOT / "requirements.lock")
        call(sys.executable, "-m", "pip", "install", *options, "-r", lock, environment={"PIP_USER": "0"})
        report = json.loads((tmp_path / f"{machine}.json").read_text())
        wheels = [item["download_info"]["url"].rpartition("/")[2] for item in report["install"]]
        assert any(f"{machine}.whl" in wheel for wheel in wheels), wheels


def test_nothing_names_an_architecture() -> None:
    for path in (ROOT / "Dockerfile", *(ROOT / "image").iterdir()):
        if path.is_file():
            assert not [name for name in ("x86_64", "amd64", "aarch64", "arm64") if name in path.read_text()]


# -- what it is made of ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bills(engine: Engine, images: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The bill of each variant, valid by CycloneDX's own schema."""
    texts = {variant: look(engine, "sbom", image) for variant, image in images.items()}
    for text in texts.values():
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    return {variant: json.loads(text) for variant, text in texts.items()}


@pytest.mark.parametrize("variant", LIMITS)
def test_the_bill_lists_what_is_there_and_nothing_else(
    engine: Engine, images: dict[str, str], bills: dict[str, dict[str, Any]], variant: str
) -> None:
    listed = {unquote(part["purl"].partition("?")[0]) for part in bills[variant]["components"]}
    program = (
        "import importlib.metadata, re; print(*("
        "'pkg:pypi/' + re.sub('[-_.]+', '-', found.name).lower() + '@' + found.version"
        " for found in importlib.metadata.distributions()), sep='\\n')"
    )
    there = set(python(engine, images[variant], program).splitlines())
    packages = ("run", "--rm", "--entrypoint", "dpkg-query", images[variant], "-W", "-f")
    shown = engine.run(*packages, "${Package} ${Version}\n").stdout.splitlines()
    debian = {name for name in listed if name.startswith("pkg:deb/debian/")}
    assert {name for name in listed if name.startswith("pkg:pypi/")} == there
    assert {name.split("/")[2].partition("@")[0] for name in debian} == {line.split()[0] for line in shown}
    assert len(listed) == len(there) + len(shown)


def test_the_bill_has_versions_licences_and_hashes(bills: dict[str, dict[str, Any]]) -> None:
    parts = bills["full"]["components"]
    assert all(part["version"] for part in parts)
    python_parts = [part for part in parts if part["purl"].startswith("pkg:pypi/")]
    assert all(part["hashes"][0]["alg"] == "SHA-256" for part in python_parts)
    assert [part["name"] for part in python_parts if not part.get("licenses")] in ([], ["pyrage"])
    (own,) = (part for part in bills["slim"]["components"] if part["name"] == "psycopg2-binary")
    assert any(inner["name"].startswith("libcrypto") for inner in own["components"])
    (debians,) = (part for part in parts if part["name"] == "psycopg2-binary")
    assert "components" not in debians, "what the wheel carried is not there"
    client = [part for part in parts if part["name"].startswith("postgresql-client-") and part.get("hashes")]
    assert client, "the sha256 of the client's .deb"
    assert "timestamp" not in bills["full"]["metadata"]


def test_the_slim_one_has_no_backup_tools(bills: dict[str, dict[str, Any]]) -> None:
    full, slim = ({part["name"] for part in bills[variant]["components"]} for variant in ("full", "slim"))
    assert full - slim >= BACKUP_TOOLS
    assert not any(name.startswith(("postgresql-client", "perl-modules")) for name in slim)


def test_it_says_what_it_was_made_from(engine: Engine, image: str) -> None:
    config = json.loads(engine.run("image", "inspect", image).stdout)[0]["Config"]
    prefix = "org.opencontainers.image."
    assert config["Labels"][f"{prefix}base.name"] == "debian:trixie-slim"
    assert {"base.digest", "source", "revision", "created"} <= {
        name.removeprefix(prefix) for name in config["Labels"]
    }
    assert not config.get("OnBuild")
    assert not config.get("Healthcheck")
    assert not config.get("Volumes")
    assert not config.get("ExposedPorts")


# -- what may be done with it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", LIMITS)
def test_no_file_has_a_setuid_or_setgid_bit(engine: Engine, images: dict[str, str], variant: str) -> None:
    program = "import os, stat\nfor folder, _, names in os.walk('/'):\n"
    program += "  if folder.split('/')[1] in ('proc', 'sys'): continue\n"
    program += "  for name in names:\n"
    program += "    mode = os.lstat(f'{folder}/{name}').st_mode\n"
    program += "    if stat.S_ISREG(mode) and mode & 0o6000: print(folder, name)\n"
    program += "print('done')"
    assert python(engine, images[variant], program, "--user", "0:0") == "done\n"


def test_it_runs_with_no_privilege_at_all(engine: Engine, image: str) -> None:
    status = python(engine, image, "print(open('/proc/self/status').read())", "--user", "4242:4242")
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    assert {fields[name].strip() for name in ("CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
    assert fields["NoNewPrivs"].strip() == "1"
    assert fields["Seccomp"].strip() == "2", "the engine's default profile"
    assert fields["Uid"].split()[0] == "4242"


def test_boto3_reaches_what_backups_and_passwords_need(engine: Engine, image: str) -> None:
    services = ("s3", "sts", "sso", "sso-oidc", "secretsmanager", "ssm", "kms", "rds", "dsql")
    program = f"""
import boto3, botocore.exceptions
from boto3.s3.transfer import TransferConfig
session = boto3.session.Session("AKIA", "secret", region_name="eu-central-1")
for name in {services}:
    session.client(name)
assert len(session.get_available_regions("s3")) > 20
print(session.client("rds").generate_db_auth_token("db.example", 5432, "shop")[:17])
try:
    session.client("ec2")
except botocore.exceptions.UnknownServiceError:
    print("and no other")
"""
    assert python(engine, image, program).splitlines() == ["db.example:5432/?", "and no other"]


def test_one_libpq_and_one_openssl_are_loaded_and_they_are_debians(engine: Engine, image: str) -> None:
    program = """
import asyncpg, psycopg, psycopg2, ssl
mapped = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(*sorted(path for path in mapped if any(name in path for name in ("libpq", "libcrypto", "libssl"))))
"""
    loaded = python(engine, image, program).split()
    assert [path.rpartition("/")[2].partition(".so")[0] for path in loaded] == [
        "libcrypto",
        "libpq",
        "libssl",
    ]
    assert all(path.startswith("/usr/lib/") for path in loaded)


def test_a_web_identity_is_taken_to_sts(engine: Engine, image: str) -> None:
    program = """
import boto3, botocore.exceptions
try:
    boto3.session.Session(region_name="eu-central-1").get_credentials().get_frozen_credentials()
except botocore.exceptions.EndpointConnectionError as error:
    print(error)
"""
    identity = {
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/etc/hostname",
        "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/shop",
        "AWS_ENDPOINT_URL_STS": "http://127.0.0.1:9",
        "AWS_MAX_ATTEMPTS": "1",
    }
    options = [f"--env={name}={value}" for name, value in identity.items()]
    assert 'Could not connect to the endpoint URL: "http://127.0.0.1:9/"' in python(
        engine, image, program, *options
    )


def test_a_client_that_apt_does_not_know_ends_the_build(engine: Engine, tmp_path: Path) -> None:
    source = tmp_path / "more.sources"
    source.write_text("Types: deb\nURIs: http://127.0.0.1:9/nowhere\nSuites: trixie\nComponents: main\n")
    said = refused_build(
        engine, "--target=client", "--build-arg=PG_MAJOR=99", f"--secret=id=apt_sources,src={source}"
    )
    assert "postgresql-client-99" in said
    assert "http://127.0.0.1:9/nowhere" in said, "the builder's own source was asked, too"


def test_the_default_client_is_the_newest_that_debian_has(engine: Engine, image: str) -> None:
    program = "import subprocess; print(subprocess.check_output(['pg_dump', '--version'], text=True))"
    assert "(PostgreSQL) 17." in python(engine, image, program)
