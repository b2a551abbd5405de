"""Where a class keeps a function, behind decorators too, and the same with another function in its place. Knows nothing of torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from fxsd.tree.once import once
from fxsd.tree.source import contains

_DEEP = 8  # decorators around a function


@dataclass(frozen=True)
class Kept:
    """Where a function is kept.

    Attributes:
        holder: the class, of those that an object's class inherits from, that has it in an attribute; None for an attribute of the object.
        name: of the attribute.
        function: what runs, behind what is around it.
    """

    holder: type | None
    name: str
    function: FunctionType


def find(thing: Any, code: CodeType) -> Kept | None:
    """Where `thing`, or its class, keeps the function whose code is `code`, or has it inside; None if neither does."""
    return find_own(thing, code) or _find_in_class(type(thing), code)


def find_own(thing: Any, code: CodeType) -> Kept | None:
    """The same for what `thing` itself keeps in an attribute, such as a forward that was patched onto it."""
    for name, value in vars(thing).items() if hasattr(thing, "__dict__") else ():
        if _leads_on(value):
            for function in functions_in(value):
                if contains(function.__code__, code):
                    return Kept(None, name, function)
    return None


@once
def _find_in_class(cls: type, code: CodeType) -> Kept | None:
    inside: Kept | None = None
    for holder in cls.__mro__:
        for name, value in vars(holder).items():
            for function in functions_in(value):
                if function.__code__ is code:
                    return Kept(holder, name, function)
                if inside is None and contains(function.__code__, code):
                    inside = Kept(holder, name, function)
    return inside


def functions_in(value: Any, deep: int = _DEEP) -> Iterator[FunctionType]:
    """The functions that an attribute of a class leads to: itself, what it decorates, what its closure holds."""
    seen: set[int] = set()
    pending = [(value, deep)]
    while pending:
        current, left = pending.pop(0)
        if id(current) in seen or left < 0:
            continue
        seen.add(id(current))
        if isinstance(current, FunctionType):
            yield current
        pending += [(inner, left - 1) for inner in _inner(current)]


def swapped(value: Any, new: dict[FunctionType, FunctionType], memo: dict[int, Any] | None = None) -> Any:
    """`value`, an attribute as `functions_in` takes it, with other functions in place of some: copied as far as it leads to them."""
    memo = {} if memo is None else memo
    if isinstance(value, FunctionType) and value in new:
        return new[value]
    if id(value) in memo:
        return memo[id(value)]
    if not any(function in new for function in functions_in(value)):
        return value
    if isinstance(value, FunctionType):
        cells = [CellType() for _ in value.__closure__ or ()]
        memo[id(value)] = made = with_code(value, value.__code__, cells)
        for old, cell in zip(value.__closure__ or (), cells, strict=True):
            if (content := _content(old)) is not _EMPTY:
                cell.cell_contents = swapped(content, new, memo)
        for name, inner in value.__dict__.items():
            made.__dict__[name] = swapped(inner, new, memo)
        return made
    if isinstance(value, (staticmethod, classmethod)):
        return type(value)(swapped(value.__func__, new, memo))
    if isinstance(value, property):
        return property(swapped(value.fget, new, memo), swapped(value.fset, new, memo), swapped(value.fdel, new, memo), value.__doc__)
    if isinstance(value, MethodType):
        return MethodType(swapped(value.__func__, new, memo), value.__self__)
    if isinstance(value, (functools.partial, functools.partialmethod)):
        return type(value)(swapped(value.func, new, memo), *value.args, **value.keywords)
    return value


def with_code(function: FunctionType, code: CodeType, cells: list[CellType] | None = None) -> FunctionType:
    """A copy of `function` that runs `code`, whose free variables are among its own."""
    if cells is None:
        by_name = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        cells = [by_name[name] for name in code.co_freevars]
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, tuple(cells))
    made.__kwdefaults__ = function.__kwdefaults__
    if hasattr(function, "__annotate__"):  # from Python 3.14 on: nothing is evaluated
        made.__annotate__ = function.__annotate__  # type: ignore[attr-defined]
    else:
        made.__annotations__ = function.__annotations__
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    made.__dict__.update(function.__dict__)
    return made


class _Empty:
    """A cell that nothing was put into yet."""


_EMPTY = _Empty()


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _inner(value: Any) -> list[Any]:
    if isinstance(value, FunctionType):
        closed = [_content(cell) for cell in value.__closure__ or ()]
        return [inner for inner in (*closed, *value.__dict__.values()) if _leads_on(inner)]
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, (functools.partial, functools.partialmethod)):
        return [value.func]
    return []


def _leads_on(value: Any) -> bool:
    return isinstance(value, (FunctionType, staticmethod, classmethod, MethodType, property, functools.partial, functools.partialmethod))
