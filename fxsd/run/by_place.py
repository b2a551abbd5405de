"""Rows drawn, taken out and put back in compiled code, where each row's place among those that run is known.

Each of the three is one operator to Dynamo, which takes long to follow Python. What it does is compiled like all else, but for draws on
the CPU: the compiler calls kernels for them in any case, and takes long to plan them one by one.

Caches of compiled code know an operator by its name: one that does something else needs another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, library


class Places(NamedTuple):
    """Where the rows of a batch are among those that run, `[batch]` each.

    Attributes:
        place: that of each row, or any if it does not run.
        ran: does it?
        added: is the branch added to it? No more rows are than run.
    """

    place: Tensor
    ran: Tensor
    added: Tensor


def draw_rows(kept: Tensor, batch: int, run: int) -> tuple[Tensor, Places]:
    """Draws which rows of a batch run, `[run]`, and which of them are added.

    Args:
        kept: how many rows are added for certain, and the probability of one more.
        batch: how many rows there are.
        run: how many run: as many as may be added, or more, and at least one.
    """
    draw = _draw_rows if _is_followed() or kept.device.type != "cpu" else torch.ops.fxsd.draw_rows.default
    taken, *places = draw(kept, batch, run)
    return taken, Places(*places)


def take_rows(value: Tensor, taken: Tensor, places: Places) -> Tensor:
    """The rows of `value` that run: `[batch, ...]` -> `[run, ...]`."""
    take = _TakeRows.apply if _is_followed() else torch.ops.fxsd.take_rows.default
    return take(value, taken, places.place, places.ran)  # type: ignore[no-any-return]


def merge_rows(shortcut: Tensor, branch: Tensor, taken: Tensor, places: Places, weight: Tensor | None) -> Tensor:
    """`shortcut` plus the weighted branch in the rows that are added: `[batch, ...]`, `[run, ...]` -> `[batch, ...]`."""
    merge = _MergeRows.apply if _is_followed() else torch.ops.fxsd.merge_rows.default
    return merge(shortcut, branch, taken, places.place, places.added, weight)  # type: ignore[no-any-return]


def _is_followed() -> bool:
    """Must compilers follow the Python? What is exported is to run without this library, and functions of `torch.func` need rules."""
    return torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()


def weighted(branch: Tensor, weight: Tensor | None) -> Tensor:
    """The branch times a number, one for each row, or None for one."""
    if weight is None:
        return branch
    weight = weight.to(branch.dtype)
    return branch * (_column(weight, branch) if weight.dim() else weight)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """One value for each row of `like`, in a shape that broadcasts to its."""
    return values.view([-1] + [1] * (like.dim() - 1))


def _only(value: Tensor, where: Tensor) -> Tensor:
    """`value` with zeros in the rows where `where` does not hold."""
    return torch.where(_column(where, value), value, 0)


def _draw_rows(kept: Tensor, batch: int, run: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = torch.randperm(batch, device=kept.device)
    place = order.argsort()
    whole, last = kept
    added = place < whole + torch.binomial(torch.ones_like(last), last)
    return order[:run], place.clamp(max=run - 1), place < run, added


def _drawn(kept: Tensor, batch: int, run: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `draw_rows` returns, with nothing in it."""
    place, ran, added = (kept.new_empty(batch, dtype=dtype) for dtype in (torch.long, torch.bool, torch.bool))
    return kept.new_empty(run, dtype=torch.long), place, ran, added


# Reading each row's value at its place fuses with what comes after; writing by index would need atomic adds.
class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, taken: Tensor, place: Tensor, ran: Tensor) -> Tensor:
        return value.index_select(0, taken)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, *rest = inputs
        ctx.save_for_backward(*rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _, place, ran = ctx.saved_tensors
        return _only(grad.index_select(0, place), ran), None, None, None


class _MergeRows(torch.autograd.Function):
    @staticmethod
    def forward(shortcut: Tensor, branch: Tensor, taken: Tensor, place: Tensor, added: Tensor, weight: Tensor | None) -> Tensor:
        dtype = torch.promote_types(shortcut.dtype, branch.dtype)
        return shortcut + _only(weighted(branch, weight).to(dtype).index_select(0, place), added)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        shortcut, branch, *rest = inputs
        ctx.save_for_backward(*rest)
        ctx.dtypes = shortcut.dtype, branch.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        taken, _, added, weight = ctx.saved_tensors
        own, other = ctx.dtypes
        return grad.to(own), weighted(_only(grad, added).index_select(0, taken).to(other), weight), None, None, None, None


_library: Any = library.Library("fxsd", "DEF")  # type: ignore[no-untyped-call]
_library.define("take_rows(Tensor value, Tensor taken, Tensor place, Tensor ran) -> Tensor")
_library.define("merge_rows(Tensor shortcut, Tensor branch, Tensor taken, Tensor place, Tensor added, Tensor? weight) -> Tensor")
_library.define(
    "draw_rows(Tensor kept, SymInt batch, SymInt run) -> (Tensor taken, Tensor place, Tensor ran, Tensor added)",
    tags=(torch.Tag.nondeterministic_seeded,),  # two draws are not one
)
_library.impl("take_rows", _TakeRows.apply, "CompositeImplicitAutograd")
_library.impl("merge_rows", _MergeRows.apply, "CompositeImplicitAutograd")
_library.impl("draw_rows", _draw_rows, "CompositeExplicitAutograd")
library.register_fake("fxsd::draw_rows", _drawn, lib=_library)
