"""Dominators of a graph whose nodes come in topological order.

`networkx.immediate_dominators` iterates to a fixed point and is quadratic where far-apart nodes meet again and again. In
topological order one pass is enough: the immediate dominator of a node is the nearest common dominator of its inputs. Jump
pointers make each such search logarithmic.

References:
    Cooper, Harvey, Kennedy, "A Simple, Fast Dominance Algorithm", 2001.
    Myers, "An applicative random-access stack", 1983 (jump pointers).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Dominators(Generic[T]):
    """The dominator tree, grown node by node.

    Example:
        >>> tree = Dominators()
        >>> for node, inputs in {"x": "", "f": "x", "g": "f", "y": "xg"}.items():
        ...     tree.add(node, inputs)
        >>> tree.nearest_common("g", "y"), tree.dominates("f", "g"), tree.dominates("f", "y")
        ('x', True, False)
    """

    def __init__(self) -> None:
        # None is the virtual root, from which every node without inputs comes.
        self.parent: dict[T | None, T | None] = {None: None}
        self.jump: dict[T | None, T | None] = {None: None}
        self._depth: dict[T | None, int] = {None: 0}

    def add(self, node: T, inputs: Iterable[T]) -> None:
        """Adds `node`, all of whose inputs have been added before."""
        known = iter(inputs)
        parent: T | None = next(known, None)
        for other in known:
            parent = self.nearest_common(parent, other)
        self.parent[node] = parent
        self._depth[node] = self._depth[parent] + 1
        jump = self.jump[parent]
        same_stride = self._depth[parent] - self._depth[jump] == self._depth[jump] - self._depth[self.jump[jump]]
        self.jump[node] = self.jump[jump] if same_stride else parent

    def nearest_common(self, a: T | None, b: T | None) -> T | None:
        """The last node that every path to `a` and every path to `b` passes; None if they share none."""
        depth, jump, parent = self._depth, self.jump, self.parent
        if depth[a] < depth[b]:
            a, b = b, a
        a = self._climb(a, depth[b])
        while a != b:
            a, b = (jump[a], jump[b]) if jump[a] != jump[b] else (parent[a], parent[b])
        return a

    def dominates(self, node: T | None, of: T | None) -> bool:
        """Does every path to `of` pass `node`?"""
        return self._depth[node] <= self._depth[of] and self._climb(of, self._depth[node]) == node

    def first_below(self, node: T | None, of: T) -> T:
        """The first node that every path from `node`, a dominator of `of`, to `of` passes."""
        found = self._climb(of, self._depth[node] + 1)
        assert found is not None
        return found

    def strides(self, node: T, above: T | None, whole: Callable[[T], bool] = lambda node: True) -> Iterator[tuple[T, bool]]:
        """The way from `node` up to its dominator `above`, which is left out, in few steps.

        Args:
            node, above: the ends of the way.
            whole: from which nodes to go to their jump at once.

        Yields:
            (a node, True) for all from that node up to its jump, which is left out; (a node, False) for that node alone.
        """
        top, current = self._depth[above], node
        while self._depth[current] > top:
            far = self._depth[self.jump[current]] >= top and whole(current)
            yield current, far
            current = self.jump[current] if far else self.parent[current]  # type: ignore[assignment]

    def _climb(self, node: T | None, depth: int) -> T | None:
        while self._depth[node] > depth:
            node = self.jump[node] if self._depth[self.jump[node]] >= depth else self.parent[node]
        return node
