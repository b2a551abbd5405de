"""What lies between the nodes of a graph, against networkx on random graphs; and how the work grows."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from fxsd.find import residual
from fxsd.find.depth import depths
from fxsd.find.reach import MANY, Reach
from fxsd.find.values import Kind

quick = settings(derandomize=True, deadline=None, max_examples=100, database=None)
KINDS = [Kind.LINEAR, Kind.NONLINEAR, Kind.MIX, Kind.ADD, Kind.NORM]


class Flow:
    """A graph whose nodes have the kinds that they are said to have."""

    def __init__(self) -> None:
        self.graph, self.kinds = fx.Graph(), dict[fx.Node, Kind]()

    def input(self) -> fx.Node:
        return self._keep(self.graph.placeholder("x"), Kind.INPUT)

    def constant(self) -> fx.Node:
        return self._keep(self.graph.get_attr("constant"), Kind.CONSTANT)

    def op(self, kind: Kind, *inputs: fx.Node) -> fx.Node:
        return self._keep(self.graph.call_function(torch.cat, (list(inputs),)), kind)

    def add(self, a: fx.Node, b: fx.Node, module: str = "") -> fx.Node:
        node = self._keep(self.graph.call_function(operator.add, (a, b)), Kind.ADD)
        if module:
            node.meta["nn_module_stack"] = {module: (module, object)}
        return node

    def light(self, x: fx.Node) -> fx.Node:
        return self.op(Kind.NONLINEAR, self.op(Kind.LINEAR, x))

    def output(self) -> fx.Node:
        return self._keep(self.graph.output([node for node in self.graph.nodes if not node.users]), Kind.SHAPE)

    def _keep(self, node: fx.Node, kind: Kind) -> fx.Node:
        self.kinds[node] = kind
        return node


# --- against networkx -----------------------------------------------------------------------------------------------------------


@st.composite
def flows(draw: st.DrawFn) -> tuple[Flow, set[fx.Node]]:
    """A random graph, with one constant, and the nodes that are marked in it."""
    flow = Flow()
    nodes = [flow.input(), flow.constant(), flow.input()]
    for _ in range(draw(st.integers(3, 25))):
        recent = nodes[-draw(st.sampled_from([3, 30])) :]
        inputs = draw(st.lists(st.sampled_from(recent), min_size=1, max_size=3, unique=True))
        if not any(flow.kinds[node] is not Kind.CONSTANT for node in inputs):
            inputs.append(nodes[0])
        nodes.append(flow.op(draw(st.sampled_from(KINDS)), *inputs))
    marked = draw(st.sets(st.sampled_from(nodes[3:])))
    return flow, marked


def grown(flow: Flow, marked: set[fx.Node]) -> Reach:
    reach = Reach(flow.graph, flow.kinds)
    for node in flow.graph.nodes:
        if flow.kinds[node] is not Kind.CONSTANT:
            reach.add(node, node in marked)
    return reach


def pairs(flow: Flow) -> Iterator[tuple[fx.Node, fx.Node, set[fx.Node]]]:
    """Each ancestor and descendant, and the nodes between them."""
    dag = nx.DiGraph((arg, node) for node in flow.graph.nodes for arg in node.all_input_nodes)
    for fork in flow.graph.nodes:
        below = nx.descendants(dag, fork) if fork in dag else set()
        for end in filter(below.__contains__, flow.graph.nodes):
            yield fork, end, below & (nx.ancestors(dag, end) | {end})


def always(fork: fx.Node, end: fx.Node, between: set[fx.Node]) -> set[fx.Node]:
    """The nodes that every path passes."""
    dag = nx.DiGraph((arg, node) for node in between for arg in node.all_input_nodes if arg is fork or arg in between)
    idom, passed = nx.immediate_dominators(dag, fork), set()
    while end is not fork:
        passed.add(end)
        end = idom[end]
    return passed


@given(made=flows())
@quick
def test_ancestors_are_those_of_networkx(made: tuple[Flow, set[fx.Node]]):
    flow, marked = made
    reach, expected = grown(flow, marked), {(fork, end) for fork, end, _ in pairs(flow)}
    activations = [node for node in flow.graph.nodes if flow.kinds[node] is not Kind.CONSTANT]
    assert {(a, b) for a in flow.graph.nodes for b in activations if reach.is_ancestor(a, b)} == expected


@given(made=flows())
@quick
def test_a_summary_tells_what_lies_between(made: tuple[Flow, set[fx.Node]]):
    flow, marked = made
    reach = grown(flow, marked)
    for fork, end, between in pairs(flow):
        summary, found = reach.summary(fork, end), reach.heavy(fork, end)
        heavy = {node for node in between if flow.kinds[node] in (Kind.LINEAR, Kind.MIX)}
        assert summary.kinds == {flow.kinds[node] for node in between}
        assert heavy.issuperset(found)
        assert len(set(found)) == len(found) == min(len(heavy), MANY)
        assert summary.sites == (not between.isdisjoint(marked))


@given(made=flows(), data=st.data())
@quick
def test_the_marked_nodes_between_are_found_before_and_after_some_lose_their_mark(made: tuple[Flow, set[fx.Node]], data: st.DataObject):
    flow, marked = made
    reach = grown(flow, marked)
    forks = {node for node in flow.graph.nodes if flow.kinds[node] is not Kind.CONSTANT and len(node.users) > 1}
    found = [each for each in pairs(flow) if each[0] in forks]
    if not found:
        return
    for _ in range(3):
        for fork, end, between in found:
            assert set(reach.marked_in_series(fork, end)) == always(fork, end, between) & marked
            assert reach.marked_between(fork, end) == [node for node in flow.graph.nodes if node in between & marked]
        fork, end, between = data.draw(st.sampled_from(found))
        lost = {node for node in flow.graph.nodes if node in between & marked and data.draw(st.booleans())}
        reach.unmark(lost, fork, end)
        marked = marked - lost


# --- growth ---------------------------------------------------------------------------------------------------------------------


def chain(flow: Flow, n: int) -> int:
    x = flow.input()
    for i in range(n):
        x = flow.add(x, flow.light(x), f"blocks.{i}")
    return n


def fan(flow: Flow, n: int) -> int:
    """Each of n values gets a branch of the product of all: no value dominates its branch."""
    x = flow.input()
    values = [flow.light(x) for _ in range(n)]
    product = values[0]
    for value in values[1:]:
        product = flow.op(Kind.NONLINEAR, product, value)
    flow.op(Kind.JOIN, *[flow.add(value, flow.light(product)) for value in values])
    return n


def fan_products(flow: Flow, n: int) -> int:
    """As `fan`, but each branch goes on to a merge of its own, with another value: no two have the same."""
    return crossed_fan(flow, n, Kind.NONLINEAR, 1)


def fan_joins(flow: Flow, n: int) -> int:
    return crossed_fan(flow, n, Kind.JOIN, 1)


def fan_sums(flow: Flow, n: int) -> int:
    """The merges are residual adds, too."""
    return crossed_fan(flow, n, Kind.ADD, 2)


def crossed_fan(flow: Flow, n: int, merge: Kind, sites: int) -> int:
    x = flow.input()
    values = [flow.light(x) for _ in range(n)]
    product = values[0]
    for value in values[1:]:
        product = flow.op(Kind.NONLINEAR, product, value)
    sums = []
    for value, other in zip(values, reversed(values), strict=True):
        branch = flow.light(product)
        merged = flow.add(branch, other) if merge is Kind.ADD else flow.op(merge, branch, other)
        sums.append(flow.add(value, merged))
    flow.op(Kind.JOIN, *sums)
    return sites * n


def nest(flow: Flow, n: int) -> int:
    """The branches lie around each other."""
    values = [flow.input()]
    for _ in range(2 * n):
        values.append(flow.light(values[-1]))
    flow.op(Kind.JOIN, *[flow.add(a, flow.light(b)) for a, b in zip(values[1 : n + 1], reversed(values[n + 1 :]), strict=True)])
    return n


def recursion(flow: Flow, n: int) -> int:
    """A residual block in the branch of a residual block, n times: only the outermost is left."""
    values = [flow.input()]
    for _ in range(n):
        values.append(flow.light(values[-1]))
    x = values.pop()
    for i, value in enumerate(reversed(values)):
        x = flow.add(value, flow.light(x), f"m{i}")
    return 1


def long_skips(flow: Flow, n: int) -> int:
    """n blocks, and skips over the last two, the last three and so on."""
    values = [flow.input()]
    for i in range(n):
        values.append(flow.add(values[-1], flow.light(values[-1]), f"blocks.{i}"))
    flow.op(Kind.JOIN, *[flow.add(value, flow.light(values[-1])) for value in values[:-2]])
    return n


def staircase(flow: Flow, n: int) -> int:
    """n blocks, then the input of the last one is added, that of the one before, and so on: each sum takes the blocks under it."""
    values = [flow.input()]
    for i in range(n):
        values.append(flow.add(values[-1], flow.light(values[-1]), f"block{i}x"))
    x = values[-1]
    for value in reversed(values):
        x = flow.add(x, value)
    return 3


def parallel(flow: Flow, n: int) -> int:
    x = flow.input()
    y = x
    for _ in range(n):
        y = flow.add(y, flow.light(x))
    return n


def heads(flow: Flow, n: int) -> int:
    """n blocks side by side meet, and n blocks side by side follow."""
    x = flow.input()
    for _ in range(2):
        x = flow.op(Kind.JOIN, *[flow.add(x, flow.light(x)) for _ in range(n)])
    return 2 * n


def shared_constant(flow: Flow, n: int) -> int:
    x, position = flow.input(), flow.constant()
    for i in range(n):
        x = flow.add(x, position)
        x = flow.add(x, flow.light(x), f"blocks.{i}")
    return n


def two_streams(flow: Flow, n: int) -> int:
    x, y = flow.input(), flow.input()
    for _ in range(n):
        x, y = (flow.add(a, flow.op(Kind.NONLINEAR, flow.light(a), b)) for a, b in ((x, y), (y, x)))
    return 2 * n


def reading_streams(flow: Flow, n: int) -> int:
    """Two streams; each block adds to the first what it reads from the second, and then the other way round."""
    x, y = flow.input(), flow.input()
    for i in range(n):
        x = flow.add(x, flow.op(Kind.MIX, flow.light(x), y), f"blocks.{i}")
        x = flow.add(x, flow.light(x), f"blocks.{i}")
        y = flow.add(y, flow.light(x), f"blocks.{i}")
        y = flow.add(y, flow.light(y), f"blocks.{i}")
    flow.op(Kind.JOIN, x, y)
    return 4 * n


def ladder(flow: Flow, n: int) -> int:
    """Two streams that have nothing in common, and after each of their blocks a sum of both."""
    x, y, sums = flow.input(), flow.input(), []
    for i in range(n):
        x, y = flow.add(x, flow.light(x), f"left.{i}"), flow.add(y, flow.light(y), f"right.{i}")
        sums.append(flow.add(x, y))
    flow.op(Kind.JOIN, *sums)
    return 2 * n


def calls(work: Callable[[], Any]) -> int:
    """How many functions `work` calls: what it costs, the same on every machine."""
    count = 0

    def on_event(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on_event)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    "shape",
    [
        chain,
        fan,
        fan_products,
        fan_joins,
        fan_sums,
        nest,
        recursion,
        long_skips,
        staircase,
        parallel,
        heads,
        shared_constant,
        two_streams,
        reading_streams,
        ladder,
    ],
)
def test_the_work_of_finding_sites_and_depths_grows_with_the_graph_and_not_its_square(shape: Callable[[Flow, int], int]):
    costs = []
    for n in (64, 256):
        flow = Flow()
        sites = shape(flow, n)
        flow.output()
        found = residual.find(flow.graph, flow.kinds).residuals
        assert len(found) == sites
        costs.append(calls(lambda flow=flow, found=found: (residual.find(flow.graph, flow.kinds), depths([flow.graph], found))))
    assert costs[1] < 5.5 * costs[0]
