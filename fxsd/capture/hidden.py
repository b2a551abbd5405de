"""How many residual adds does the source of a module show? For modules whose forward cannot be traced.

Reads the forward as a syntax tree and follows values by name: an add is residual where one operand is a value that the
other was computed from. A reading, not a proof: it decides between "keep the module as a call" and "say that adds are lost".
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass

from torch import nn

_SHAPES = {"shape", "size", "dim", "ndim", "numel", "dtype", "device", "stride"}
_NUMBERS = {"len", "int", "float", "bool", "range", "isinstance", "getattr", "hasattr", "min", "max", "round", "abs"}


def hidden_residual_adds(module: nn.Module, reached: Set[int] = frozenset()) -> int:
    """Counts the residual adds in the forwards of `module` and of the submodules, but for those with an id in `reached` and torch's own."""
    classes = Counter(type(part) for part in module.modules() if id(part) not in reached and _is_read(part))
    return sum(_count(cls) * times for cls, times in classes.items())


def _is_read(module: nn.Module) -> bool:
    layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    return isinstance(module, layers) or not type(module).forward.__module__.startswith("torch.nn")


def _count(cls: type[nn.Module]) -> int:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, TypeError, SyntaxError):  # no source, generated code
        return 0
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef):
        return 0
    reader = _Reader()
    for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs][1:]:
        reader.assign(argument.arg, _Value(frozenset(), frozenset()))
    reader.block(function.body)
    return reader.adds


@dataclass(frozen=True)
class _Value:
    """`same`: the versions of names that it may be; `past`: the versions that it was computed from."""

    same: frozenset[int]
    past: frozenset[int]


class _Reader:
    def __init__(self) -> None:
        self.names: dict[str, _Value] = {}
        self.versions = 0
        self.adds = 0

    def assign(self, name: str, value: _Value | None, maybe: bool = False) -> None:
        if value is None:
            if not maybe:
                self.names.pop(name, None)
            return
        if not value.same:
            self.versions += 1
            value = _Value(frozenset([self.versions]), value.past | {self.versions})
        before = self.names.get(name)
        if maybe and before:
            value = _Value(value.same | before.same, value.past | before.past)
        self.names[name] = value

    def block(self, statements: list[ast.stmt], maybe: bool = False) -> None:
        for statement in statements:
            self.statement(statement, maybe)

    def statement(self, node: ast.stmt, maybe: bool) -> None:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            value = self.value(node.value)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        self.assign(
                            name.id, value if isinstance(target, ast.Name) or value is None else _Value(frozenset(), value.past), maybe
                        )
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            left, right = self.names.get(node.target.id), self.value(node.value)
            self.assign(node.target.id, self.add(left, right) if isinstance(node.op, ast.Add) else _computed(left, right), maybe)
        elif isinstance(node, (ast.If, ast.For, ast.While)):
            self.block(node.body, True)
            self.block(node.orelse, True)
        elif isinstance(node, (ast.With, ast.Try)):
            self.block(node.body, maybe)
        elif isinstance(node, (ast.Return, ast.Expr)) and node.value is not None:
            self.value(node.value)

    def add(self, left: _Value | None, right: _Value | None) -> _Value | None:
        if (
            left
            and right
            and ((left.same & right.past and not left.same & right.same) or (right.same & left.past and not left.same & right.same))
        ):
            self.adds += 1
        return _computed(left, right)

    def value(self, node: ast.expr) -> _Value | None:
        """The activation that an expression gives, or None for a number, a shape or a parameter."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.BinOp):
            left, right = self.value(node.left), self.value(node.right)
            return self.add(left, right) if isinstance(node.op, ast.Add) else _computed(left, right)
        if isinstance(node, ast.Attribute):
            return None if node.attr in _SHAPES else self.value(node.value)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in _NUMBERS:
                return None
            if isinstance(node.func, ast.Attribute) and node.func.attr in _SHAPES:
                return None
            parts = [*node.args, *(k.value for k in node.keywords)]
            if isinstance(node.func, ast.Attribute):
                parts.append(node.func.value)
            return _computed(*(self.value(part) for part in parts))
        if isinstance(node, ast.Subscript):
            return _computed(self.value(node.value))
        if isinstance(node, (ast.Tuple, ast.List)):
            return _computed(*(self.value(part) for part in node.elts))
        if isinstance(node, ast.IfExp):
            return _computed(self.value(node.body), self.value(node.orelse))
        if isinstance(node, ast.Starred):
            return self.value(node.value)
        return None


def _computed(*parts: _Value | None) -> _Value | None:
    known = [part for part in parts if part]
    return _Value(frozenset(), frozenset().union(*(part.past for part in known))) if known else None
