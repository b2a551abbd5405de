"""How a model calls the modules in it: seen in one run, remembered without the values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from fxsd.capture.modes import in_mode
from fxsd.errors import FxsdError

Call: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"

_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    slice,
    range,
    Enum,
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.layout,
)


def as_call(example_inputs: Any) -> Call:
    """`example_inputs` as the `(args, kwargs)` of a call."""
    if isinstance(example_inputs, Tensor):
        raise FxsdError("example_inputs must be a tuple of args or a dict of kwargs, but got a Tensor; write (x,).")
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise FxsdError(f"example_inputs must be a tuple of args or a dict of kwargs, but got {type(example_inputs).__name__}.")


def is_plain(value: Any) -> bool:
    """Is `value` made of numbers, names and the like alone, which mean the same in every call?"""
    return all(isinstance(leaf, _PLAIN) for leaf in torch.utils._pytree.tree_leaves(value))


def without_values(value: Any, fakes: FakeTensorMode) -> Any:
    """A copy of `value`, objects of any class included, whose tensors have shapes and no data."""
    with FakeCopyMode(fakes):
        return copy.deepcopy(value)


class Place(NamedTuple):
    """Where a tensor has samples.

    Attributes:
        dim: what has them.
        each: how many rows there are for one, in a row.
    """

    dim: int = 0
    each: int = 1


def batch_of(call: Call) -> int | None:
    """How many samples there are, which is what dim 0 of the first tensor is."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim()]
    return int(leaves[0].shape[0]) if leaves else None


def twice(call: Call) -> Call:
    """The call with every sample twice."""
    batch = batch_of(call)

    def doubled(leaf: Tensor) -> Tensor:
        return torch.cat((leaf, leaf)) if leaf.dim() and leaf.shape[0] == batch else leaf

    found: Call = torch.utils._pytree.tree_map_only(Tensor, doubled, call)
    return found


def differing(first: torch.Size, second: torch.Size) -> list[int]:
    """The dims in which two shapes differ."""
    return [dim for dim, (a, b) in enumerate(zip(first, second, strict=False)) if a != b]


def places(call: Call, doubled: Call, batch: int) -> list[Place | None] | None:
    """Where each leaf of `call` has samples, by how it differs where there are twice as many; None if more differs."""
    leaves, spec = torch.utils._pytree.tree_flatten(call)
    others, other_spec = torch.utils._pytree.tree_flatten(doubled)
    return [_place(a, b, batch) for a, b in zip(leaves, others, strict=True)] if spec == other_spec else None


def _place(leaf: Any, doubled: Any, batch: int) -> Place | None:
    if not isinstance(leaf, Tensor) or not isinstance(doubled, Tensor) or leaf.dim() != doubled.dim():
        return None
    dims = differing(leaf.shape, doubled.shape)
    rows = leaf.shape[dims[0]] if len(dims) == 1 else 0
    return Place(dims[0], rows // batch) if rows and not rows % batch and doubled.shape[dims[0]] == 2 * rows else None


@dataclass(frozen=True)
class Run:
    """What was seen of a run.

    Attributes:
        calls: module path -> the calls of it that differ in more than values, by what tells them apart; in the order of the first calls.
        error: what ended the run too early, if something did.
    """

    calls: dict[str, dict[Any, Call]]
    error: Exception | None = None


def observed(model: nn.Module, call: Call, fakes: FakeTensorMode, training: bool) -> Run:
    """Runs `model` once, in training or in eval mode and without gradients, and notes how it calls each module.

    Args:
        model: its attributes may change; its buffers do not.
        call: what to run it on.
        fakes: of the tensors in the result.
    """
    paths = {module: path for path, module in model.named_modules()}
    seen: dict[str, dict[Any, Call]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        path = paths.get(module)
        if path is None:
            return
        calls, key = seen.setdefault(path, {}), _key((args, kwargs))
        if key not in calls:
            with suppress(Exception):  # an argument that cannot be copied: a generator, a lock
                calls[key] = without_values((args, kwargs), fakes)

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    failure: Exception | None = None
    try:
        with in_mode(model, training), _noted_calls(note), torch.no_grad():
            args, kwargs = copy.deepcopy(call)
            torch.func.functional_call(model, buffers, args, kwargs)
    except Exception as error:  # the model's own code
        failure = error
    return Run(seen, failure)


@contextmanager
def _noted_calls(note: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    original = nn.Module.__call__

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        note(self, args, kwargs)
        return original(self, *args, **kwargs)

    try:
        nn.Module.__call__ = noted  # type: ignore[method-assign]
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


def _key(call: Call) -> Any:
    """Equal for calls that the same graph serves, as far as one can tell without tracing."""
    leaves, spec = torch.utils._pytree.tree_flatten(call)
    return str(spec), tuple(_leaf_key(leaf) for leaf in leaves)


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return repr(leaf) if isinstance(leaf, _PLAIN) else type(leaf)
