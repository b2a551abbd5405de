"""Where in the code of the modules an add stands, from where it ran."""

from __future__ import annotations

import ast
import builtins
import operator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import nn

from fxsd.tree.classes import ORIGINAL, resolved, value_of
from fxsd.tree.edits import START, Drop, changes
from fxsd.tree.frames import Whereabouts
from fxsd.tree.functions import Kept, find, functions_in
from fxsd.tree.once import once
from fxsd.tree.places import expression_at, line_of
from fxsd.tree.source import NoSource, contains, source

_ADDS = (torch.add, operator.add, operator.iadd, torch.Tensor.add, torch.Tensor.add_)
_NAMES = ("add", "iadd", "radd")


@dataclass(frozen=True)
class Spot:
    """An operand of an add in the code of a module, the same in each of its calls.

    Attributes:
        home: path of the module whose function adds, or hands on what is added.
        thing: attribute of the home with the object whose function it is; '' for the home itself.
        holder, name, behind, path, owner, text: as in `Writing` and `Drop`.
        operand: which operand is the branch; of a call that adds several values, how many come before it.
        several: such a call.
    """

    home: str
    thing: str
    holder: type | None
    name: str
    behind: int
    path: tuple[int, ...]
    owner: str
    text: str
    operand: int
    several: bool


def spot(model: nn.Module, where: Whereabouts | None, operand: int) -> Spot:
    """The spot of an operand of an add that ran.

    Args:
        model: the model that ran.
        where: the add was seen to run.
        operand: 0 or 1.

    Raises:
        NoSource: nothing can be written there, and why.
    """
    if where is None:
        raise NoSource("it was not seen where it runs")
    code, instruction = where.add
    try:
        return _spot(model, where, operand)
    except NoSource as error:
        raise NoSource(f"no op can be written at {code.co_filename}:{line_of(code, instruction)}, where it runs: {error}") from None


def _spot(model: nn.Module, where: Whereabouts, operand: int) -> Spot:
    if where.home is None:
        raise NoSource(
            f"{where.steps[0][0].co_name} is not kept by a module of the model, nor called by its name from a function that is; "
            "add in the forward of a module"
        )
    home = model.get_submodule(where.home)
    thing = vars(home)[where.thing] if where.thing else home
    kept = _kept(thing, where.steps[0][0])
    path, function = _path(kept, where)
    if len(path) > 2:
        raise NoSource("it runs in a function that another one calls, which the forward calls: add in the forward itself")
    node = source(function).expressions()[path[-1]]
    several = isinstance(node, ast.Call) and not _is_add(node, function)
    if several:
        if value_of(node.func, function) is not builtins.sum:  # type: ignore[attr-defined]
            raise NoSource(f"`{ast.unparse(node)}` adds inside of what it calls: write the sum itself")
        # The sum so far is the branch where it is the first value alone, or the start.
        started = len(node.args) > 1 or bool(node.keywords)  # type: ignore[attr-defined]
        so_far = {(False, 1): 0, (True, 0): START}.get((started, where.run))
        if not operand and so_far is None:
            raise NoSource(f"`{ast.unparse(node)}` adds to a sum that is the branch: write the sum itself")
        operand = where.run if operand else cast(int, so_far)
    _check_writable(function, path[-1], operand, several)
    own = {**vars(thing), **vars(thing).get(ORIGINAL, {})}
    value = vars(kept.holder)[kept.name] if kept.holder is not None else own[kept.name]
    behind = list(functions_in(value)).index(kept.function)
    return Spot(where.home, where.thing, kept.holder, kept.name, behind, path, where.owner, _text(function, path[-1]), operand, several)


@once
def _text(function: FunctionType, expression: int) -> str:
    return ast.unparse(source(function).expressions()[expression])


@once
def _check_writable(function: FunctionType, expression: int, operand: int, several: bool) -> None:
    """Raises where no op can be written."""
    drop = Drop((expression,), operand, "op", several=several)
    changes(source(function).definition, [drop], lambda call, inside: "")


def _kept(thing: Any, code: CodeType) -> Kept:
    """Where the function is kept that ran: of one with ops in it, where the author's is."""
    kept = find(thing, code)
    if kept is None:
        raise NoSource("its function is not kept by its class any more")
    if ORIGINAL not in kept.function.__dict__:
        return kept
    function = kept.function.__dict__[ORIGINAL]
    if kept.holder is None:
        return Kept(None, kept.name, function)
    cls = getattr(type(thing), "original_class", type(thing))
    for holder in cls.__mro__:
        for name, value in vars(holder).items():
            if function in functions_in(value):
                return Kept(holder, name, function)
    raise NoSource("its function is not kept by its class any more")


def _path(kept: Kept, where: Whereabouts) -> tuple[tuple[int, ...], FunctionType]:
    """The expressions that lead to the add: calls of other functions, and the add; and the function with the add in it."""
    function, codes = kept.function, [code for code, _ in where.steps]
    at, path = 0, list[int]()
    # Of a function with ops in it, the author's function is read, and the code with the ops has run.
    loaded = kept.function.__code__ if contains(kept.function.__code__, codes[0]) else codes[0]
    while True:
        at = max(place for place in range(at, len(codes)) if place == at or contains(loaded, codes[place]))
        number = expression_at(function, *where.steps[at])
        path.append(number)
        if at == len(codes) - 1:
            return tuple(path), function
        call = source(function).expressions()[number]
        helper = resolved(call, function) if isinstance(call, ast.Call) else None
        if helper is None or helper.__code__ is not codes[at + 1]:
            raise NoSource(f"`{codes[at + 1].co_name}` is not called there by a name of its file; add in the forward itself")
        function, loaded, at = helper, helper.__code__, at + 1


def _is_add(call: ast.Call, function: FunctionType) -> bool:
    """Does a call add two values, as its name says, or what it names?"""
    node: ast.expr = call.func
    if any(value_of(node, function) is add for add in _ADDS):
        return True
    while isinstance(node, ast.Attribute):  # torch.ops.aten.add.Tensor
        if node.attr.strip("_") in _NAMES:
            return True
        node = node.value
    return False
