"""Ask a vulnerability service about requirements.lock, and never take a question without an answer for a good one.

pip-audit itself ends with 0 where the service knows none of the packages (it calls them skipped).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 180
"""Seconds for all of it."""


def main() -> int:
    """Run pip-audit and return 0, 1 or 3."""
    program = Path(sys.executable).with_name("pip-audit")
    options = ["--disable-pip", "--require-hashes", "--progress-spinner=off", "--format=json"]
    try:
        done = subprocess.run(
            [program, *options, *sys.argv[1:], "-r", ROOT / "requirements.lock"],
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        packages = json.loads(done.stdout)["dependencies"]
    except FileNotFoundError:
        return not_audited("pip-audit is not installed: bin/setup")
    except subprocess.TimeoutExpired:
        return not_audited(f"the vulnerability service gave no answer within {LIMIT} s")
    except (ValueError, KeyError):
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return not_audited(said[-1].strip() if said else f"pip-audit ended with {done.returncode}")
    skipped = [item["name"] for item in packages if "skip_reason" in item]
    found = [(item, flaw) for item in packages for flaw in item.get("vulns", ())]
    for item, flaw in found:
        fixed = ", ".join(flaw["fix_versions"]) or "no version yet"
        names = ", ".join([flaw["id"], *flaw["aliases"]])
        print(f"{item['name']} {item['version']}: {names}; mended in {fixed}", file=sys.stderr)
    if found:
        return 1
    if skipped or not packages:
        return not_audited(f"the vulnerability service knows nothing of: {', '.join(skipped) or 'anything'}")
    print(f"audited: {len(packages)} packages, none with a known vulnerability")
    return 0


def not_audited(why: str) -> int:
    """Say that nothing is known, and return 3."""
    print(
        f"NOT AUDITED: {why}. Run `make audit` where a vulnerability service can be reached.", file=sys.stderr
    )
    return 3


if __name__ == "__main__":
    sys.exit(main())
