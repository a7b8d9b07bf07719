"""What the documents say is what the code does: tables, names, numbers, commands, messages, links and YAML."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import kubernetes_validate
import pytest
import yaml
from alembic.config import CommandLine

from migrator import errors
from migrator.cli.arguments import PASSED_ON
from migrator.cli.catalogue import COMMANDS as CATALOGUE
from migrator.cli.parser import make_parser
from migrator.config import settings
from migrator.outcome import ExitCode
from migrator.schema import expectations

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
TROUBLESHOOTING = DOCS / "howto" / "troubleshooting"
CHART = ROOT / "k8s" / "chart" / "migrator" / "README.md"
PAGES = (
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    CHART,
    *sorted(DOCS.rglob("*.md")),
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")

# Settings aside, what the image, the build and Kubernetes' examples set.
OTHER_VARIABLES = {
    "MIGRATOR_IMAGE_VERSION",
    *(
        "MIGRATOR_VERSION",
        "MIGRATOR_REVISION",
        "MIGRATOR_CREATED",
        "MIGRATOR_SOURCE",
    ),  # the build's arguments
}

# What Postgres and Alembic say, in messages that the troubleshooting page is arranged by.
NOT_OURS = (
    "canceling statement due to lock timeout [55P03]",
    "password authentication failed for user",
    "[28P01]",
    "database … does not exist [3D000]",
    "permission denied for database … [42501]",
    "permission denied",
    "server does not support SSL, but SSL was required",
    "Can't locate revision identified by",
)


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """Yield the fenced blocks of a page in these languages."""
    for language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in languages:
            yield text


def troubleshooting() -> str:
    """Return all pages about messages as one text."""
    return "\n".join(page.read_text(encoding="utf-8") for page in sorted(TROUBLESHOOTING.glob("*.md")))


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


# -- tables -----------------------------------------------------------------------------------------------


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATED = ("settings", "exit-codes", "commands", "help", "outcome", "outcome-parts")


@pytest.mark.parametrize("name", GENERATED)
def test_generated_tables_are_current(name: str) -> None:
    module = generator()
    assert set(module.TABLES) == set(GENERATED)
    page, table = module.TABLES[name]
    text = (DOCS / page).read_text(encoding="utf-8")
    assert module.fill(text, name, table()) == text, "run `python docs/generate.py`"


def test_every_command_is_documented_with_its_help() -> None:
    page = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")
    rows, _, helps = page.partition("\n## Help\n")
    for name in CATALOGUE:
        assert f"\n| `{name}` |" in rows, name
        assert f"\n### `{name}`\n\n```text\nusage: migrator" in helps, name


# -- names and numbers ------------------------------------------------------------------------------------


@each_page
def test_every_variable_named_is_a_setting(page: Path) -> None:
    known = {settings.variable_name(item) for item in settings.OPTIONS} | OTHER_VARIABLES
    known |= {f"{name}_FILE" for name in settings.SECRET_VARIABLES}
    named = set(re.findall(r"\bMIGRATOR_[A-Z_]*[A-Z]\b", page.read_text(encoding="utf-8")))
    assert named <= known


def test_every_setting_is_documented() -> None:
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    missing = [item.name for item in settings.OPTIONS if f"`{settings.variable_name(item)}`" not in page]
    missing += [
        name for name in (*settings.ADDRESS_VARIABLES, *settings.SECRET_VARIABLES) if name not in page
    ]
    assert not missing


@each_page
def test_every_exit_code_named_has_its_number(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    pairs = [(name, int(number)) for number, name in re.findall(r"\b(\d+) \(`?([A-Z_]{2,})`?\)", text)]
    pairs += [(name, int(number)) for name, number in re.findall(r"`?\b([A-Z_]{3,})`? \((\d+)\)", text)]
    pairs += [(name, int(number)) for number, name in re.findall(r"^\| (\d+) \| `([A-Z_]+)`", text, re.M)]
    for name, number in pairs:
        assert name in ExitCode.__members__, name
        assert int(ExitCode[name]) == number
    numbers = {int(code) for code in ExitCode}
    said = re.findall(r"\b[Cc]odes? (\d+)\b", text)
    said += re.findall(r"(?:refused with|exited? with|run with|fails with) (\d+)\b", text)
    assert {int(number) for number in said} <= numbers


def test_every_exit_code_is_explained() -> None:
    head = (TROUBLESHOOTING / "README.md").read_text(encoding="utf-8").split("## ", 1)[0]
    reserved = {38}  # no message yet
    for code in set(ExitCode) - {ExitCode.OK, ExitCode.PENDING}:
        listed = re.search(rf"^\|.*\b{int(code)}\b.*\|.*\|$", head, re.M) is not None
        assert listed is (int(code) not in reserved), code


# -- commands ---------------------------------------------------------------------------------------------

# Where the words for migrator begin, in `docker run ... migrator downgrade -1` and the like.
_IMAGES = {"migrator", "migrator:latest", "shop-migrations:1.4.2"}
_OTHERS_COMMANDS = {"build", "rmi", "pull", "tag", "push"}


def command_lines(page: Path) -> Iterator[str]:
    """Yield what the page tells people to type, one line each."""
    for block in blocks(page, "sh", "console", "bash"):
        yield from block.replace("\\\n", " ").splitlines()
    yield from INLINE.findall(prose(page))


def words_for_migrator(line: str) -> list[str] | None:
    """Return the arguments that the line gives to migrator; None where it does not run it."""
    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:
        return None
    for number, word in enumerate(words):
        if word in {"&&", "||", "|", ">", ";"}:
            words = words[:number]
            break
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words:
        return None
    if words[0] == "migrator":
        return words[1:]
    runs = words[0] in {"docker", "kubectl", "podman"} and "run" in words[:3] and "--entrypoint" not in words
    if runs and _IMAGES & set(words) and not _OTHERS_COMMANDS & set(words[:2]):
        return words[min(words.index(image) for image in _IMAGES & set(words)) + 1 :]
    return None


COMMANDS = sorted(
    {
        (str(page.relative_to(ROOT)), shlex.join(words))
        for page in PAGES
        if page.parent.name != "adr"  # where what was decided against is named, too
        for line in command_lines(page)
        if "…" not in line and (words := words_for_migrator(line)) is not None
    }
)


def test_the_documents_have_commands() -> None:
    assert len(COMMANDS) > 40
    shown = {command.split()[0] for _, command in COMMANDS if command}
    assert set(CATALOGUE) <= shown | {"COMMAND"}


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_parses(page: str, command: str) -> None:
    words = shlex.split(command)
    if "--help" in words or words == ["..."]:
        words = [word for word in words if word not in {"--help", "...", "COMMAND"}]
    arguments = make_parser().parse_args(words)
    command = arguments.__dict__.get("command")
    if command in PASSED_ON and arguments.arguments not in ([], ["..."]):
        own = [] if command == "alembic" else [command]
        CommandLine(prog="alembic").parser.parse_args([*own, *arguments.arguments])


# -- messages ---------------------------------------------------------------------------------------------


@functools.cache
def literals() -> frozenset[str]:
    """Return the text of every string in the source, `…` where a value is filled in."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(" ".join(node.value.split()))
            elif isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.add(" ".join("".join(parts).split()))
    return frozenset(found)


