"""Who can reach whom: ancestors, regions between two nodes, and dominators of a captured graph."""

from __future__ import annotations

from torch import fx

from fxsd.dominators import Dominators
from fxsd.values import Kind, activation_inputs, is_activation


class Reach:
    """Answers about one graph, for which node order is topological order.

    Args:
        graph: a captured graph.
        kinds: the kind of each node, from `fxsd.values.kinds`.
    """

    def __init__(self, graph: fx.Graph, kinds: dict[fx.Node, Kind]) -> None:
        self.kinds = kinds
        self.index = {node: i for i, node in enumerate(graph.nodes)}
        self._dominators: Dominators[fx.Node] = Dominators()
        for node in graph.nodes:
            self._dominators.add(node, activation_inputs(node, kinds))

    def is_ancestor(self, node: fx.Node, of: fx.Node) -> bool:
        """Is `of` computed from `node`, among other things?"""
        if node is of or len(node.users) < 2 or self.index[node] > self.index[of]:
            return False
        if is_activation(self.kinds[node]) and self._dominators.dominates(node, of):
            return True
        return node in self.past(of, self.index[node])

    def common_fork(self, a: fx.Node, b: fx.Node) -> fx.Node | None:
        """The last activation through which everything goes that `a` and `b` are computed from; None if there is none."""
        return self._dominators.nearest_common(a, b)

    def past(self, node: fx.Node, floor: int = 0) -> set[fx.Node]:
        """The ancestors of `node`, itself included, from place `floor` of the order on."""
        seen, stack = {node}, [node]
        while stack:
            for arg in stack.pop().all_input_nodes:
                if arg not in seen and self.index[arg] >= floor and self.kinds[arg] is not Kind.SHAPE:
                    seen.add(arg)
                    stack.append(arg)
        return seen

    def region(self, fork: fx.Node, end: fx.Node) -> list[fx.Node]:
        """The nodes on the paths from `fork` (left out) to `end` (kept), in order."""
        inside: dict[fx.Node, None] = {}
        for node in sorted(self.past(end, self.index[fork] + 1), key=self.index.__getitem__):
            if any(arg is fork or arg in inside for arg in node.all_input_nodes):
                inside[node] = None
        return list(inside)


def cuts(region: list[fx.Node], fork: fx.Node) -> set[fx.Node]:
    """The nodes of a region that every path from `fork` to its end passes.

    In topological order these are the nodes that no edge of the region jumps over.
    """
    place = {fork: -1, **{node: i for i, node in enumerate(region)}}
    furthest = dict.fromkeys(place, -1)  # the furthest user inside the region
    for node in region:
        for arg in node.all_input_nodes:
            if arg in place:
                furthest[arg] = max(furthest[arg], place[node])
    found, reach = set(), furthest[fork]
    for node in region:
        if reach <= place[node]:
            found.add(node)
        reach = max(reach, furthest[node])
    return found
