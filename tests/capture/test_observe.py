"""A run as a graph: the same residual adds are found in it as in a trace, and nothing is left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from models import CASES, Case
from torch import Tensor, fx, nn

import fxsd
from fxsd.capture.observe import SHAPE, Observed, observe
from fxsd.find import find_residuals, kinds
from fxsd.tree import PLACE


def sites(model: nn.Module, seen: Observed) -> list[tuple[str, str]]:
    assert seen.error is None
    found = find_residuals(seen.graph, kinds(seen.graph, dict(model.named_modules()).__getitem__, frozenset()))
    return [(residual.module, residual.kind) for residual in found.residuals]


def traced(model: nn.Module, given: Any) -> list[tuple[str, str]]:
    found = fxsd.analyze(model, compute="skip", example_inputs=given).sites  # graphs have a site a call
    return [(site.module, site.kind) for site in found]


@pytest.mark.parametrize("case", [case for case in CASES if case.sites and not case.known_failure], ids=lambda case: case.factory.__name__)
def test_a_run_shows_the_residual_adds_that_a_trace_does(case: Case):
    torch.manual_seed(0)
    model, given = case.factory(), case.inputs(3)
    given = given if isinstance(given, tuple) else (given,)
    assert sites(model, observe(model, (given, {}), training=True)) == traced(model, given)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "swin_t", "convnext_tiny", "efficientnet_b0", "vit_b_32", "regnet_y_400mf"]
)
def test_a_run_of_a_whole_model_shows_the_residual_adds_that_a_trace_does(name: str):
    model = torchvision.models.get_model(name, weights=None)
    x = torch.randn(2, 3, 224 if name == "vit_b_32" else 64, 224 if name == "vit_b_32" else 64)
    drops = [path for path, module in model.named_modules() if isinstance(module, torchvision.ops.StochasticDepth)]
    assert sites(model, observe(model, ((x,), {}), training=True, leaves=drops)) == traced(model, (x,))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.calls = nn.BatchNorm1d(4), nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.fc(self.norm(x)).relu() if x.sum() < 1e9 else x


def test_a_run_leaves_buffers_weights_and_modes_as_they_are():
    model = Counts().eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 4)
    seen = observe(model, ((x,), {}), training=True)
    assert [node.op for node in seen.graph.nodes].count("placeholder") == 1
    assert not model.training
    assert before.keys() == model.state_dict().keys()
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])] == []
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert nn.Module.__call__.__qualname__ == "Module._wrapped_call_impl"


def test_an_add_knows_where_it_ran_and_what_shape_it_has():
    model = Counts()
    seen = observe(model, ((torch.randn(3, 4),), {}), training=False)
    (add,) = (
        node for node in seen.graph.nodes if node.target == "add" or getattr(node.target, "__name__", "") == "add" or PLACE in node.meta
    )
    assert add.meta[SHAPE] == (3, 4)
    where = add.meta[PLACE]
    assert (where.home, where.owner, where.call, where.run) == ("", "self", 1, 0)
    assert where.add[0] is Counts.forward.__code__


def test_what_ends_a_run_is_told_and_what_ran_before_is_there():
    class Fails(Counts):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ValueError("no targets")

    seen = observe(Fails(), ((torch.randn(3, 4),), {}), training=True)
    assert isinstance(seen.error, ValueError)
    assert any(PLACE in node.meta for node in seen.graph.nodes)


class OpaqueLayer(nn.Module):
    """Its work is done in what is no Python of torch's: the graph has one call of it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.script = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.script(self.fc(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_what_runs_outside_of_python_is_a_call():
    model = OpaqueLayer()
    seen = observe(model, ((torch.randn(3, 4),), {}), training=True)
    assert [node.target for node in seen.graph.nodes if node.op == "call_module"] == ["fc", "script"]
    assert sites(model, seen) == [("", "identity")]


def test_sites_that_only_a_run_shows_are_shown_in_its_graph():
    model = nn.Sequential(Counts(), Counts())
    x = torch.randn(3, 4)
    gm = fxsd.transform(model, 1.0, drop_distribution="uniform", example_inputs=(x,))
    assert isinstance(gm, fx.GraphModule), "its graph calls them"
    assert [(site.name, site.module, site.depth) for site in fxsd.sites(gm)] == [("0", "0", 0), ("1", "1", 1)]
    assert all(site.add.graph is not gm.graph for site in fxsd.sites(gm))
    assert torch.equal(gm(x), x)
    again = copy.deepcopy(gm)
    assert [site.name for site in fxsd.sites(again)] == ["0", "1"]
    assert fxsd.sites(again)[0].add.graph is not fxsd.sites(gm)[0].add.graph


class Refuses(nn.Module):
    """A stem that cannot be traced, and does not run where the example is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta or float(x.detach().sum()) > -1e9:
            raise RuntimeError("no kernel")
        return x


def test_where_no_run_ends_the_graph_shows_what_it_shows():
    model = nn.Sequential(Counts(), nn.Sequential(nn.Linear(4, 4), Refuses()))
    with pytest.raises(fxsd.CaptureError, match="Nor does the model run on example_inputs: RuntimeError: no kernel"):
        fxsd.transform(nn.Sequential(Refuses()), example_inputs=(torch.randn(3, 4),))
    found = fxsd.analyze(nn.Sequential(Residue(), model[1]), example_inputs=(torch.randn(3, 4),))
    assert [site.module for site in found.sites] == ["0"]
    assert any("what its graphs do not hold was not seen to run" in note for note in found.notes)


class Residue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x).relu()
