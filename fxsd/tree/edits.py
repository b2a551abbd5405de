"""Writes the ops of sites into a function: `a + b` becomes `a + self.stochastic_depth(b)`. Knows nothing of torch.

What to write is worked out once, as changes of single nodes; they are applied to the tree, which is compiled, and to the text, which is
read, alike.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fxsd.tree.source import Definition, NoSource, expressions

RUNS = "runs_of"
START = -1  # the operand of a sum of several values that it starts with
_HERE = "__here__"  # stands for the node in the text of a change


@dataclass(frozen=True)
class Drop:
    """One op in one function.

    Attributes:
        path: the number of the sum or the call among `expressions` of the function; before it, where the sum is in another function that
            this one calls, the number of that call, and so on.
        operand: which operand of it is the branch: 0 or 1; of one call that adds several values, how many values come before it, or
            `START`.
        op: the name of the op, an attribute of `owner`.
        owner: the variable of the function that holds the module with the op; '' where the op is an argument of the function.
        text: the expression as its author wrote it, to tell when another version of a library is rewritten.
        runs: several runs of the expression in one call of the function have an op each.
        several: the call adds several values: `sum`.
    """

    path: tuple[int, ...]
    operand: int
    op: str
    owner: str = "self"
    text: str = ""
    runs: bool = False
    several: bool = False


@dataclass(frozen=True)
class Change:
    """What becomes of one node.

    Attributes:
        node: an expression, an argument, or a statement.
        text: what stands for it, with `{}` where it goes itself; what stands before a statement.
    """

    node: ast.AST
    text: str


def changes(
    definition: Definition, drops: Sequence[Drop], called: Callable[[ast.Call, Sequence[Drop]], str], as_arguments: bool = False
) -> list[Change]:
    """What writes ops into a function.

    Args:
        definition: of the function; is only read.
        drops: the ops.
        called: given a call of another function, and what is to be written into that, whose ops are its arguments, says which
            attribute of the owner, called with the ops, gives the function with the ops in it.
        as_arguments: the ops are the first arguments of the function.

    Raises:
        NoSource: an expression is no add whose operand can be told.
    """
    nodes = expressions(definition)
    runs = _unused(definition, RUNS)
    found: list[Change] = []
    if as_arguments:
        drops = [replace(drop, op=_unused(definition, drop.op)) for drop in drops]
        found.append(Change(_first_argument(definition), ", ".join([*(drop.op for drop in drops), "{}"])))
    for drop in drops:
        if len(drop.path) == 1:
            found += _add(definition, nodes[drop.path[0]], drop, f"{runs}_{drop.op}")
    for number in dict.fromkeys(drop.path[0] for drop in drops if len(drop.path) > 1):
        call = nodes[number]
        assert isinstance(call, ast.Call)
        inside = [drop for drop in drops if len(drop.path) > 1 and drop.path[0] == number]
        name = called(call, [replace(drop, path=drop.path[1:], owner="", runs=False) for drop in inside])
        ops = [f"{_op(drop)}.next({runs}_{drop.op})" if drop.runs else _op(drop) for drop in inside]
        found.append(Change(call.func, f"{inside[0].owner}.{name}({', '.join(ops)})"))
    for name in dict.fromkeys(drop.op for drop in drops if drop.runs):
        found.append(Change(_first_statement(definition), f"{runs}_{name} = []"))
    return found


def operands(node: ast.AST) -> list[ast.expr] | None:
    """The two operands of a sum, in order; None if they cannot be told."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [node.left, node.right]
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
        return [node.target, node.value]
    if not isinstance(node, ast.Call) or any(isinstance(arg, ast.Starred) for arg in node.args):
        return None
    named = {keyword.arg: keyword.value for keyword in node.keywords}
    given = [*node.args, *(named[name] for name in ("input", "self", "other") if name in named)]
    if isinstance(node.func, ast.Attribute) and len(given) == 1:  # x.add(y)
        given = [node.func.value, *given]
    return given[:2] if len(given) >= 2 else None


