"""Static checks and the audit of dependencies: bandit finds nothing unexplained, and an audit never passes unmade."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.runner import ROOT

# What ruff has no rule for, or does not mistake for something else, as bandit does.  bandit's numbers are ruff's:
# everything else is waived where it stands, by ruff's own noqa with a reason.
EXPLAINED = {
    ("B404", "subprocesses.py"): "the one module that starts processes",
    ("B603", "subprocesses.py"): "without a shell, with lists of arguments that migrator makes",
    ("B105", "settings.py"): "the text 'True' in a field's metadata is no password",
    ("B105", "database_url.py"): "PGPASSWORD is a variable's name",
}
NOQA = re.compile(r"# noqa: (?P<rules>[A-Z0-9, ]+)(?P<reason>.*)")


def found_by_bandit(*paths: str) -> list[dict[str, Any]]:
    """Return what bandit finds, its own waivers ignored: this project has none."""
    program = Path(sys.executable).with_name("bandit")
    done = subprocess.run(
        [program, "--quiet", "--recursive", "--format=json", "--ignore-nosec", *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    answer = json.loads(done.stdout)
    assert not answer["errors"], answer["errors"]
    found: list[dict[str, Any]] = answer["results"]
    return found


def waiver(finding: dict[str, Any]) -> str:
    """Return the reason that stands beside a finding, in its statement's lines; nothing where there is none."""
    lines = (ROOT / finding["filename"]).read_text(encoding="utf-8").splitlines()
    first, last = min(finding["line_range"]), max(finding["line_range"])
    while last < len(lines) and '"""' in "".join(lines[first - 1 : last]) and '"""' not in lines[last - 1]:
        last += 1
    for line in lines[first - 1 : last + 1]:
        match = NOQA.search(line)
        if match and finding["test_id"].replace("B", "S", 1) in match["rules"].replace(",", " ").split():
            return match["reason"].strip(" -")
    return ""


def test_bandit_finds_nothing_unexplained() -> None:
    found = found_by_bandit("src", "entrypoint.py")
    assert found, "bandit looked at nothing"
    unexplained = [
        f"{item['test_id']} {item['filename']}:{item['line_number']}: {item['issue_text']}"
        for item in found
        if (item["test_id"], Path(item["filename"]).name) not in EXPLAINED and not waiver(item)
    ]
    assert not unexplained, "\n".join(unexplained)


def test_bandit_would_find_something(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import subprocess\nsubprocess.run('ls ' + input(), shell=True)\n")
    assert {item["test_id"] for item in found_by_bandit(str(bad))} >= {"B602"}


@pytest.mark.parametrize("folder", ["src", "tests", "bench", "bin", "migrations"])
def test_every_waiver_has_a_reason(folder: str) -> None:
    bare = []
    for path in [*(ROOT / folder).rglob("*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            match = NOQA.search(line)
            if match and re.search(r"\bS\d+", match["rules"]) and not match["reason"].strip(" -#"):
                bare.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
            assert path == Path(__file__) or "# nosec" not in line, (
                f"{path}:{number}: ruff's waivers serve both"
            )
    assert not bare, "\n".join(bare)


# -- the audit ---------------------------------------------------------------------------------------------


@contextmanager
def vulnerability_service(answers: dict[str, Any], status: int = 200) -> Iterator[str]:
    """Answer as OSV does, by package, on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(answers.get(asked["package"]["name"], {})).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def audit(url: str) -> subprocess.CompletedProcess[str]:
    """Run bin/audit against a service."""
    return subprocess.run(
        [ROOT / "bin" / "audit", "--vulnerability-service=osv", f"--osv-url={url}", "--timeout=5"],
        capture_output=True,
        text=True,
        timeout=300,
    )


KNOWN = {
    "id": "GHSA-0000-test-0000",
    "aliases": ["CVE-2026-00000"],
    "summary": "made up",
    "affected": [
        {
            "package": {"name": "mako", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}],
        }
    ],
}


def test_an_audit_that_finds_nothing_says_what_it_looked_at() -> None:
    with vulnerability_service({}) as url:
        done = audit(url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"audited: \d+ packages, none with a known vulnerability", done.stdout), done.stdout


def test_an_audit_that_finds_something_fails() -> None:
    with vulnerability_service({"mako": {"vulns": [KNOWN]}}) as url:
        done = audit(url)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "mako" in done.stderr
    assert "GHSA-0000-test-0000" in done.stderr
    assert "99.0" in done.stderr


def test_an_audit_that_could_not_be_made_is_no_pass() -> None:
    for url in ("http://127.0.0.1:9/v1/query",):
        done = audit(url)
        assert done.returncode == 3, done.stdout + done.stderr
        assert "NOT AUDITED" in done.stderr
    with vulnerability_service({}, status=503) as url:
        done = audit(url)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "NOT AUDITED" in done.stderr
