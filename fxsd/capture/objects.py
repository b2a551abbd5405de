"""Objects that a forward makes and returns, such as a key-value cache: made again each time the graph runs, from what they hold.

So are attributes of modules that it sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx.node import has_side_effect


@dataclass(frozen=True)
class MakeObject:
    """Makes an instance of `cls` with given attributes, without its `__init__`."""

    cls: type
    __name__ = "make_object"

    def __call__(self, attributes: dict[str, Any]) -> Any:
        made: Any = object.__new__(self.cls)
        made.__dict__.update(attributes)
        return made


@dataclass(frozen=True)
class Constant:
    """Gives what cannot be written as source: a class."""

    value: Any
    __name__ = "constant"

    def __call__(self) -> Any:
        return self.value


@has_side_effect
def set_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Sets what the forward of `module` sets, for others to read: an attention map, a loss of its own."""
    setattr(module, name, value)


def is_made_of_attributes(value: Any) -> bool:
    """Is `value` an instance of a plain Python class, all of whose state is in its attributes?"""
    cls: Any = type(value)
    plain = hasattr(value, "__dict__") and cls.__new__ is object.__new__ and not any(vars(base).get("__slots__") for base in cls.__mro__)
    return plain and not callable(value) and not isinstance(value, (nn.Module, type))
