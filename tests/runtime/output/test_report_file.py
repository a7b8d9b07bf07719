"""The report and the termination message: written to files alone, never through a link, and never an earlier run's."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.runtime import files
from tests.support.projects import linear_history
from tests.support.runner import PATIENCE, Runner
from tests.support.servers import Database


def fifo(place: Path) -> None:
    os.mkfifo(place)


def unix_socket(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place))


def link_to_another(place: Path) -> None:
    other = place.with_name("another")
    other.write_text("theirs")
    place.symlink_to(other)


def link_to_nothing(place: Path) -> None:
    place.symlink_to(place.with_name("nothing-yet"))


def second_name(place: Path) -> None:
    other = place.with_name("another")
    other.write_text("theirs")
    os.link(other, place)


PLANTED = [fifo, unix_socket, Path.mkdir, link_to_another, link_to_nothing, second_name]


@pytest.mark.parametrize("plant", PLANTED, ids=[item.__name__ for item in PLANTED])
def test_nothing_that_others_planted_is_written_through(
    plant: Callable[[Path], None], tmp_path: Path
) -> None:
    place = tmp_path / "place"
    plant(place)
    try:
        files.replace(str(place), "ours")
        assert place.read_text() == "ours"
        assert not place.is_symlink()
    except OSError:
        assert not stat.S_ISREG(place.lstat().st_mode)
    place_for_overwriting = tmp_path / "b"
    place_for_overwriting.mkdir()
    planted = place_for_overwriting / "place"
    plant(planted)
    with pytest.raises(OSError, match=r"\[Errno"):
        files.overwrite(str(planted), b"ours")
    for folder in (tmp_path, place_for_overwriting):
        assert not (folder / "nothing-yet").exists()
        if (folder / "another").exists():
            assert (folder / "another").read_text() == "theirs"
    assert [item.name for item in tmp_path.iterdir() if item.name.endswith(".part")] == []


def test_a_guessable_name_is_no_way_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", bytes)
    other = tmp_path / "another"
    other.write_text("theirs")
    (tmp_path / f".place.{'00' * 8}.part").symlink_to(other)
    with pytest.raises(FileExistsError):
        files.replace(str(tmp_path / "place"), "ours")
    assert other.read_text() == "theirs"


def test_a_device_and_a_descriptor_are_written_to_and_stay(tmp_path: Path) -> None:
    files.replace("/dev/null", "ours")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with (tmp_path / "out").open("w") as file:
        file.write("before ")
        file.flush()
        files.replace(f"/dev/fd/{file.fileno()}", "ours, ")
        files.remove(f"/proc/self/fd/{file.fileno()}")
        files.replace(f"/proc/{os.getpid()}/fd/{file.fileno()}", "again")
    assert (tmp_path / "out").read_text() == "before ours, again"
    with pytest.raises(OSError, match=r"\[Errno"):
        files.replace("/dev/full", "ours")


def test_a_file_that_is_full_leaves_no_part(tmp_path: Path) -> None:
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
    code += "from migrator.runtime import files\n"
    code += "try: files.replace(sys.argv[1], 'x' * 100)\nexcept OSError as error: print(error.strerror)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "place")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "File too large\n"
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_killed_leaves_no_report_of_an_earlier_one(
    database: Database, project: Callable[..., Path], run_migrator: Runner, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    report.write_text('{"code": 0}')
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    folder = project(revisions=linear_history(1))
    (folder / "migrations" / "env.py").write_text(kill)
    result = run_migrator(cwd=folder, database=database, env={"MIGRATOR_REPORT_FILE": str(report)})
    assert result.code == -9
    assert not report.exists()


def test_a_report_to_stdout_and_a_fifo_nobody_reads(
    database: Database, project: Callable[..., Path], run_migrator: Runner, tmp_path: Path
) -> None:
    folder = project(revisions=linear_history(1))
    os.mkfifo(tmp_path / "termination")
    env = {"MIGRATOR_REPORT_FILE": "/dev/stdout", "MIGRATOR_TERMINATION_LOG": str(tmp_path / "termination")}
    result = run_migrator(cwd=folder, database=database, env=env, timeout=PATIENCE)
    assert result.code == 0, result
    report, _, answer = result.stdout.partition("\n}\n")
    assert json.loads(report + "\n}")["outcome"] == "OK"
    assert "upgraded" in answer
    assert Path("/dev/stdout").is_symlink()
