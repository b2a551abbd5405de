"""A graph that leaves branches out for a whole batch -> the graph for compiled code, where `torch.cond` does so.

Eager code runs a dropped branch on no rows. Compiled code cannot ask how a draw came out, so each branch becomes a function of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fxsd.run.rows import Rows, by_stride, fork, merge, take

BRANCH = "_conditional_branch"  # begins the names of the methods that compute branches


def conditional(graph: fx.Graph, targets: Collection[str]) -> tuple[fx.Graph, dict[str, fx.Graph]]:
    """A graph with a `torch.cond` at each of some sites, and the graphs of the methods for their branches, by name.

    Args:
        graph: is edited.
        targets: ops whose branch compiled code may leave out.
    """
    sites = [node for node in graph.nodes if node.op == "call_module" and node.target in targets]
    return graph, {f"{BRANCH}_{number}": _outlined(rows, f"{BRANCH}_{number}") for number, rows in enumerate(sites)}


def _outlined(rows: fx.Node, name: str) -> fx.Graph:
    """Moves the branch of a site out of the graph, and returns its own."""
    graph = rows.graph
    rows.target = f"{rows.target}.draw_whole"
    for user in list(rows.users):
        if user.target is fork:
            user.target = take
            for part in list(user.users):
                part.replace_all_uses_with(user if part.args[1] else user.args[0])  # type: ignore[arg-type]
                graph.erase_node(part)
    takes = {user: user.args[0] for user in rows.users if user.target is take}
    (added,) = (user for user in rows.users if user.target is merge)
    inside: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node is added:
            break
        if node in takes or not inside.keys().isdisjoint(node.all_input_nodes):
            inside[node] = None
    branch, values, modules = _copied(inside, takes, added)
    with graph.inserting_before(added):
        called = tuple(graph.get_attr(path) for path in modules)
        places = {takes[user]: user.kwargs.get("dim", 0) for user in takes}
        dims = tuple(places.get(value) for value in values)
        whole = graph.call_function(run_or_not, (graph.get_attr(name), rows, added.args[0], tuple(values), dims, called))
    added.replace_all_uses_with(whole)
    graph.erase_node(added)
    for node in reversed(inside):
        if node in takes:
            node.replace_all_uses_with(takes[node])  # type: ignore[arg-type]
        if not node.users:  # a number that goes with no row may be used elsewhere too
            graph.erase_node(node)
    return branch


def _copied(inside: Collection[fx.Node], takes: Mapping[fx.Node, Any], added: fx.Node) -> tuple[fx.Graph, list[fx.Node], list[str]]:
    """A graph of the nodes in a branch, what goes into it, and the paths of its modules, whose parameters go in too."""
    branch = fx.Graph()
    own: dict[fx.Node, fx.Node] = {}
    read = [arg for node in inside for arg in ([takes[node]] if node in takes else node.all_input_nodes)]
    values = list(dict.fromkeys(arg for arg in read if arg not in inside))
    for number, arg in enumerate(values):
        own[arg] = branch.placeholder(f"value_{number}")
    modules = list(dict.fromkeys(str(node.target) for node in inside if node.op == "call_module"))
    parameters = {path: branch.placeholder(f"parameters_{number}") for number, path in enumerate(modules)}
    for node in inside:
        if node in takes:
            own[node] = own[takes[node]]
        elif node.op == "call_module":
            path = str(node.target)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), own.__getitem__)
            own[node] = branch.call_function(torch.func.functional_call, (branch.get_attr(path), parameters[path], args, kwargs))
        else:
            own[node] = branch.node_copy(node, own.__getitem__)
    branch.output(own[added.args[1]])  # type: ignore[index]
    return branch, values, modules


def run_or_not(
    branch: Callable[..., Tensor],
    rows: Rows,
    shortcut: Tensor,
    values: Sequence[Any],
    dims: Sequence[int | None],
    modules: Sequence[nn.Module],
) -> Tensor:
    """`merge` with what `branch` gives for `values` and the parameters of `modules` where the draw says so, else the shortcut.

    Args:
        dims: which dim of each of `values` has the batch, if any.

    Tensors go in and out flat: both ways have to have results and gradients of one layout, and Inductor, which gives convolutions layouts
    of its own, does not keep the one that it promises. No two may share memory, so that what may be part of another is copied.
    """
    whole = _Layout.of(shortcut)
    kept = whole.flat(shortcut)
    layouts = [_Layout.of(value) if isinstance(value, Tensor) else None for value in values]
    flat = [
        kept if value is shortcut else value if layout is None else layout.flat(value).clone()
        for value, layout in zip(values, layouts, strict=True)
    ]
    seen: list[Tensor] = []
    states = []
    for module in modules:
        state = {}
        for name, parameter in module.named_parameters():
            layout = _Layout.of(parameter)
            tied = any(parameter is other for other in seen)
            state[name] = (layout, layout.flat(parameter).clone() if tied else layout.flat(parameter))
            seen.append(parameter)
        states.append(state)

    def run() -> Tensor:
        given = [value if layout is None else layout.of_flat(value) for value, layout in zip(flat, layouts, strict=True)]
        parameters = [{name: layout.of_flat(value) for name, (layout, value) in state.items()} for state in states]
        return whole.flat(merge(whole.of_flat(kept), branch(*given, *parameters), rows))

    with torch.no_grad():  # the dtype of the sum, which autocast decides
        none = [value if dim is None else value.narrow(dim, 0, 0) for value, dim in zip(values, dims, strict=True)]
        dtype = torch.promote_types(shortcut.dtype, branch(*none, *[dict(module.named_parameters()) for module in modules]).dtype)

    def leave_out() -> Tensor:
        return kept.to(dtype, copy=True)  # no result may be an input

    assert rows.keep is not None
    return whole.of_flat(torch.cond(rows.keep, run, leave_out))


class _Layout(NamedTuple):
    """How tensors become flat, and come back."""

    order: list[int]  # dims from the largest stride to the smallest
    shape: list[int]  # in that order

    @staticmethod
    def of(like: Tensor) -> _Layout:
        order = by_stride(like.stride())
        return _Layout(order, [like.shape[dim] for dim in order])

    def flat(self, value: Tensor) -> Tensor:
        return value.permute(self.order).reshape(-1)

    def of_flat(self, flat: Tensor) -> Tensor:
        return flat.view(self.shape).permute([self.order.index(dim) for dim in range(len(self.order))])
