"""A function's source as a tree, checked against the code that is loaded: what is compiled from it is what runs.

The function is compiled in the scopes that its author wrote it in, so that the compiler sees to free variables, `__class__`, private
names, nested functions and comprehensions. Knows nothing of torch.
"""

from __future__ import annotations
import __future__

import ast
import copy
import gc
import linecache
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from types import CodeType, FunctionType
from typing import TypeAlias, cast

from fxsd.errors import FxsdError
from fxsd.tree.once import once

Definition: TypeAlias = "ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda"

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_FUTURES = 0
for _name in __future__.all_feature_names:
    _FUTURES |= getattr(__future__, _name).compiler_flag
# What pytest calls where it has rewritten `assert`: all else of such code is as its author wrote it.
_REWRITTEN_ASSERTS = "@pytest_ar"
MARK = 1_000_000  # a line that no file has
_COMPARED = (
    "co_name", "co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_flags", "co_argcount", "co_kwonlyargcount",
    "co_posonlyargcount", "co_firstlineno", "co_exceptiontable",
)  # fmt: skip


class NoSource(FxsdError):
    """The source of a function cannot be had, or is not what runs. The message goes on from "it"."""


class Source:
    """The source of one function.

    Args:
        function: any function written in Python.

    Attributes:
        function: the same.
        definition: its node in the tree of its file; not to be changed.

    Raises:
        NoSource: there is no source, or it is not what runs.
    """

    def __init__(self, function: FunctionType) -> None:
        self.function = function
        code = function.__code__
        self.file, tree = code.co_filename, _tree(code.co_filename, function)
        self._imports = _imports(tree)
        found = [definition for definition in _definitions_at(tree, code) if _same(self._look_at(tree, definition), code)]
        if len(found) > 1:  # that begin on one line and do the same, as lambdas may: columns tell which it is
            found = [each for each in found if _positions(self._look_at(tree, each)) == _positions(code) != []]
        if not found:
            raise NoSource(f"its source in {self.file} is not what runs: it was changed after the import, or is made by a tool")
        self._look_at(tree, found[0])

    def _look_at(self, tree: ast.Module, definition: Definition) -> CodeType:
        """Takes a definition for that of the function. Returns its code, compiled."""
        self.definition, self._path = definition, _path(tree, definition)
        self._where = self._place_of(definition)
        return dict(_codes(self._compiled(definition)))[self._where]

    @property
    def text(self) -> str:
        """That of its file."""
        return _text(self.file, self.function)

    @property
    def lines(self) -> tuple[int, int]:
        """Of the text, those of the function with its decorators: where they begin, and where what follows does."""
        start = min([self.definition.lineno, *(each.lineno for each in getattr(self.definition, "decorator_list", ()))])
        return start - 1, self.definition.end_lineno or start

    def expressions(self) -> list[ast.AST]:
        """What may be an add: sums and calls, in an order that all versions of Python share."""
        return self._expressions

    @cached_property
    def _expressions(self) -> list[ast.AST]:
        return expressions(self.definition)

    def edited(self, edit: Callable[[Definition], None]) -> CodeType:
        """The code of the function after `edit` has changed a copy of its definition."""
        definition = copy.deepcopy(self.definition)
        edit(definition)
        ast.fix_missing_locations(definition)
        compiled = dict(_codes(self._compiled(definition)))
        return compiled[self._where]

    def renumbered(self) -> dict[int, CodeType]:
        """Where each expression has a line of its own, from 1,000,000 on: for Python 3.10, whose code tells lines alone."""

        def number(definition: Definition) -> None:
            for place, node in enumerate(expressions(definition)):
                node.lineno = node.end_lineno = MARK + place  # type: ignore[attr-defined]
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    node.func.end_lineno = node.lineno  # where Python 3.10 says that the call of an attribute is

        return _inner(self.edited(number), self.function.__code__)

    def _place_of(self, definition: Definition) -> tuple[int, ...]:
        """Which of the codes that are compiled is that of a definition: the one that begins on a line of its own, if it does."""
        marked = copy.copy(definition)
        marked.lineno = marked.end_lineno = MARK
        if not isinstance(marked, ast.Lambda):
            marked.decorator_list = [ast.copy_location(copy.copy(each), marked) for each in marked.decorator_list]
        name = self.function.__code__.co_name
        found = _codes(self._compiled(marked))
        return next(where for where, compiled in found if compiled.co_firstlineno == MARK and compiled.co_name == name)

    def _compiled(self, definition: Definition) -> CodeType:
        inner: ast.AST = definition
        for parent in reversed(self._path[:-1]):
            inner = _around(parent, inner, self._path)
        body = [*self._imports, inner if isinstance(inner, ast.stmt) else ast.Expr(cast(ast.expr, inner))]
        module = ast.Module(body=body, type_ignores=[])
        ast.fix_missing_locations(module)
        flags = self.function.__code__.co_flags & _FUTURES
        compiled: CodeType = compile(module, self.file, "exec", flags, dont_inherit=True)
        return compiled


def expressions(definition: Definition) -> list[ast.AST]:
    return [node for node in ast.walk(definition) if isinstance(node, (ast.BinOp, ast.AugAssign, ast.Call))]


@once
def source(function: FunctionType) -> Source:
    """The source of `function`, read once.

    Raises:
        NoSource: there is none, or it is not what runs.
    """
    return Source(function)


def contains(code: CodeType, other: CodeType) -> bool:
    """Is `other` the code of a function that is defined inside of `code`, or `code` itself?"""
    return code is other or any(contains(inner, other) for inner in code.co_consts if isinstance(inner, CodeType))


