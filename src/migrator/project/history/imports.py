"""Tell from the text of the revisions whether their imports may depend on ``env.py``.

Alembic imports the revisions within ``context.run_migrations``.  A revision that imports the application would
otherwise load it before ``env.py`` has set what it reads.  See docs/why/adr/0049-env-py-goes-first.md.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from migrator.project.history_manifest import revision_files

_KNOWN = sys.stdlib_module_names | {"alembic", "sqlalchemy"}

_TELLING = frozenset(
    {"__import__", "environ", "environb", "eval", "exec", "exec_module", "getenv", "import_module"}
    | {"imp", "importlib", "pkgutil", "runpy"}
)
"""Names that import something by its name, or read a variable that ``env.py`` may set."""

_IMPORT = re.compile(
    rb"^[ \t]*(?:from[ \t]+(\w+)[\w.]*[ \t]+import\b|import[ \t]+(\w+)[\w.]*(?:[ \t]+as[ \t]+\w+)?[ \t\r]*$)",
    re.MULTILINE,
)
_WORDS = (b"import", b"environ", b"getenv", b"runpy", b"pkgutil", b"context", b"op as")
_EXECUTES = re.compile(rb"e(?:xec|val)\b")
_AT_ONCE = re.compile(
    rb"^(?:(?:class|for|if|try|while|with)\b|(?!def |async |from |import |[@#])\S.*\bop\b)", re.MULTILINE
)
"""What may use ``op`` outside of a function."""


def imports_more(folders: Iterable[str], *, recursive: bool = False) -> bool:
    """Tell whether a revision in ``folders`` imports more than Alembic, SQLAlchemy and the standard library.

    The imports of a function do not count, unless the file itself may call it during its import.
    """
    return any(_is_dependent(place) for place in revision_files([*folders], recursive))


def _is_dependent(place: str) -> bool:
    try:
        with open(place, "rb", buffering=0) as file:
            source = file.read()
    except OSError:
        return False
    if not _may_be(source):
        return False  # nearly always, and parsing takes longer
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return False  # it does not import: Alembic says why
    except RecursionError:
        return True
    nodes = list(_run_on_import(tree))
    return any(map(_tells, nodes)) or not _proxies(nodes).isdisjoint(_names(nodes))


def _may_be(source: bytes) -> bool:
    rest = _IMPORT.sub(_without_known, source)
    return bool(any(word in rest for word in _WORDS) or _EXECUTES.search(rest) or _AT_ONCE.search(source))


def _without_known(found: re.Match[bytes]) -> bytes:
    """Leave out an import that is certainly harmless."""
    name = (found[1] or found[2]).decode("ascii", "replace")
    return b"" if name in _KNOWN and name not in _TELLING else found[0]


def _tells(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.partition(".")[0] not in _KNOWN for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        module = (node.module or "").partition(".")[0]
        by_another_name = _TELLING.intersection({module, *(alias.name for alias in node.names)})
        return bool(node.level) or module not in _KNOWN or bool(by_another_name)
    if isinstance(node, (ast.Name, ast.Attribute)):
        return (node.id if isinstance(node, ast.Name) else node.attr) in _TELLING
    return False


def _proxies(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names of Alembic's objects that work only within ``env.py``: ``op`` and ``context``."""
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "alembic"]
    aliases = [alias for node in imports for alias in node.names if alias.name in {"context", "op"}]
    return {alias.asname or alias.name for alias in aliases} | {"alembic"}


def _names(nodes: Iterable[ast.AST]) -> set[str]:
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _run_on_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes that run during an import; all nodes, if these mention a function or class of the file."""
    at_once = list(_outside_of_functions(tree))
    own = {node.name for node in ast.walk(tree) if isinstance(node, (*_FUNCTIONS, ast.ClassDef))}
    mentioned = {node.id for node in at_once if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return ast.walk(tree) if own & mentioned else iter(at_once)


def _outside_of_functions(tree: ast.AST) -> Iterator[ast.AST]:
    waiting: list[Any] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, _FUNCTIONS):
            waiting += [*node.decorator_list, node.args, *([node.returns] if node.returns else [])]
        elif isinstance(node, ast.If) and ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING":
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)
