"""Judge whether a ``downgrade()`` can be called without a database and without a side effect.

It is a user's Python, called only to record its SQL, when nobody has requested a downgrade. So only
known harmless code passes: calls of Alembic's operations and SQLAlchemy's constructs, a few builtins,
and functions of the same file that pass the same test. Anything else is refused, with its line. Names
are resolved in the imported module, so ``op`` is really Alembic's.
"""

from __future__ import annotations

import ast
import builtins
import enum
import inspect
import logging
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

from migrator.project.downgrade.harmless import (
    ATTRIBUTES_REFUSED,
    BUILTINS,
    LOGGING,
    METHODS,
    MUTATIONS,
    OPERATIONS,
    is_constant,
    is_function_namespace,
    may_be_called,
    own_code,
)

_PLAIN: tuple[type[ast.AST], ...] = (
    *(ast.Pass, ast.Expr, ast.If, ast.For, ast.Return, ast.Assert, ast.Raise, ast.Break, ast.Continue),
    *(
        ast.Constant,
        ast.BinOp,
        ast.BoolOp,
        ast.UnaryOp,
        ast.Compare,
        ast.IfExp,
        ast.JoinedStr,
        ast.FormattedValue,
    ),
    *(
        ast.Subscript,
        ast.Slice,
        ast.List,
        ast.Tuple,
        ast.Set,
        ast.Dict,
        ast.Starred,
        ast.NamedExpr,
        ast.Lambda,
    ),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension, ast.arguments, ast.arg),
    *(ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.keyword),
)
_WORDS: dict[type[ast.AST], str] = {
    ast.Try: "try",
    ast.While: "while",
    ast.Delete: "del",
    ast.Global: "global",
}


class Refused(Exception):
    """A function does something that is not known to be harmless; the text says what, and in which line."""


class SafetyChecker:
    """Judges the functions of one file; ``loggers`` are their loggers, ``methods`` the methods of its
    records.
    """

    def __init__(self, module: ModuleType) -> None:
        self._globals: Mapping[str, Any] = vars(module)
        self._lines: list[str] | None = None
        self._judged: set[FunctionType] = set()
        self.loggers: list[logging.Logger] = []
        self.methods: set[str] = set()

    def admit(self, function: Any) -> None:
        """Raise :class:`Refused` unless ``function`` is known to be harmless; it must be one of this file."""
        if type(function) is not FunctionType or function.__globals__ is not self._globals:
            raise Refused(
                f"{getattr(function, '__name__', 'it')}() is not defined in the revision's own file"
            )
        if function not in self._judged:
            self._judged.add(function)
            _Body(self, self.find, function).judge(self._parse(function))

    def find(self, name: str) -> Any:
        """Return the object behind a name of the module, or a builtin; raises KeyError."""
        return self._globals[name] if name in self._globals else vars(builtins)[name]

    def _parse(self, function: FunctionType) -> ast.FunctionDef:
        """Return the function's syntax tree from its own lines: ten times as fast as the whole file."""
        if self._lines is None:
            try:
                with open(function.__code__.co_filename, encoding="utf-8") as file:
                    self._lines = file.readlines()
            except (OSError, UnicodeDecodeError):
                raise Refused("its source cannot be read") from None
        first = function.__code__.co_firstlineno
        for last in (_last_line(function.__code__), len(self._lines)):
            try:
                text = textwrap.dedent("".join(self._lines[first - 1 : last]))
                tree = ast.parse("\n" * (first - 1) + text)  # so that nodes have the line numbers of the file
            except (SyntaxError, ValueError):
                continue
            if (
                tree.body
                and isinstance(tree.body[0], ast.FunctionDef)
                and tree.body[0].name == function.__name__
            ):
                return tree.body[0]
        raise Refused(f"{function.__name__}() is not a plain function")


def _last_line(code: CodeType) -> int:
    return max((place[1] or 0 for place in code.co_positions()), default=0)


