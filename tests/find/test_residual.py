"""Which adds are sites: the hand-written models of `models`, the fields of a site, and choosing among them."""

from __future__ import annotations

import operator
from collections import OrderedDict
from typing import Any

import networkx as nx
import pytest
import torch
from models import (
    CASES,
    BareLinear,
    BranchRight,
    CalledTwice,
    Case,
    ConvolvedPosition,
    LongSkip,
    Outer,
    ParallelSum,
    PreNorm,
    Reparametrised,
    Stack,
    ThreeBlocks,
)
from torch import Tensor, fx, nn

import fxsd
from fxsd.find import residual
from fxsd.find.residual import is_add, operands
from fxsd.find.values import kinds


def marked(case: Case) -> object:
    marks = [pytest.mark.xfail(strict=True, reason=case.known_failure)] if case.known_failure else []
    return pytest.param(case, marks=marks, id=case.name)


FOUND = [pytest.param(case, id=case.name) for case in CASES if case.sites and not case.known_failure]


def dag(graph: fx.Graph) -> nx.DiGraph:
    return nx.DiGraph((arg, node) for node in graph.nodes for arg in node.all_input_nodes)


# --- what is found --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_a_model_has_the_sites_and_the_rejected_adds_that_a_reader_of_it_expects(case: Case):
    found = fxsd.analyze(case.factory())
    assert tuple((site.module, site.kind) for site in found.sites) == case.sites
    assert len(found.rejected) == len(case.rejected), [r.reason for r in found.rejected]
    for rejected, reason in zip(found.rejected, case.rejected, strict=True):
        assert reason in rejected.reason


@pytest.mark.parametrize("case", FOUND)
def test_the_nodes_of_a_site_are_an_add_of_branch_and_shortcut_that_come_from_the_fork(case: Case):
    found = fxsd.analyze(case.factory())
    assert found.sites
    graph = dag(found.sites[0].add.graph)
    place = {node: i for i, node in enumerate(found.sites[0].add.graph.nodes)}
    assert [place[site.add] for site in found.sites] == sorted(place[site.add] for site in found.sites)
    for site in found.sites:
        assert is_add(site.add)
        assert set(operands(site.add)) == {site.branch, site.shortcut}
        assert site.branch is not site.shortcut
        assert nx.has_path(graph, site.fork, site.branch)
        assert nx.has_path(graph, site.fork, site.shortcut)
        assert site.fork is not site.branch


@pytest.mark.parametrize("case", FOUND)
def test_a_transformed_model_reports_the_sites_that_analyze_promised(case: Case):
    model = case.factory()
    promised, made = fxsd.analyze(model, 0.3).sites, fxsd.sites(fxsd.transform(model, 0.3))
    assert promised
    for before, after in zip(promised, made, strict=True):
        assert (before.name, before.module, before.depth, before.kind, before.compute) == (
            after.name, after.module, after.depth, after.kind, after.compute,
        )  # fmt: skip
        assert after.drop_rate == pytest.approx(before.drop_rate, abs=1e-7)
        assert [n.name for n in (before.add, before.branch, before.shortcut, before.fork)] == [
            n.name for n in (after.add, after.branch, after.shortcut, after.fork)
        ]


@pytest.mark.parametrize(
    ("factory", "names"),
    [
        (BranchRight, ["0"]),
        (ParallelSum, ["0", "1"]),
        (ThreeBlocks, ["blocks.0", "blocks.1", "blocks.2"]),
        (lambda: Stack(PreNorm(), BranchRight()), ["blocks.0.0", "blocks.0.1", "blocks.1"]),
        (CalledTwice, ["block"]),
    ],
)
def test_a_site_is_named_by_its_module_and_numbered_where_that_has_several(factory, names: list[str]):
    assert [site.name for site in fxsd.analyze(factory()).sites] == names


def test_names_stay_unique_where_a_number_meets_a_module_of_that_name():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = BranchRight().f, BranchRight().f
            self.add_module("0", BranchRight())

        def forward(self, x):
            x = getattr(self, "0")(x)
            x = x + self.f(x)
            return x + self.g(x)

    names = [site.name for site in fxsd.analyze(Odd()).sites]
    assert len(names) == 3
    assert len(set(names)) == 3


# --- a user's choice among them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ({"target_layer_name": "BranchRight"}, ["blocks.0", "blocks.2"]),
        ({"target_layer_name": "Stack"}, ["blocks.0", "blocks.1", "blocks.2"]),
        ({"target_layer_name": ["blocks.1", "BranchRight"]}, ["blocks.0", "blocks.1", "blocks.2"]),
        ({"target_layer_name": "blocks.[12]"}, ["blocks.1", "blocks.2"]),
        ({"target_layer_name": "blocks"}, ["blocks.0", "blocks.1", "blocks.2"]),
        ({"exclude": "blocks.0"}, ["blocks.1", "blocks.2"]),
        ({"exclude": ["*.0", "*.2"]}, ["blocks.1"]),
        ({"target_layer_name": "BranchRight", "exclude": "*.2"}, ["blocks.0"]),
    ],
)
def test_sites_are_chosen_by_class_and_by_module_path(options: dict[str, object], modules: list[str]):
    found = fxsd.analyze(ThreeBlocks(), **options)
    assert [site.module for site in found.sites] == modules
    assert sorted([*modules, *(r.module for r in found.rejected)]) == ["blocks.0", "blocks.1", "blocks.2"]
    assert [site.module for site in fxsd.sites(fxsd.transform(ThreeBlocks(), **options))] == modules


