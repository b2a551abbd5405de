"""Random residual networks, with an oracle of their sites that is built while they are.

A network is a nest of specs. `build` makes the modules. `Oracle` walks the same specs, draws the data flow as a networkx
graph of its own, and decides by its dominators which adds are sites: no line of fxsd and no fx graph takes part.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import assert_equal, gradients, outputs
from torch import Tensor, nn

import fxsd
from fxsd.find.dominators import Dominators
from fxsd.rates import NAMED

WIDTH = 3
quick = settings(derandomize=True, deadline=None, max_examples=30, database=None, suppress_health_check=[HealthCheck.too_slow])

Spec: TypeAlias = "tuple[Any, ...]"


# --- specs ----------------------------------------------------------------------------------------------------------------------

PLAIN, BARE, BIAS = ("plain",), ("bare",), ("bias",)
BRANCHES = ("mlp", "norm", "scaled", "dropout", "shared norm")
ADDS = ("right", "left", "function", "keyword", "augmented", "in place")


@st.composite
def _leaf(draw: st.DrawFn) -> Spec:
    kind = draw(st.sampled_from(["plain", "bare", "bias", "identity", "identity", "identity", "projection", "parallel", "transformer"]))
    if kind in ("plain", "bare", "bias"):
        return (kind,)
    if kind == "identity":
        return (kind, draw(st.sampled_from(BRANCHES)), draw(st.sampled_from(ADDS)))
    if kind == "projection":
        return (kind, draw(st.sampled_from(["linear", "linear norm", "linear act"])), draw(st.sampled_from(["right", "left"])))
    return (kind, draw(st.sampled_from(BRANCHES)), draw(st.sampled_from(BRANCHES)))


def _inside(children: st.SearchStrategy[Spec]) -> st.SearchStrategy[Spec]:
    body = st.lists(children, min_size=1, max_size=3).map(tuple)
    return st.one_of(st.tuples(st.just("around"), body), st.tuples(st.just("around"), body), st.tuples(st.just("chain"), body))


specs = st.lists(st.recursive(_leaf(), _inside, max_leaves=5), min_size=1, max_size=4).map(lambda body: ("chain", tuple(body)))


# --- modules --------------------------------------------------------------------------------------------------------------------


class Branch(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(WIDTH) if "norm" in kind else nn.Identity()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 5), nn.GELU(), nn.Linear(5, WIDTH)
        self.tail = nn.Dropout(0.2) if kind == "dropout" else nn.Identity()
        self.gamma = nn.Parameter(torch.rand(WIDTH)) if kind == "scaled" else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.tail(self.fc2(self.act(self.fc1(self.norm(x)))))
        return x if self.gamma is None else x * self.gamma


class Adds(nn.Module):
    """Base of what executes adds. `alone[i]` leaves the branch of add i out: the shortcut-only network of the tests."""

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.alone = [False] * count


class Identity(Adds):
    def __init__(self, branch: nn.Module, how: str) -> None:
        super().__init__()
        self.branch, self.how = branch, how

    def forward(self, x: Tensor) -> Tensor:
        r = self.branch(x)
        if self.alone[0]:
            return x
        if self.how == "right":
            return x + r
        if self.how == "left":
            return r + x
        if self.how == "function":
            return torch.add(x, r)
        if self.how == "keyword":
            return x.add(other=r)
        if self.how == "in place":
            return r.add_(x)
        r += x
        return r


class Projection(Adds):
    def __init__(self, shortcut: str, how: str) -> None:
        super().__init__()
        self.branch, self.how, self.down = Branch("mlp"), how, nn.Linear(WIDTH, WIDTH)
        self.after = {"linear": nn.Identity(), "linear norm": nn.LayerNorm(WIDTH), "linear act": nn.Tanh()}[shortcut]

    def forward(self, x: Tensor) -> Tensor:
        r, shortcut = self.branch(x), self.after(self.down(x))
        if self.alone[0]:
            return shortcut
        return shortcut + r if self.how == "right" else r + shortcut


class Parallel(Adds):
    def __init__(self, f: str, g: str) -> None:
        super().__init__(2)
        self.f, self.g = Branch(f), Branch(g)

    def forward(self, x: Tensor) -> Tensor:
        f, g = self.f(x), self.g(x)
        y = x if self.alone[0] else x + f
        return y if self.alone[1] else y + g


class Transformer(Adds):
    def __init__(self, f: str, g: str) -> None:
        super().__init__(2)
        self.f, self.g = Branch(f), Branch(g)

    def forward(self, x: Tensor) -> Tensor:
        f = self.f(x)
        x = x if self.alone[0] else x + f
        g = self.g(x)
        return x if self.alone[1] else x + g


class Bias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def build(spec: Spec) -> nn.Module:
    kind = spec[0]
    if kind == "chain":
        return nn.Sequential(*[build(child) for child in spec[1]])
    if kind == "around":
        return Identity(nn.Sequential(*[build(child) for child in spec[1]]), "right")
    if kind == "plain":
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    if kind == "bare":
        return Identity(nn.Linear(WIDTH, WIDTH), "right")
    if kind == "bias":
        return Bias()
    if kind == "identity":
        return Identity(Branch(spec[1]), spec[2])
    return {"projection": Projection, "parallel": Parallel, "transformer": Transformer}[kind](spec[1], spec[2])


# --- the oracle -----------------------------------------------------------------------------------------------------------------


@dataclass
class Add:
    node: int
    path: str
    kind: str
    site: bool
    number: int  # among the adds of its module


@dataclass
class Oracle:
    """The adds of a network, in the order of execution."""

    spec: Spec
    flow: nx.DiGraph = field(default_factory=nx.DiGraph)
    adds: list[Add] = field(default_factory=list)
    long_skips: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.flow.add_node(0)
        self.walk(self.spec, 0, "")

    def op(self, *inputs: int) -> int:
        node = self.flow.number_of_nodes()
        self.flow.add_edges_from((i, node) for i in inputs)
        return node

    def add(self, shortcut: int, branch: int, path: str, kind: str = "identity", site: bool = True, number: int = 0) -> int:
        node = self.op(shortcut, branch)
        self.adds.append(Add(node, path, kind, site, number))
        return node

    def walk(self, spec: Spec, x: int, path: str) -> int:
        kind = spec[0]
        if kind == "chain":
            for i, child in enumerate(spec[1]):
                x = self.walk(child, x, f"{path}.{i}" if path else str(i))
            return x
        if kind == "around":
            return self.around(spec, x, path)
        if kind == "plain":
            return self.op(x)
        if kind == "bare":
            return self.add(x, self.op(x), path, site=False)
        if kind == "bias":
            return self.add(x, self.op(), path, site=False)
        if kind == "identity":
            return self.add(x, self.op(x), path)
        if kind == "projection":
            return self.add(self.op(x), self.op(x), path, "projection")
        if kind == "parallel":
            f, g = self.op(x), self.op(x)
            return self.add(self.add(x, f, path), g, path, number=1)
        x = self.add(x, self.op(x), path)
        return self.add(x, self.op(x), path, number=1)

    def around(self, spec: Spec, x: int, path: str) -> int:
        """A shortcut around a chain: a site, unless the chain holds blocks in series, or a long skip, or too little work."""
        first = len(self.adds)
        end = self.walk(("chain", spec[1]), x, f"{path}.branch")
        inner = self.adds[first:]
        between = nx.subgraph(self.flow, (nx.descendants(self.flow, x) & nx.ancestors(self.flow, end)) | {x, end})
        passed = set()
        dominators = nx.immediate_dominators(between, x)
        node = end
        while node != x:
            passed.add(node)
            node = dominators[node]
        series = [a for a in inner if a.site and a.node in passed]
        long = len(series) > 1 or bool(passed & self.long_skips)
        works = _works(spec[1])
        node = self.add(x, end, path, site=not long and works)
        if long:
            self.long_skips.add(node)
        elif works:
            for a in inner:
                a.site = False
        return node

    @property
    def sites(self) -> list[Add]:
        return [a for a in self.adds if a.site]

    def block(self, add: Add) -> tuple[str, int]:
        """The nearest numbered module around an add; a network whose only number is around all of them has no blocks."""
        parts = add.path.split(".")
        while parts and not (parts[-1].isdigit() and ".".join(parts) not in self.common()):
            parts.pop()
        return (".".join(parts), 0) if parts else (add.path, add.node)

    def common(self) -> set[str]:
        around = [{".".join(a.path.split(".")[: i + 1]) for i in range(a.path.count(".") + 1)} for a in self.sites]
        return set.intersection(*around) if len(around) > 1 else set()

    def depths(self) -> list[int]:
        order = nx.DiGraph()
        order.add_nodes_from(self.block(a) for a in self.sites)
        for a in self.sites:
            order.add_edges_from(
                (self.block(a), self.block(b))
                for b in self.sites
                if self.block(a) != self.block(b) and nx.has_path(self.flow, a.node, b.node)
            )
        depth = {block: i for i, blocks in enumerate(nx.topological_generations(order)) for block in blocks}
        return [depth[self.block(a)] for a in self.sites]


def _works(body: tuple[Spec, ...]) -> bool:
    """Is there more in it than additions of parameters?"""
    return any(_works(child[1]) if child[0] in ("chain", "around") else child[0] != "bias" for child in body)


def shortcut_only(model: nn.Module, oracle: Oracle) -> nn.Module:
    alone = copy.deepcopy(model)
    for add in oracle.sites:
        alone.get_submodule(add.path).alone[add.number] = True
    return alone


def network(spec: Spec) -> tuple[nn.Module, Oracle, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return build(spec), Oracle(spec), (torch.randn(4, WIDTH),)


# --- properties -----------------------------------------------------------------------------------------------------------------


@given(spec=specs)
@settings(quick, max_examples=100)
def test_the_sites_are_those_of_the_oracle(spec: Spec):
    model, oracle, _ = network(spec)
    found = fxsd.analyze(model)
    assert [(s.module, s.kind) for s in found.sites] == [(a.path, a.kind) for a in oracle.sites]
    assert len(found.sites) + len(found.rejected) == len(oracle.adds)


@given(spec=specs, rate=st.floats(0.0, 1.0))
@settings(quick, max_examples=60)
def test_the_depths_are_longest_paths_of_the_oracle_and_the_rates_follow(spec: Spec, rate: float):
    model, oracle, _ = network(spec)
    found, expected = fxsd.analyze(model, rate).sites, oracle.depths()
    assert [s.depth for s in found] == expected
    last = max(expected, default=0)
    assert [s.drop_rate for s in found] == pytest.approx([rate * d / last if last else rate for d in expected])


def transformed(spec: Spec, **options: object) -> tuple[nn.Module, nn.Module, Oracle, tuple[Tensor, ...]] | None:
    """The model, and a transformed copy of it; None for a network without sites, which must be refused."""
    model, oracle, inputs = network(spec)
    if not oracle.sites:
        with pytest.raises(fxsd.FxsdError, match="has no residual add"):
            fxsd.transform(model, **options)
        return None
    gm = fxsd.transform(copy.deepcopy(model), **options)
    gm.graph.lint()
    assert list(gm.state_dict()) == list(model.state_dict())
    return model, gm, oracle, inputs


@given(spec=specs)
@quick
def test_with_scaling_in_training_evaluation_is_bit_for_bit_the_original(spec: Spec):
    made = transformed(spec, drop_rate=0.5, scaling="train")
    if made:
        model, gm, _, inputs = made
        assert_equal(outputs(gm.eval(), inputs), outputs(model.eval(), inputs))


@given(spec=specs, method=st.sampled_from(["sample", "block"]), scaling=st.sampled_from(["inference", "train"]))
@quick
def test_at_rate_zero_outputs_and_gradients_are_those_of_the_original(spec: Spec, method: str, scaling: str):
    made = transformed(spec, drop_rate=0.0, stochastic_method=method, scaling=scaling)
    if made:
        model, gm, _, inputs = made
        expected, actual = outputs(model, inputs), outputs(gm, inputs)
        assert_equal(actual, expected)
        assert_equal(gradients(gm, actual), gradients(model, expected))


@given(spec=specs, method=st.sampled_from(["sample", "block"]), scaling=st.sampled_from(["inference", "train"]))
@quick
def test_at_rate_one_the_output_is_that_of_the_shortcuts_alone(spec: Spec, method: str, scaling: str):
    made = transformed(spec, drop_rate=1.0, drop_distribution="uniform", stochastic_method=method, scaling=scaling)
    if made:
        model, gm, oracle, inputs = made
        assert_equal(outputs(gm, inputs), outputs(shortcut_only(model, oracle), inputs))


@given(spec=specs, rate=st.sampled_from([0.1, 0.5, 0.8]))
@settings(quick, max_examples=15)
def test_every_site_drops_every_sample_as_often_as_its_rate_says(spec: Spec, rate: float):
    made = transformed(spec, drop_rate=rate, drop_distribution="uniform")
    if made:
        _, gm, oracle, _ = made
        samples, seen = 2_000, []
        for site in fxsd.sites(gm):
            (user,) = [node for node in site.branch.users if "stochastic_depth" in str(node.target)]
            gm.get_submodule(user.target).register_forward_hook(lambda module, args, out: seen.append((out == 0).all(1).double().mean()))
        gm(torch.randn(samples, WIDTH))
        assert len(seen) == len(oracle.sites)
        assert [float(share) for share in seen] == pytest.approx([rate] * len(seen), abs=4.5 * math.sqrt(rate * (1 - rate) / samples))


@given(spec=specs, data=st.data())
@quick
def test_a_second_transform_and_new_rates_end_where_a_first_one_would(spec: Spec, data: st.DataObject):
    first, last = (data.draw(st.sampled_from(sorted(NAMED))) for _ in range(2))
    made = transformed(spec, drop_rate=0.3, drop_distribution=first)
    if made:
        model, gm, _, inputs = made
        again = fxsd.transform(gm, 0.1, drop_distribution=last)
        fxsd.set_drop_rate(again, 0.75)
        fresh = fxsd.transform(model, 0.75, drop_distribution=last)
        assert [(s.name, s.depth) for s in fxsd.sites(again)] == [(s.name, s.depth) for s in fxsd.sites(fresh)]
        assert [s.drop_rate for s in fxsd.sites(again)] == pytest.approx([s.drop_rate for s in fxsd.sites(fresh)], abs=1e-6)
        assert_equal(outputs(again, inputs), outputs(fresh, inputs))


@given(edges=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60))
@settings(quick, max_examples=150)
def test_dominators_are_those_of_networkx(edges: list[tuple[int, int]]):
    flow = nx.DiGraph((min(a, b), max(a, b)) for a, b in edges if a != b)
    flow.add_edges_from([("root", node) for node in list(flow) if not flow.in_degree(node)])
    flow.add_node("root")
    expected = nx.immediate_dominators(flow, "root")
    tree: Dominators[int] = Dominators()
    nodes = sorted(node for node in flow if node != "root")
    for node in nodes:
        tree.add(node, [arg for arg in flow.predecessors(node) if arg != "root"])

    def above(node: Any) -> list[Any]:
        chain = []
        while node != "root":
            chain.append(node)
            node = expected[node]
        return chain

    for a in nodes:
        for b in nodes:
            assert tree.dominates(a, b) == (a in above(b))
            assert tree.nearest_common(a, b) == next((node for node in above(a) if node in above(b)), None)


BUILT: dict[str, Callable[[], Spec]] = {
    "a shortcut around one block": lambda: ("around", (("identity", "mlp", "right"),)),
    "a shortcut around a transformer block": lambda: ("around", (("transformer", "mlp", "mlp"),)),
    "a shortcut around a parallel sum": lambda: ("around", (("parallel", "mlp", "mlp"),)),
    "a shortcut around a long skip": lambda: ("around", (("around", (("identity", "mlp", "right"),) * 2),)),
}


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("a shortcut around one block", [""]),
        ("a shortcut around a transformer block", ["branch.0", "branch.0"]),
        ("a shortcut around a parallel sum", [""]),
        ("a shortcut around a long skip", ["branch.0.branch.0", "branch.0.branch.1"]),
    ],
)
def test_the_oracle_itself_says_what_a_reader_would(name: str, sites: list[str]):
    assert [a.path.removeprefix("0.") if a.path != "0" else "" for a in Oracle(("chain", (BUILT[name](),))).sites] == sites
