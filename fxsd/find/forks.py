"""What the paths from a fork to a merge hold, where the fork does not dominate the merge.

Each fork of which that is so has a field of bits in one long integer: bit 0 says that there are paths, the others what lies on them. One
operation carries all fields from a node to the next, and a field is carried only as far as paths from its fork may meet others that do
not pass it. In a chain of blocks the integers are empty; where n forks are open at n nodes, they are n * n fields, at the speed of memory.
"""

from __future__ import annotations

from torch import fx


class OpenForks:
    """Answers about the merges that were added so far, in graph order.

    Args:
        inputs: node -> the nodes that it comes from; in graph order.
        above: node -> its immediate dominator, None for the root.
        width: bits a field.
    """

    def __init__(self, inputs: dict[fx.Node, list[fx.Node]], above: dict[fx.Node | None, fx.Node | None], width: int) -> None:
        self._inputs, self._above, self._width = inputs, above, width
        self._fields: dict[fx.Node, int] = {}  # as they leave a node that has users to come; none where it would be 0
        self._merged: dict[fx.Node, int] = {}  # as they enter a merge, from the first fork after its immediate dominator on
        self._ones = 1  # bit 0 of many fields
        # Forks are numbered. A node has fields of those from `_first` up to `_until`, which is left out.
        self._until: dict[fx.Node | None, int] = {None: 0}
        forks = 0
        for node in inputs:
            forks += len(node.users) > 1
            self._until[node] = forks
        self._first: dict[fx.Node, int] = {}
        self._last_user: dict[fx.Node, fx.Node] = {}
        self._enters: dict[fx.Node, int] = {}  # the first fork whose field is asked of the inputs of a node
        asked: dict[fx.Node, int] = {}
        for node in reversed(inputs):
            first = self._first[node] = asked.pop(node, self._until[node])
            first = self._enters[node] = min(first, self._until[self._above[node]])
            for arg in inputs[node]:
                self._last_user.setdefault(arg, node)
                if first < asked.get(arg, self._until[arg]):
                    asked[arg] = first

    def add(self, node: fx.Node, own: int) -> None:
        """Adds the next node, which holds `own`."""
        inputs = self._inputs[node]
        enters, leaves, fields = self._enters[node], self._first[node], 0
        if self._fields:
            for arg in inputs:
                if arg in self._fields:
                    fields |= self._fields[arg] >> (enters - self._first[arg]) * self._width
                    if self._last_user[arg] is node:
                        del self._fields[arg]
        if fields:
            if len(inputs) > 1:
                self._merged[node] = fields >> (self._until[self._above[node]] - enters) * self._width
            fields >>= (leaves - enters) * self._width
            while self._ones < fields:
                self._ones |= self._ones << (self._ones.bit_length() + self._width - 1)
            fields |= (fields & self._ones) * own
        if leaves < self._until[node] and len(node.users) > 1:
            fields |= 1 << (self._until[node] - 1 - leaves) * self._width
        if fields:
            self._fields[node] = fields

    def between(self, fork: fx.Node, merge: fx.Node) -> int:
        """What lies between `fork`, a node with several users, and `merge`, which are both left out; 0 if there is no path."""
        place = self._until[fork] - 1 - self._until[self._above[merge]]
        if place < 0 or merge not in self._merged:
            return 0
        return self._merged[merge] >> place * self._width & ((1 << self._width) - 1)
