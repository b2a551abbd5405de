"""Who can reach whom in a captured graph, and what lies between: grown node by node, each question in about logarithmic time.

What lies between a node and a dominator of it is the union of what lies between each dominator on the way and the next. The
*summary* of such a part is a union, too, so that it can be kept for every node and for every jump along the tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

from torch import fx

from fxsd.dominators import Dominators
from fxsd.values import Kind, activation_inputs, bases, is_activation, written

MANY = 4  # a summary names at most as many nodes
HEAVY = {Kind.LINEAR, Kind.MIX, Kind.OPAQUE}
_TABLES = 16  # tables of paths that are kept


@dataclass(frozen=True, slots=True)
class Summary:
    """What a part of a graph holds. Parts may overlap: nothing is counted twice.

    Attributes:
        kinds: of all its nodes.
        heavy: its linear, mixing and opaque nodes; any `MANY` of them where there are more.
        sealed: it holds opaque calls that may have parameters.
        sites: it holds nodes that were marked when they were added.
    """

    kinds: frozenset[Kind] = frozenset()
    heavy: tuple[fx.Node, ...] = ()
    sealed: bool = False
    sites: bool = False

    def __or__(self, other: Summary) -> Summary:
        if other is self or other is NOTHING:
            return self
        kinds = self.kinds if other.kinds <= self.kinds else self.kinds | other.kinds
        heavy = self.heavy
        if len(heavy) < MANY and other.heavy:
            heavy = (*heavy, *(node for node in other.heavy if node not in heavy))[:MANY]
        sealed, sites = self.sealed or other.sealed, self.sites or other.sites
        if kinds is self.kinds and len(heavy) == len(self.heavy) and sealed is self.sealed and sites is self.sites:
            return self
        return Summary(kinds, heavy, sealed, sites)


NOTHING = Summary()
_ONLY = {kind: Summary(frozenset([kind])) for kind in Kind}


class Reach:
    """Answers about the nodes of a graph that were added so far, in graph order, which is topological order.

    Args:
        graph: a captured graph.
        kinds: the kind of each node, from `fxsd.values.kinds`.
    """

    def __init__(self, graph: fx.Graph, kinds: dict[fx.Node, Kind]) -> None:
        self.kinds = kinds
        self.index = {node: i for i, node in enumerate(graph.nodes)}
        self._tree: Dominators[fx.Node] = Dominators()
        self._inputs: dict[fx.Node, list[fx.Node]] = {}
        self._own: dict[fx.Node, Summary] = {}
        self._local: dict[fx.Node, Summary] = {}  # between a node and its immediate dominator
        self._stride: dict[fx.Node, Summary] = {}  # between a node and its jump
        self._marked: set[fx.Node] = set()
        self._holding: set[fx.Node] = set()  # marked nodes may lie between one of these and its immediate dominator
        self._up: dict[fx.Node, fx.Node | None] = {}  # itself if marked or holding, else a dominator on the way to one that is
        self._paths: dict[fx.Node, tuple[int, dict[fx.Node, Summary]]] = {}  # the last ones that were asked for
        self._fed: dict[fx.Node, _Descendants] = {}

    def add(self, node: fx.Node, marked: bool = False) -> None:
        """Adds the next activation of the graph."""
        inputs = self._inputs[node] = activation_inputs(node, self.kinds)
        self._tree.add(node, inputs)
        above, jump = self._tree.parent[node], self._tree.jump[node]
        local = self._own[node] = self._summary_of(node, marked)
        for arg in inputs:
            if arg is not above:
                local = local | self._down(above, arg)
        self._local[node] = local
        # A jump over several dominators is made of those of the first of them.
        self._stride[node] = local if jump is above else local | self._stride[above] | self._stride[self._tree.jump[above]]  # type: ignore[index]
        if marked:
            self._marked.add(node)
        if len(inputs) > 1 and self._holds(node):
            self._holding.add(node)
        self._up[node] = node if node in self._marked or node in self._holding else above

    def _summary_of(self, node: fx.Node, marked: bool) -> Summary:
        kind = self.kinds[node]
        if kind not in HEAVY and not marked:
            return _ONLY[kind]
        sealed = kind is Kind.OPAQUE and (node.op != "call_function" or any(self.kinds[a] is Kind.CONSTANT for a in node.all_input_nodes))
        return Summary(frozenset([kind]), (node,) if kind in HEAVY else (), sealed, marked)

    # --- who comes from whom ------------------------------------------------------------------------------------------------

    def is_ancestor(self, node: fx.Node, of: fx.Node) -> bool:
        """Is `of` an activation that is computed from `node`, or from a value that it shares with other users of `node`?"""
        if node is of or self.index[node] > self.index[of]:
            return False
        if not is_activation(self.kinds[node]):
            return of in self._descendants(node, self.index[of])
        if self._tree.dominates(node, of):
            return True
        merge = self._merge(node, of)
        return len(self._inputs[merge]) > 1 and self.index[node] < self.index[merge] and node in self._paths_to(merge, node)

    def is_behind(self, node: fx.Node, of: fx.Node) -> bool:
        """Does every path to the activation `of` pass `node`? None passes a constant only."""
        return is_activation(self.kinds[node]) and self._tree.dominates(node, of)

    def common_fork(self, a: fx.Node, b: fx.Node) -> fx.Node | None:
        """The last activation through which everything goes that `a` and `b` are computed from; None if there is none."""
        return self._tree.nearest_common(a, b)

    def _merge(self, node: fx.Node, of: fx.Node) -> fx.Node:
        """The first node through which everything goes from `node`, which does not dominate `of`, to `of`."""
        return self._tree.first_below(self._tree.nearest_common(node, of), of)

    def _descendants(self, constant: fx.Node, limit: int) -> set[fx.Node]:
        if constant not in self._fed:
            self._fed[constant] = _Descendants(self, constant)
        return self._fed[constant].until(limit)

    # --- what lies between --------------------------------------------------------------------------------------------------

    def summary(self, fork: fx.Node, end: fx.Node) -> Summary:
        """What the paths from `fork`, an ancestor of `end`, to `end` hold; `fork` is left out."""
        if not is_activation(self.kinds[fork]):
            found = NOTHING
            for node in self.fed(fork, end):
                found = found | self._own[node]
            return found
        if self._tree.dominates(fork, end):
            return self._down(fork, end)
        merge = self._merge(fork, end)
        return self._paths_to(merge, fork)[fork] | self._down(merge, end)

    def region(self, fork: fx.Node, end: fx.Node) -> list[fx.Node]:
        """The activations on the paths from `fork` (left out) to `end` (kept), in order. As slow as they are many."""
        if not is_activation(self.kinds[fork]):
            return sorted(self.fed(fork, end), key=self.index.__getitem__)
        inside: dict[fx.Node, None] = {}
        for node in self._past(end, self.index[fork] + 1):
            if any(arg is fork or arg in inside for arg in self._inputs[node]):
                inside[node] = None
        return list(inside)

    def fed(self, constant: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
        """The activations on the paths from a constant to `end`, nearest to `end` first."""
        below = self._descendants(constant, self.index[end])
        seen, stack = {end}, [end]
        while stack:
            yield (node := stack.pop())
            new = [arg for arg in self._inputs[node] if arg in below and arg not in seen]
            seen.update(new)
            stack.extend(new)

    # --- marked nodes -------------------------------------------------------------------------------------------------------

    def marked_in_series(self, fork: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
        """The marked nodes that every path from `fork` to `end` passes, nearest to `end` first."""
        if not self.is_behind(fork, end):
            region = self.region(fork, end)
            always = _cuts(region, fork)
            yield from (node for node in reversed(region) if node in always and node in self._marked)
            return
        node = self._first_of_interest(end, fork)
        while node is not None:
            if node in self._marked:
                yield node
            node = self._first_of_interest(self._tree.parent[node], fork)

    def marked_between(self, fork: fx.Node, end: fx.Node) -> list[fx.Node]:
        """All marked nodes on the paths from `fork` to `end`, in order."""
        if not self.is_behind(fork, end):
            return [node for node in self.region(fork, end) if node in self._marked]
        return sorted(self._marked & self._of_interest(fork, end), key=self.index.__getitem__)

    def unmark(self, nodes: Iterable[fx.Node], fork: fx.Node, end: fx.Node) -> None:
        """Takes the marks off nodes between `fork` and `end`."""
        self._marked.difference_update(nodes)
        passed = self._of_interest(fork, end) if self.is_behind(fork, end) else set(nodes)
        for node in sorted(passed, key=self.index.__getitem__):
            if node in self._holding and not self._holds(node):
                self._holding.remove(node)
            if node not in self._marked and node not in self._holding:
                self._up[node] = self._tree.parent[node]

    def _holds(self, node: fx.Node) -> bool:
        above = self._tree.parent[node]
        return any(self._first_of_interest(arg, above) for arg in self._inputs[node])

    def _of_interest(self, fork: fx.Node, end: fx.Node) -> set[fx.Node]:
        """The marked and holding nodes on the paths from `fork`, a dominator of `end`, to `end`."""
        seen: set[fx.Node] = set()
        stack = [end]
        while stack:
            node = self._first_of_interest(stack.pop(), fork)
            if node is not None and node not in seen:
                seen.add(node)
                stack.extend(self._inputs[node])
        return seen

    def _first_of_interest(self, node: fx.Node | None, above: fx.Node | None) -> fx.Node | None:
        """The nearest dominator of `node`, or itself, that is marked or holding, if it comes after `above`, which dominates it."""
        passed = []
        while node is not None and self._up[node] is not node:
            passed.append(node)
            node = self._up[node]
        for below in passed:
            self._up[below] = node
        return node if node is not None and (above is None or self.index[node] > self.index[above]) else None

    def _down(self, above: fx.Node | None, node: fx.Node) -> Summary:
        """What lies between `node` and its dominator `above`, which is left out."""
        found = NOTHING
        for current, far in self._tree.strides(node, above):
            found = found | (self._stride if far else self._local)[current]
        return found

    def _past(self, node: fx.Node, floor: int) -> list[fx.Node]:
        """The activations from place `floor` on that `node` is computed from, itself included, in order."""
        seen, stack = {node}, [node]
        while stack:
            new = [arg for arg in self._inputs[stack.pop()] if self.index[arg] >= floor and arg not in seen]
            seen.update(new)
            stack.extend(new)
        return sorted(seen, key=self.index.__getitem__)

    def _paths_to(self, merge: fx.Node, start: fx.Node) -> dict[fx.Node, Summary]:
        """For every ancestor of `merge` from `start` on, what lies on the paths from there to `merge`."""
        first, found = self._paths.pop(merge, (self.index[merge], {}))
        if self.index[start] < first:
            first = 2 * self.index[start] - self.index[merge]  # twice as far as asked for: others ask for earlier ones
            found = dict.fromkeys(self._past(merge, first), NOTHING)
            for node in reversed(found):
                after = found[node] | self._own[node]
                for arg in self._inputs[node]:
                    if arg in found:
                        found[arg] = found[arg] | after
        if len(self._paths) >= _TABLES:
            del self._paths[next(iter(self._paths))]
        self._paths[merge] = first, found
        return found


@dataclass
class _Descendants:
    """The nodes that come from one node, found as far as they are asked for."""

    reach: Reach
    origin: fx.Node
    found: set[fx.Node] = field(default_factory=set)
    ahead: list[tuple[int, fx.Node]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._look_ahead(self.origin)

    def until(self, limit: int) -> set[fx.Node]:
        """All of them up to place `limit` of the order, and perhaps some after it."""
        while self.ahead and self.ahead[0][0] <= limit:
            self._look_ahead(heappop(self.ahead)[1])
        return self.found

    def _look_ahead(self, node: fx.Node) -> None:
        for user in node.users:
            if user not in self.found and self.reach.kinds[user] is not Kind.SHAPE:
                self.found.add(user)
                heappush(self.ahead, (self.reach.index[user], user))


def live(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the output, or what outlasts the call, is computed from: by what they return, or by what they write in place."""
    base, found, read = bases(graph), set[fx.Node](), set[fx.Node]()
    for node in reversed(graph.nodes):
        target = written(node)
        leaves = target is not None and (base[target] in read or base[target].op in ("placeholder", "get_attr"))
        if node.op == "output" or node in found or leaves:
            found |= {node, *node.all_input_nodes}
            read.update(base[arg] for arg in node.all_input_nodes)
    return found


def _cuts(region: list[fx.Node], fork: fx.Node) -> set[fx.Node]:
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