def _add(definition: Definition, node: ast.AST, drop: Drop, runs: str) -> list[Change]:
    call = f"{_op(drop)}({{}}, {runs})" if drop.runs else f"{_op(drop)}({{}})"
    if drop.several:
        return [_among(node, drop)]
    given = operands(node)
    if given is None:
        raise NoSource("which operand is the branch cannot be told there: write it as `x + y`")
    branch = given[drop.operand]
    if isinstance(branch, (ast.Yield, ast.YieldFrom)):
        call = call.replace("{}", "({})")
    if drop.operand or not _writes_in_place(node):
        return [Change(branch, call)]
    # What is written in place into the branch is read by its name, and by others that it may have.
    if isinstance(branch, ast.Subscript):
        raise NoSource("it adds in place to an item of something: write `x[i] = x[i] + ...`")
    if not isinstance(branch, (ast.Name, ast.Attribute)):
        return [Change(branch, call)]
    name = ast.unparse(branch)
    if isinstance(node, ast.AugAssign):
        own = isinstance(branch, ast.Name) and _is_its_own(definition, node, branch.id)
        return [Change(node, f"{name} = {call.format(name)}" if own else f"{name}.copy_({call.format(name)})")]
    return [Change(branch, f"{name}.copy_({call})")]


def _among(node: ast.AST, drop: Drop) -> Change:
    """`sum(values)` becomes `sum(self.stochastic_depth.among(values, 1))`."""
    if isinstance(node, ast.Call) and drop.operand == START and not drop.runs:
        start = next((keyword.value for keyword in node.keywords if keyword.arg == "start"), node.args[-1])
        return Change(start, f"{_op(drop)}({{}})")
    if not isinstance(node, ast.Call) or not node.args or isinstance(node.args[0], ast.Starred) or drop.runs:
        raise NoSource("a call adds several values that cannot be told apart there: write them as a sum")
    values = node.args[0]
    text = f"{_op(drop)}.among({{}}, {drop.operand})"
    # A generator alone in a call begins with the parenthesis of the call.
    alone = (values.lineno, values.col_offset) == (node.func.end_lineno, node.func.end_col_offset)
    return Change(values, f"({text})" if alone else text)


def _op(drop: Drop) -> str:
    return f"{drop.owner}.{drop.op}" if drop.owner else drop.op


def _writes_in_place(node: ast.AST) -> bool:
    """Does a sum write into its first operand, as `+=`, `add_` and `iadd` do?"""
    if not isinstance(node, ast.Call):
        return isinstance(node, ast.AugAssign)
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name.strip("_") == "iadd" or (name.endswith("_") and not name.endswith("__"))


def _is_its_own(definition: Definition, add: ast.AugAssign, name: str) -> bool:
    """Is a variable, right before an add into it, for sure the only name of its value?

    It is where it was assigned by itself, from a call or a sum, and read by nothing else since but what assigned it anew.
    """
    assigned = False
    for statement in ast.walk(definition):
        if not isinstance(statement, ast.stmt) or isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        own = [node for node in _in_statement(statement) if isinstance(node, ast.Name) and node.id == name]
        if not own or statement is add:
            continue
        simple = isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name)
        anew = simple and statement.targets[0].id == name and isinstance(statement.value, (ast.Call, ast.BinOp))  # type: ignore[attr-defined]
        if any(isinstance(node.ctx, ast.Store) for node in own):
            if not anew:
                return False
            assigned = True
        elif statement.lineno < add.lineno or _around(definition, add, (ast.For, ast.While)):
            return False
    return assigned


def _in_statement(statement: ast.stmt) -> list[ast.AST]:
    """The nodes of a statement, without the statements inside it."""
    found: list[ast.AST] = []
    pending: list[ast.AST] = [statement]
    while pending:
        node = pending.pop()
        found.append(node)
        pending += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]
    return found


def _around(definition: Definition, node: ast.AST, kinds: tuple[type[ast.AST], ...]) -> bool:
    """Does a statement of some kinds hold `node`?"""
    return any(isinstance(outer, kinds) and any(inner is node for inner in ast.walk(outer)) for outer in ast.walk(definition))


