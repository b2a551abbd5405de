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

from fxsd.residual import Residual

Inside: TypeAlias = "Mapping[fx.Node, Sequence[fx.Graph]]"
NOTHING: Inside = {}

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
    blocks = _blocks(residuals) if depth_by == "block" else [r.add.name for r in residuals]
    block_of = {residual.add: block for residual, block in zip(residuals, blocks, strict=True)}
    order = nx.DiGraph()
    order.add_nodes_from(blocks)
    latest: dict[fx.Node, frozenset[str]] = {}  # the blocks that a value comes from, with none between
    ends: dict[fx.Graph, frozenset[str]] = {}  # the same of what a graph returns

    def walk(graph: fx.Graph, start: frozenset[str]) -> frozenset[str]:
        if graph in ends:  # called again
            return start | ends[graph]
        before = start
        for node in graph.nodes:
            before = start if node.op == "placeholder" else frozenset().union(*(latest[arg] for arg in node.all_input_nodes))
            for inner in inside.get(node, ()):
                before = walk(inner, before)
            if node in block_of:
                block = block_of[node]
                order.add_edges_from((other, block) for other in before if other != block)
                before = frozenset([block])
            latest[node] = before
        ends[graph] = before  # of the output, which comes last
        return before

    end: frozenset[str] = frozenset()
    for graph in graphs:
        end = walk(graph, end)
    # Blocks that lead to each other in both directions, as interleaved streams do, share a depth.
    groups = nx.condensation(order)
    depth = {
        block: generation
        for generation, members in enumerate(nx.topological_generations(groups))
        for group in members
        for block in groups.nodes[group]["members"]
    }
    return [depth[block] for block in blocks]


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
