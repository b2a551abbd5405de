"""A copy of a module tree in which some modules have ops in their code; all that needs no copy is shared.

New are the modules with ops, those above them, and those whose attributes refer to new ones. Parameters and buffers are shared, and so are
the dictionaries that hold them: moving, casting or loading one model reaches the other.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules.module import _WrappedHook

from fxsd.tree.classes import ORIGINAL, Rewritten, Writing, ops_of, rewritten_class, write_own, written
from fxsd.tree.once import once

HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name)
_REGISTERED = {*HOOKS, "_modules", "_parameters", "_buffers"}


@dataclass(frozen=True)
class Home:
    """What becomes of a module that has ops.

    Attributes:
        original: its class, without ops.
        writings: into the functions of its class, or its own.
        ops: by name.
        things: by attribute: what is written into the class of an object that the module has there.
        attributes: others that it gets.
    """

    original: type[nn.Module]
    writings: tuple[Writing, ...]
    ops: Mapping[str, nn.Module]
    things: Mapping[str, tuple[Writing, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)


def rebuilt(
    root: nn.Module,
    homes: Mapping[int, Home],
    others: Mapping[int, type[nn.Module]],
    root_class: Callable[[type[nn.Module], tuple[Writing, ...]], type[nn.Module]] | None = None,
) -> nn.Module:
    """The tree of `root` with ops in it.

    Args:
        root: stays as it is.
        homes: by the ids of the modules.
        others: modules, by their ids, that only get another class.
        root_class: makes the class of the new root, of the original class and what is written into it.
    """
    return _Tree(root, homes, others, root_class).root


class _Tree:
    def __init__(
        self,
        root: nn.Module,
        homes: Mapping[int, Home],
        others: Mapping[int, type[nn.Module]],
        root_class: Callable[[type[nn.Module], tuple[Writing, ...]], type[nn.Module]] | None,
    ) -> None:
        self._homes, self._others, self._made_root = homes, others, root_class
        modules = list(root.modules())
        new = {id(module) for module in modules if id(module) in homes or id(module) in others} | {id(root)}
        self._new = self._with_those_around(modules, new)
        self._copies: dict[int, nn.Module] = {}
        self.root = self._copy(root, is_root=True)
        for module in modules:
            if id(module) in self._copies:
                follow(self._copies[id(module)], self._copies)

    def _with_those_around(self, modules: list[nn.Module], new: set[int]) -> set[int]:
        """Those that are above new ones, or have attributes that refer to them, are new as well."""
        references = {id(module): _referred(module) for module in modules}
        users: dict[int, list[int]] = {}
        for user, used in references.items():
            for other in used:
                users.setdefault(other, []).append(user)
        pending = list(new)
        while pending:
            for user in users.get(pending.pop(), ()):
                if user not in new:
                    new.add(user)
                    pending.append(user)
        return new

    def _copy(self, module: nn.Module, is_root: bool = False) -> nn.Module:
        if id(module) not in self._new:
            return module
        if id(module) in self._copies:
            return self._copies[id(module)]
        home = self._homes.get(id(module))
        cls = self._class(module, home, is_root)
        self._copies[id(module)] = made = copied(module, cls)
        for name in ops_of(module):
            made.__dict__.pop(name, None)
        made.__dict__.update(made.__dict__.pop(ORIGINAL, {}))
        if home is not None:
            made.__dict__.update(home.ops)
            self._write_own(made, home)
        made.__dict__["_modules"] = {name: child if child is None else self._copy(child) for name, child in module._modules.items()}
        return made

    def _class(self, module: nn.Module, home: Home | None, is_root: bool) -> type[nn.Module]:
        original, writings = (home.original, home.writings) if home is not None else (original_class(module), ())
        if is_root and self._made_root is not None:
            return self._made_root(original, writings)
        if id(module) in self._others:
            return self._others[id(module)]
        return rewritten_class(original, writings) if home is not None else original

    def _write_own(self, made: nn.Module, home: Home) -> None:
        """Into functions, and objects, that the module has as attributes."""
        names = [*(writing.name for writing in home.writings if writing.holder is None), *home.things, *home.attributes]
        if names:
            made.__dict__[ORIGINAL] = {name: made.__dict__[name] for name in names}
        made.__dict__.update(home.attributes)
        write_own(made, home.writings)
        for name, writings in home.things.items():
            thing = copy.copy(made.__dict__[name])
            thing.__class__ = _thing_class(type(thing), writings)
            made.__dict__[name] = thing


def copied(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A shallow copy of another class, with dictionaries of hooks of its own."""
    made = object.__new__(cls)
    made.__dict__.update(module.__dict__)
    made.__dict__.pop("_compiled_call_impl", None)  # what `module.compile()` left there runs `module`
    for hooks in HOOKS:
        made.__dict__[hooks] = OrderedDict(module.__dict__.get(hooks) or {})  # no dict: the handles of hooks refer to it weakly
    return made


