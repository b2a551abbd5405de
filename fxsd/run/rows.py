"""Rows of a batch taken out, and put back in: what runs around a branch that is computed on the kept rows only.

    y = shortcut + F(x)      becomes      rows = draw(shortcut); y = merge(shortcut, F(take(x, rows)), rows)

In evaluation all rows run, and nothing is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxsd.run.again import can_take_again
from fxsd.run.by_place import Places, merge_rows, take_rows, weighted
from fxsd.run.one_pass import is_plain, is_transformed, kernels_for

Times = int | Sequence[int]  # how many times the number of rows a number is, or each of several: 0 if it does not go with them


class Rows(NamedTuple):
    """Which rows of a batch a branch runs on.

    Attributes:
        batch: how many rows there are.
        taken: the rows that run, or None: all of them.
        places: of all rows in `taken`; compiled code only.
        order: all rows, those taken first; eager code only.
        weight: what the branch is multiplied by, None for one: a number, or one for each row that runs.
        none: no row runs, instead of `taken`.
        keep: whether all rows run, or none, is what this says; compiled code only.
    """

    batch: int
    taken: Tensor | None = None
    places: Places | None = None
    weight: Tensor | None = None
    none: bool = False
    keep: Tensor | None = None
    order: Tensor | None = None


def take(value: Tensor, rows: Rows, kept: bool = False, each: int = 1, dim: int = 0) -> Tensor:
    """The rows of `value` that run: `[batch, ...]` -> `[kept, ...]`. One row that stands for all of them is left as it is.

    Args:
        kept: `value` is kept for backward anyway, so that its rows need not be.
        each: how many rows there are for one of the batch, in a row: `[batch * each, ...]` -> `[kept * each, ...]`.
        dim: what has the rows.
    """
    if dim:
        return put_back(take(value.transpose(0, dim), rows, each=each), dim, value)
    if each > 1:
        return take(value.view(rows.batch, each, *value.shape[1:]), rows).flatten(0, 1)
    if value.shape[0] == 1 and rows.batch != 1:
        return value
    if rows.none:
        return value[:0]
    if rows.taken is None:
        return value
    if rows.places is not None:
        return take_rows(value, rows.taken, rows.places)
    taken: Tensor = _apply(_Take, value, rows.taken)
    return _kept(taken, value, rows.taken) if kept else taken


def fork(value: Tensor, rows: Rows, kept: bool = False, dim: int = 0) -> tuple[Tensor, Tensor]:
    """`value` itself for the shortcut, and `take(value, rows, kept, dim=dim)` for the branch: one pass less in backward."""
    if dim:
        shortcut, taken = fork(value.transpose(0, dim), rows)
        return shortcut.transpose(0, dim), put_back(taken, dim, value)
    if not rows.none and (rows.taken is None or torch.compiler.is_compiling()):
        return value, take(value, rows, kept)
    shortcut, taken = _apply(_Fork, value, rows.taken, rows.order)
    return shortcut, _kept(taken, value, rows.taken) if kept and rows.taken is not None else taken


def _kept(taken: Tensor, value: Tensor, index: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        can_take_again(taken, value.detach(), partial(_select, index=index))
    return taken


def merge(shortcut: Tensor, branch: Tensor, rows: Rows, branch_first: bool = False, dim: int = 0) -> Tensor:
    """`shortcut` plus the branch in the rows that ran: `[batch, ...]`, `[kept, ...]` -> `[batch, ...]`.

    The result has the memory format of the first operand, as that of an add has, unless that has its rows in pieces: it decides how fast
    the convolutions after it are.

    Args:
        branch_first: the branch is the first operand.
        dim: what has the rows.
    """
    if dim:
        return put_back(merge(shortcut.transpose(0, dim), branch.transpose(0, dim), rows, branch_first), dim, shortcut)
    if rows.taken is None and not rows.none:
        branch = weighted(branch, rows.weight)
        return branch + shortcut if branch_first else shortcut + branch
    if rows.taken is not None and rows.places is not None:
        return merge_rows(shortcut, branch, rows.taken, rows.places, rows.weight)
    if shortcut.dtype is not branch.dtype:
        shortcut = shortcut.to(torch.promote_types(shortcut.dtype, branch.dtype))
    # No row is merged too, so that parameters of the branch get gradients of zero.
    taken = torch.empty(0, dtype=torch.long, device=branch.device) if rows.none else rows.taken
    return _apply(_Merge, shortcut, branch, taken, rows.order, rows.weight, branch_first)  # type: ignore[no-any-return]


def spread(branch: Tensor, rows: Rows, dim: int = 0) -> Tensor:
    """The branch in the rows that ran, which `dim` has, and zeros in the others: `[kept, ...]` -> `[batch, ...]`."""
    if dim:
        return put_back(spread(branch.transpose(0, dim), rows), dim, branch)
    if rows.taken is None and not rows.none:
        return weighted(branch, rows.weight)
    zeros = branch.new_zeros(()).expand(rows.batch, *branch.shape[1:])
    return merge(zeros, branch, rows)


def put_back(value: Tensor, dim: int, like: Tensor) -> Tensor:
    """Rows in dim 0 back in `dim`; contiguous if `like` is, which code that comes after may rely on."""
    value = value.transpose(0, dim)
    return value.contiguous() if like.is_contiguous() else value


def counted(rows: int, times: Times, value: Any) -> Any:
    """What stands for `value`, a number, or a size or tuple of them, where so many rows run."""
    if isinstance(times, int):
        return times * rows
    each = tuple(number * rows if number else own for number, own in zip(times, value, strict=True))
    return torch.Size(each) if isinstance(value, torch.Size) else each


def _select(value: Tensor, index: Tensor) -> Tensor:
    """Rows of `value`, in its memory format."""
    if torch.compiler.is_compiling() or value.is_contiguous() or is_transformed(value):
        return value.index_select(0, index)
    taken, order = empty_in_format(value, (index.shape[0], *value.shape[1:]))
    if torch.is_grad_enabled():  # a backward that has a gradient itself
        return taken.copy_(value.index_select(0, index))
    torch.index_select(value.permute(order), order.index(0), index, out=taken.permute(order))
    return taken


def _select_as(dtype: torch.dtype, value: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
    """Rows of `value` in a dtype, and weighted in it."""
    # Selecting alone is one pass too, and launched in less time than a kernel of Triton.
    alone = weight is None and value.dtype is dtype
    if not alone and (kernels := kernels_for(value)) and index.shape[0]:
        taken = _empty_rows(index.shape[0], value, dtype)
        kernels.take_rows(taken, value, index, weight)
        return taken
    return weighted(_select(value, index).to(dtype), weight)


def _empty_rows(rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor of so many rows, laid out as those of `like`, which are one after the other."""
    return torch.empty_strided((rows, *like.shape[1:]), like.stride(), dtype=dtype, device=like.device)


