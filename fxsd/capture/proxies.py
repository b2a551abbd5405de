"""The values of a trace: proxies that can say what they are where Python asks, if an example of the inputs is known."""

from __future__ import annotations

import builtins
import math
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import fx

from fxsd.values import is_size

if TYPE_CHECKING:
    from fxsd.capture.tracer import Tracer


_FLOOR, _CEIL = math.floor, math.ceil  # themselves: others may stand in their place during a trace


class Value(fx.Proxy):
    """A value of the trace. Python that must know it (`if`, `len`, `int`) asks the tracer.

    Tensors are dense: the layouts that no captured graph supports are known to be absent.
    """

    tracer: Tracer

    @property
    def is_nested(self) -> bool:
        return False

    is_sparse = is_quantized = is_mkldnn = is_nested

    def __getattr__(self, name: str) -> Attribute:  # type: ignore[override]
        if name.startswith("__"):  # a protocol that no value follows: `__array__`, `__fspath__`
            raise AttributeError(name)
        return Attribute(self, name)

    def __int__(self) -> int:
        return int(self.tracer.decide(self, int))

    __index__ = __int__

    def __float__(self) -> float:
        return float(self.tracer.decide(self, float))

    def __len__(self) -> int:
        if self.tracer.examples is not None:
            len(self.tracer.known(self))  # NumPy asks numbers too: nothing is recorded where there is no length
        return int(self.tracer.decide(self._call(len), int))

    def __contains__(self, item: Any) -> bool:
        return bool(self._call(contains, item))

    def __round__(self, digits: int | None = None) -> Value:
        return self._call(round) if digits is None else self._call(round, digits)

    def __floor__(self) -> Value:
        return self._call(_FLOOR)

    def __ceil__(self) -> Value:
        return self._call(_CEIL)

    def __trunc__(self) -> Value:
        return self._call(math.trunc)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._become(self._call(assign_item, index, value))

    def _call(self, function: Callable[..., Any], *args: Any) -> Value:
        return cast(Value, self.tracer.create_proxy("call_function", function, (self, *args), {}))

    def _become(self, written: Value) -> None:
        """After a write in place, this name means what was written, so that the graph shows who depends on it."""
        self.tracer.journal.append((self, self.node))
        self.node = written.node


def _in_place(name: str) -> Callable[[Value, Any], Any]:
    """`y += x` writes into a tensor, under every name that it has, and gives a number a new value under this name alone."""
    plain = name.removeprefix("i")
    anew, write = getattr(operator, f"{plain}_" if plain in ("and", "or") else plain), getattr(operator, name)

    def assign(self: Value, other: Any) -> Any:
        if is_size(self.node):
            return self._call(anew, other)
        self._become(self._call(write, other))
        return self

    return assign


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift", "irshift"):
    setattr(Value, f"__{_name}__", _in_place(_name))


class Attribute(Value):
    """`value.name`: a node only once it is used as a value; called, it is a method call."""

    def __init__(self, root: Value, name: str) -> None:
        self.root, self.attr, self.tracer = root, name, root.tracer
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:
        if self._node is None:
            self._node = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {}).node
            self.tracer.journal.append((self, None))
        return self._node

    @node.setter
    def node(self, node: fx.Node | None) -> None:
        self._node = node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)
        if self.attr.endswith("_") and not self.attr.endswith("__"):
            self.root._become(cast(Value, result))
        return result


def contains(container: Any, item: Any) -> bool:
    return item in container


def assign_item(tensor: Any, index: Any, value: Any) -> Any:
    """`tensor[index] = value` as an expression: writes in place and returns the tensor."""
    tensor[index] = value
    return tensor


@contextmanager
def known_types(tracer: Tracer) -> Iterator[None]:
    """Inside, Python's `isinstance` of a value answers for what the value stands for."""
    original = builtins.isinstance

    def asked(thing: Any, classes: Any) -> bool:
        if original(thing, classes):
            return True
        if type(thing) not in (Value, Attribute) or sys._getframe(1).f_globals.get("__name__", "").startswith("torch.fx"):
            return False
        return original(tracer.known(thing), classes)

    builtins.isinstance = asked
    try:
        yield
    finally:
        builtins.isinstance = original
