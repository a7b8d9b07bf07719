"""Logs and redaction: no secret gets out in any form, and no env.py takes the log away."""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import logging.config
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
import pythonjsonlogger.json

from migrator.runtime import logs
from migrator.runtime.logs import MASK, Logs, RedactingStream, Redactor, protect_streams
from tests.config.test_database_url import PASSWORDS
from tests.support import PLANTED, leaks
from tests.support.env_text import env
from tests.support.projects import Revision, linear_history
from tests.support.runner import Runner
from tests.support.servers import Database

SECRETS = [password for password in PASSWORDS if len(password) >= 6]
FORMS = {
    "raw": lambda secret: secret,
    "quoted": lambda secret: quote(secret, safe=""),
    "quoted, some": lambda secret: quote(secret, safe="/:?#[]!$&'()*+,;="),
    "quoted in lower case": lambda secret: (
        quote(secret, safe="").replace("%", "\0").lower().replace("\0", "%")
        if secret.islower()
        else quote(secret, safe="")
    ),
    "quoted with plus": quote_plus,
    "every character quoted": lambda secret: "".join(f"%{byte:02X}" for byte in secret.encode()),
    "for configparser": lambda secret: secret.replace("%", "%%"),
    "quoted for configparser": lambda secret: quote(secret, safe="").replace("%", "%%"),
    "JSON": json.dumps,
    "JSON, not ASCII": lambda secret: json.dumps(secret, ensure_ascii=False),
    "repr": repr,
    "ascii": ascii,
    "repr in JSON": lambda secret: json.dumps(repr(secret)),
    "JSON in JSON": lambda secret: json.dumps(json.dumps(secret)),
    "SQL": lambda secret: secret.replace("'", "''"),
    "DSN": lambda secret: secret.replace("\\", "\\\\").replace("'", "\\'"),
    "HTML": html.escape,
    "base64": lambda secret: base64.b64encode(secret.encode()).decode(),
}


@pytest.fixture
def secret() -> Iterator[None]:
    """Let the process know the planted password for one test."""
    known = set(logs.redact._secrets)
    logs.redact.add([PLANTED])
    yield
    logs.redact._secrets = known
    logs.redact.add([])


