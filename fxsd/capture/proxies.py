"""The values of a trace: proxies that can say what they are where Python asks, if an example of the inputs is known."""

from __future__ import annotations

import builtins
import dis
import math
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy
from torch import Tensor, fx

from fxsd.capture.trace import Trace
from fxsd.find.values import is_size

_OF_SHAPE = ("shape", "size", "dim", "ndim", "numel", "nelement")
_PROPERTIES = {"data", "grad", "names", "requires_grad"}  # of tensors, which can be set
_ARITHMETIC = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv, "floor_divide": operator.floordiv,
    "remainder": operator.mod, "power": operator.pow,
}  # fmt: skip
_UNPACK = dis.opmap["UNPACK_SEQUENCE"]
_FLOOR, _CEIL, _LEN = math.floor, math.ceil, len  # themselves: others may stand in their place during a trace


class Value(fx.Proxy):
    """A value of the trace. Python that must know it (`if`, `len`, `int`) asks the tracer.

    Tensors are dense: the layouts that no captured graph supports are known to be absent.
    """

    tracer: Trace

    @property
    def is_nested(self) -> bool:
        return False

    is_sparse = is_quantized = is_mkldnn = is_nested

    def __getattr__(self, name: str) -> Attribute:  # type: ignore[override]
        # A protocol that no value follows: `__array__`, `__fspath__`. NumPy asks sizes for more: `sqrt`, `prod`.
        if name.startswith("__") or (self.tracer.examples and is_size(self.node) and not hasattr(self.tracer.known(self), name)):
            raise AttributeError(name)
        return Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PROPERTIES:
            self._become(self._call(assign_property, name, value))
        else:
            object.__setattr__(self, name, value)

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Arithmetic with NumPy's numbers is arithmetic; `sqrt`, `log` and the like are computed with the number that a size is."""
        if len(inputs) > 1:
            values = [value.item() if isinstance(value, numpy.generic) else value for value in inputs]
            return _ARITHMETIC[function.__name__](*values) if function.__name__ in _ARITHMETIC else NotImplemented
        if method == "__call__":
            return function(self.tracer.decide(self, itself), **options)
        return getattr(function, method)(numpy.array(list(self), dtype=object), **options)

    def __int__(self) -> int:
        return int(self.tracer.decide(self, int))

    __index__ = __int__

    def __float__(self) -> float:
        return float(self.tracer.decide(self, float))

    def __iter__(self) -> Iterator[Any]:
        # As `fx.Proxy` does it, but that leaves a cycle of frames behind, which keeps the values of the trace alive.
        caller = sys._getframe(1)
        code = caller.f_code.co_code
        if code[caller.f_lasti] == _UNPACK:  # `a, b = value`
            return iter([self._call(operator.getitem, i) for i in range(code[caller.f_lasti + 1])])
        return self.tracer.iter(self)

    def __len__(self) -> int:
        if self.tracer.examples is not None:
            len(self.tracer.known(self))  # NumPy asks numbers too: nothing is recorded where there is no length
        return int(self.tracer.decide(self._call(_LEN), int))

    def __contains__(self, item: Any) -> bool:
        return bool(self._call(contains, item))

    def __eq__(self, other: object) -> Any:
        # Of a trace that is over, in a cache that it was a key of.
        return super().__eq__(other) if self.tracer.is_open else self is other

    def __hash__(self) -> int:
        caller = sys._getframe(1)
        # A call may be of a cached function, which runs for each value as it would for a new one.
        called = dis.opname[caller.f_code.co_code[caller.f_lasti]].startswith(("CALL", "PRECALL"))
        return self.tracer.hashed(self, called)

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

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


class Weight(Value):
    """A parameter or a buffer. Its shape is a plain one."""

    def __init__(self, node: fx.Node, tracer: Trace, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name) if name in _OF_SHAPE else super().__getattr__(name)


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


def assign_property(tensor: Any, name: str, value: Any) -> Any:
    """`tensor.data = value` as an expression: sets it and returns the tensor."""
    setattr(tensor, name, value)
    return tensor


def itself(value: Any) -> Any:
    return value


@contextmanager
def known_types(tracer: Trace) -> Iterator[None]:
    """Inside, Python's `isinstance`, `callable` and `len` of a value answer for what the value stands for."""
    is_instance, is_callable, length = builtins.isinstance, builtins.callable, builtins.len
    kinds = (Value, Weight, Attribute)

    def asked(thing: Any, classes: Any) -> bool:
        if type(thing) not in kinds or sys._getframe(1).f_globals.get("__name__", "").startswith("torch.fx"):
            return is_instance(thing, classes)
        return issubclass(type(thing), classes) or tracer.is_a(thing, classes)

    def asked_to_call(thing: Any) -> bool:
        if type(thing) is Attribute:
            return tracer.examples is None or is_callable(getattr(tracer.known(thing.root), thing.attr))
        return type(thing) not in kinds and is_callable(thing)

    def live_length(thing: Any) -> Any:
        # That of a tensor may be the batch; how many dims or parts there are shapes the graph.
        return thing.size(0) if type(thing) in kinds and tracer.examples and is_instance(tracer.known(thing), Tensor) else length(thing)

    try:
        builtins.isinstance, builtins.callable, builtins.len = asked, asked_to_call, live_length  # type: ignore[assignment]
        yield
    finally:
        builtins.isinstance, builtins.callable, builtins.len = is_instance, is_callable, length
