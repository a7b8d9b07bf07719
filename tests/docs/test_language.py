"""Plain English: words that messages, help, docstrings, comments and pages avoid."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTEAD = {
    "afresh|anew": "again",
    "for want of": "without, because ... is missing",
    "mend|mends|mended": "fix",
    "nor": "two sentences",
    "prove|proves|proven|unproven": "verify, verified",
    "so is said|is said": "the message says",
    "a person is needed": "manual action required",
    "thereof": "of it",
    "whoever|whomever": "the role, run or program",
    "(?<!there )is none": "is not a ...",
}
BANNED = re.compile(rf"\b(?:{'|'.join(INSTEAD)})\b")
"""As whole words in lower case: None is Python's."""
NEITHER = re.compile(r"\bneither\b[^.;:]*?\bnor\b")

SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.parent.name != "adr")]


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each text of a module, with its line: strings and docstrings of several words, and comments."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def banned(text: str) -> list[str]:
    """Return the words in a text that have a plainer one."""
    return BANNED.findall(NEITHER.sub("", " ".join(text.split())))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_the_program_speaks_plain_english(path: Path) -> None:
    assert not [(line, words) for line, text in texts(path) if (words := banned(text))], INSTEAD


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_pages_speak_plain_english(page: Path) -> None:
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert not banned(prose), INSTEAD


@pytest.mark.parametrize("text", ["mend the cause", "it is proven", "that\n    is none", "x, nor y"])
def test_a_banned_word_is_found(text: str) -> None:
    assert banned(text)