class _Body:
    """One function: each of its nodes is checked once."""

    def __init__(self, judge: SafetyChecker, find: Callable[[str], Any], function: FunctionType) -> None:
        self._judge = judge
        self._find = find
        code = function.__code__
        self._local = set(code.co_varnames) | set(code.co_cellvars) | set(_inner_names(code))
        self._fresh: set[str] = set()
        self._imported: dict[str, Any] = {}

    def judge(self, tree: ast.FunctionDef) -> None:
        if any(
            ast.unparse(one) not in {"property", "staticmethod", "classmethod"} for one in tree.decorator_list
        ):
            raise Refused(f"{tree.name}() is decorated")
        nodes = ast.walk(tree) if self._local else ()
        assigned = [node for node in nodes if isinstance(node, (ast.Assign, ast.AnnAssign))]
        self._fresh = {
            target.id
            for node in assigned
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        for node in assigned:
            if not _makes_new(node.value):
                self._fresh -= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        for statement in tree.body:
            self._look(statement)

    def _look(self, node: ast.AST) -> None:
        look = _LOOKS.get(type(node))
        if look is not None:
            look(self, node)
        elif isinstance(node, _PLAIN):
            for child in ast.iter_child_nodes(node):
                self._look(child)
        else:
            word = _WORDS.get(type(node), type(node).__name__)
            raise self._refuse(node, f"has a `{word}`")

    def _refuse(self, node: ast.AST, what: str) -> Refused:
        return Refused(f"it {what} (line {getattr(node, 'lineno', '?')})")

    # -- names and attributes --------------------------------------------------------------------------

    def _resolve(self, node: ast.expr) -> tuple[bool, Any]:
        """Return (True, object) for a name of the module, an import, a builtin, or an attribute of a module."""
        if isinstance(node, ast.Name):
            if node.id in self._imported:
                return True, self._imported[node.id]
            if node.id in self._local:
                return False, None
            try:
                return True, self._find(node.id)
            except KeyError:
                raise self._refuse(node, f"uses {node.id}, which does not exist") from None
        if isinstance(node, ast.Attribute):
            known, owner = self._resolve(node.value)
            if known and isinstance(owner, ModuleType):
                if node.attr in vars(owner):  # never a module's __getattr__, which may import
                    return True, vars(owner)[node.attr]
                raise self._refuse(node, f"uses {ast.unparse(node)}")
            if known and isinstance(owner, type) and issubclass(owner, enum.Enum):
                return True, owner.__members__.get(node.attr)
        return False, None

    def _name(self, node: ast.Name) -> None:
        known, value = self._resolve(node)
        if not known:
            return
        if not is_constant(value):
            raise self._refuse(node, f"uses {node.id}")
        for function in own_code(value):
            self._judge.admit(function)
            self._judge.methods.add(function.__name__)

    def _attribute(self, node: ast.Attribute) -> None:
        known, value = self._resolve(node)
        if known:
            if not is_constant(value):
                raise self._refuse(node, f"uses {ast.unparse(node)}")
            return
        if node.attr.startswith("_") or node.attr in ATTRIBUTES_REFUSED or not isinstance(node.ctx, ast.Load):
            raise self._refuse(node, f"uses {ast.unparse(node)}")
        self._look(node.value)

    # -- calls -----------------------------------------------------------------------------------------

    def _call(self, node: ast.Call) -> None:
        for argument in (*node.args, *node.keywords):
            self._look(argument)
        function = node.func
        known, value = self._resolve(function)
        if known:
            self._known_call(node, value)
        elif isinstance(function, ast.Attribute):
            self._method(node, function)
        else:
            raise self._refuse(node, f"calls {ast.unparse(function)}()")

    def _known_call(self, node: ast.Call, value: Any) -> None:
        if isinstance(node.func, ast.Attribute) and self._is_op(node.func.value):
            if node.func.attr in OPERATIONS:
                return
        elif value in BUILTINS if _hashable(value) else False:
            if value is not open or _opens_for_reading(node):
                return
        elif type(value) is FunctionType and value.__globals__ is self._judge._globals:
            self._judge.admit(value)
            return
        elif may_be_called(value):
            return
        raise self._refuse(node, f"calls {ast.unparse(node.func)}()")

    def _method(self, node: ast.Call, function: ast.Attribute) -> None:
        name = function.attr
        known, owner = self._resolve(function.value)
        if known and isinstance(owner, logging.Logger) and name in LOGGING:
            self._judge.loggers.append(owner)
            return
        if known and is_function_namespace(owner):
            return
        if name in {"execute", "exec_driver_sql", "scalar", "scalars"}:
            raise self._refuse(node, "reads from the database")
        if name in MUTATIONS and not self._is_fresh(function.value):
            raise self._refuse(node, f"changes {ast.unparse(function.value)}")
        if name in {"create", "drop", "create_all", "drop_all"} and not (node.args or node.keywords):
            raise self._refuse(
                node, f"calls {ast.unparse(function)}()"
            )  # a bound one works on a real database
        if isinstance(function.value, ast.Name):
            self._name(function.value)  # first: a record's methods become known by it
        if name not in METHODS | MUTATIONS | OPERATIONS | self._judge.methods:
            raise self._refuse(node, f"calls {ast.unparse(function)}()")
        if not isinstance(function.value, ast.Name):
            self._look(function.value)

    def _is_fresh(self, owner: ast.expr) -> bool:
        """Tell whether a change of ``owner`` ends with the call, or makes a new statement."""
        known, value = self._resolve(owner)
        if known:
            return not isinstance(value, (list, dict, set, bytearray))
        return not isinstance(owner, ast.Name) or owner.id in self._fresh

    def _is_op(self, node: ast.expr) -> bool:
        from alembic import op

        return self._resolve(node)[1] is op

    # -- statements ------------------------------------------------------------------------------------

    def _expression(self, node: ast.Expr) -> None:
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            known, _ = self._resolve(call.func)
            if not known and call.func.attr in {"execute", "exec_driver_sql"}:
                for part in (call.func.value, *call.args, *call.keywords):  # its result is not checked
                    self._look(part)
                return
        self._look(call)

    def _assign(self, node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Attribute):
                    raise self._refuse(node, f"changes {ast.unparse(part)}")
                if isinstance(part, ast.Subscript) and not (
                    isinstance(part.value, ast.Name) and part.value.id in self._fresh
                ):
                    raise self._refuse(node, f"changes {ast.unparse(part.value)}")
        for target in targets:
            self._look(target)
        if node.value is not None:
            self._look(node.value)

    def _with(self, node: ast.With) -> None:
        for item in node.items:
            call = item.context_expr
            name = (
                call.func.attr if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else ""
            )
            opens = isinstance(call, ast.Call) and self._resolve(call.func) == (True, open)
            if name not in {"batch_alter_table", "autocommit_block"} and not opens:
                raise self._refuse(call, f"enters {ast.unparse(call)}")
            self._look(call)
        for statement in node.body:
            self._look(statement)

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        """Allow an import of a loaded and known module; any other import may do anything."""
        for alias in node.names:
            source = (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
            module = sys.modules.get(source)
            trusted = (
                source.partition(".")[0] in {"sqlalchemy", "alembic"} or source in sys.stdlib_module_names
            )
            if module is None or not trusted or (isinstance(node, ast.ImportFrom) and node.level):
                raise self._refuse(node, f"imports {source or '.'}")
            if isinstance(node, ast.ImportFrom):
                if alias.name not in vars(module):
                    raise self._refuse(node, f"imports {source}.{alias.name}")
                self._imported[alias.asname or alias.name] = vars(module)[alias.name]
            elif alias.asname:
                self._imported[alias.asname] = module
            else:
                root = source.partition(".")[0]
                self._imported[root] = sys.modules[root]


_LOOKS: dict[type[ast.AST], Callable[[_Body, Any], None]] = {
    ast.Name: _Body._name,
    ast.Attribute: _Body._attribute,
    ast.Call: _Body._call,
    ast.Expr: _Body._expression,
    ast.Assign: _Body._assign,
    ast.AugAssign: _Body._assign,
    ast.AnnAssign: _Body._assign,
    ast.With: _Body._with,
    ast.Import: _Body._import,
    ast.ImportFrom: _Body._import,
}


def _inner_names(code: CodeType) -> Iterator[str]:
    """Yield the names that comprehensions and lambdas bind."""
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from constant.co_varnames
            yield from _inner_names(constant)


def _makes_new(value: ast.expr | None) -> bool:
    """Tell whether an expression creates a list, dictionary or set that nothing else refers to."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        return value.func.id in {"list", "dict", "set", "sorted"}
    return isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp))


def _opens_for_reading(node: ast.Call) -> bool:
    modes = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "mode")]
    return all(
        isinstance(mode, ast.Constant) and mode.value in ("r", "rt", "rb") for mode in modes
    ) and not any(word.arg in (None, "opener") for word in node.keywords)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