@pytest.fixture
def logging_kept() -> Iterator[None]:
    """Put the process's logging back as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    loggers = {
        name: (logger.level, logger.disabled, logger.propagate, list(logger.handlers))
        for name, logger in root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger)
    }
    yield
    logging.captureWarnings(False)
    root.handlers, root.level = handlers, level
    for name, (was_level, disabled, propagate, was_handlers) in loggers.items():
        logger = logging.getLogger(name)
        logger.setLevel(was_level)
        logger.disabled, logger.propagate, logger.handlers = disabled, propagate, was_handlers


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_masked_in_every_form(secret: str, form: str) -> None:
    shown = FORMS[form](secret)
    redact = Redactor([secret])
    for text in (shown, f"before {shown} after", f"postgresql://u:{shown}@h/db", f"|{shown}{shown}|"):
        assert redact(text).replace('"', "").replace("'", "").replace("\\", "") == text.replace(
            shown, MASK
        ).replace('"', "").replace("'", "").replace("\\", "")


def test_the_harness_finds_nothing_either() -> None:
    redact = Redactor([PLANTED, f"postgresql://u:{quote(PLANTED, safe='')}@h/db"])
    for form in FORMS.values():
        assert leaks.find(redact(f"a {form(PLANTED)} b postgresql://u:{form(PLANTED)}@h/db")) is None


@pytest.mark.parametrize("secret", ["postgres", "app", "migrator", "x", "123", "a!"])
def test_a_password_that_is_also_a_word_is_masked_where_it_is_a_password(secret: str) -> None:
    redact = Redactor([secret])
    for text in (
        "postgresql://postgres:{}@h/postgres",
        "host=h password={} user=x",
        "password='{}'",
        "PGPASSWORD={}",
        "{{'password': '{}'}}",
        '{{"password": "{}"}}',
        '{{"password":"{}"}}',
        "password: {}",
    ):
        assert MASK in redact(text.format(secret)), text
        assert redact(text.format(secret)) == text.format(MASK)
    for text in (f"connected as {secret} to {secret}", f"role {secret}.", f"the password of {secret}"):
        assert redact(text) == text


@pytest.mark.parametrize(
    "secret", ["correcthorsebatterystaple", "aKdjwLqPzm", "hunter2", "pässwörtchen", "123456"]
)
def test_a_password_that_is_no_word_is_masked_anywhere(secret: str) -> None:
    assert Redactor([secret])(f"it says {secret}.") == f"it says {MASK}."


def test_of_several_secrets_the_longest_is_masked_first() -> None:
    redact = Redactor(["secret-1", "secret-1-and-more", ""])
    redact.add(["third@secret"])
    assert redact("secret-1-and-more, secret-1, third%40secret") == "***, ***, ***"
    assert Redactor()("nothing known") == "nothing known"
    assert Redactor([""])("nothing known") == "nothing known"


def test_a_secret_that_is_no_text_can_be_one() -> None:
    """What os.environ makes of bytes that are not UTF-8."""
    secret = b"pass\xff\xfeword".decode(errors="surrogateescape")
    assert Redactor([secret])(f"a {secret} b pass%FF%FEword") == "a *** b ***"


def test_masking_is_quick_on_a_long_text() -> None:
    import time

    redact = Redactor([*SECRETS, "%" * 60, "\\" * 60, " " * 60])
    text = ("% " * 50 + "\\" * 200 + "a line of a log with 100% of what it takes; ") * 300
    started = time.process_time()
    redact(text)
    assert time.process_time() - started < 5


@pytest.mark.usefixtures("secret")
def test_whatever_is_written_to_a_stream_is_masked(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    protected = RedactingStream(stream)
    print("the password is", PLANTED, file=protected)
    protected.writelines([f"{PLANTED}\n", "x\n"])
    assert protected.write(PLANTED) == len(PLANTED)
    protected.flush()
    assert protected.isatty() is False
    assert stream.getvalue() == f"the password is {MASK}\n{MASK}\nx\n{MASK}"


@pytest.mark.usefixtures("secret")
def test_stdout_and_stderr_are_protected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    protect_streams()
    protect_streams()
    print(PLANTED)
    print(PLANTED, file=sys.stderr)
    assert (out.getvalue(), err.getvalue()) == (f"{MASK}\n", f"{MASK}\n")


def catch_stderr(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Put a stream in the place of stderr, which is no terminal; in the test itself, for pytest puts its own there."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.mark.usefixtures("secret", "logging_kept")
@pytest.mark.parametrize("log_format", ["auto", "json"])
def test_json_lines(monkeypatch: pytest.MonkeyPatch, log_format: str) -> None:
    stderr = catch_stderr(monkeypatch)
    Logs(log_format, "info", "run-1").install()
    log = logging.getLogger("migrator")
    log.debug("not shown")
    log.info("connected with %s", PLANTED, extra={"address": f"postgresql://u:{quote(PLANTED)}@h/db"})
    try:
        raise ValueError(PLANTED)
    except ValueError:
        log.exception("failed\nover two lines")
    log.warning("its kind", extra={"path": Path("x"), "text": "é→"})
    first, second, third = (json.loads(line) for line in stderr.getvalue().splitlines())
    assert (first["message"], first["level"], first["logger"]) == (
        f"connected with {MASK}",
        "info",
        "migrator",
    )
    assert (first["run_id"], first["address"]) == ("run-1", f"postgresql://u:{MASK}@h/db")
    assert first["time"].endswith("+00:00")
    assert second["message"] == "failed\nover two lines"
    assert f"ValueError: {MASK}" in second["exc_info"]
    assert (third["path"], third["text"]) == ("x", "é→")
    assert leaks.find(stderr.getvalue()) is None


@pytest.mark.usefixtures("secret", "logging_kept")
@pytest.mark.parametrize(
    ("message", "extra"),
    [
        ("Nothing to do: x is at r003 (head), verified.", {"stage": "verify", "seconds": 0.25}),
        (f"é→ \u202e \x1b[1m\n{PLANTED}", {"path": Path("x"), "text": "\x7f", "none": None, "items": [1, 2]}),
        ("its keys", {"time": 1, "run_id": "mine"}),
    ],
)
@pytest.mark.parametrize("run_id", ["run-1", ""])
def test_the_line_without_logging_is_that_of_logging(
    monkeypatch: pytest.MonkeyPatch, run_id: str, message: str, extra: dict[str, Any]
) -> None:
    """A run with nothing to do writes its line itself; pythonjsonlogger makes all others."""
    stderr = catch_stderr(monkeypatch)
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.25)
    Logs("json", "info", run_id).say("info", message, **extra)
    fast = stderr.getvalue()
    logs = Logs("json", "info", run_id)
    logs.install()
    logs.say("info", message, **extra)
    assert stderr.getvalue() == fast + fast
    document = json.loads(fast)
    assert document["logger"] == "migrator"
    assert next(iter(document)) == "message"
    formatters = [handler.formatter for handler in logging.getLogger().handlers]
    assert any(isinstance(formatter, pythonjsonlogger.json.JsonFormatter) for formatter in formatters)


@pytest.mark.usefixtures("secret", "logging_kept")
def test_text_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = catch_stderr(monkeypatch)
    Logs("text", "warning").install()
    log = logging.getLogger("migrator")
    log.info("not shown")
    try:
        raise ValueError(PLANTED)
    except ValueError:
        log.warning("hm %s", PLANTED, exc_info=True)
    first, *others = stderr.getvalue().splitlines()
    assert first.split(maxsplit=1)[1] == f"WARNING hm {MASK}"
    assert others[-1] == f"ValueError: {MASK}"


@pytest.mark.usefixtures("logging_kept")
def test_a_terminal_gets_text_and_the_levels_of_others_are_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = catch_stderr(monkeypatch)
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    found = Logs("auto", "info")
    assert not found.is_json
    found.install()
    logging.getLogger("alembic.runtime.migration").info("Running upgrade")
    logging.getLogger("sqlalchemy.engine").info("SELECT 1")
    logging.getLogger("sqlalchemy.engine").warning("heard")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("and this", stacklevel=1)
    assert "Running upgrade" not in stderr.getvalue()
    assert "SELECT 1" not in stderr.getvalue()
    assert "heard" in stderr.getvalue()
    assert "and this" in stderr.getvalue()


CONFIG = """
[loggers]
keys = root,alembic,app
[handlers]
keys = console,file
[formatters]
keys = plain
[logger_root]
level = WARNING
handlers = console,file
[logger_alembic]
level = INFO
handlers = console
qualname = alembic
[logger_app]
level = INFO
handlers = console
qualname = app
propagate = 0
[handler_console]
class = StreamHandler
args = (sys.stderr,)
formatter = plain
[handler_file]
class = FileHandler
args = ("{file}",)
formatter = plain
[formatter_plain]
format = FILE-CONFIG %(message)s
"""


@pytest.mark.usefixtures("secret", "logging_kept")
def test_the_log_survives_file_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What an env.py does as Alembic's template has it: existing loggers disabled, the root's handlers replaced."""
    stderr = catch_stderr(monkeypatch)
    log = logging.getLogger("migrator.stages")
    found = Logs("json", "info", "run-2")
    found.install()
    config = tmp_path / "alembic.ini"
    config.write_text(CONFIG.replace("{file}", str(tmp_path / "app.log")))
    logging.config.fileConfig(config)
    assert log.disabled
    found.install()
    found.install()
    log.info("still here")
    logging.getLogger("app").warning("the app says %s", PLANTED)
    logging.getLogger("migrator").warning("to the file: %s", PLANTED)
    lines = [json.loads(line) for line in stderr.getvalue().splitlines()]
    assert [line["message"] for line in lines if line["logger"].startswith("migrator")] == [
        "still here",
        f"to the file: {MASK}",
    ]
    assert [line["message"] for line in lines if line["logger"] == "app"] == [f"the app says {MASK}"]
    assert "FILE-CONFIG" not in stderr.getvalue()
    file = (tmp_path / "app.log").read_text()
    assert f"FILE-CONFIG to the file: {MASK}\n" in file
    assert leaks.find(stderr.getvalue() + file) is None


