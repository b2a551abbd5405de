"""Activation checkpointing: what a model ran under `torch.utils.checkpoint` runs under it in its graph too.

The graph itself stays flat, so that sites are found as elsewhere; its nodes carry a mark. In the code that runs, nodes of one mark are a
function of their own:

before                                    after
    norm = self.blocks.0.norm(x)              add = checkpoint(self._checkpointed_train_0, x, use_reentrant = False)
    drop = self.blocks.0.stochastic_depth(norm)
    add = x + drop

Draws lie inside, and `checkpoint` restores the state of the generators, so what is computed again is what was drawn first.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.utils.checkpoint import checkpoint

MARK = "fxsd_checkpoint"  # the key in node.meta


@dataclass(frozen=True)
class Checkpoint:
    """One call of `checkpoint` while the model was traced.

    Attributes:
        number: which one.
        options: its keywords that say how.
    """

    number: int
    options: dict[str, Any] = field(compare=False)


def is_checkpointed(graph: fx.Graph) -> bool:
    return any(MARK in node.meta for node in graph.nodes)


def outline(graph: fx.Graph, prefix: str) -> dict[str, fx.Graph]:
    """Moves the nodes of each mark out of `graph`, and returns the graphs of the methods that compute them, by name."""
    return {name: _outlined(graph, nodes, name) for nodes in list(_spans(graph)) for name in [f"{prefix}_{nodes[0].meta[MARK].number}"]}


def _spans(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """From the first node of each mark to the last: what rewriting has put in between belongs there."""
    marked: dict[Checkpoint, list[int]] = {}
    nodes = list(graph.nodes)
    for place, node in enumerate(nodes):
        if MARK in node.meta and node.op != "get_attr":  # the same tensor, wherever it is read
            marked.setdefault(node.meta[MARK], []).append(place)
    for places in marked.values():
        yield [node for node in nodes[places[0] : places[-1] + 1] if node.op != "get_attr"]


def _outlined(graph: fx.Graph, nodes: list[fx.Node], name: str) -> fx.Graph:
    inside = fx.Graph()
    own: dict[fx.Node, fx.Node] = {}
    members = set(nodes)
    given = list(dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if arg not in members))
    for value in given:
        own[value] = inside.placeholder(value.name)
    for node in nodes:
        own[node] = inside.node_copy(node, own.__getitem__)
    results = [node for node in nodes if any(user not in members for user in node.users)]
    inside.output(own[results[0]] if len(results) == 1 else tuple(own[node] for node in results))
    with graph.inserting_after(nodes[-1]):
        method = graph.get_attr(name)
    with graph.inserting_after(method):
        call = graph.call_function(checkpoint, (method, *given), nodes[0].meta[MARK].options)
    after = call
    for place, node in enumerate(results):
        result = call
        if len(results) > 1:
            with graph.inserting_after(after):
                result = after = graph.call_function(operator.getitem, (call, place))
        node.replace_all_uses_with(result, lambda user: user not in members)
    for node in reversed(nodes):
        graph.erase_node(node)
    return inside
