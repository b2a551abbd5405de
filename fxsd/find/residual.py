"""Which adds of a graph are residual: y = shortcut + F(x), the shortcut being x or a projection of x.

Pure reading of a graph: no edits, no rates, no modules. The rules, in the order in which they decide:

1. Both operands are activations. Shape arithmetic, biases and position embeddings are not. (A parameter that also feeds the other
   operand counts: a class token.)
2. *Identity*: one operand, through views and constant scaling, is an ancestor of the other.
3. *Projection*: one operand is a chain of at most one conv or linear, with norms, pools and activations, from a node that every path to the
   other operand passes, and the other is nonlinear and does more.
   Neither, where it is one part of a value of which the branch takes other parts: the shift of an adaptive norm.
4. The branch does work: something that mixes positions or channels, and not a single bare linear op.
5. A branch that holds residual blocks in series is a long skip, not a branch. A residual add inside a branch is its internal. Neither,
   if it is of another stream, that goes on outside of the branch.
6. In `f(x) + g(x) + x` each of f and g that makes a branch by itself is one, if all do.
7. `x + act(conv(x))`, once, ahead of the numbered blocks that the same module runs, is a position encoding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice, pairwise

from torch import fx

from fxsd.find.reach import HEAVY, MANY, Reach, live
from fxsd.find.samples import sample_dims
from fxsd.find.values import Kind, is_activation, op_name, written

_CHAIN = {Kind.VIEW, Kind.SCALE, Kind.DROP}
_LIGHT = {Kind.NORM, Kind.POOL, Kind.PAD, Kind.NONLINEAR, Kind.RESIZE, Kind.JOIN}
_STREAM = _CHAIN | {Kind.NORM, Kind.NONLINEAR}
_WORK = HEAVY | {Kind.POOL}
_LINEAR = {Kind.LINEAR, Kind.VIEW, Kind.SCALE, Kind.NORM, Kind.PAD, Kind.DROP, Kind.ADD, Kind.JOIN, Kind.RESIZE, Kind.POOL}
_BARE = {Kind.LINEAR, Kind.VIEW, Kind.SCALE, Kind.PAD}
_MERGE = "one of its sides goes down and up again in resolution: it merges levels, as a U-Net does"
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
    batch_dim: int = 0  # which dim of its operands holds the samples
    placed: bool = False  # is that known?


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


def find(
    graph: fx.Graph,
    kinds: dict[fx.Node, Kind],
    include: Callable[[str], bool] = lambda module: False,
    holds: Callable[[fx.Node], int] = lambda node: 0,
) -> Found:
    """Finds the residual adds of `graph`.

    Args:
        graph: a captured graph, topologically ordered as every fx graph is.
        kinds: the kind of each node, from `fxsd.find.values.kinds`.
        include: of which modules the adds are taken even where the rules say no; '' is the root.
        holds: how many sites a `call_module` node holds that are rewritten elsewhere: they count as residual blocks in series.

    Returns:
        The residual adds and the rejected ones, each in graph order. Two residual adds share their `add` where both its sides are
        branches: `f(x) + g(x) + x`.
    """
    finder = _Finder(Reach(graph, kinds), live(graph), include, holds)
    dims = sample_dims(graph, kinds)
    for node in graph.nodes:
        if is_add(node):
            finder.judge(node)
        if is_activation(kinds[node]):
            finder.reach.add(node, marked=finder.blocks_in(node) > 0)
    finder.leave_out_position_encodings()
    order = finder.reach.index
    residuals = (_placed(residual, dims) for sites in finder.accepted.values() for residual in sites)
    return Found(
        tuple(sorted(residuals, key=lambda r: (order[r.add], operands(r.add).index(r.branch)))),
        tuple(sorted(finder.rejected.values(), key=lambda r: order[r.add])),
    )


def _placed(residual: Residual, dims: Mapping[fx.Node, int]) -> Residual:
    dim = dims.get(residual.shortcut, dims.get(residual.branch))
    return residual if dim is None else replace(residual, batch_dim=dim, placed=True)


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
    live: set[fx.Node]
    include: Callable[[str], bool]
    holds: Callable[[fx.Node], int]
    accepted: dict[fx.Node, list[Residual]] = field(default_factory=dict)  # a sum with its shortcut -> the branches in it
    rejected: dict[fx.Node, RejectedAdd] = field(default_factory=dict)
    long_skips: dict[fx.Node, fx.Node] = field(default_factory=dict)  # a sum -> the fork of its sides
    # x + f(x) + g(x): the second branch has the shortcut of the first. From a sum that was accepted, where its shortcuts lead to:
    fork_of: dict[fx.Node, fx.Node] = field(default_factory=dict)  # the first value with other users, which may be a fork
    start_of: dict[fx.Node, fx.Node] = field(default_factory=dict)  # the first value that is no such sum
    origins: dict[fx.Node, fx.Node] = field(default_factory=dict)  # what `_origin` has found
    parts: dict[fx.Node, dict[fx.Node, list[fx.Node]]] = field(default_factory=dict)  # what `_parts` has found

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
            candidate = self._smaller_side(add, a, b, exact=True)
        if candidate is None:
            self._reject(add, self._no_shortcut(a, b))
            return
        against = (self._unused, self._feeds, self._shifts, self._idle, self._nested)
        reason = self._in_place(candidate) or (None if wanted else next(filter(None, (rule(candidate) for rule in against)), None))
        if reason:
            self._reject(add, reason)
        else:
            self._accept(candidate)

    def blocks_in(self, node: fx.Node) -> int:
        """How many residual blocks a node counts as: 2 says that it stands for blocks in series."""
        if node.op == "call_module":
            return self.holds(node)
        return 2 if node in self.long_skips else int(node in self.accepted)

    def _accept(self, candidate: Residual) -> None:
        add, shortcut = candidate.add, candidate.shortcut
        terms = self._terms(candidate)
        for inner in {term.add for term in terms}:
            self.rejected.pop(inner, None)
            if self.accepted.pop(inner, None):
                self.reach.unmark([inner], candidate.fork, candidate.branch)
        self.accepted[add] = terms or [candidate]
        self.fork_of[add] = self.fork_of.get(shortcut, shortcut) if len(shortcut.users) == 1 else shortcut
        self.start_of[add] = self.start_of.get(shortcut, shortcut)

    def _terms(self, outer: Residual) -> list[Residual]:
        """`f(x) + g(x) + x`: the branches, if each would make one by itself. The parentheses of `x + (f(x) + g(x))` make it one branch."""
        if outer.kind != "identity" or operands(outer.add)[0] is not outer.branch:
            return []
        found: list[Residual] = []
        rest = outer.branch
        while is_add(rest) and len(rest.users) == 1 and call(rest) == call(outer.add) and len(set(operands(rest))) == 2:
            add, (rest, term) = rest, operands(rest)
            found.append(self._residual(add, term, rest, outer.fork, outer.kind))
            if not self._is_branch(found[-1]):
                return []
        if found:
            found.append(self._residual(add, rest, term, outer.fork, outer.kind))
        return found if found and self._is_branch(found[-1]) else []

    def _is_branch(self, candidate: Residual) -> bool:
        """Does it come from the fork, do something that is not linear, and hold no residual add, now or before?"""
        fork, branch = candidate.fork, candidate.branch
        if not is_activation(self.kinds[branch]) or not self.reach.is_ancestor(fork, branch) or self._in_place(candidate):
            return False
        inside = self.reach.summary(fork, branch)
        return not inside.sites and (candidate.existing is not None or not (self._idle(candidate) or inside.kinds <= _LINEAR))

    # --- the two sides ----------------------------------------------------------------------------------------------

    def _identity(self, add: fx.Node, a: fx.Node, b: fx.Node) -> Residual | None:
        if not is_activation(self.kinds[b]):
            return None
        for node in self._chain(a, _CHAIN):
            if len(node.users) > 1 and self.reach.is_ancestor(node, b):
                return self._residual(add, b, a, node, "identity")
            if node is a and not self.reach.is_ancestor(self._origin(a), b):
                return None  # nor is any other
        return None

    def _projection(self, add: fx.Node, a: fx.Node, b: fx.Node) -> Residual | None:
        found = self._smaller_side(add, a, b)
        if found and self._is_light(found.fork, found.shortcut):
            return found
        return self._conditioned(add, a, b) or self._conditioned(add, b, a)

    def _conditioned(self, add: fx.Node, shortcut: fx.Node, branch: fx.Node) -> Residual | None:
        """A projection block whose branch takes a second input besides the fork, such as a time embedding.

        Not everything behind the branch comes from one node then; that one call executes it all and gets the fork from outside says that
        it is a block. A merge of a U-Net gets its shortcut from outside as well, but has computed it from an input of its own.
        """
        linears = 0
        for node in self._chain(shortcut, _CHAIN | _LIGHT | {Kind.LINEAR}):
            inside = self._in_call(add, [node])
            if node is not shortcut and len(node.users) > 1 and self.reach.is_ancestor(node, branch):
                enters = node.op == "placeholder" or not inside
                block = enters and self._weight(node, branch) > self._weight(node, shortcut) and self._is_light(node, shortcut)
                if block and self._in_call(add, self.reach.region(node, branch)):
                    return self._residual(add, branch, shortcut, node, "projection")
                return None
            linears += self.kinds[node] is Kind.LINEAR
            if linears > 1 or not inside:
                return None
        return None

    def _smaller_side(self, add: fx.Node, a: fx.Node, b: fx.Node, exact: bool = False) -> Residual | None:
        """Of two sides that fork from one node, the one with less work is the shortcut."""
        fork = self.reach.common_fork(a, b)
        if fork is None or fork is a or fork is b:
            return None
        weight_a, weight_b = (self._weight(fork, side, exact) for side in (a, b))
        if weight_a == weight_b:
            return None
        branch, shortcut = (a, b) if weight_a > weight_b else (b, a)
        return self._residual(add, branch, shortcut, fork, "projection")

    def _weight(self, fork: fx.Node, side: fx.Node, exact: bool = False) -> int:
        """How much a side does: pools alone make no branch. Up to `MANY`, unless it has to be exact."""
        if (start := self._start(fork, side)) is None:
            return 0
        counted = len(self.reach.heavy(fork, start))
        if exact and counted == MANY:
            return sum(self.kinds[node] in HEAVY for node in self.reach.region(fork, start))
        return counted

    def _is_light(self, fork: fx.Node, shortcut: fx.Node) -> bool:
        """At most one linear op from `fork` to `shortcut`, and else only norms, pools, activations, views and plain functions."""
        if (start := self._start(fork, shortcut)) is None:
            return True
        side = self.reach.summary(fork, start)
        if side.sealed or not side.kinds <= _CHAIN | _LIGHT | {Kind.LINEAR, Kind.OPAQUE}:
            return False
        heavy = self.reach.heavy(fork, start)
        return len(heavy) < MANY and sum(self.kinds[node] is Kind.LINEAR for node in heavy) <= 1

    def _start(self, fork: fx.Node, side: fx.Node) -> fx.Node | None:
        """What the shortcuts of a side lead to; None if it does not come from `fork`: it is an earlier value, or a constant."""
        start = self.start_of.get(side, side)
        return start if is_activation(self.kinds[start]) and self.reach.index[start] > self.reach.index[fork] else None

    def _residual(self, add: fx.Node, branch: fx.Node, shortcut: fx.Node, fork: fx.Node, kind: str) -> Residual:
        existing = next((node for node in self._single_inputs(branch, _CHAIN | {Kind.NORM}) if self.kinds[node] is Kind.DROP), None)
        return Residual(add, branch, shortcut, fork, kind, owner(add), existing)

    def _chain(self, node: fx.Node, through: set[Kind]) -> Iterator[fx.Node]:
        """`node`, and what it comes from through single-input ops of the kinds `through` and the shortcuts of accepted sums, nearest first.

        Such sums that have no other user are left out.
        """
        while True:
            passed = node
            for passed in self._single_inputs(node, through):
                yield passed
            if passed not in self.accepted:
                return
            node = self.fork_of[passed]

    def _origin(self, node: fx.Node) -> fx.Node:
        """What the `_chain` of an identity ends in, or what that comes from, where a sum that was accepted once is so no more."""
        passed = []
        while node not in self.origins:
            passed.append(node)
            before = next(islice(self._single_inputs(node, _CHAIN), 1, None), None) or self.fork_of.get(node)
            if before is None:
                self.origins[node] = node
            else:
                node = before
        self.origins.update(dict.fromkeys(passed, self.origins[node]))
        return self.origins[node]

    def _single_inputs(self, node: fx.Node, through: set[Kind]) -> Iterator[fx.Node]:
        yield node
        while (kind := self.kinds[node]) is Kind.CONSTANT or kind in through:
            constant = kind is Kind.CONSTANT
            inputs = [arg for arg in node.all_input_nodes if (self.kinds[arg] is Kind.CONSTANT) is constant]
            inputs = [arg for arg in inputs if constant or is_activation(self.kinds[arg])]
            if len(inputs) != 1:
                return
            yield (node := inputs[0])

    # --- what speaks against a candidate: each gives the reason, or None --------------------------------------------------

    def _unused(self, candidate: Residual) -> str | None:
        return None if candidate.add in self.live else "its result is not used"

    def _feeds(self, candidate: Residual) -> str | None:
        """The shortcut is a constant, as a class token is, but has been added before, as a position embedding may be."""
        fork, branch = candidate.fork, candidate.branch
        if not is_activation(self.kinds[fork]) and any(map(self.blocks_in, self.reach.region(fork, branch))):
            return "its shortcut is a constant that feeds earlier blocks"
        return None

    def _shifts(self, candidate: Residual) -> str | None:
        """The shortcut is one part of a value, and the branch takes only others of them, such as the scale that belongs to a shift."""
        for part, whole in pairwise(self._chain(candidate.shortcut, _CHAIN)):
            if part is candidate.fork:
                break
            same = self._parts(whole).get(part)
            if same and [node for node in (whole, *same) if self.reach.is_ancestor(node, candidate.branch)] == [whole]:
                return "its shortcut is one part of a value whose other parts go into its branch, as the shift of an adaptive norm is"
        return None

    def _parts(self, whole: fx.Node) -> dict[fx.Node, list[fx.Node]]:
        """The users of `shift, scale = x.chunk(2)` -> the users that take the same part. Empty if not all take one by its number."""
        if whole not in self.parts:
            users = [user for user in whole.users if self.kinds[user] is not Kind.SHAPE]
            by_index: dict[str, list[fx.Node]] = {}
            for user in users:
                index = user.args[1] if op_name(user) == "getitem" else None
                if any(isinstance(number, int) for number in (index if isinstance(index, tuple) else (index,))):
                    by_index.setdefault(str(index), []).append(user)
            split = self.kinds[whole] is not Kind.OPAQUE and sum(map(len, by_index.values())) == len(users)
            self.parts[whole] = {user: same for same in by_index.values() for user in same} if split else {}
        return self.parts[whole]

    def _idle(self, candidate: Residual) -> str | None:
        """The branch does nothing worth dropping, or the add merges what no residual block merges."""
        branch = self.reach.summary(candidate.fork, candidate.branch)
        if candidate.existing is None:
            if branch.kinds.isdisjoint(_WORK):
                return "its branch has no convolution, linear, attention or pooling op: there is nothing to drop"
            if branch.kinds <= _BARE and len(self.reach.heavy(candidate.fork, candidate.branch)) == 1:
                return "its branch is a single linear op, as in a position encoding"
        if candidate.kind == "projection":
            if branch.kinds <= _LINEAR:
                return "both sides are linear, as in reparametrised convolutions"
            # A block that changes the resolution does so on both sides, and in one direction. An opaque call may resize unseen.
            shortcut = self.reach.summary(candidate.fork, candidate.shortcut)
            below = Kind.RESIZE in branch.kinds - shortcut.kinds
            above = Kind.RESIZE in shortcut.kinds and (Kind.POOL in shortcut.kinds or branch.kinds.isdisjoint({Kind.RESIZE, Kind.OPAQUE}))
            if below or above:
                return _MERGE
        elif Kind.RESIZE in branch.kinds:
            numbered = _NUMBERED.search(owner(candidate.add))
            if not numbered or not self._in_call(candidate.add, self.reach.region(candidate.fork, candidate.branch)):
                return _MERGE
        return None

    def _in_call(self, add: fx.Node, nodes: Iterable[fx.Node]) -> bool:
        """Does the module call that executes `add` execute all of `nodes`? A decoder gets its skip from outside."""
        here = call(add)
        return all(here in node.meta.get("nn_module_stack", ()) for node in nodes)

    def _nested(self, outer: Residual) -> str | None:
        """Residual adds inside the branch: in series they make the outer add a long skip, elsewhere they are its internals.

        Those of another stream that the branch reads from are neither.
        """
        fork, branch = outer.fork, outer.branch
        inside = self.reach.summary(fork, branch)
        if not (inside.sites and is_activation(self.kinds[fork])):  # of a constant, `_feeds` has asked
            return None
        series = self._blocks(self.reach.marked_in_series(fork, branch), fork)
        if series and call(series[0]) == call(outer.add) and self._is_aside(series[0], outer):
            series = []
        if len(series) > 1:
            self.long_skips[outer.add] = outer.fork
            return f"it is a long skip over residual blocks such as {series[0].name}"
        together = [node for node in series if node in self.accepted and call(node) == call(outer.add)]
        if series and not together and self._is_global(outer, series[0]):
            self.long_skips[outer.add] = outer.fork
            return f"it is a long skip over the residual block {series[0].name} and more"
        if series and Kind.RESIZE in inside.kinds:
            return _MERGE
        inner = [node for node in self.reach.marked_between(fork, branch) if node in self.accepted]
        for node in together:  # y + f(y) + g(y): one block, two adds
            shortcut = self.accepted[node][0].shortcut
            if shortcut in inner and call(shortcut) == call(outer.add):
                together.append(shortcut)
        aside: set[fx.Node] = set()
        for node in reversed(inner):
            if node in aside or self._is_aside(node, outer):
                aside.update((node, *self._single_inputs(self.accepted[node][0].shortcut, _STREAM)))
        internals = [node for node in inner if node not in together and node not in aside and not self.include(owner(node))]
        if chained := self._fed_by_another(internals, outer):
            self.long_skips[outer.add] = outer.fork
            return f"it is a long skip over residual blocks such as {chained.name}"
        self.reach.unmark(internals, fork, branch)
        for node in internals:
            for add in {node, *(residual.add for residual in self.accepted.pop(node))}:
                self._reject(add, f"it lies inside the branch of the residual add {outer.add.name}")
        return None

    def _fed_by_another(self, inner: list[fx.Node], outer: Residual) -> fx.Node | None:
        """One of two blocks in series, each a numbered module's. A way around them, on which their values leave too, changes nothing."""
        blocks = dict.fromkeys(node for node in inner if call(node) != call(outer.add) and _NUMBERED.search(owner(node)))
        for node in reversed(blocks):
            before = self._single_inputs(self.accepted[node][0].shortcut, _STREAM)
            if any(other in blocks and call(other) != call(node) for other in before):
                return node
        return None

    def _is_aside(self, node: fx.Node, outer: Residual) -> bool:
        """Is the sum of another stream than the fork: not made of it alone, and going on outside of the branch?"""
        if self.reach.is_behind(outer.fork, node):
            return False
        while len(node.users) == 1 and self.kinds[user := next(iter(node.users))] in _STREAM:
            node = user
        users = [user for user in node.users if user in self.live and (is_activation(self.kinds[user]) or user.op == "output")]
        inside = {outer.add, outer.branch}
        return any(user not in inside and not self.reach.is_ancestor(user, outer.branch) for user in users)

    def _blocks(self, nodes: Iterable[fx.Node], fork: fx.Node) -> list[fx.Node]:
        """The residual blocks among nodes in series, until there are two. A long skip from elsewhere, as of a mask, stands for none."""
        found: list[fx.Node] = []
        for node in nodes:
            start = self.long_skips.get(node, fork)
            if start is not fork and not self.reach.is_ancestor(fork, start):
                continue
            found += [node] * self.blocks_in(node)
            if len(found) > 1:
                break
        return found

    def _is_global(self, outer: Residual, block: fx.Node) -> bool:
        """The add around all of a network, with one residual block and other work in its branch: the block is numbered, it is not."""
        if block not in self.accepted or _NUMBERED.search(owner(outer.add)) or not _NUMBERED.search(owner(block)):
            return False
        if self._joins_parts(self.accepted[block][0]):
            return False
        parts = [(outer.fork, self.accepted[block][0].fork), (block, outer.branch)]
        return any(not self.reach.summary(a, b).kinds.isdisjoint(_WORK) for a, b in parts if self.reach.is_ancestor(a, b))

    def _joins_parts(self, site: Residual) -> bool:
        """Is its shortcut made of one part of a value, and its branch of others too: values, and queries and keys?"""
        for part, whole in pairwise(self._chain(site.shortcut, _CHAIN | _LIGHT | {Kind.LINEAR})):
            parts = self._parts(whole)
            if part in parts:
                return any(other not in parts[part] and self.reach.is_ancestor(other, site.branch) for other in parts)
        return False

    def leave_out_position_encodings(self) -> None:
        """Takes back `x + act(conv(x))` where a module adds it once, ahead of the numbered blocks that it runs."""
        order = sorted(self.accepted, key=self.reach.index.__getitem__)
        first: dict[str, fx.Node] = {}
        for add in order:
            for path in ("", *accumulate(owner(add).split("."), "{}.{}".format)):
                first.setdefault(path, add)
        for add, following in pairwise(order):
            path, site = owner(add), self.accepted[add][0]
            ahead = first[path] is add and owner(following).startswith(f"{path}." if path else "") and _NUMBERED.search(owner(following))
            if not ahead or _NUMBERED.search(path) or site.kind != "identity" or site.existing or self.include(path):
                continue
            branch = self.reach.summary(site.fork, site.branch)
            if branch.kinds <= _BARE | {Kind.NORM, Kind.NONLINEAR} and len(self.reach.heavy(site.fork, site.branch)) == 1:
                del self.accepted[add]
                self._reject(add, "its branch is a single linear op and an activation ahead of the blocks, as in a position encoding")

    def _in_place(self, candidate: Residual) -> str | None:
        """`branch.add_(shortcut)` writes into the branch; a dropped branch is another tensor, so nobody else may look at it."""
        add = candidate.add
        if written(add) is not candidate.branch:
            return None
        for node in self._aliases(candidate.branch):
            late = [user for user in node.users if self.reach.index[user] > self.reach.index[add]]
            if late:
                return f"it adds in place into {node.name}, which {late[0].name} reads afterwards"
        return None

    def _aliases(self, node: fx.Node) -> list[fx.Node]:
        """The nodes before an in-place write that may share memory with `node`: views of it, and what it is a view of."""
        seen, stack = {node}, [*self._single_inputs(node, {Kind.VIEW})]
        while stack:
            seen.add(base := stack.pop())
            stack.extend(user for user in base.users if self.kinds[user] is Kind.VIEW and user not in seen)
        return sorted(seen, key=self.reach.index.__getitem__)

    def _reject(self, add: fx.Node, reason: str) -> None:
        self.rejected[add] = RejectedAdd(add, owner(add), reason)

    def _no_shortcut(self, a: fx.Node, b: fx.Node) -> str:
        for side in (a, b):
            if not is_activation(self.kinds[side]):
                return f"{side.name} is a parameter or a constant, not the output of a branch"
        return "neither side is a shortcut to the other: no common input that one of them leaves as it is or merely projects"
