"""A module's class with ops written into its code: all else of it is its author's.

    class Block(nn.Module):                               class Block(Block):
        def forward(self, x):                                 def forward(self, x):
            return x + self.mlp(self.norm(x))                     return x + self.stochastic_depth(self.mlp(self.norm(x)))

Modules of one class with ops in the same places share one class, whatever their rates are: compiled code of one serves all.
"""

from __future__ import annotations

import ast
import builtins
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, ClassVar

from torch import nn
from torch.nn.utils import parametrize

from fxsd.errors import FxsdError
from fxsd.run import StochasticDepth
from fxsd.run.runs import Runs
from fxsd.tree.edits import Change, Drop, change_tree, changes
from fxsd.tree.functions import functions_in, swapped, with_code
from fxsd.tree.once import once
from fxsd.tree.source import NoSource, Source, source

CONSTANTS = "fxsd_constants"  # the module, beside the children of a root, that holds tensors which its graph needs
# Of a function with ops in it, the function without; of a module, the attributes, by name, as they were without ops.
ORIGINAL = "__fxsd_original__"


@dataclass(frozen=True)
class Writing:
    """Ops in one function that a class keeps.

    Attributes:
        holder: the class that keeps it; None where it is an attribute of the object.
        name: of the attribute that keeps it.
        behind: how many functions are around it there, such as decorators.
        drops: the ops.
    """

    holder: type | None
    name: str
    behind: int
    drops: tuple[Drop, ...]


