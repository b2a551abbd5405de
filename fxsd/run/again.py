"""What need not be kept for backward, because it can be taken again from a value that is kept.

A ReLU keeps its result. A convolution that runs on some rows of it would keep these besides, and at small rates a ResNet that skips would
need more memory than without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fxsd.versions import HOOKS_NEST

_hooks_are_allowed: Callable[[], bool] = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]


class _Source(NamedTuple):
    """Of a tensor that is `take(whole)`."""

    whole: Tensor
    take: Callable[[Tensor], Tensor]
    version: int  # of the tensor


class _Packed(NamedTuple):
    """A tensor that lies in the memory of one that can be taken again, as the same with fewer dims does."""

    whole: Any  # what the hooks around made of it
    take: Callable[[Tensor], Tensor]
    place: tuple[Any, Any, Any]  # size, stride and offset


class _Again:
    """Hooks of what is kept for backward, which are called before those around them."""

    def __init__(self) -> None:
        self.keep: Callable[[Tensor], Any]
        self.give: Callable[[Any], Tensor]
        self.keep, self.give = _hooks() or (_keep, _give)
        self.sources = WeakIdKeyDictionary()  # of tensors that live, by their storage

    def pack(self, tensor: Tensor) -> Any:
        if not self.sources or tensor.layout is not torch.strided:
            return self.keep(tensor)
        source: _Source | None = self.sources.get(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        if source is None or source.version != tensor._version or source.whole.dtype != tensor.dtype or tensor.is_conj() or tensor.is_neg():
            return self.keep(tensor)
        return _Packed(self.keep(source.whole), source.take, (tensor.shape, tensor.stride(), tensor.storage_offset()))

    def unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Packed):
            return self.give(packed)
        return packed.take(self.give(packed.whole)).as_strided(*packed.place)


def taking_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, but what it keeps for backward is taken again where it can be. Hooks of the caller see the whole instead."""

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not HOOKS_NEST or torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _hooks_are_allowed():
            return forward(*args, **kwargs)
        again = _Again()
        with torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack):
            return forward(*args, **kwargs)

    return run


def can_take_again(taken: Tensor, whole: Tensor, take: Callable[[Tensor], Tensor]) -> None:
    """Says inside of `taking_again` that `taken` is `take(whole)`, and that `whole` is kept for backward anyway."""
    pack, _ = _hooks() or (None, None)
    again = getattr(pack, "__self__", None)
    if isinstance(again, _Again) and type(taken) is Tensor:  # other kinds may have no memory of their own
        again.sources[taken.untyped_storage()] = _Source(whole, take, taken._version)


def _hooks() -> Any:
    """Those that a tensor that is kept now would meet, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) if HOOKS_NEST else None


def _keep(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor.detach(), tensor._version  # itself, it could hold what holds it


def _give(packed: tuple[Tensor, int]) -> Tensor:
    """As autograd does without hooks.

    Raises:
        RuntimeError: it was written into.
    """
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a tensor of shape {list(tensor.shape)} is at version {tensor._version}; expected version {version} instead."
        )
    return tensor
