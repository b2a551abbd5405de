"""What a picture shows of a graph: boxes, edges between them, the blocks around them, and columns that fit a page.

Pure reading of a graph. In the default view a branch is one box, and so is each run of ops between sites; in the full view every
node is a box.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx
from torch import fx

from fxsd import RejectedAdd, ResidualSite
from fxsd.find.residual import operands
from fxsd.find.values import Kind, is_activation

Block = tuple[str, str]  # a module call: its key, told apart by call, and the module's qualified name


@dataclass(frozen=True)
class Box:
    """One box of the picture, which stands for one node or several.

    Attributes:
        role: `"input"`, `"output"`, `"add"` of a site, `"rejected"` add, `"branch"` of a site, the `"drop"` op of a branch that is not
            one box, `"shortcut"` that is a projection or a view, or a `"run"` of other ops.
        nodes: what it stands for, in graph order.
        site: the site that it belongs to, if any.
        rejected: the rejected adds among its nodes.
        blocks: the module calls around it that hold sites, outermost first.
    """

    role: str
    nodes: tuple[fx.Node, ...]
    site: ResidualSite | None
    rejected: tuple[RejectedAdd, ...]
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Edge:
    """From box to box, by place. Style: `"shortcut"`, `"branch"`, `"flow"`, or `"side"` for constants and sizes."""

    tail: int
    head: int
    style: str


@dataclass(frozen=True)
class View:
    """The boxes in topological order, their edges, the column of each box, and how many nodes are left out."""

    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]
    columns: tuple[int, ...]
    left_out: int


def view(
    graph: fx.Graph,
    kinds: Mapping[fx.Node, Kind],
    sites: Sequence[ResidualSite],
    rejected: Sequence[RejectedAdd],
    full: bool = False,
) -> View:
    """Works out what to draw.

    Args:
        graph: what runs.
        kinds: the kind of each node, from `fxsd.find.values.kinds`.
        sites, rejected: their nodes are nodes of `graph`.
        full: a box for every node.
    """
    shown = list(graph.nodes) if full else _leads_to_output(graph, kinds, [*sites, *rejected])
    groups = _Groups(shown, kinds, sites, {r.add: r for r in rejected})
    if not full:
        groups.collapse()
    ordered = groups.ordered()
    place = {node: i for i, group in enumerate(ordered) for node in group.nodes}
    around = _Blocks(sites)
    boxes = tuple(
        Box(
            group.role,
            tuple(group.nodes),
            group.site,
            tuple(groups.rejected[n] for n in group.nodes if n in groups.rejected),
            around.of(group.nodes, group.site),
        )
        for group in ordered
    )
    edges = _edges(groups, place)
    return View(boxes, edges, _columns(boxes, edges), len(graph.nodes) - len(shown))


def drop_node(site: ResidualSite) -> fx.Node:
    """The node of the stochastic op on the branch of a site of a transformed model."""
    return next(side for side in operands(site.add) if side is not site.shortcut)


def _leads_to_output(graph: fx.Graph, kinds: Mapping[fx.Node, Kind], adds: Iterable[ResidualSite | RejectedAdd]) -> list[fx.Node]:
    """The activations that the output is computed from, and the constants that enter an add."""
    useful: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or any(user in useful for user in node.users):
            useful.add(node)
    named = {add.add for add in adds}
    entering = {side for add in named for side in operands(add)}
    return [
        node
        for node in graph.nodes
        if node in named or (node in useful and (node.op == "output" or node in entering or is_activation(kinds[node])))
    ]


@dataclass(eq=False)
class _Group:
    role: str
    nodes: list[fx.Node]
    site: ResidualSite | None = None


@dataclass
class _Groups:
    """A partition of the nodes that are shown; every group is convex, so that what they form together has no cycle."""

    shown: list[fx.Node]
    kinds: Mapping[fx.Node, Kind]
    sites: Sequence[ResidualSite]
    rejected: Mapping[fx.Node, RejectedAdd]
    of: dict[fx.Node, _Group] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.index = {node: i for i, node in enumerate(self.shown)}
        self.inputs = {node: [arg for arg in node.all_input_nodes if arg in self.index] for node in self.shown}
        self.adds = {site.add: site for site in self.sites}
        self.drops = {drop_node(site): site for site in self.sites}
        self.branches = {site: self._between(site.fork, drop_node(site)) for site in self.sites}
        self.shortcuts = {site: self._between(site.fork, site.shortcut) for site in self.sites}
        inside = {node: site for site in reversed(self.sites) for node in self.branches[site]}
        for node in self.shown:
            site = self.adds.get(node) or self.drops.get(node) or inside.get(node)
            self.of[node] = _Group(self._role(node), [node], site)

    def collapse(self) -> None:
        """Makes one group of each branch without a site inside, each shortcut that is more than a line, and each run between."""
        for site in self.sites:
            if not any(node in self.adds for node in self.branches[site]):
                self._join("branch", self.branches[site], site)
        for site in self.sites:
            if not any(node in self.adds or node in self.rejected for node in self.shortcuts[site]):
                self._join("shortcut", self.shortcuts[site], site)
        self._join_runs()
        self._break_cycles()

    def ordered(self) -> list[_Group]:
        flow = self._flow()
        ordered: list[_Group] = list(nx.lexicographical_topological_sort(flow, key=lambda group: self.index[group.nodes[-1]]))
        return ordered

    def _role(self, node: fx.Node) -> str:
        if node in self.rejected:
            return "rejected"
        if node in self.adds:
            return "add"
        if node in self.drops:
            return "drop"
        return {"placeholder": "input", "output": "output"}.get(node.op, "run")

    def _between(self, fork: fx.Node, end: fx.Node) -> list[fx.Node]:
        """The nodes on the paths from `fork` (left out) to `end` (kept), in order."""
        if end is fork or end not in self.index:
            return []
        floor = self.index.get(fork, -1)
        past, stack = {end}, [end]
        while stack:
            for arg in self.inputs[stack.pop()]:
                if arg not in past and self.index[arg] > floor:
                    past.add(arg)
                    stack.append(arg)
        inside: dict[fx.Node, None] = {}
        for node in sorted(past, key=self.index.__getitem__):
            if any(arg is fork or arg in inside for arg in self.inputs[node]):
                inside[node] = None
        return list(inside)

    def _join(self, role: str, nodes: Iterable[fx.Node], site: ResidualSite | None = None) -> None:
        """One group of those nodes that are in no joint group yet."""
        free = [node for node in nodes if self.of[node].role in ("run", "drop", "rejected")]
        group = _Group(role, free, site)
        self.of.update(dict.fromkeys(free, group))

    def _join_runs(self) -> None:
        """Joins neighbours that lie between the same groups: those that they are computed from, and those that they lead to."""
        before = self._nearest(self.shown, self.inputs)
        users = {node: [user for user in node.users if user in self.index] for node in self.shown}
        after = self._nearest(reversed(self.shown), users)
        runs: nx.utils.UnionFind = nx.utils.UnionFind()
        for node in filter(self._is_plain, self.shown):
            runs[node]  # a run of its own, to begin with
            for arg in filter(self._is_plain, self.inputs[node]):
                if before[arg] == before[node] and after[arg] == after[node]:
                    runs.union(arg, node)
        for run in list(runs.to_sets()):
            self._join("run", sorted(run, key=self.index.__getitem__))

    def _is_plain(self, node: fx.Node) -> bool:
        return self.of[node].role == "run" and is_activation(self.kinds[node])

    def _nearest(self, nodes: Iterable[fx.Node], following: Mapping[fx.Node, list[fx.Node]]) -> dict[fx.Node, frozenset[_Group]]:
        nearest: dict[fx.Node, frozenset[_Group]] = {}
        for node in nodes:
            nearest[node] = frozenset().union(*(nearest[other] if self._is_plain(other) else {self.of[other]} for other in following[node]))
        return nearest

    def _flow(self) -> nx.DiGraph:
        flow = nx.DiGraph()
        flow.add_nodes_from(self.of[node] for node in self.shown)
        flow.add_edges_from(
            (self.of[arg], self.of[node]) for node in self.shown for arg in self.inputs[node] if self.of[arg] is not self.of[node]
        )
        return flow

    def _break_cycles(self) -> None:
        """Takes groups that lead to each other in both directions apart: branches that share nodes can."""
        while tangled := [group for part in nx.strongly_connected_components(self._flow()) if len(part) > 1 for group in part]:
            for group in tangled:
                for node in group.nodes:
                    self.of[node] = _Group(self._role(node), [node], group.site)


def _edges(groups: _Groups, place: Mapping[fx.Node, int]) -> tuple[Edge, ...]:
    style: dict[tuple[fx.Node, fx.Node], str] = {}
    for paths, name in ((groups.branches, "branch"), (groups.shortcuts, "shortcut")):  # a shortcut inside a branch is a shortcut
        for site, inside in paths.items():
            ends = {site.fork, *inside}
            style.update({(arg, node): name for node in inside for arg in groups.inputs[node] if arg in ends})
            style[drop_node(site) if name == "branch" else site.shortcut, site.add] = name
    found: dict[tuple[int, int], str] = {}
    rank = ["side", "flow", "branch", "shortcut"]
    for node in groups.shown:
        for arg in groups.inputs[node]:
            pair = place[arg], place[node]
            if pair[0] != pair[1]:
                carried = style.get((arg, node), "flow" if is_activation(groups.kinds[arg]) else "side")
                found[pair] = max(found.get(pair, "side"), carried, key=rank.index)
    return tuple(Edge(tail, head, name) for (tail, head), name in found.items())


class _Blocks:
    """The module calls that are drawn around boxes: those that hold a site, but for those that hold all of them."""

    def __init__(self, sites: Sequence[ResidualSite]) -> None:
        stacks = [_stack(site.add) for site in sites]
        common = set.intersection(*map(set, stacks)) if stacks else set()
        self.drawn = {block for stack in stacks for block in stack if block not in common or block == stack[-1]}

    def of(self, nodes: Sequence[fx.Node], site: ResidualSite | None) -> tuple[Block, ...]:
        stacks = [_stack(site.add)] if site else [_stack(node) for node in nodes]
        shared = [block for block in stacks[0] if block in self.drawn and all(block in stack for stack in stacks)]
        return tuple(shared)


def _stack(node: fx.Node) -> list[Block]:
    """The module calls around a node, outermost first; the module that a call_module node calls is not around it."""
    stack = node.meta.get("nn_module_stack") or {}
    blocks = [(str(key), str(value[0])) for key, value in stack.items() if value[0]]
    return blocks[:-1] if node.op == "call_module" and blocks and blocks[-1][1] == node.target else blocks


_ASPECT = 0.55  # a row of one box is about half as high as a column is wide


def _columns(boxes: Sequence[Box], edges: Sequence[Edge]) -> tuple[int, ...]:
    """Breaks a long chain into columns, where all goes through one box: between stages or blocks if it can, of like height."""
    inputs = Counter(edge.head for edge in edges)
    edges = [edge for edge in edges if edge.style != "side" and boxes[edge.tail].role != "input"]
    row, last = [0] * len(boxes), [-1] * len(boxes)
    for edge in sorted(edges, key=lambda edge: edge.head):
        row[edge.head] = max(row[edge.head], row[edge.tail] + 1)
        last[edge.tail] = max(last[edge.tail], edge.head)
    rows = max(row, default=0) + 1
    wide = max(1.0, max(inputs.values(), default=0) / 2)  # parameters of a call stand side by side
    goal = rows / max(1, round((rows * _ASPECT / wide) ** 0.5))
    waiting: set[int] = set()
    breaks = [0]
    for i in range(len(boxes) - 1):
        waiting = {tail for tail in {*waiting, i} if last[tail] > i}
        if len(waiting) == 1 and boxes[i].role != "input":
            breaks.append(i + 1)
    cuts = _best_breaks(breaks, [row[i] for i in breaks] + [rows], [_break_cost(boxes, i) for i in breaks], goal)
    return tuple(sum(cut <= i for cut in cuts) for i in range(len(boxes)))


def _best_breaks(breaks: Sequence[int], rows: Sequence[int], costs: Sequence[float], goal: float) -> list[int]:
    """Of the places where a column may begin, those that give the best columns (dynamic programming over the last break)."""
    best: list[tuple[float, list[int]]] = []
    for end in range(1, len(breaks) + 1):
        ways = [
            (before[0] + ((rows[end] - rows[start]) / goal - 1) ** 2 + costs[start], [*before[1], breaks[start]])
            for start, before in enumerate([(0.0, []), *best])
        ]
        best.append(min(ways, key=lambda way: way[0]))
    return best[-1][1][1:]


def _break_cost(boxes: Sequence[Box], i: int) -> float:
    """What it costs to begin a column at box `i`: nothing between stages, little between blocks, much inside of one."""
    if i == 0:
        return 0.0
    shared = set(boxes[i - 1].blocks) & set(boxes[i].blocks)
    inside = bool(shared) and boxes[i - 1].blocks[-1] in shared and boxes[i].blocks[-1] in shared
    return 2.0 if inside else 0.15 * bool(shared)
