"""What torch does differently while a model is traced, so that nothing of the forward is lost without a word."""

from __future__ import annotations

import inspect
import pickle
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import fx
from torch.utils import checkpoint

from fxsd.capture.trace import Trace

# Called without any proxy these would run once, at trace time, and bake their values (and draws) into the graph.
_FACTORIES = (
    "arange", "as_tensor", "asarray", "bernoulli", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint",
    "randn", "randperm", "tensor", "zeros",
)  # fmt: skip
# Others are recorded if a value of the trace is among their arguments. Torch does so by itself for tensors, but it asks what a size is
# (`torch.reshape(x, (batch, -1))`) or a dtype, and torch 2.7 takes no value for several tensors, such as what `chunk` gives.
_FUNCTIONS = tuple(name for name, value in vars(torch).items() if isinstance(value, BuiltinFunctionType) and not name.startswith("_"))
_OTHERS = ("block_diag", "finfo", "iinfo", *(name for name in _FUNCTIONS if name not in _FACTORIES))
_CONTEXTS = (torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode, torch.autocast)


class Untraceable(Exception):
    """A part of the model that must not be recorded op by op."""


class KeepsState(Untraceable):
    """A module gives attributes, by name, other values for its next call."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(f"keeps {', '.join(map(repr, names))} for its next call, as a graph would not")


@contextmanager
def recorded_functions(tracer: Trace) -> Iterator[None]:
    """Factories of tensors are recorded even where no argument is a value of the trace, other functions of torch where one is."""
    originals = {name: getattr(torch, name) for name in (*_FACTORIES, *_OTHERS)}

    def recorded(function: Callable[..., Any], always: bool) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            if tracer.set_aside or not (always or any(map(_has_value, (*args, *kwargs.values())))):
                return function(*args, **kwargs)
            return tracer.create_proxy("call_function", function, args, kwargs)

        return record

    try:  # an interruption may come at any time
        for name, function in originals.items():
            setattr(torch, name, recorded(function, name in _FACTORIES))
        yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)


def _has_value(argument: Any) -> bool:
    return isinstance(argument, fx.Proxy) or (type(argument) in (tuple, list) and any(map(_has_value, argument)))


@dataclass(frozen=True)
class Apply:
    """Calls an `autograd.Function`, whose backward is not that of the ops in its forward."""

    function: type[torch.autograd.Function]
    __name__ = "apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)


@contextmanager
def recorded_autograd_functions(tracer: Trace) -> Iterator[None]:
    """`autograd.Function`s are recorded whole, but for that of `torch.utils.checkpoint`: what runs under it is recorded, and marked."""
    original = vars(torch.autograd.Function)["apply"]

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if cls is checkpoint.CheckpointFunction and not tracer.set_aside:
            function, _, *given = args
            with tracer.checkpointed({"use_reentrant": True}):
                return function(*given)
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        if tracer.set_aside or not any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            return original.__get__(None, cls)(*args, **kwargs)
        return tracer.create_proxy("call_function", Apply(cls), args, kwargs)

    try:
        torch.autograd.Function.apply = classmethod(apply)
        yield
    finally:
        torch.autograd.Function.apply = original


@contextmanager
def noticed_contexts(tracer: Trace) -> Iterator[None]:
    """`with torch.no_grad():` leaves no node, so the graph would lose it without a word."""
    originals: Mapping[Any, Any] = {cls: cls.__enter__ for cls in _CONTEXTS}

    def noticed(enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def refuse(context: Any) -> Any:
            if tracer.set_aside:
                return enter(context)
            raise Untraceable(f"it enters {type(context).__name__}, which a graph cannot hold.")

        return refuse

    try:
        for cls, enter in originals.items():
            cls.__enter__ = noticed(enter)
        yield
    finally:
        for cls, enter in originals.items():
            cls.__enter__ = enter


@contextmanager
def noticed_draws(tracer: Trace) -> Iterator[None]:
    """What Python's or NumPy's `random` gives is a plain number: the graph would draw once and for all."""
    with ExitStack() as stack:
        for module in filter(None, (random, sys.modules.get("numpy.random"))):
            for name in dir(module):
                draw = getattr(module, name)
                if type(getattr(draw, "__self__", None)).__name__ in ("Random", "RandomState") and "state" not in name:
                    stack.callback(setattr, module, name, draw)
                    setattr(module, name, _refusing(tracer, draw, f"it draws a number with {module.__name__}.{name}"))
        yield


@contextmanager
def recorded_checkpoints(tracer: Trace) -> Iterator[None]:
    """Inside, what runs under `torch.utils.checkpoint(use_reentrant=False)` is recorded, and marked."""
    name = "_checkpoint_without_reentrant_generator"  # around which the function is called; later versions have it in another
    name = f"{name}_impl" if hasattr(checkpoint, f"{name}_impl") else name
    run = getattr(checkpoint, name)
    signature, usual = inspect.signature(run), inspect.signature(checkpoint.checkpoint).parameters
    own = ("args", "kwargs", "preserve_rng_state")  # generators are always put back: whatever the model draws, its sites will

    def record(*args: Any, **kwargs: Any) -> Iterator[None]:
        if tracer.set_aside:
            yield from run(*args, **kwargs)
            return
        given = signature.bind(*args, **kwargs).arguments
        options = {key: value for key, value in given.items() if key in usual and key not in own and value is not usual[key].default}
        if not all(isinstance(value, (bool, str)) for value in options.values()):
            raise Untraceable(f"it checkpoints activations with options of its own, {', '.join(options)}, which a graph would not keep")
        with tracer.checkpointed({"use_reentrant": False, **options}):
            yield

    try:
        setattr(checkpoint, name, record)
        yield
    finally:
        setattr(checkpoint, name, run)


def _refusing(tracer: Trace, function: Callable[..., Any], why: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if tracer.set_aside:
            return function(*args, **kwargs)
        raise Untraceable(why)

    return refuse


def random_states() -> bytes:
    """The states of the generators whose numbers a graph would take for constants; equal if nothing was drawn in between."""
    numpy_random = sys.modules.get("numpy.random")
    return pickle.dumps((random.getstate(), numpy_random and numpy_random.get_state(), torch.get_rng_state().numpy().tobytes()))
