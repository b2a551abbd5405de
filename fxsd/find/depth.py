"""Where in the network a site stands: the block that it belongs to, and the depth of that block.

A block is the nearest numbered module around the add (`stages.1.blocks.3`), so attention and MLP of a transformer layer share a
depth. Depth follows the data: the longest path of blocks that lead to this one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import networkx as nx
from torch import fx

from fxsd.find.residual import Residual

Inside: TypeAlias = "Mapping[fx.Node, Sequence[fx.Graph]]"
NOTHING: Inside = {}
_Value: TypeAlias = "str | fx.Node | fx.Graph | None"

_NUMBER = re.compile(r"(^|\.)\d+$")
_NUMBERED = re.compile(r"\d$")  # encoder_layer_0, block1-0


def execution_order(graphs: Sequence[fx.Graph], inside: Inside) -> list[fx.Node]:
    """The nodes of all graphs as they run: those of a graph that a node calls stand before it.

    Args:
        graphs: in the order in which they run.
        inside: the nodes that call other graphs.
    """
    order: list[fx.Node] = []
    done: set[fx.Graph] = set()

    def walk(graph: fx.Graph) -> None:
        if graph not in done:
            done.add(graph)
            for node in graph.nodes:
                for inner in inside.get(node, ()):
                    walk(inner)
                order.append(node)

    for graph in graphs:
        walk(graph)
    return order


def depths(graphs: Sequence[fx.Graph], residuals: Sequence[Residual], depth_by: str = "block", inside: Inside = NOTHING) -> list[int]:
    """The depth of each residual add, from 0.

    Args:
        graphs: the graphs that hold them, in the order in which they run.
        residuals: in order.
        depth_by: `"block"` or `"add"`, where every add is a block of its own.
        inside: the nodes that call other graphs.
    """
    blocks = _blocks(residuals) if depth_by == "block" else [f"{r.module}:{r.add.name}" for r in residuals]
    block_of = {residual.add: block for residual, block in zip(residuals, blocks, strict=True)}
    order = nx.DiGraph()  # of blocks, and of values in which paths from several blocks meet
    order.add_nodes_from(blocks)
    latest: dict[fx.Node, _Value] = {}  # what of these a value comes from last
    ends: dict[fx.Graph, _Value] = {}  # the same of what a graph returns

    def meet(before: set[_Value], here: _Value) -> _Value:
        before.discard(None)
        if len(before) < 2:
            return next(iter(before), None)
        order.add_edges_from((other, here) for other in before)
        return here

    def walk(graph: fx.Graph, start: _Value) -> _Value:
        end = start
        for node in graph.nodes:
            before = {start} if node.op == "placeholder" else {latest[arg] for arg in node.all_input_nodes}
            for inner in inside.get(node, ()):
                before = before | {ends[inner]} if inner in ends else {walk(inner, meet(before, inner))}
            if node in block_of:
                end = block_of[node]
                order.add_edges_from((other, end) for other in before - {None, end})
            else:
                end = meet(before, node)
            latest[node] = end
        ends[graph] = end  # of the output, which comes last
        return end

    end: _Value = None
    for graph in graphs:
        if graph not in ends:
            end = walk(graph, end)
    # Blocks that lead to each other in both directions, as interleaved streams do, share a depth.
    groups = nx.condensation(order)
    group_of = groups.graph["mapping"]
    counted = {group_of[block] for block in blocks}
    depth: dict[int, int] = {}
    for group in nx.topological_sort(groups):
        depth[group] = max((depth[other] + (other in counted) for other in groups.predecessors(group)), default=0)
    return [depth[group_of[block]] for block in blocks]


def _blocks(residuals: Sequence[Residual]) -> list[str]:
    # A number that is around every site tells none of them apart: Sequential(normalize, model).
    around = [set(prefixes(r.module)) for r in residuals]
    common = set.intersection(*around) if len(around) > 1 else set()
    return [_block(residual, common) for residual in residuals]


def _block(residual: Residual, common: set[str]) -> str:
    called = _calls(residual)
    for pattern in (_NUMBER, _NUMBERED):
        for path in reversed(prefixes(residual.module)):
            if pattern.search(path) and path not in common:
                # A module that runs twice is a block each time. A mere container counts with the module that runs around it.
                return next((f"{path} in {called[around]}" for around in reversed(prefixes(path)) if around in called), path)
    return f"{called.get(residual.module, residual.module)}:{residual.add.name}"


def prefixes(path: str) -> list[str]:
    """The paths of the modules around and including `path`, outermost first, without the root."""
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _calls(residual: Residual) -> dict[str, str]:
    """path -> the same told apart by call, of the modules that run around the add."""
    stack = residual.add.meta.get("nn_module_stack") or {}
    return {value[0]: str(key) for key, value in stack.items()}
