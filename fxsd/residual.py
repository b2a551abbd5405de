"""Which adds of a graph are residual: y = shortcut + F(x), the shortcut being x or a projection of x.

Pure reading of a graph: no edits, no rates, no modules. The rules, in the order in which they decide:

1. Both operands are activations. Shape arithmetic, biases and position embeddings are not. (A parameter that also feeds the other
   operand counts: a class token.)
2. *Identity*: one operand, through views and constant scaling, is an ancestor of the other.
3. *Projection*: one operand is a chain of at most one conv or linear, with norms, pools and activations, from a node that every path to the
   other operand passes, and the other is nonlinear and does more.
4. The branch does work: something that mixes positions or channels, and not a single bare linear op.
5. A branch that holds residual blocks in series is a long skip, not a branch. A residual add inside a branch is its internal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import fx

from fxsd.reach import Reach, cuts
from fxsd.values import Kind, is_activation, op_name

_CHAIN = {Kind.VIEW, Kind.SCALE, Kind.DROP}
_LIGHT = {Kind.NORM, Kind.POOL, Kind.PAD, Kind.NONLINEAR, Kind.RESIZE, Kind.JOIN}
_WORK = {Kind.LINEAR, Kind.MIX, Kind.OPAQUE, Kind.POOL}
_LINEAR = {Kind.LINEAR, Kind.VIEW, Kind.SCALE, Kind.NORM, Kind.PAD, Kind.DROP, Kind.ADD, Kind.JOIN, Kind.RESIZE, Kind.POOL}
_BARE = {Kind.LINEAR, Kind.VIEW, Kind.SCALE, Kind.PAD}
_MERGE = "its branch goes down and up again in resolution: it merges levels, as a U-Net does"
_NUMBERED = re.compile(r"\d(\.|$)")  # a path with a numbered module in it


@dataclass(frozen=True)
class Residual:
    """A residual add as found in a captured graph, before it has a rate."""

    add: fx.Node
    branch: fx.Node
    shortcut: fx.Node
    fork: fx.Node
    kind: str  # "identity" | "projection"
    module: str  # the module whose forward executes the add
    existing: fx.Node | None = None  # stochastic depth that the branch already ends in


@dataclass(frozen=True)
class RejectedAdd:
    """A tensor add that is no site, with the reason in a sentence."""

    add: fx.Node
    module: str
    reason: str


@dataclass(frozen=True)
class Found:
    residuals: tuple[Residual, ...]
    rejected: tuple[RejectedAdd, ...]


def find(graph: fx.Graph, kinds: dict[fx.Node, Kind], include: Callable[[str], bool] = lambda module: False) -> Found:
    """Finds the residual adds of `graph`.

    Args:
        graph: a captured graph, topologically ordered as every fx graph is.
        kinds: the kind of each node, from `fxsd.values.kinds`.
        include: of which modules the adds are taken even where the rules say no.

    Returns:
        The residual adds and the rejected ones, each in graph order.
    """
    finder = _Finder(Reach(graph, kinds), include)
    for node in graph.nodes:
        if is_add(node):
            finder.judge(node)
    order = finder.reach.index
    return Found(
        tuple(sorted(finder.accepted.values(), key=lambda r: order[r.add])),
        tuple(sorted(finder.rejected.values(), key=lambda r: order[r.add])),
    )


def is_add(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and op_name(node) in ("add", "radd", "iadd") and "out" not in node.kwargs


def operands(add: fx.Node) -> list[fx.Node]:
    """The two operands of an add that are nodes, in order, however they are passed."""
    named = [add.kwargs[key] for key in ("input", "self", "other") if key in add.kwargs]
    return [arg for arg in (*add.args[:2], *named) if isinstance(arg, fx.Node)]


def owner(node: fx.Node) -> str:
    """The qualified name of the module whose forward executes `node`; '' is the root."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def call(node: fx.Node) -> str:
    """`owner`, told apart by call where a module runs more than once."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack))) if stack else ""


@dataclass
class _Finder:
    reach: Reach
    include: Callable[[str], bool]
    accepted: dict[fx.Node, Residual] = field(default_factory=dict)
    rejected: dict[fx.Node, RejectedAdd] = field(default_factory=dict)
    long_skips: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.kinds = self.reach.kinds

    def judge(self, add: fx.Node) -> None:
        sides = operands(add)
        alive = [side for side in sides if is_activation(self.kinds[side])]
        if len(sides) < 2 or not alive or any(self.kinds[side] is Kind.SHAPE for side in sides):
            return  # a number, a size: no sum of tensors
        a, b = sides
        candidate = self._identity(add, a, b) or self._identity(add, b, a)
        if candidate is None and len(alive) == 2:
            candidate = self._projection(add, a, b)
        wanted = self.include(owner(add))
        if candidate is None and wanted and len(alive) == 2:
            candidate = self._smaller_side(add, a, b)
        if candidate is None:
            self._reject(add, self._no_shortcut(a, b))
            return
        reason = self._in_place(candidate) or (None if wanted else self._idle(candidate) or self._nested(candidate))
        if reason:
            self._reject(add, reason)
        else:
            self.accepted[add] = candidate

    # --- the two sides ----------------------------------------------------------------------------------------------

    def _identity(self, add: fx.Node, a: fx.Node, b: fx.Node) -> Residual | None:
        if not is_activation(self.kinds[b]):
            return None
        for node in self._chain(a, _CHAIN):
            if self.reach.is_ancestor(node, b):
                return self._residual(add, b, a, node, "identity")
        return None

    def _projection(self, add: fx.Node, a: fx.Node, b: fx.Node) -> Residual | None:
        found = self._smaller_side(add, a, b)
        if found and self._is_light(found.shortcut, found.fork):
            return found
        return self._conditioned(add, a, b) or self._conditioned(add, b, a)

    def _conditioned(self, add: fx.Node, shortcut: fx.Node, branch: fx.Node) -> Residual | None:
        """A projection block whose branch takes a second input besides the fork, such as a time embedding.

        Not everything behind the branch comes from one node then; that one numbered module executes it all says that it is a block.
        """
        chain: list[fx.Node] = []
        for node in self._chain(shortcut, _CHAIN | _LIGHT | {Kind.LINEAR}):
            if chain and self.reach.is_ancestor(node, branch):
                region = self.reach.region(node, branch)
                heavier = self._weight(node, branch) > self._weight(node, shortcut)
                if heavier and self._is_light(shortcut, node) and self._is_block(add, [*chain, *region]):
                    return self._residual(add, branch, shortcut, node, "projection")
                return None
            chain.append(node)
        return None

    def _smaller_side(self, add: fx.Node, a: fx.Node, b: fx.Node) -> Residual | None:
        """Of two sides that fork from one node, the one with less work is the shortcut."""
        fork = self.reach.common_fork(a, b)
        if fork is None or fork is a or fork is b:
            return None
        weight_a, weight_b = (self._weight(fork, side) for side in (a, b))
        if weight_a == weight_b:
            return None
        branch, shortcut = (a, b) if weight_a > weight_b else (b, a)
        return self._residual(add, branch, shortcut, fork, "projection")

    def _weight(self, fork: fx.Node, side: fx.Node) -> int:
        """How much a side does: pools alone make no branch."""
        return sum(self.kinds[node] in _WORK - {Kind.POOL} for node in self.reach.region(fork, self._first_shortcut(side)))

    def _first_shortcut(self, side: fx.Node) -> fx.Node:
        """x + f(x) + g(x): the second branch has the shortcut of the first."""
        while side in self.accepted:
            side = self.accepted[side].shortcut
        return side

    def _is_light(self, shortcut: fx.Node, fork: fx.Node) -> bool:
        """At most one linear op from `fork` to `shortcut`, and else only norms, pools, activations and views."""
        region = self.reach.region(fork, self._first_shortcut(shortcut))
        linears = sum(self.kinds[node] is Kind.LINEAR for node in region)
        return linears <= 1 and all(self.kinds[n] in _CHAIN | _LIGHT or _is_plain_call(n, self.kinds) for n in region)

    def _residual(self, add: fx.Node, branch: fx.Node, shortcut: fx.Node, fork: fx.Node, kind: str) -> Residual:
        end = self._chain(branch, _CHAIN | {Kind.NORM})
        existing = next((node for node in end if self.kinds[node] is Kind.DROP), None)
        return Residual(add, branch, shortcut, fork, kind, owner(add), existing)

    def _chain(self, node: fx.Node, through: set[Kind]) -> Iterator[fx.Node]:
        """`node`, and what it comes from through single-input ops of the kinds `through`, nearest first."""
        while True:
            yield node
            if node in self.accepted:  # x + f(x) + g(x): the second branch forks where the first one does
                node = self.accepted[node].shortcut
                continue
            constant = self.kinds[node] is Kind.CONSTANT
            inputs = [
                arg for arg in node.all_input_nodes if (self.kinds[arg] is Kind.CONSTANT if constant else is_activation(self.kinds[arg]))
            ]
            if len(inputs) != 1 or self.kinds[node] not in through | {Kind.CONSTANT}:
                return
            node = inputs[0]

    # --- what speaks against a candidate: each gives the reason, or None --------------------------------------------------

    def _idle(self, candidate: Residual) -> str | None:
        """The branch does nothing worth dropping, or the add merges what no residual block merges."""
        region = self.reach.region(candidate.fork, candidate.branch)
        inside = {self.kinds[node] for node in region}
        if candidate.existing is None:
            if not self._work(region):
                return "its branch has no convolution, linear, attention or pooling op: there is nothing to drop"
            if self._work(region) == 1 and inside <= _BARE:
                return "its branch is a single linear op, as in a position encoding"
        if candidate.kind == "projection":
            if inside <= _LINEAR:
                return "both sides are linear, as in reparametrised convolutions"
            beside = {self.kinds[node] for node in self.reach.region(candidate.fork, candidate.shortcut)}
            if Kind.RESIZE in inside - beside:
                return _MERGE
        elif Kind.RESIZE in inside and not self._is_block(candidate.add, region):
            return _MERGE
        return None

    def _is_block(self, add: fx.Node, nodes: list[fx.Node]) -> bool:
        """Does the call of one numbered module execute `add` and all of `nodes`? A decoder gets its skip from outside."""
        here = call(add)
        inside = all(here in node.meta.get("nn_module_stack", ()) for node in nodes)
        return inside and bool(_NUMBERED.search(owner(add)))

    def _nested(self, outer: Residual) -> str | None:
        """Residual adds inside the branch: in series they make the outer add a long skip, elsewhere they are its internals."""
        region = self.reach.region(outer.fork, outer.branch)
        always = cuts(region, outer.fork)
        inner = [node for node in region if node in self.accepted]
        series = [node for node in inner if node in always]
        if len(series) > 1 or not always.isdisjoint(self.long_skips):
            self.long_skips.add(outer.add)
            return f"it is a long skip over residual blocks{' such as ' + series[0].name if series else ''}"
        if inner and self.kinds[outer.shortcut] is Kind.CONSTANT:
            return "its shortcut is a constant that feeds earlier blocks"
        together = [node for node in series if call(node) == call(outer.add)]
        if together and any(self.kinds[node] is Kind.RESIZE for node in region):
            return _MERGE
        for node in inner:
            if node not in together and not self.include(owner(node)):
                del self.accepted[node]
                self._reject(node, f"it lies inside the branch of the residual add {outer.add.name}")
        return None

    def _in_place(self, candidate: Residual) -> str | None:
        """`branch.add_(shortcut)` writes into the branch; a dropped branch is another tensor, so nobody else may look at it."""
        add = candidate.add
        writes = op_name(add) == "iadd" or str(add.target).split(".")[-2:-1] == ["add_"] or add.target == "add_"
        if not writes or operands(add)[0] is not candidate.branch:
            return None
        for node in self._aliases(candidate.branch):
            late = [user for user in node.users if self.reach.index[user] > self.reach.index[add]]
            if late:
                return f"it adds in place into {node.name}, which {late[0].name} reads afterwards"
        return None

    def _aliases(self, node: fx.Node) -> list[fx.Node]:
        """The nodes before an in-place write that may share memory with `node`: views of it, and what it is a view of."""
        seen, stack = {node}, [*self._chain(node, {Kind.VIEW})]
        while stack:
            seen.add(base := stack.pop())
            stack.extend(user for user in base.users if self.kinds[user] is Kind.VIEW and user not in seen)
        return sorted(seen, key=self.reach.index.__getitem__)

    def _work(self, region: list[fx.Node]) -> int:
        return sum(self.kinds[node] in _WORK for node in region)

    def _reject(self, add: fx.Node, reason: str) -> None:
        self.rejected[add] = RejectedAdd(add, owner(add), reason)

    def _no_shortcut(self, a: fx.Node, b: fx.Node) -> str:
        for side in (a, b):
            if not is_activation(self.kinds[side]):
                return f"{side.name} is a parameter or a constant, not the output of a branch"
        return "neither side is a shortcut to the other: no common input that one of them leaves as it is or merely projects"


def _is_plain_call(node: fx.Node, kinds: dict[fx.Node, Kind]) -> bool:
    """A linear op, or a function that fx does not look into and that is given no parameters."""
    opaque_function = kinds[node] is Kind.OPAQUE and node.op == "call_function"
    return kinds[node] is Kind.LINEAR or (opaque_function and all(kinds[arg] is not Kind.CONSTANT for arg in node.all_input_nodes))