OF_A_CLASS_OF_ITS_OWN = """
import logging, sys
class Pretty(logging.Handler):
    def emit(self, record):
        print("PRETTY", record.getMessage(), file=sys.stderr)
        print("PRETTY", record.getMessage(), file=sys.__stdout__)
        with open("seen.txt", "a") as file:
            print(record.getMessage(), file=file)
{0}
"""
REPLACED = {
    "the root's handlers": "logging.basicConfig(level='INFO', handlers=[Pretty()], force=True)",
    "our own logger's": "mine = logging.getLogger('migrator'); mine.handlers = [Pretty()]; mine.propagate = False",
}


@pytest.mark.parametrize("what", REPLACED)
@pytest.mark.parametrize("where", ["env.py", "a revision"])
def test_an_env_py_that_replaces_logging_gets_each_line_once_and_as_json(
    database: Database, project: Callable[..., Path], run_migrator: Runner, what: str, where: str
) -> None:
    text = OF_A_CLASS_OF_ITS_OWN.format(REPLACED[what])
    revisions = linear_history(2)
    if where == "a revision":
        revisions[0] = Revision("r001", None, f"{text}\nop.execute('CREATE TABLE t1 (id int)')")
    folder = project(env(top=text if where == "env.py" else ""), revisions=revisions)
    result = run_migrator(cwd=folder, database=database)
    assert result.code == 0, result
    lines = result.stderr.splitlines()
    assert len(result.logs) == len(lines), result
    said = [line["message"] for line in result.logs]
    assert len(said) == len(set(said)), result
    assert len([line for line in said if line.startswith("applied ")]) == 2, result
    assert "PRETTY" not in result.stdout
    assert "applied 2 of 2" in (folder / "seen.txt").read_text()  # what else it does, it does