def _add_rows(
    base: Tensor, index: Tensor, value: Tensor, like: Tensor, order: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """A copy of `base` with `value` added to the rows at `index`, weighted, in the memory format of `like`.

    Args:
        order: all rows, those of `index` first.
    """
    if order is not None and like.stride() == base.stride() and (kernels := kernels_for(base)) and is_plain(value):
        if value.stride() != base.stride():
            value = _empty_rows(value.shape[0], base, value.dtype).copy_(value)
        added = _empty_rows(base.shape[0], base, base.dtype)
        kernels.add_rows(added, base, order, value, weight)
        return added
    value = weighted(value, weight).to(base.dtype)
    if (base.is_contiguous() and like.is_contiguous()) or is_transformed(base) or is_transformed(value):
        return base.index_add(0, index, value.contiguous())  # of one that is not, it adds number by number
    added, dims = empty_in_format(like, base.shape, base.dtype)
    added.copy_(base)
    added.permute(dims).index_add_(dims.index(0), index, value.permute(dims).contiguous())
    return added


def _first(shortcut: Tensor, branch: Tensor, branch_first: bool) -> Tensor:
    """The operand whose memory format the sum has: the first that has its rows whole.

    An empty branch has lost its own. Rows in pieces, as of a transposed result of attention, would be slow to take again.
    """
    for like in (branch, shortcut) if branch_first else (shortcut, branch):
        if like.shape[0] and like.stride(0) == max(like.stride()):
            return like
    return shortcut


def empty_in_format(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> tuple[Tensor, list[int]]:
    """A new tensor of a shape in the memory format of `like`, and its dims from the largest stride to the smallest.

    Its dtype is that of `like` too, if none is given. It is no view, so that what comes after may write into it.
    """
    steps = like.stride() if 0 not in like.stride() else [0] * like.dim()  # expanded: contiguous, as an add of it is
    order = by_stride(steps)
    strides, size = [0] * like.dim(), 1
    for dim in reversed(order):
        strides[dim], size = size, size * shape[dim]
    return torch.empty_strided(shape, strides, dtype=dtype or like.dtype, device=like.device), order


def by_stride(strides: Sequence[int]) -> list[int]:
    """Dims from the largest stride to the smallest; of equal ones, the first first."""
    return sorted(range(len(strides)), key=lambda dim: -strides[dim])


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, in a fifth of the time where nobody but autograd looks on: what `args` are called is not looked up."""
    if torch.compiler.is_compiling():
        return function.apply(*args)
    return _with_tangents(function, quick=not torch._C._are_functorch_transforms_active()).apply(*args)


@cache
def _with_tangents(function: type[torch.autograd.Function], quick: bool) -> type[torch.autograd.Function]:
    """The same with forward-mode derivatives, which Dynamo does not take.

    Args:
        quick: without a `setup_context` of its own, which only `torch.func` needs.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        result = function.forward(*args)
        function.setup_context(ctx, args, result)
        return result

    body: dict[str, Any] = {"jvp": staticmethod(function.tangents), "generate_vmap_rule": not quick}  # type: ignore[attr-defined]
    if quick:
        body |= {"forward": staticmethod(forward), "setup_context": torch.autograd.Function.setup_context}
    return type(function.__name__, (function,), body)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, index: Tensor) -> Tensor:
        return _select(value, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        value, ctx.index = inputs
        ctx.batch = value.shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        zeros = grad.new_zeros(()).expand(ctx.batch, *grad.shape[1:])
        return _add_rows(zeros, ctx.index, grad, grad), None

    @staticmethod
    def tangents(ctx: Any, value: Tensor, *_: Any) -> Tensor:
        return _select(value, ctx.index)


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, index: Tensor | None, order: Tensor | None) -> tuple[Tensor, Tensor]:
        # No rows are taken as some are: FSDP sees what enters a module in backward, on every rank at the same time.
        return value.detach(), value[:0].clone() if index is None else _select(value, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.index, ctx.order = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_taken: Tensor) -> Any:
        return grad if ctx.index is None else _add_rows(grad, ctx.index, grad_taken, grad, ctx.order), None, None

    @staticmethod
    def tangents(ctx: Any, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return _Fork.forward(value, ctx.index, ctx.order)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        shortcut: Tensor,
        branch: Tensor,
        index: Tensor,
        order: Tensor | None,
        weight: Tensor | None,
        branch_first: bool,
    ) -> Tensor:
        return _add_rows(shortcut, index, branch, _first(shortcut, branch, branch_first), order, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, branch, *ctx.rest = inputs
        ctx.index, _, ctx.weight, _ = ctx.rest
        ctx.dtype = branch.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, _select_as(ctx.dtype, grad, ctx.index, ctx.weight), None, None, None, None

    @staticmethod
    def tangents(ctx: Any, shortcut: Tensor, branch: Tensor, *_: Any) -> Tensor:
        return _Merge.forward(shortcut, branch, *ctx.rest)
