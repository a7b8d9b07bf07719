"""Children are streamed, bounded, ended with whatever ends us, and given nothing but what they need."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from migrator.runtime import subprocesses
from tests.support.pace import Stopwatch

PYTHON = sys.executable


class Stop(BaseException):
    """What a signal handler raises."""


@pytest.fixture
def alarm() -> Iterator[None]:
    """Have SIGTERM raise Stop in the main thread, as the pipeline's handler does."""

    def raise_stop(_number: int, _frame: FrameType | None) -> None:
        raise Stop

    previous = signal.signal(signal.SIGTERM, raise_stop)
    yield
    signal.signal(signal.SIGTERM, previous)


def python(code: str, *arguments: str, **options: object) -> subprocesses.Finished:
    command = [PYTHON, "-c", textwrap.dedent(code), *arguments]
    return subprocesses.run(command, environment=subprocesses.base_environment(), **options)  # type: ignore[arg-type]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_both_pipes_are_drained_whatever_the_order() -> None:
    chunks: list[bytes] = []
    finished = python(
        """
        import os
        os.write(2, b"e" * 3_000_000)
        for _ in range(50): os.write(1, b"o" * 100_000)
        os.write(2, b"E" * 3_000_000 + b"the end")
        os._exit(7)
        """,
        on_output=chunks.append,
    )
    assert finished.status == 7
    assert b"".join(chunks) == b"o" * 5_000_000
    assert len(finished.stderr) == subprocesses.STDERR_KEPT
    assert finished.stderr.endswith("the end")


def test_a_child_ended_by_a_signal_says_which() -> None:
    assert python("import os; os.kill(os.getpid(), 9)").status == -9


def test_the_environment_is_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIGRATOR_SECRET_OF_OURS", "x")
    chunks: list[bytes] = []
    code = "import os; print(sorted(os.environ))"
    subprocesses.run(
        [PYTHON, "-c", code], environment={"PATH": "/bin", "PGPASSWORD": "p"}, on_output=chunks.append
    )
    names = eval(b"".join(chunks))  # noqa: S307 - what repr() wrote
    assert set(names) - {"LC_CTYPE"} == {"PATH", "PGPASSWORD"}  # Python itself sets LC_CTYPE


def test_a_failing_reader_ends_the_child_and_what_it_started(tmp_path: Path) -> None:
    pids: list[int] = []

    def fail(chunk: bytes) -> None:
        pids.extend(int(word) for word in chunk.split())
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        python(
            """
            import os, subprocess, time
            other = subprocess.Popen(["sleep", "60"])
            print(os.getpid(), other.pid, flush=True)
            time.sleep(60)
            """,
            on_output=fail,
        )
    assert len(pids) == 2
    wait_until(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.usefixtures("alarm")
def test_an_exception_from_a_signal_handler_ends_the_child() -> None:
    pids: list[int] = []

    def interrupt(chunk: bytes) -> None:
        pids.append(int(chunk))
        code = f"import os, time; time.sleep(0.2); os.kill({os.getpid()}, 15)"
        subprocess.Popen([PYTHON, "-c", code])

    with Stopwatch() as watch, pytest.raises(Stop):
        python(
            "import os, time; print(os.getpid(), flush=True); time.sleep(60)",
            on_output=interrupt,
        )
    assert watch.within(10)
    assert not alive(pids[0])
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[0], os.WNOHANG)  # reaped


def test_a_child_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocesses, "GRACE", 0.2)
    pids: list[int] = []

    def fail(chunk: bytes) -> None:
        pids.append(int(chunk))
        raise Stop

    with pytest.raises(Stop):
        python(
            """
            import os, signal, time
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print(os.getpid(), flush=True)
            time.sleep(60)
            """,
            on_output=fail,
        )
    assert not alive(pids[0])


def test_the_timeout_counts_with_pipes_open_and_with_pipes_closed() -> None:
    for code in ("import time; time.sleep(60)", "import os, time; os.close(1); os.close(2); time.sleep(60)"):
        with Stopwatch() as watch, pytest.raises(subprocesses.TimedOut, match=r"did not end within 0\.5 s"):
            python(code, timeout=0.5)
        assert watch.within(5)


def test_a_program_that_is_missing_is_an_oserror() -> None:
    with pytest.raises(FileNotFoundError):
        subprocesses.run(["/nonexistent/pg_dump"], environment={})


def terminate_ourselves() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)


@pytest.mark.usefixtures("alarm")
def test_uninterrupted_holds_signals_back_and_hands_them_on() -> None:
    done = []

    def work() -> None:
        with subprocesses.uninterrupted():
            terminate_ourselves()
            done.append("all of it")

    with pytest.raises(Stop):
        work()
    assert done == ["all of it"]


@pytest.mark.usefixtures("alarm")
def test_uninterrupted_can_forget_what_came_too_late() -> None:
    with subprocesses.uninterrupted(forget=True):
        terminate_ourselves()
    with pytest.raises(Stop):  # and the handler is back
        terminate_ourselves()