def follow(module: nn.Module, copies: Mapping[int, nn.Module]) -> None:
    """Makes the plain attributes of a module refer to copies of modules, which are given by the ids of those that they stand for."""
    own = {name: value for name, value in module.__dict__.items() if name not in _REGISTERED}
    module.__dict__.update({name: _moved(value, copies) for name, value in own.items()})
    for hooks in HOOKS:
        registered = module.__dict__[hooks]
        registered.update({key: _moved(hook, copies) for key, hook in registered.items()})


def _moved(value: Any, copies: Mapping[int, nn.Module]) -> Any:
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module) and id(value.__self__) in copies:
        owner = copies[id(value.__self__)]
        return MethodType(_current(value.__func__, type(value.__self__), type(owner)), owner)
    if isinstance(value, _WrappedHook):
        module = value.module() if value.with_module else None
        return _WrappedHook(_moved(value.hook, copies), copies.get(id(module), module))
    if isinstance(value, functools.partial):
        call, *args = (_moved(part, copies) for part in (value.func, *value.args))
        keywords = {name: _moved(item, copies) for name, item in value.keywords.items()}
        before = (value.func, *value.args, *value.keywords.values())
        if all(map(operator.is_, (call, *args, *keywords.values()), before)):
            return value
        made = functools.partial(call, *args, **keywords)
        made.__dict__.update(value.__dict__)
        return made
    if type(value) in (list, tuple):
        moved = [_moved(item, copies) for item in value]
        return value if all(map(operator.is_, moved, value)) else type(value)(moved)
    if type(value) is dict:
        moved_values = {key: _moved(item, copies) for key, item in value.items()}
        return value if all(map(operator.is_, moved_values.values(), value.values())) else moved_values
    return value


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that its author gave a module."""
    return module.original_class if isinstance(module, Rewritten) else type(module)


def _current(function: Any, old: type, new: type) -> Any:
    """The function of a bound method, as the new class has it."""
    name = getattr(function, "__name__", "")
    return getattr(new, name) if getattr(old, name, None) is function else function


def _referred(module: nn.Module) -> set[int]:
    """The ids of the modules that a module has as children, or refers to."""
    found = {id(child) for child in module._modules.values() if child is not None}
    pending = [value for key, value in module.__dict__.items() if key not in _REGISTERED]
    pending += [hook for hooks in HOOKS for hook in (module.__dict__.get(hooks) or {}).values()]
    while pending:
        value = pending.pop()
        if isinstance(value, nn.Module):
            found.add(id(value))
        elif isinstance(value, MethodType):
            pending.append(value.__self__)
        elif isinstance(value, functools.partial):
            pending += [value.func, *value.args, *value.keywords.values()]
        elif type(value) in (list, tuple):
            pending += [item for item in value if not isinstance(item, (int, float, str))]
        elif type(value) is dict:
            pending += value.values()
    return found


@once
def _thing_class(cls: type, writings: tuple[Writing, ...]) -> type:
    """The class of objects that are no modules, with ops of others in their code."""
    own: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    own |= {"thing_writings": writings, "original_class": cls}
    own["__reduce_ex__"] = lambda self, protocol: _reduced(self, cls, writings, protocol)
    for writing in writings:
        made, helpers = written(vars(writing.holder)[writing.name], writing)
        own |= made | helpers
    return type(cls.__name__, (cls,), own)


def _reduced(thing: Any, cls: type, writings: tuple[Writing, ...], protocol: Any) -> Any:
    make, args, *rest = super(type(thing), thing).__reduce_ex__(protocol)
    return (_thing_again, (cls, writings, make, tuple(cls if arg is type(thing) else arg for arg in args)), *rest)


def _thing_again(cls: type, writings: tuple[Writing, ...], make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    thing = make(*args)
    thing.__class__ = _thing_class(cls, writings)
    return thing
