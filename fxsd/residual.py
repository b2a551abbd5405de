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

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import fx

from fxsd.values import Kind, activation_inputs, is_activation, op_name

_CHAIN_IDENTITY = {Kind.VIEW, Kind.SCALE, Kind.DROP}
_CHAIN_PROJECTION = {Kind.NORM, Kind.POOL, Kind.PAD, Kind.NONLINEAR, Kind.RESIZE}
_WORK = {Kind.LINEAR, Kind.MIX, Kind.OPAQUE, Kind.POOL}
_LINEAR = {Kind.LINEAR, Kind.VIEW, Kind.SCALE, Kind.NORM, Kind.PAD, Kind.DROP, Kind.ADD, Kind.JOIN, Kind.RESIZE, Kind.POOL}
_BARE = {Kind.LINEAR, Kind.VIEW, Kind.SCALE, Kind.PAD}


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
    finder = _Finder(graph, kinds, include)
    for node in graph.nodes:
        if is_add(node):
            finder.judge(node)
    order = finder.index
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
    graph: fx.Graph
    kinds: dict[fx.Node, Kind]
    include: Callable[[str], bool]
    accepted: dict[fx.Node, Residual] = field(default_factory=dict)
    rejected: dict[fx.Node, RejectedAdd] = field(default_factory=dict)
    long_skips: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.index = {node: i for i, node in enumerate(self.graph.nodes)}

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
        reason = self._in_place(candidate) or (None if wanted else self._refuses(candidate))
        if reason:
            self._reject(add, reason)
        else:
            self.accepted[add] = candidate

    # --- the two sides ----------------------------------------------------------------------------------------------

    def _identity(self, add: fx.Node, a: fx.Node, b: fx.Node) -> Residual | None:
        if not is_activation(self.kinds[b]):
            return None
        for node in self._chain(a, _CHAIN_IDENTITY, linears=0):
            if self._is_ancestor(node, b):
                return self._residual(add, b, a, node, "identity")
        return None

    def _projection(self, add: fx.Node, a: fx.Node, b: fx.Node) -> Residual | None:
        found = []
        for shortcut, branch in ((a, b), (b, a)):
            for node in self._chain(shortcut, _CHAIN_IDENTITY | _CHAIN_PROJECTION, linears=1):
                if self._is_ancestor(node, branch):
                    found.append(self._residual(add, branch, shortcut, node, "projection"))
                    break
        found = [r for r in found if self._enters_only_at(r.fork, r.branch)]
        if len(found) == 2:
            work = [self._work(self._region(r.branch, r.fork)) for r in found]
            if work[0] == work[1]:
                return None
            return found[0] if work[0] > work[1] else found[1]
        return found[0] if found else None

    def _smaller_side(self, add: fx.Node, a: fx.Node, b: fx.Node) -> Residual | None:
        """For an add that the user asked for: the side with less work behind it, back to where both sides meet, is the shortcut."""
        past_a, past_b = self._past(a, 0), self._past(b, 0)
        common = max((past_a | {a}) & (past_b | {b}), key=self.index.__getitem__, default=None)
        if common is None:
            return None
        work_a, work_b = (self._work(self._region(side, common)) for side in (a, b))
        if work_a == work_b:
            return None
        branch, shortcut = (a, b) if work_a > work_b else (b, a)
        return self._residual(add, branch, shortcut, common, "projection")

    def _residual(self, add: fx.Node, branch: fx.Node, shortcut: fx.Node, fork: fx.Node, kind: str) -> Residual:
        return Residual(add, branch, shortcut, fork, kind, owner(add), self._existing(branch))

    def _existing(self, branch: fx.Node) -> fx.Node | None:
        return next((n for n in self._chain(branch, _CHAIN_IDENTITY | {Kind.NORM}, linears=0) if self.kinds[n] is Kind.DROP), None)

    def _chain(self, node: fx.Node, through: set[Kind], linears: int) -> Iterator[fx.Node]:
        """The nodes that `node` is a simple function of, nearest first, with at most `linears` linear ops between."""
        while True:
            yield node
            kind = self.kinds[node]
            if node in self.accepted:  # x + f(x) + g(x): the second branch forks where the first one does
                node = self.accepted[node].shortcut
                continue
            if kind is Kind.LINEAR and linears:
                linears -= 1
            elif kind not in through:
                return
            inputs = activation_inputs(node, self.kinds) or (node.all_input_nodes if self.kinds[node] is Kind.CONSTANT else [])
            if len(inputs) != 1:
                return
            node = inputs[0]

    # --- reachability, bounded by the fork's place in the order ---------------------------------------------------------

    def _past(self, node: fx.Node, floor: int) -> set[fx.Node]:
        """The ancestors of `node`, itself included, that come after place `floor`."""
        seen, stack = {node}, [node]
        while stack:
            for arg in stack.pop().all_input_nodes:
                if arg not in seen and self.index[arg] >= floor and self.kinds[arg] is not Kind.SHAPE:
                    seen.add(arg)
                    stack.append(arg)
        return seen

    def _is_ancestor(self, node: fx.Node, of: fx.Node) -> bool:
        if node is of or len(node.users) < 2 or self.index[node] > self.index[of]:
            return False
        return node in self._past(of, self.index[node])

    def _region(self, branch: fx.Node, fork: fx.Node) -> list[fx.Node]:
        """The nodes on the paths from `fork` (left out) to `branch` (kept), in order."""
        past = sorted(self._past(branch, self.index[fork] + 1), key=self.index.__getitem__)
        inside: dict[fx.Node, None] = {}
        for node in past:
            if any(arg is fork or arg in inside for arg in node.all_input_nodes):
                inside[node] = None
        return list(inside)

    def _enters_only_at(self, fork: fx.Node, branch: fx.Node) -> bool:
        """Every activation behind `branch` comes through `fork`."""
        region = self._region(branch, fork)
        inside = {fork, *region}
        return all(arg in inside for node in region for arg in activation_inputs(node, self.kinds))

    # --- the branch -------------------------------------------------------------------------------------------------

    def _work(self, region: list[fx.Node]) -> int:
        return sum(self.kinds[node] in _WORK for node in region)

    def _refuses(self, candidate: Residual) -> str | None:
        region = self._region(candidate.branch, candidate.fork)
        inside = {self.kinds[node] for node in region}
        if candidate.existing is None:
            if not self._work(region):
                return "its branch has no convolution, linear, attention or pooling op: there is nothing to drop"
            if self._work(region) == 1 and inside <= _BARE:
                return "its branch is a single linear op, as in a position encoding"
        if candidate.kind == "projection":
            if inside <= _LINEAR:
                return "both sides are linear, as in reparametrised convolutions"
            if Kind.RESIZE in inside and Kind.RESIZE not in {self.kinds[n] for n in self._region(candidate.shortcut, candidate.fork)}:
                return "its branch goes down and up again in resolution: it merges levels, as a U-Net does"
            if Kind.CONSTANT is self.kinds[candidate.shortcut]:
                return "its shortcut is computed from a parameter"
        return self._nested(candidate, region, inside)

    def _nested(self, outer: Residual, region: list[fx.Node], inside: set[Kind]) -> str | None:
        inner = [node for node in region if node in self.accepted]
        cuts = _cuts(region, outer.fork)
        series = [node for node in inner if node in cuts]
        if len(series) > 1 or any(node in self.long_skips for node in region if node in cuts):
            self.long_skips.add(outer.add)
            return f"it is a long skip over the residual adds {', '.join(n.name for n in series[:3]) or 'inside'}"
        if not series:
            if self.kinds[outer.shortcut] is Kind.CONSTANT and inner:
                return "its shortcut is a constant that feeds earlier blocks"
            return self._swallow(outer, inner)
        if Kind.RESIZE in inside and call(series[0]) == call(outer.add):
            return "its branch goes down and up again in resolution around a residual add: it merges levels, as a U-Net does"
        if self.kinds[outer.shortcut] is Kind.CONSTANT:
            return "its shortcut is a constant that feeds earlier blocks"
        if call(series[0]) == call(outer.add):
            return self._swallow(outer, [node for node in inner if node not in series])
        return self._swallow(outer, inner)

    def _swallow(self, outer: Residual, inner: list[fx.Node]) -> None:
        for node in inner:
            del self.accepted[node]
            self._reject(node, f"it lies inside the branch of the residual add {outer.add.name}")

    def _in_place(self, candidate: Residual) -> str | None:
        """`branch.add_(shortcut)` writes into the branch; a dropped branch is another tensor, so nobody else may look at it."""
        add = candidate.add
        writes = op_name(add) == "iadd" or add.op == "call_method" and str(add.target) == "add_" or "add_" in str(add.target)
        if not writes or operands(add)[0] is not candidate.branch:
            return None
        here = self.index[add]
        for node in self._chain(candidate.branch, {Kind.VIEW}, linears=0):
            late = [user for user in node.users if self.index[user] > here]
            if late:
                return f"it adds in place into {node.name}, which {late[0].name} reads afterwards"
        return None

    # --- reasons ----------------------------------------------------------------------------------------------------

    def _reject(self, add: fx.Node, reason: str) -> None:
        self.rejected[add] = RejectedAdd(add, owner(add), reason)

    def _no_shortcut(self, a: fx.Node, b: fx.Node) -> str:
        for side in (a, b):
            if not is_activation(self.kinds[side]):
                return f"{side.name} is a parameter or a constant, not the output of a branch"
        return "neither side is a shortcut to the other: no common input that one of them leaves as it is or merely projects"


def _cuts(region: list[fx.Node], fork: fx.Node) -> set[fx.Node]:
    """The nodes of `region` that every path from `fork` to its end passes.

    In topological order a node is one exactly if no edge of the region jumps over it.
    """
    place = {fork: -1, **{node: i for i, node in enumerate(region)}}
    cuts, reach = set(), 0
    furthest = [-1] * (len(region) + 1)  # by place + 1: the furthest user inside the region
    for node in region:
        for arg in node.all_input_nodes:
            if arg in place:
                furthest[place[arg] + 1] = max(furthest[place[arg] + 1], place[node])
    reach = furthest[0]
    for i, node in enumerate(region):
        if reach <= i:
            cuts.add(node)
        reach = max(reach, furthest[i + 1])
    return cuts