def _unused(definition: Definition, name: str) -> str:
    """A name that no variable of a function begins with."""
    taken = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name)}
    taken |= {node.arg for node in ast.walk(definition) if isinstance(node, ast.arg)}
    while any(each.startswith(name) for each in taken):
        name += "_"
    return name


def _first_argument(definition: Definition) -> ast.arg:
    arguments = definition.args
    if not (arguments.posonlyargs or arguments.args):
        raise NoSource("its function takes no positional argument before which an op could stand")
    return (arguments.posonlyargs or arguments.args)[0]


def _first_statement(definition: Definition) -> ast.stmt:
    """The first one behind the docstring."""
    if isinstance(definition, ast.Lambda):
        raise NoSource("a lambda runs it several times in one call: write a function")
    first = definition.body[0]
    has_doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return definition.body[int(has_doc)]


# --- the tree ---------------------------------------------------------------------------------------------------------------


def change_tree(definition: Definition, found: Sequence[Change]) -> None:
    """Applies changes to a definition. New nodes have the place of the old ones, so that tracebacks show the author's lines."""
    by_node: dict[int, list[Change]] = {}
    for change in found:
        by_node.setdefault(id(change.node), []).append(change)
    _Changer(by_node).visit(definition)


class _Changer(ast.NodeTransformer):
    def __init__(self, by_node: dict[int, list[Change]]) -> None:
        self.by_node = by_node

    def visit(self, node: ast.AST) -> Any:
        self.generic_visit(node)
        new: Any = node
        before: list[ast.stmt] = []
        for change in self.by_node.get(id(node), ()):
            if isinstance(node, ast.stmt):
                before += _place(ast.parse(change.text).body, node, None)
            elif isinstance(node, ast.arg):
                names = [ast.copy_location(ast.arg(name.strip()), node) for name in change.text.split(",")[:-1]]
                new = [*names, node]
            else:
                parsed = ast.parse(change.text.replace("{}", _HERE), mode="eval").body
                new = _place([parsed], node, new)[0]
        return [*before, new] if before else new


def _place(made: list[Any], node: ast.AST, here: ast.AST | None) -> list[Any]:
    """New nodes at the place of `node`, with `here` where their text says so."""

    class Filled(ast.NodeTransformer):
        def visit(self, each: ast.AST) -> Any:
            if isinstance(each, ast.Name) and each.id == _HERE:
                return here
            return self.generic_visit(ast.copy_location(each, node) if hasattr(each, "lineno") else each)

    return [Filled().visit(each) for each in made]


# --- the text ---------------------------------------------------------------------------------------------------------------


def change_text(text: str, found: Sequence[Change]) -> str:
    """Applies changes to the text of a file, and leaves all else of it as it is."""
    rows = [row.encode() for row in text.split("\n")]
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row) + 1)
    data = text.encode()

    def at(line: int, column: int) -> int:
        return starts[line - 1] + column

    pieces: list[tuple[int, tuple[int, ...], bytes, int]] = []  # where, order of those at one place, what, how much of the old goes
    for order, change in enumerate(found):
        node: Any = change.node
        if isinstance(node, ast.stmt):
            first = min([node, *getattr(node, "decorator_list", ())], key=lambda each: each.lineno)
            column = node.col_offset
            place = at(first.lineno, column)
            indent = rows[first.lineno - 1][:column]
            alone = not indent.strip() and not (first.lineno > 1 and rows[first.lineno - 2].rstrip(b"\r").endswith(b"\\"))
            pieces.append((place, (1, 0, order), change.text.encode() + (b"\n" + indent if alone else b"; "), 0))
            continue
        start, end = at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)
        if "{}" not in change.text:
            pieces.append((start, (2, start - end, -order), change.text.encode(), end - start))
            continue
        before, after = change.text.split("{}")  # of nodes that begin or end at one place the larger one is around the other
        pieces.append((start, (2, start - end, -order), before.encode(), 0))
        pieces.append((end, (0, end - start, order), after.encode(), 0))
    for place, _, new, gone in sorted(pieces, key=lambda piece: piece[:2], reverse=True):
        data = data[:place] + new + data[place + gone :]
    return data.decode()