def _text(file: str, function: FunctionType) -> str:
    return "".join(linecache.getlines(file, function.__globals__))


def _tree(file: str, function: FunctionType) -> ast.Module:
    text = _text(file, function)
    if not text:
        raise NoSource(f"its source cannot be read: there is no file {file!r}")
    try:
        return _parsed(text)
    except SyntaxError:
        raise NoSource(f"its source in {file} is not Python that this version reads") from None


@lru_cache(maxsize=64)
def _parsed(text: str) -> ast.Module:
    enabled = gc.isenabled()
    gc.disable()  # it would go over a tree that grows, again and again
    try:
        return ast.parse(text)
    finally:
        if enabled:
            gc.enable()


def _definitions_at(tree: ast.Module, code: CodeType) -> Iterator[Definition]:
    """The functions of a file that begin where `code` does, by line and name."""
    for node in ast.walk(tree):
        if isinstance(node, _DEFINITIONS) and code.co_name == getattr(node, "name", "<lambda>"):
            decorators = getattr(node, "decorator_list", ())
            if code.co_firstlineno == min([node.lineno, *(decorator.lineno for decorator in decorators)]):
                yield node


def _positions(code: CodeType) -> list[tuple[int | None, ...]]:
    """Line and column of each instruction, where Python tells."""
    return list(code.co_positions()) if hasattr(code, "co_positions") else []


def _path(tree: ast.Module, target: ast.AST) -> list[ast.AST]:
    """The scopes around a definition, outermost first, and the definition."""

    def walk(node: ast.AST, around: list[ast.AST]) -> list[ast.AST] | None:
        if node is target:
            return [*around, node]
        inner = [*around, node] if isinstance(node, (ast.ClassDef, *_DEFINITIONS)) else around
        for child in ast.iter_child_nodes(node):
            if (found := walk(child, inner)) is not None:
                return found
        return None

    found = walk(tree, [])
    assert found is not None
    return found


def _around(parent: ast.AST, inner: ast.AST, path: list[ast.AST]) -> ast.AST:
    """A scope with what it holds for `inner` to mean the same: of a class nothing else, of a function all, which binds its names."""
    original = path[path.index(parent) + 1]
    if isinstance(parent, ast.ClassDef) and isinstance(inner, ast.stmt) and any(original is statement for statement in parent.body):
        made = copy.copy(parent)
        made.bases, made.keywords, made.decorator_list, made.body = [], [], [], [inner]
        return made
    return _replaced(parent, original, inner)


def _replaced(node: ast.AST, old: ast.AST, new: ast.AST) -> ast.AST:
    """A copy of `node` with `new` in place of `old`, which shares what does not lead there."""
    if node is old:
        return new
    made = copy.copy(node)
    for name, value in ast.iter_fields(node):
        if isinstance(value, ast.AST):
            setattr(made, name, _replaced(value, old, new) if _holds(value, old) else value)
        elif isinstance(value, list):
            setattr(made, name, [_replaced(v, old, new) if isinstance(v, ast.AST) and _holds(v, old) else v for v in value])
    return made


def _holds(node: ast.AST, target: ast.AST) -> bool:
    return any(inner is target for inner in ast.walk(node))


def _imports(tree: ast.Module) -> list[ast.stmt]:
    """The imports of a file: from Python 3.11 on a method of an imported name compiles in another way."""
    found: list[ast.stmt] = []
    pending: list[ast.AST] = [tree]
    while pending:
        for node in ast.iter_child_nodes(pending.pop()):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                if getattr(node, "module", None) != "__future__":  # the flags tell
                    found.append(node)
            elif not isinstance(node, (ast.ClassDef, ast.expr, *_DEFINITIONS)):
                pending.append(node)
    return found


def _codes(code: CodeType, where: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], CodeType]]:
    """The codes inside of a code, by their places among those of each."""
    inner = [value for value in code.co_consts if isinstance(value, CodeType)]
    for place, value in enumerate(inner):
        yield (*where, place), value
        yield from _codes(value, (*where, place))


def _same(compiled: CodeType, loaded: CodeType) -> bool:
    if compiled.co_name != loaded.co_name or compiled.co_firstlineno != loaded.co_firstlineno:
        return False
    if _REWRITTEN_ASSERTS in loaded.co_names:
        return compiled.co_varnames[: compiled.co_argcount] == loaded.co_varnames[: loaded.co_argcount]
    if any(getattr(compiled, name, None) != getattr(loaded, name, None) for name in _COMPARED):
        return False
    return list(compiled.co_lines()) == list(loaded.co_lines()) and _same_constants(compiled.co_consts, loaded.co_consts)


def _same_constants(compiled: object, loaded: object) -> bool:
    if type(compiled) is not type(loaded):
        return False
    if isinstance(compiled, CodeType) and isinstance(loaded, CodeType):
        return _same(compiled, loaded)
    if isinstance(compiled, tuple) and isinstance(loaded, tuple):
        return len(compiled) == len(loaded) and all(map(_same_constants, compiled, loaded))
    return repr(compiled) == repr(loaded) if isinstance(compiled, (float, complex)) else compiled == loaded


def _inner(renumbered: CodeType, loaded: CodeType) -> dict[int, CodeType]:
    """The codes of a function, renumbered, by the ids of those that are loaded."""
    found = {id(loaded): renumbered}
    for a, b in zip(
        (value for value in renumbered.co_consts if isinstance(value, CodeType)),
        (value for value in loaded.co_consts if isinstance(value, CodeType)),
        strict=True,
    ):
        found |= _inner(a, b)
    return found