def test_an_add_that_is_left_out_says_which_argument_did_it():
    found = fxsd.analyze(ThreeBlocks(), target_layer_name="BranchRight", exclude="blocks.0")
    assert [r.reason for r in found.rejected] == ["exclude names its module", "target_layer_name names none of the modules around it"]


@pytest.mark.parametrize(("factory", "kind"), [(BareLinear, "identity"), (Reparametrised, "projection")])
def test_include_takes_what_the_rules_reject(factory, kind: str):
    model = nn.Sequential(BranchRight(), factory())
    assert [site.module for site in fxsd.analyze(model).sites] == ["0"]
    assert [(site.module, site.kind) for site in fxsd.analyze(model, include="1").sites] == [("0", "identity"), ("1", kind)]


def test_include_takes_a_long_skip():
    assert [site.module for site in fxsd.analyze(LongSkip(2)).sites] == ["body.0", "body.1"]
    found = fxsd.analyze(nn.Sequential(LongSkip(2)), include="0")
    assert [site.module for site in found.sites] == ["0.body.0", "0.body.1", "0"]


def test_include_takes_a_block_inside_a_branch():
    model = nn.Sequential(Outer())
    assert [site.module for site in fxsd.analyze(model).sites] == ["0"]
    assert [site.module for site in fxsd.analyze(model, include="0.inner").sites] == ["0.inner", "0"]


def test_the_printed_analysis_names_sites_and_reasons():
    text = str(fxsd.analyze(nn.Sequential(LongSkip(2)), 0.25))
    assert "2 sites, 2 depths" in text
    assert "0.body.1" in text
    assert "0.25" in text
    assert "1 add rejected" in text


def test_include_takes_a_position_encoding():
    model = nn.Sequential(OrderedDict(encoder=ConvolvedPosition()))
    assert [site.module for site in fxsd.analyze(model).sites] == ["encoder.layers.0", "encoder.layers.1"]
    assert [site.module for site in fxsd.analyze(model, include="encoder").sites] == ["encoder", "encoder.layers.0", "encoder.layers.1"]


def test_a_sum_of_many_branches_has_a_site_for_each():
    class Many(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.branches, self.first = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(500)]), first

        def forward(self, x: Tensor) -> Tensor:
            terms = [branch(x) for branch in self.branches]
            return sum(terms, x) if self.first else sum(terms[1:], terms[0]) + x

    for first in (True, False):
        found = fxsd.analyze(Many(first))
        assert len({site.branch for site in found.sites}) == len(found.sites) == 500
        assert {str(site.fork) for site in found.sites} == {"x"}
        assert not found.rejected


# --- what the captured graph does not show ----------------------------------------------------------------------------------------


def search(graph: fx.Graph, model: nn.Module, **options: Any) -> residual.Found:
    return residual.find(graph, kinds(graph, model.get_submodule, set()), **options)


@pytest.mark.parametrize(("held", "sites"), [(0, ["add"]), (1, ["add"]), (2, []), (5, [])])
def test_sites_that_a_called_module_holds_count_as_blocks_in_series(held: int, sites: list[str]):
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))
    graph = fx.Graph()
    y = x = graph.placeholder("x")
    for name in ("0", "1", "2"):
        y = graph.call_module(name, (y,))
    graph.output(graph.call_function(operator.add, (x, y)))
    found = search(graph, model, holds=lambda node: held if node.target == "1" else 0)
    assert [str(r.add) for r in found.residuals] == sites
    assert ["it is a long skip over residual blocks" in r.reason for r in found.rejected] == [True] * (1 - len(sites))


def test_a_position_embedding_that_a_called_module_with_sites_has_taken_is_no_shortcut():
    model = nn.ModuleDict({"encoder": nn.GELU(), "position": nn.Embedding(5, 2)})
    graph = fx.Graph()
    x, position = graph.placeholder("x"), graph.get_attr("position.weight")
    memory = graph.call_module("encoder", (x, position))
    graph.output(graph.call_function(operator.add, (memory, position)))
    found = search(graph, model, holds=lambda node: 2 if node.target == "encoder" else 0)
    assert not found.residuals
    assert [r.reason for r in found.rejected] == ["its shortcut is a constant that feeds earlier blocks"]


def test_a_class_token_that_was_read_after_the_fork_may_be_added_to_again():
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.first, self.second = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.GELU()), nn.Linear(2, 2)
            self.token = nn.Parameter(torch.zeros(1, 2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            token = self.token
            token = token + self.first(torch.maximum(token, x))
            return token + self.second(x.relu())

    assert [(site.name, str(site.shortcut)) for site in fxsd.analyze(Token()).sites] == [("0", "token"), ("1", "add")]


@pytest.mark.parametrize("left", [False, True])
def test_include_is_asked_about_the_root_module_and_takes_any_sum_whose_shortcut_is_decidable(left: bool):
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("f", "g", "h")})
    graph = fx.Graph()
    x = graph.placeholder("x")
    shortcut, branch = graph.call_module("f", (x,)), graph.call_module("h", (graph.call_module("g", (x,)),))
    graph.output(graph.call_function(operator.add, (branch, shortcut) if left else (shortcut, branch)))
    assert not search(graph, model).residuals
    asked: list[str] = []
    (found,) = search(graph, model, include=lambda module: asked.append(module) or True).residuals
    assert (found.shortcut, found.branch, set(asked)) == (shortcut, branch, {""})
