"""Who can reach whom in a captured graph, and what lies between: grown node by node, each question in about logarithmic time.

What lies between a node and a dominator of it is the union of what lies between each dominator on the way and the next, so that it can
be kept for every node and for every jump along the tree. What comes from a fork that is no dominator meets what does not in a *merge*, the
first node that all of its paths to an end pass: `fxsd.find.forks` tells what lies between these two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from heapq import heappop, heappush
from itertools import islice
from typing import NamedTuple

from torch import fx

from fxsd.find.dominators import Dominators
from fxsd.find.forks import OpenForks
from fxsd.find.values import Kind, bases, is_activation, written

MANY = 4  # so many heavy nodes or more are not told apart
HEAVY = {Kind.LINEAR, Kind.MIX, Kind.OPAQUE}

# What a part of a graph holds is a number, a bit for each kind and two more. Bit 0 says that there is such a part.
_PART = 1
_BIT = {kind: 2 << i for i, kind in enumerate(filter(is_activation, Kind))}
_SEALED, _SITES = 2 << len(_BIT), 4 << len(_BIT)
_HEAVY = sum(_BIT[kind] for kind in HEAVY)


class Summary(NamedTuple):
    """What a part of a graph holds.

    Attributes:
        kinds: of all its nodes.
        sealed: it holds opaque calls that may have parameters.
        sites: it holds nodes that were marked when they were added.
    """

    kinds: frozenset[Kind]
    sealed: bool
    sites: bool


@cache
def _read(bits: int) -> Summary:
    return Summary(frozenset(kind for kind, bit in _BIT.items() if bits & bit), bool(bits & _SEALED), bool(bits & _SITES))


class Reach:
    """Answers about the nodes of a graph that were added so far, in graph order, which is topological order.

    Args:
        graph: a captured graph.
        kinds: the kind of each node, from `fxsd.find.values.kinds`.
    """

    def __init__(self, graph: fx.Graph, kinds: dict[fx.Node, Kind]) -> None:
        self.kinds = kinds
        self.index = {node: i for i, node in enumerate(graph.nodes)}
        self._tree: Dominators[fx.Node] = Dominators()
        self._inputs: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if is_activation(kinds[node]):
                inputs = self._inputs[node] = [arg for arg in node.all_input_nodes if arg in self._inputs]
                self._tree.add(node, inputs)
        self._forks = OpenForks(self._inputs, self._tree.parent, _SITES.bit_length())
        self._own: dict[fx.Node, int] = {}
        self._local: dict[fx.Node, int] = {}  # between a node and its immediate dominator
        self._stride: dict[fx.Node, int] = {}  # between a node and its jump
        self._marked: set[fx.Node] = set()
        self._holding: set[fx.Node] = set()  # marked nodes may lie between one of these and its immediate dominator
        self._up: dict[fx.Node, fx.Node | None] = {}  # itself if marked or holding, else a dominator on the way to one that is
        self._fed: dict[fx.Node, _Descendants] = {}

    def add(self, node: fx.Node, marked: bool = False) -> None:
        """Adds the next activation of the graph."""
        inputs, above, jump = self._inputs[node], self._tree.parent[node], self._tree.jump[node]
        local = self._own[node] = self._bits(node, marked)
        self._forks.add(node, local)
        if len(inputs) > 1:
            for arg in inputs:
                if arg is not above:
                    local |= self._down(above, arg)
        self._local[node] = local
        # A jump over several dominators is made of those of the first of them.
        self._stride[node] = local if jump is above else local | self._stride[above] | self._stride[self._tree.jump[above]]  # type: ignore[index]
        if marked:
            self._marked.add(node)
        if len(inputs) > 1 and self._holds(node):
            self._holding.add(node)
        self._up[node] = node if node in self._marked or node in self._holding else above

    def _bits(self, node: fx.Node, marked: bool) -> int:
        kind = self.kinds[node]
        bits = _BIT[kind] | _SITES if marked else _BIT[kind]
        if kind is Kind.OPAQUE and (node.op != "call_function" or any(self.kinds[a] is Kind.CONSTANT for a in node.all_input_nodes)):
            return bits | _SEALED
        return bits

    # --- who comes from whom ------------------------------------------------------------------------------------------------

    def is_ancestor(self, node: fx.Node, of: fx.Node) -> bool:
        """Is `of` an activation that is computed from `node`, or from a value that it shares with other users of `node`?"""
        if node is of or self.index[node] > self.index[of]:
            return False
        if not is_activation(self.kinds[node]):
            return of in self._descendants(node, self.index[of])
        return self._between(node, of) > 0

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
        if is_activation(self.kinds[fork]):
            return _read(self._between(fork, end))
        bits = 0
        for node in self.region(fork, end):
            bits |= self._own[node]
        return _read(bits)

    def heavy(self, fork: fx.Node, end: fx.Node) -> list[fx.Node]:
        """The linear, mixing and opaque nodes on the paths from `fork` to `end`; any `MANY` of them where there are more."""
        if self.is_behind(fork, end):
            return list(islice(self._heavy_behind(fork, end), MANY))
        return list(islice((node for node in self.region(fork, end) if self._own[node] & _HEAVY), MANY))

    def region(self, fork: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
        """The activations on the paths from `fork` (left out) to `end` (kept), from `end` on. As slow as they are many."""
        below = None if is_activation(self.kinds[fork]) else self._descendants(fork, self.index[end])
        seen, stack = {end}, [end]
        while stack:
            yield (node := stack.pop())
            new = [arg for arg in self._inputs[node] if arg not in seen]
            new = [arg for arg in new if (self.is_ancestor(fork, arg) if below is None else arg in below)]
            seen.update(new)
            stack.extend(new)

    def _between(self, node: fx.Node, end: fx.Node) -> int:
        """What the paths from `node` to `end`, which comes later, hold; 0 if there are none."""
        if end not in self._inputs:
            return 0
        passed = _PART
        while not self._tree.dominates(node, end):
            if len(node.users) != 1:
                merge = self._merge(node, end)
                entered = self._forks.between(node, merge) if node.users else 0
                return passed | entered | self._own[merge] | self._down(merge, end) if entered else 0
            node = next(iter(node.users))
            if node not in self._inputs or self.index[node] > self.index[end]:
                return 0
            passed |= self._own[node]
        return passed | self._down(node, end)

    def _down(self, above: fx.Node | None, node: fx.Node) -> int:
        """What lies between `node` and its dominator `above`, which is left out."""
        found = 0
        for current, far in self._tree.strides(node, above):
            found |= (self._stride if far else self._local)[current]
        return found

    def _heavy_behind(self, above: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
        """The heavy nodes between `end` and its dominator `above`, without a look at the parts that hold none."""
        seen = set[fx.Node]()
        stack: list[tuple[fx.Node | None, fx.Node]] = [(above, end)]
        while stack:
            top, node = stack.pop()
            for current, far in self._tree.strides(node, top, whole=lambda node: not self._stride[node] & _HEAVY):
                if not far and current not in seen and self._local[current] & _HEAVY:
                    seen.add(current)
                    if self._own[current] & _HEAVY:
                        yield current
                    parent = self._tree.parent[current]
                    stack.extend((parent, arg) for arg in self._inputs[current] if arg is not parent)

    # --- marked nodes -------------------------------------------------------------------------------------------------------

    def marked_in_series(self, fork: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
        """The marked nodes that every path from `fork` to `end` passes, nearest to `end` first."""
        above = self._tree.nearest_common(fork, end)
        node = self._first_of_interest(end, above)
        while node is not None:
            if node in self._marked:
                yield node
            node = self._first_of_interest(self._tree.parent[node], above)
        if above is not fork:
            yield from filter(self._marked.__contains__, self._always(fork, self._merge(fork, end)))

    def _always(self, fork: fx.Node, merge: fx.Node) -> Iterator[fx.Node]:
        """The nodes before `merge` that every path from `fork` passes, if some are marked, nearest to `merge` first.

        In the order of the graph, no path jumps over these.
        """
        if not self._forks.between(fork, merge) & _SITES:
            return
        ahead, seen, node = list[tuple[int, fx.Node]](), set[fx.Node](), merge
        while fork not in self._inputs[node]:
            for arg in self._inputs[node]:
                if arg not in seen and self.is_ancestor(fork, arg):
                    seen.add(arg)
                    heappush(ahead, (-self.index[arg], arg))
            node = heappop(ahead)[1]
            if not ahead:
                yield node

    def marked_between(self, fork: fx.Node, end: fx.Node) -> list[fx.Node]:
        """All marked nodes on the paths from `fork` to `end`, in order."""
        above = self._tree.nearest_common(fork, end)
        inside = self._of_interest(fork if above is fork else self._merge(fork, end), end)
        if above is not fork:
            merge = self._merge(fork, end)
            inside.update(self.region(fork, merge) if self._forks.between(fork, merge) & _SITES else [merge])
        return sorted(self._marked & inside, key=self.index.__getitem__)

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
        if node not in found and node.op != "output":
            target = written(node)
            if target is None or not (base[target] in read or base[target].op in ("placeholder", "get_attr")):
                continue
        inputs = node.all_input_nodes
        found.update((node, *inputs))
        read.update(map(base.__getitem__, inputs))
    return found
