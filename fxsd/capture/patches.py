"""What torch does differently while a model is traced, so that nothing of the forward is lost without a word."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fxsd.capture.tracer import Tracer

# Called without any proxy these would run once, at trace time, and bake their values (and draws) into the graph.
_FACTORIES = (
    "arange", "bernoulli", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint", "randn", "randperm",
    "tensor", "zeros",
)  # fmt: skip
_CONTEXTS = (torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode, torch.autocast)


class Untraceable(Exception):
    """A part of the model that must not be recorded op by op."""


@contextmanager
def recorded_factories(tracer: Tracer) -> Iterator[None]:
    """Factories of tensors are recorded even where no argument is a value of the trace."""
    originals = {name: getattr(torch, name) for name in _FACTORIES}

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            if tracer.set_aside:
                return function(*args, **kwargs)
            return tracer.create_proxy("call_function", function, args, kwargs)

        return record

    for name, function in originals.items():
        setattr(torch, name, recorded(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)


@contextmanager
def noticed_contexts(tracer: Tracer) -> Iterator[None]:
    """`with torch.no_grad():` leaves no node, so the graph would lose it without a word."""
    originals: Mapping[Any, Any] = {cls: cls.__enter__ for cls in _CONTEXTS}

    def noticed(enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def refuse(context: Any) -> Any:
            if tracer.set_aside:
                return enter(context)
            raise Untraceable(f"it enters {type(context).__name__}, which a graph cannot hold.")

        return refuse

    for cls, enter in originals.items():
        cls.__enter__ = noticed(enter)
    try:
        yield
    finally:
        for cls, enter in originals.items():
            cls.__enter__ = enter
