"""Live train and eval: `self.training` is read at run time, not when the model is traced.

While a model is traced, a data descriptor on `nn.Module` answers `self.training` with a proxy of `<path>.training`,
so `F.dropout(x, training=self.training)` follows every submodule's own flag later on. Python that branches on the flag
gets the mode of the trace, and the module that did so is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn


class Flag(fx.Proxy):
    """The proxy of one module's `training`; a plain bool where Python must decide."""

    def __init__(self, node: fx.Node, tracer: Any, decide: Callable[[], bool]) -> None:
        super().__init__(node, tracer)
        self._decide = decide

    def __bool__(self) -> bool:
        return self._decide()

    def __eq__(self, other: object) -> bool:
        return self._decide() == other

    def __hash__(self) -> int:
        return hash(self._decide())


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Inside, `model` and every module in it are in training mode, or not, whatever their own `train()` would do."""
    modes = [(module, _mode_of(module)) for module in model.modules()]
    try:
        for module, _ in modes:
            _set_mode(module, training)
        yield
    finally:
        for module, mode in modes:
            _set_mode(module, mode)


def _mode_of(module: nn.Module) -> bool:
    own = module.__dict__
    if "training" in own:
        mode: bool = own["training"]
        return mode
    return module.training  # of a ScriptModule, which has it elsewhere


def _set_mode(module: nn.Module, training: bool) -> None:
    if "training" in module.__dict__:
        module.__dict__["training"] = training
    else:
        module.training = training


@contextmanager
def live_training(read: Callable[[nn.Module], Any]) -> Iterator[None]:
    """Inside, `module.training` is `read(module)` for every module; assignments still reach the module itself."""

    def write(module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value

    try:
        nn.Module.training = property(read, write)  # type: ignore[assignment]
        yield
    finally:
        if "training" in vars(nn.Module):
            del nn.Module.training  # an annotation only: the class has no such attribute of its own
