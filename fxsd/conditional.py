"""A graph that leaves branches out for a whole batch -> the graph for compiled code, where `torch.cond` does so.

Eager code runs a dropped branch on no rows. Compiled code cannot ask how a draw came out, so each branch becomes a function of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsd.skip import Rows, SkipStochasticDepth, fork, merge, take

BRANCH = "_conditional_branch"  # begins the names of the methods that compute branches


def conditional(graph: fx.Graph, ops: Mapping[str, SkipStochasticDepth]) -> tuple[fx.Graph, dict[str, fx.Graph]]:
    """A graph with a `torch.cond` at each site of `ops`, and the graphs of the methods for the branches, by name.

    Args:
        graph: is edited.
        ops: those whose branch may be left out by compiled code, by their target in `graph`.
    """
    sites = [node for node in graph.nodes if node.op == "call_module" and node.target in ops]
    branches = {f"{BRANCH}_{number}": _outlined(rows, f"{BRANCH}_{number}") for number, rows in enumerate(sites)}
    return graph, branches


def _outlined(rows: fx.Node, name: str) -> fx.Graph:
    """Moves the branch of a site out of the graph, and returns its own."""
    graph = rows.graph
    rows.target = f"{rows.target}.draw_whole"
    for user in list(rows.users):
        if user.target is fork:
            shortcut, taken = (next((part for part in user.users if part.args[1] == place), None) for place in (0, 1))
            if shortcut is not None:
                shortcut.replace_all_uses_with(user.args[0])  # type: ignore[arg-type]
                graph.erase_node(shortcut)
            if taken is not None:
                user.target, user.args = take, user.args
                taken.replace_all_uses_with(user)
                graph.erase_node(taken)
    takes = {user: user.args[0] for user in rows.users if user.target is take}
    (added,) = (user for user in rows.users if user.target is merge)
    inside: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node in takes or (node is not added and not inside.keys().isdisjoint(node.all_input_nodes)):
            inside[node] = None
        if node is added:
            break
    return _moved(rows, added, takes, inside, name)


def _moved(rows: fx.Node, added: fx.Node, takes: Mapping[fx.Node, Any], inside: dict[fx.Node, None], name: str) -> fx.Graph:
    branch, graph = fx.Graph(), rows.graph
    own: dict[fx.Node, fx.Node] = {}
    read = [arg for node in inside for arg in ([takes[node]] if node in takes else node.all_input_nodes)]
    outside = dict.fromkeys(arg for arg in read if arg not in inside)
    for arg in outside:
        own[arg] = branch.placeholder(arg.name)
    for node in inside:
        if node in takes:
            own[node] = own[takes[node]]
            continue
        own[node] = new = branch.node_copy(node, own.__getitem__)
        if new.op == "call_module":
            with branch.inserting_before(new):
                module = branch.get_attr(str(new.target))
            new.op, new.target, new.args = "call_function", call_in_layout, (module, *new.args)
    shortcut, result, _, _ = added.args
    branch.output(own[result])  # type: ignore[index]
    with graph.inserting_before(added):
        method = graph.get_attr(name)
        whole = graph.call_function(run_or_not, (method, rows, shortcut, *outside))
    added.replace_all_uses_with(whole)
    graph.erase_node(added)
    for node in reversed(inside):
        graph.erase_node(node)
    return branch


def run_or_not(branch: Callable[..., Tensor], rows: Rows, shortcut: Tensor, *values: Any) -> Tensor:
    """`merge` with what `branch` gives for `values` where the draw says so, else the shortcut.

    Both ways have to give results, and gradients, of one layout: that of the shortcut, and of what the gradients are for.
    """

    def run() -> Tensor:
        return merge(_in_layout(shortcut), branch(*map(_in_layout, values)), rows)

    def leave_out() -> Tensor:
        return _in_layout(shortcut).clone()  # no result may be an input

    assert rows.keep is not None
    return torch.cond(rows.keep, run, leave_out)  # type: ignore[no-any-return]


def call_in_layout(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a module so that the gradients of its parameters have the layout of the parameters."""
    parameters = {name: _in_layout(parameter) for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, parameters, args, kwargs)


def _in_layout(value: Any) -> Any:
    """`value`, whose gradient will have its layout."""
    return _InLayout.apply(value) if isinstance(value, Tensor) and value.is_floating_point() else value


class _InLayout(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0]).copy_(grad)
