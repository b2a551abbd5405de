"""Which dim of an activation holds the samples: dim 0 of what enters the model, followed through what moves dims.

Models that take `[batch, sequence, channels]` may compute in `[sequence, batch, channels]`: there the samples are in dim 1. Shapes are not
needed, so that it is known without example inputs. Where dims are merged or split what is known ends, unless the samples come first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from fxsd.find.values import Kind, is_activation, op_name

# Their results are several tensors, of which an index takes one.
_SEVERAL = {
    "chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "unbind", "max", "min", "topk", "sort",
    "median", "mode", "var_mean", "std_mean", "multi_head_attention_forward", "tuple", "list",
}  # fmt: skip


def sample_dims(graph: fx.Graph, kinds: Mapping[fx.Node, Kind]) -> dict[fx.Node, int]:
    """The dim of each activation that holds the samples, where it is known; of several tensors in one value, that of each.

    Args:
        graph: is only read.
        kinds: of its nodes, from `fxsd.find.values.kinds`.
    """
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = 0
        elif is_activation(kinds[node]):
            source = next((arg for arg in node.all_input_nodes if arg in found), None)
            dim = None if source is None else _followed(node, source, found[source], kinds)
            if dim is not None:
                found[node] = dim
    return found


def _followed(node: fx.Node, source: fx.Node, dim: int, kinds: Mapping[fx.Node, Kind]) -> int | None:
    """The dim of `node` that `dim` of its first activation becomes; None if that cannot be told without shapes."""
    if node.op == "call_module":
        return dim
    name = op_name(node)
    if name == "getitem" and isinstance(node.args[1], int):
        called = source.op == "call_module" and kinds[source] is Kind.MIX
        several = source.op == "placeholder" or called or kinds[source] is Kind.OPAQUE or op_name(source) in _SEVERAL
        return dim if several else _indexed(dim, (node.args[1],))
    if name == "einsum":
        return _einsum(node, source, dim)
    if name in ("assign_item", "assign_property"):
        return dim if source is node.args[0] else None
    follow = _FOLLOW.get(name)
    return dim if follow is None else follow(node, dim)


def _argument(node: fx.Node, place: int, *names: str) -> Any:
    """An argument by its place or one of its names, None if it is not given."""
    named = next((node.kwargs[name] for name in names if name in node.kwargs), None)
    return node.args[place] if place < len(node.args) else named


def _swapped(node: fx.Node, dim: int) -> int | None:
    first, second = _argument(node, 1, "dim0", "axis0"), _argument(node, 2, "dim1", "axis1")
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    if first < 0 or second < 0:  # of these only dim 0 is not one
        return dim if dim == 0 and 0 not in (first, second) else None
    return {first: second, second: first}.get(dim, dim)


def _permuted(node: fx.Node, dim: int) -> int | None:
    order = _argument(node, 1, "dims")
    order = list(order if isinstance(order, (tuple, list)) else node.args[1:])
    if not all(isinstance(place, int) for place in order):
        return None
    places = [place % len(order) for place in order]
    return places.index(dim) if dim in places else None


def _moved(node: fx.Node, dim: int) -> int | None:
    start, end = _argument(node, 1, "source"), _argument(node, 2, "destination")
    if not isinstance(start, int) or not isinstance(end, int) or start < 0 or end < 0:
        return None
    if dim == start:
        return end
    without = dim - (start < dim)
    return without + (end <= without)


def _flattened(node: fx.Node, dim: int) -> int | None:
    first, last = _argument(node, 1, "start_dim"), _argument(node, 2, "end_dim")
    first, last = 0 if first is None else first, -1 if last is None else last
    if dim == 0 or (isinstance(first, int) and first > dim):
        return dim
    if not isinstance(first, int) or not isinstance(last, int):
        return None
    return dim - last + first if 0 <= first <= last < dim else None


def _unflattened(node: fx.Node, dim: int) -> int | None:
    place, sizes = _argument(node, 1, "dim"), _argument(node, 2, "sizes")
    if not isinstance(place, int) or not isinstance(sizes, (tuple, list)):
        return None
    if place == dim:  # the samples are what has no fixed number
        return next((dim + each for each, size in enumerate(sizes) if not isinstance(size, int) or size < 0), None)
    if place < 0:
        return dim if dim == 0 else None
    return dim + len(sizes) - 1 if place < dim else dim


def _more(node: fx.Node, dim: int) -> int | None:
    """A dim comes in."""
    place = _argument(node, 1, "dim") or 0
    return dim + (0 <= place <= dim) if isinstance(place, int) else None


def _less(node: fx.Node, dim: int) -> int | None:
    """A dim goes."""
    place = _argument(node, 1, "dim") or 0
    if not isinstance(place, int) or place == dim or (place < 0 and dim):
        return None
    return dim - (0 <= place < dim)


def _squeezed(node: fx.Node, dim: int) -> int | None:
    place = _argument(node, 1, "dim")
    return dim if dim == 0 or place == dim else dim - (place < dim) if isinstance(place, int) and place >= 0 else None


def _reduced(node: fx.Node, dim: int) -> int | None:
    if len(node.args) > 1 and isinstance(node.args[1], fx.Node):  # the larger of two
        return dim
    first = 2 if op_name(node) in ("norm", "vector_norm") else 1
    given, keep = _argument(node, first, "dim"), _argument(node, first + 1, "keepdim")
    places = list(given) if isinstance(given, (tuple, list)) else [given]
    if not all(isinstance(place, int) for place in places) or dim in places:
        return None
    return dim if keep else dim - sum(0 <= place < dim for place in places)


def _einsum(node: fx.Node, source: fx.Node, dim: int) -> int | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation or source not in operands:
        return dim if dim == 0 else None
    inputs, _, result = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")[operands.index(source)]
    return result.index(letters[dim]) if dim < len(letters) and letters[dim] in result else None


def _indexed(dim: int, index: tuple[Any, ...]) -> int | None:
    place, made = 0, 0  # the next dim, and how many the result has so far
    for item in index:
        if item is None:
            made += 1
        elif item is Ellipsis or place == dim:
            break
        else:
            place, made = place + 1, made + (not isinstance(item, int))
    else:
        item = Ellipsis
    return None if place == dim and isinstance(item, int) else made + dim - place


def _first_stays(node: fx.Node, dim: int) -> int | None:
    return 0 if dim == 0 else None


_FOLLOW: dict[str, Callable[[fx.Node, int], int | None]] = {
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _swapped),
    **dict.fromkeys(("t", "T", "H"), lambda node, dim: 1 - dim if dim < 2 else None),
    **dict.fromkeys(("mT", "mH", "adjoint", "view", "reshape", "view_as", "reshape_as", "ravel"), _first_stays),
    **dict.fromkeys(("movedim", "moveaxis"), _moved),
    **dict.fromkeys(("unsqueeze", "stack"), _more),
    **dict.fromkeys(("select", "unbind"), _less),
    **dict.fromkeys(("mean", "sum", "nansum", "nanmean", "amax", "amin", "max", "min", "norm", "vector_norm", "var", "std"), _reduced),
    **dict.fromkeys(("prod", "all", "any", "logsumexp", "median", "mode", "count_nonzero", "var_mean", "std_mean"), _reduced),
    "permute": _permuted,
    "flatten": _flattened,
    "unflatten": _unflattened,
    "squeeze": _squeezed,
    "getitem": lambda node, dim: _indexed(dim, index if isinstance(index := node.args[1], tuple) else (index,)),
}