class Rewritten(nn.Module):
    """A module with ops in its code.

    The ops are attributes and no children, since code may run the children one by one; to `modules()`, `train()` and `to()` they are there.
    """

    original_class: ClassVar[type[nn.Module]] = nn.Module
    writings: ClassVar[tuple[Writing, ...]] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Who makes a new one gets what the author's class makes: `type(gm)(config)`, a slice of an nn.Sequential.
        self.__class__ = self.original_class  # type: ignore[assignment]
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        known = self in memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        if not (known and remove_duplicate):
            for name, op in ops_of(self).items():
                yield from op.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def train(self, mode: bool = True) -> Any:
        result = super().train(mode)
        for op in ops_of(self).values():
            op.train(self.training)
        return result

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for op in ops_of(self).values():
            op._apply(fn)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        ops = (f"({name}): {op}" for name, op in ops_of(self).items() if name != CONSTANTS)
        return "\n".join(filter(None, (super().extra_repr(), *ops)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, args, state, *rest = (*reduced, None)[: max(len(reduced), 3)]
        args = tuple(self.original_class if arg is type(self) else arg for arg in args)
        if isinstance(state, dict):
            state = with_own_functions_as_they_were(self, state)
        return (_made_again, (self.original_class, self.writings, make, args), state, *rest)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        write_own(self, self.writings)

    def __prepare_scriptable__(self) -> Any:
        raise FxsdError(
            f"torch.jit.script reads the source of {type(self).__name__}, in which the ops of stochastic depth are not; "
            "script the original model, or export the transformed one with torch.export or torch.jit.trace."
        )


def ops_of(module: nn.Module) -> dict[str, nn.Module]:
    """The ops of a module, by the attributes that hold them, and the constants of a graph beside."""
    if not isinstance(module, Rewritten):
        return {}
    return {name: value for name, value in module.__dict__.items() if isinstance(value, (StochasticDepth, Runs)) or name == CONSTANTS}


def _made_again(original: type[nn.Module], writings: tuple[Writing, ...], make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    module = make(*args)
    module.__class__ = rewritten_class(original, writings)
    return module


def with_own_functions_as_they_were(module: Rewritten, state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module, whose own functions have no ops in them: such functions cannot be found by name."""
    own = [writing.name for writing in module.writings if writing.holder is None]
    return {**state, **{name: state[ORIGINAL][name] for name in own}}


def write_own(module: nn.Module, writings: Sequence[Writing]) -> None:
    """Writes ops into functions that a module itself has as attributes."""
    for writing in writings:
        if writing.holder is None:
            value, helpers = written(module.__dict__[writing.name], writing)
            if not all(drop.owner for drop in writing.drops):
                ops = [module.__dict__[drop.op] for drop in writing.drops]
                value = {name: partial(each, *ops) for name, each in value.items()}
            module.__dict__.update({**value, **helpers})


@once
def rewritten_class(original: type[nn.Module], writings: tuple[Writing, ...]) -> type[nn.Module]:
    """The class of modules of class `original` with ops in their code. Made once.

    Raises:
        FxsdError: the code is another one than the ops were placed in.
    """
    if original.__module__ == parametrize.__name__:
        # A parametrized module has a class of its own, which torch takes off again: its one base has to be what is below.
        below = rewritten_class(original.__bases__[0], writings)
        own = {name: value for name, value in vars(original).items() if name not in ("__dict__", "__weakref__")}
        return type(original.__name__, (below,), {**own, "original_class": original})
    return new_class(original, writings, Rewritten)


def new_class(original: type[nn.Module], writings: tuple[Writing, ...], base: type[nn.Module]) -> type[nn.Module]:
    """A class like `original`, and a subclass of it and of `base`, with ops written into its functions."""
    own: dict[str, Any] = {}
    between: dict[type, dict[str, Any]] = {}  # functions that others override, and call by `super()`
    for writing in writings:
        if writing.holder is None:
            continue
        made, helpers = written(vars(writing.holder)[writing.name], writing)
        own |= helpers
        for name, value in made.items():
            overrides = next(cls for cls in original.__mro__ if name in vars(cls)) is not writing.holder
            (between.setdefault(writing.holder, {}) if overrides else own)[name] = value
    supers = [types.new_class(cls.__name__, (cls,), {}, _filled(cls, functions)) for cls, functions in between.items()]
    about = {
        "original_class": original,
        "writings": writings,
        "__doc__": original.__doc__,
    }
    bases = (base,) if original is nn.Module else (base, original, *supers)
    return types.new_class(original.__name__, bases, {}, _filled(original, {**own, **about}))


def _filled(cls: type, values: Mapping[str, Any]) -> Callable[[dict[str, Any]], None]:
    def fill(namespace: dict[str, Any]) -> None:
        namespace.update(values, __module__=cls.__module__, __qualname__=cls.__qualname__)

    return fill


def written(value: Any, writing: Writing) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is kept under each name that holds a function, with the ops in it, and the functions that it calls, with ops in them."""
    functions = list(functions_in(value))
    if writing.behind >= len(functions):
        raise _another(writing, "is not there")
    function = functions[writing.behind]
    helpers: dict[str, Any] = {}
    made = _with_ops(function, writing.drops, writing, helpers, as_arguments=not all(drop.owner for drop in writing.drops))
    new = {function: made}
    held = vars(writing.holder) if writing.holder is not None else {writing.name: value}
    return {name: swapped(kept, new) for name, kept in held.items() if function in functions_in(kept)}, helpers


def _with_ops(
    function: FunctionType, drops: Sequence[Drop], writing: Writing, helpers: dict[str, Any], as_arguments: bool = False
) -> FunctionType:
    read = source(function)
    _check_same(read, drops, writing)

    def called(call: ast.Call, inside: Sequence[Drop]) -> str:
        helper = _helper(read, call, writing)
        name = helper_name(helper, inside)
        helpers[name] = staticmethod(_bound(_with_ops(helper, inside, writing, helpers, as_arguments=True)))
        return name

    made = with_code(function, read.edited(lambda definition: change_tree(definition, changes(definition, drops, called, as_arguments))))
    made.__dict__[ORIGINAL] = function
    return made


def _bound(function: FunctionType) -> Callable[..., Any]:
    def with_ops(*ops: Any) -> Callable[..., Any]:
        return partial(function, *ops)

    return with_ops


def helper_name(helper: FunctionType, inside: Sequence[Drop]) -> str:
    """The attribute that gives a function with ops in it."""
    return f"_{helper.__name__.strip('_<>')}_with_{'_'.join(drop.op for drop in inside)}"


def _helper(read: Source, call: ast.Call, writing: Writing) -> FunctionType:
    helper = resolved(original_call(read.expressions(), call), read.function)
    if helper is None:
        raise _another(writing, "calls another function")
    return helper


def _check_same(read: Source, drops: Sequence[Drop], writing: Writing) -> None:
    """Raises where a function is not the one that ops were placed in."""
    expressions = read.expressions()
    for drop in drops:
        if len(drop.path) == 1 and drop.text and (drop.path[0] >= len(expressions) or ast.unparse(expressions[drop.path[0]]) != drop.text):
            raise _another(writing, f"has no {drop.text!r} where it was")


@dataclass(frozen=True)
class Text:
    """One function as it is to be read: its file, and what is changed in it."""

    read: Source
    changes: list[Change]


def written_texts(value: Any, writing: Writing) -> Iterator[Text]:
    """The function of `writing`, and each that it calls with ops."""
    function = list(functions_in(value))[writing.behind]
    yield from _texts(function, writing.drops, writing, not all(drop.owner for drop in writing.drops))


def _texts(function: FunctionType, drops: Sequence[Drop], writing: Writing, as_arguments: bool) -> Iterator[Text]:
    read = source(function)
    _check_same(read, drops, writing)
    inner: list[tuple[FunctionType, Sequence[Drop]]] = []

    def called(call: ast.Call, inside: Sequence[Drop]) -> str:
        helper = _helper(read, call, writing)
        inner.append((helper, inside))
        return helper_name(helper, inside)

    yield Text(read, changes(read.definition, drops, called, as_arguments))
    for helper, inside in inner:
        yield from _texts(helper, inside, writing, as_arguments=True)


def original_call(expressions: Sequence[ast.AST], call: ast.Call) -> ast.Call:
    """The call in the author's tree that a copy of it stands for."""

    def place(node: ast.Call) -> tuple[int | None, ...]:
        return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset

    return next(node for node in expressions if isinstance(node, ast.Call) and place(node) == place(call))


def resolved(call: ast.Call, function: FunctionType) -> FunctionType | None:
    """The function that a call in `function` calls, where `value_of` tells."""
    found = value_of(call.func, function)
    return found if isinstance(found, FunctionType) else None


def value_of(node: ast.expr, function: FunctionType) -> Any:
    """What a name, or an attribute of one, means in `function`, where its file or what is around the function says so; else None."""
    path: list[str] = []
    while isinstance(node, ast.Attribute):
        path.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id in function.__code__.co_varnames:
        return None
    closed = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    try:
        if node.id in closed:
            found = closed[node.id].cell_contents
        else:
            found = function.__globals__[node.id] if node.id in function.__globals__ else getattr(builtins, node.id)
        for name in path:
            found = getattr(found, name)
    except (AttributeError, KeyError, ValueError):
        return None
    return found


def _another(writing: Writing, what: str) -> FxsdError:
    holder = writing.holder.__qualname__ + "." if writing.holder is not None else ""
    return NoSource(
        f"{holder}{writing.name} is another function than the one that stochastic depth was written into: it {what}. "
        "Transform the model again, or use the version of the library that it was saved with."
    )
