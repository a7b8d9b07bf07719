"""Write the image's bill of materials: CycloneDX, what dpkg and Python know of what is installed, nothing guessed.

    python sbom.py ENVIRONMENT REPORT... > sbom.cdx.json

REPORT is what `pip install --report` wrote: the sha256 of each wheel. That of each .deb is in /usr/share/migrator/debs,
as far as the archive still had it. There is no time in it and no random number, so equal images have equal bills.
"""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import json
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

DEBS = Path("/usr/share/migrator/debs")
DPKG_FIELDS = "${db:Status-Status}\t${Package}\t${Version}\t${Architecture}\t${source:Package}\n"
_LICENCE = LicenseFactory()
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:migrator:sbom")


def main(environment: Path, reports: list[Path]) -> None:
    """Print the bill of the running system, with the Python environment in it."""
    bom = Bom(components=[*debian_packages(), *distributions(environment, wheels(reports))])
    (own,) = metadata.distributions(name="migrator", path=[str(site_packages(environment))])
    image = Component(name="migrator", version=own.version, type=ComponentType.CONTAINER, bom_ref="image")
    bom.metadata.component = image
    bom.register_dependency(image, list(bom.components))
    bom.metadata.properties.add(Property(name="migrator:base", value=base_system()))
    answer = json.loads(make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string())
    answer["metadata"].pop("timestamp")
    answer.pop("serialNumber")
    answer["serialNumber"] = uuid.uuid5(_NAMESPACE, json.dumps(answer, sort_keys=True)).urn
    print(json.dumps(answer, indent=1, sort_keys=True))


def site_packages(environment: Path) -> Path:
    """Return where an environment's packages are."""
    (found,) = environment.glob("lib/python3.*/site-packages")
    return found


def base_system() -> str:
    """Return what the base calls itself."""
    lines = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    return lines["PRETTY_NAME"].strip('"')


def sha256(value: str) -> list[HashType]:
    """Return a component's hash, or none."""
    return [HashType(alg=HashAlgorithm.SHA_256, content=value)] if value else []


def debian_packages() -> Iterator[Component]:
    """Yield what dpkg says is installed."""
    known = archive_hashes()
    listed = subprocess.run(
        ["dpkg-query", "-W", "-f", DPKG_FIELDS],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for line in listed.splitlines():
        status, name, version, architecture, source = line.split("\t")
        if status != "installed":
            continue
        yield Component(
            name=name,
            version=version,
            type=ComponentType.LIBRARY,
            bom_ref=f"deb:{name}:{architecture}",
            purl=PackageURL("deb", "debian", name, version, {"arch": architecture}),
            licenses=debian_licences(name),
            hashes=sha256(known.get((name, version, architecture), "")),
            properties=[Property(name="debian:source", value=source)],
        )


def archive_hashes() -> dict[tuple[str, str, str], str]:
    """Return the sha256 of each .deb that the archive had when it was installed."""
    found = {}
    for paragraph in DEBS.read_text().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line)
        if "SHA256" in fields:
            found[fields["Package"], fields["Version"], fields["Architecture"]] = fields["SHA256"]
    return found


def debian_licences(package: str) -> list[DisjunctiveLicense]:
    """Return the short names in a machine-readable copyright file; they are Debian's, not all of them SPDX's."""
    path = Path("/usr/share/doc", package, "copyright")
    text = path.read_text(errors="replace") if path.is_file() else ""
    if not text.startswith("Format:"):
        return []
    names = {" ".join(name.split()) for name in re.findall(r"^License: *(\S.*)$", text, re.MULTILINE)}
    return [_LICENCE.make_with_name(name) for name in sorted(names)]


def wheels(reports: list[Path]) -> dict[str, str]:
    """Return the sha256 of each wheel by its distribution's name."""
    found = {}
    for report in reports:
        for item in json.loads(report.read_text())["install"]:
            hashes = item["download_info"]["archive_info"]["hashes"]
            found[normal(item["metadata"]["name"])] = hashes["sha256"]
    return found


def normal(name: str) -> str:
    """Return a name as the index writes it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions(environment: Path, known: Mapping[str, str]) -> Iterator[Component]:
    """Yield what is installed in a Python environment, each with the libraries that its wheel carries."""
    site = site_packages(environment)
    for distribution in metadata.distributions(path=[str(site)]):
        name = normal(distribution.metadata["Name"])
        yield Component(
            name=name,
            version=distribution.version,
            type=ComponentType.LIBRARY,
            bom_ref=f"pypi:{name}",
            purl=PackageURL("pypi", None, name, distribution.version),
            licenses=python_licences(distribution),
            hashes=sha256(known.get(name, "")),
            components=[*declared(distribution, name), *carried(site, distribution, name)],
        )


def declared(distribution: metadata.Distribution, name: str) -> Iterator[Component]:
    """Yield what a wheel says of its own contents (PEP 770: libraries that auditwheel put in, crates)."""
    seen = set()
    for file in distribution.files or ():
        if ".dist-info/sboms/" not in file.as_posix():
            continue
        for item in json.loads(file.read_text()).get("components", []):
            purl = item.get("purl", "")
            if not purl or purl in seen or purl.startswith(f"pkg:pypi/{name}@"):
                continue
            seen.add(purl)
            yield Component(
                name=item["name"],
                version=item.get("version"),
                type=ComponentType.LIBRARY,
                bom_ref=f"pypi:{name}/{purl}",
                purl=PackageURL.from_string(purl),
            )


def carried(site: Path, distribution: metadata.Distribution, name: str) -> Iterator[Component]:
    """Yield the files of the libraries that a wheel carries."""
    for path in sorted((site / f"{distribution.metadata['Name'].replace('-', '_')}.libs").glob("*")):
        yield Component(
            name=path.name,
            type=ComponentType.FILE,
            bom_ref=f"pypi:{name}/{path.name}",
            hashes=sha256(hashlib.sha256(path.read_bytes()).hexdigest()),
        )


def python_licences(
    distribution: metadata.Distribution,
) -> list[DisjunctiveLicense] | list[LicenseExpression]:
    """Return what a distribution says: an expression, else one line of text, else its classifiers."""
    said = distribution.metadata.json
    if "license_expression" in said:
        return [_LICENCE.make_with_expression(str(said["license_expression"]))]
    text = str(said.get("license", ""))
    if text and "\n" not in text:
        return [_LICENCE.make_with_name(text)]
    classifiers = distribution.metadata.get_all("Classifier") or []
    names = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License :: ")]
    return [_LICENCE.make_with_name(name) for name in sorted(set(names))]


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