MESSAGES = re.findall(r"^### (.*)$", troubleshooting(), re.MULTILINE)


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_is_one_that_is_printed(message: str) -> None:
    for foreign in NOT_OURS:
        message = message.replace(foreign, "…")
    parts = [part.strip(" .:;,") for part in re.split("…", message)]
    known = literals()
    for part in parts:
        if len(part) >= 3:
            assert any(part in literal for literal in known), part


def raised() -> set[str]:
    """Return the first literal message of every error that the source makes, `…` where a value is filled in."""
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type)} | {"_failed", "failed"}
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
                texts = [words(argument) for argument in node.args]
                found |= set([text for text in texts if text.strip("… ")][:1])
    return found


def words(node: ast.expr) -> str:
    """Return what is literal in an expression, `…` for the rest."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.List):
        return " ".join(words(item) for item in node.elts)
    if isinstance(node, ast.BinOp):
        return f"{words(node.left)}…{words(node.right)}"
    return ""


def test_every_error_can_be_found() -> None:
    page = " ".join(troubleshooting().split())
    missing = []
    for message in raised():
        parts = [part.strip(" .:;,[]") for part in message.split("…")]
        own = [part for part in parts if len(part) > 4]
        if own and not any(part[:25] in page for part in own):
            missing.append(message)
    assert not missing, "not in docs/howto/troubleshooting"


# -- links and blocks -------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@each_page
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(place), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


def test_the_index_leads_to_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    folders = {TROUBLESHOOTING, DOCS / "howto" / "migrating-from", DOCS / "why" / "adr"}
    for page in DOCS.rglob("*.md"):
        leads = page.parent / "README.md" if page.parent in folders else page
        found = f"({leads.relative_to(DOCS)})" in index and (
            leads == page or f"({page.name})" in leads.read_text(encoding="utf-8")
        )
        assert found or page == DOCS / "README.md", page


@each_page
def test_lines_are_wrapped_at_100_columns(page: Path) -> None:
    if page.name != "CHANGELOG.md":
        text = re.sub(
            r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
        )
        lines = [line for line in text.splitlines() if not line.startswith(("|", "#", "<!--"))]
        whole = {line: INLINE.sub("code", line).lstrip(" -0123456789.") for line in lines}
        assert not [line for line in lines if len(line) > 100 and " " in whole[line]]


@each_page
def test_yaml_parses_and_manifests_fit_the_schema(page: Path) -> None:
    for block in blocks(page, "yaml", "yml"):
        for document in yaml.safe_load_all(block):
            assert document
            if (
                "apiVersion" in document and document["kind"] != "Kustomization"
            ):  # test_manifests.py renders those
                kubernetes_validate.validate(document, "1.31", strict=True)


@each_page
def test_toml_parses(page: Path) -> None:
    for block in blocks(page, "toml"):
        document = tomllib.loads(block)
        if "tables" in document:
            assert expectations.parse(block).tables
        for key in document.get("tool", {}).get("migrator", {}):
            assert key.replace("-", "_") in {item.name for item in settings.OPTIONS}


@each_page
def test_python_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


@each_page
def test_a_page_names_no_place_of_the_machine_it_was_written_on(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"(?:/work/|/home/\w|/root/)\S*", text)


def test_the_architecture_page_names_what_is_there() -> None:
    text = (DOCS / "why" / "architecture.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    source = ROOT / "src" / "migrator"
    places = {place: path for path in source.rglob("*.py") for place in _spellings(path.relative_to(source))}
    named = re.findall(r'\["([a-z_/]+\.py): ([\w.]+)', text)
    assert len(named) > 12
    for place, name in named:
        assert re.search(rf"\b(?:def|class) {name.rpartition('.')[2]}\b", places[place].read_text()), (
            place,
            name,
        )
    assert not [
        place for place in re.findall(r"`([a-z_/]+\.py)`", text) if place not in {**places, "env.py": 0}
    ]
    assert not [folder for folder in re.findall(r"`([a-z_/]+/)`", text) if not (source / folder).is_dir()]


def _spellings(path: Path) -> list[str]:
    """Return the ways to write a module's place: whole, or without the folders above it."""
    return ["/".join(path.parts[start:]) for start in range(len(path.parts))]