def test_a_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(subprocesses.__file__).parents[2])!r})
        from migrator.runtime import subprocesses
        child = "import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
        subprocesses.run([sys.executable, "-c", child], environment=subprocesses.base_environment())
    """
    parent = subprocess.Popen([PYTHON, "-c", textwrap.dedent(code)])
    try:
        wait_until(lambda: note.exists() and note.read_text())
    finally:
        parent.kill()
        parent.wait(10)
    wait_until(lambda: not alive(int(note.read_text())))


def test_what_the_pulse_raises_ends_a_child_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocesses, "PULSE", 0.1)
    beats: list[float] = []

    def pulse() -> None:
        beats.append(time.monotonic())
        if len(beats) == 3:
            raise Stop

    started = time.monotonic()
    with pytest.raises(Stop):
        python("import time; time.sleep(60)", pulse=pulse)
    assert len(beats) == 3
    assert 0.25 < time.monotonic() - started < 20


def test_a_fork_that_holds_the_pipes_is_not_waited_for_and_nothing_of_the_child_is_lost() -> None:
    chunks: list[bytes] = []
    finished = python(
        """
        import os, time
        if fork := os.fork():
            os.write(1, b"%d " % fork + b"o" * 5_000_000)
            os.write(2, b"the end")
            os._exit(5)
        time.sleep(300)
        """,
        on_output=chunks.append,
        timeout=60,
    )
    fork, _, rest = b"".join(chunks).partition(b" ")
    assert (finished.status, finished.stderr, len(rest)) == (5, "the end", 5_000_000)
    wait_until(lambda: not alive(int(fork)))


@pytest.mark.parametrize("talks", [False, True])
def test_a_process_that_left_the_group_is_not_waited_for_either(talks: bool, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    said: list[bytes] = []
    try:
        finished = python(
            """
            import os, signal, sys, time
            if os.fork():
                while not os.path.exists(sys.argv[1]): time.sleep(0.01)
                os.write(1, b"mine")
                os._exit(0)
            os.setsid()
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            with open(sys.argv[1] + ".new", "w") as file: file.write(str(os.getpid()))
            os.rename(sys.argv[1] + ".new", sys.argv[1])
            while sys.argv[2] == "True": os.write(1, b"z" * 100)
            time.sleep(300)
            """,
            str(note),
            str(talks),
            on_output=said.append,
            feed=[bytes(10_000_000)],  # which nobody reads, though the fork could
            timeout=60,
        )
        assert finished.status == 0
        assert b"mine" in b"".join(said)
    finally:
        pid = int(note.read_text())
        if talks:
            wait_until(lambda: not alive(pid))  # of SIGPIPE: the pipe is closed
        else:
            os.kill(pid, signal.SIGKILL)


def test_what_a_child_leaves_is_reaped_by_a_process_that_inherits_it() -> None:
    code = f"""
        import ctypes, os, sys
        sys.path.insert(0, {str(Path(subprocesses.__file__).parents[2])!r})
        from migrator.runtime import subprocesses
        assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER: as PID 1 is
        child = "import os, time; os.fork() or time.sleep(300)"
        subprocesses.run([sys.executable, "-c", child], environment=subprocesses.base_environment())
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            print("none")
    """
    done = subprocess.run([PYTHON, "-c", textwrap.dedent(code)], capture_output=True, timeout=60, check=True)
    assert done.stdout == b"none\n"


def test_a_child_is_fed_no_faster_than_it_reads_and_answers_meanwhile() -> None:
    digest, given, received = hashlib.sha256(), 0, bytearray()

    def chunks() -> Iterator[bytes]:
        nonlocal given
        for number in range(40):
            chunk = bytes([number]) * 1_000_003
            digest.update(chunk)
            given += len(chunk)
            yield chunk
        yield b""

    finished = python(
        """
        import hashlib, sys
        digest = hashlib.sha256()
        while chunk := sys.stdin.buffer.read(1 << 16):
            digest.update(chunk)
            sys.stderr.write("." * 64)
        print(digest.hexdigest(), end="")
        """,
        feed=chunks(),
        on_output=received.extend,
    )
    assert (finished.status, given) == (0, 40 * 1_000_003)
    assert received.decode() == digest.hexdigest()


def test_a_child_that_reads_only_a_part_is_no_error_and_the_rest_stays() -> None:
    feed = iter([bytes(4_000_000) for _ in range(10)])
    finished = python("import sys; sys.stdin.buffer.read(10); sys.exit(3)", feed=feed)
    assert finished.status == 3
    assert len(list(feed)) >= 7


def test_what_the_feed_raises_ends_the_child() -> None:
    def chunks() -> Iterator[bytes]:
        yield b"a"
        raise OSError("the store is gone")

    started = time.monotonic()
    with pytest.raises(OSError, match="the store is gone"):
        python("import sys, time; sys.stdin.buffer.read(); time.sleep(600)", feed=chunks())
    assert time.monotonic() - started < 60
