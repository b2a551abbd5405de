"""The GraphModule that transform returns: its tree, its copies, and the graph as data."""

from __future__ import annotations

import copy
import io
import pickle
import sys

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxsd
from fxsd.graph.graphmodule import copy_graph


def copies(gm: nn.Module) -> dict[str, nn.Module]:
    saved = io.BytesIO()
    torch.save(gm, saved)
    saved.seek(0)
    return {
        "deepcopy": copy.deepcopy(gm),
        "pickle": pickle.loads(pickle.dumps(gm)),
        "save": torch.load(saved, weights_only=False),
    }


@pytest.mark.parametrize("name", ["resnet18", "swin_t"])
def test_copies_keep_draws_modes_sites_and_node_names(name: str):
    gm = fxsd.transform(torchvision.models.get_model(name, weights=None), 0.5, drop_distribution="uniform")
    x = torch.randn(3, 3, 64, 64)
    others = copies(gm)
    torch.manual_seed(1)
    trained, evaluated = gm.train()(x), gm.eval()(x)  # in this order: training moves the running statistics
    for how, other in others.items():
        torch.manual_seed(1)
        assert torch.equal(other.train()(x), trained), how
        assert torch.equal(other.eval()(x), evaluated), how
        assert [str(node) for node in other.graph.nodes] == [str(node) for node in gm.graph.nodes], how
        assert [(s.name, s.depth, s.drop_rate, str(s.fork)) for s in fxsd.sites(other)] == [
            (s.name, s.depth, s.drop_rate, str(s.fork)) for s in fxsd.sites(gm)
        ], how
        assert list(other.state_dict()) == list(gm.state_dict()), how
        other.graph.lint()


def test_a_deep_copy_is_independent_and_a_shallow_one_is_not():
    gm = fxsd.transform(torchvision.models.resnet18(), 0.5)
    deep, shallow = copy.deepcopy(gm), copy.copy(gm)
    fxsd.set_drop_rate(gm, 0.0)
    assert max(site.drop_rate for site in fxsd.sites(deep)) == 0.5
    assert max(site.drop_rate for site in fxsd.sites(shallow)) == 0.0
    assert deep.conv1.weight is not gm.conv1.weight
    assert shallow.conv1.weight is gm.conv1.weight


def test_a_very_deep_model_can_be_pickled():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(x).relu()

    globals()["Block"] = Block  # pickle looks classes up by name
    Block.__qualname__ = "Block"
    gm = fxsd.transform(nn.Sequential(*[Block() for _ in range(sys.getrecursionlimit())]))
    again = pickle.loads(pickle.dumps(gm))
    assert len(fxsd.sites(again)) == sys.getrecursionlimit()


def test_an_aten_graph_survives_pickling():
    graph = fx.Graph()
    x = graph.placeholder("x")
    relu = graph.call_function(torch.ops.aten.relu.default, (x,))
    mm = graph.call_function(torch.ops.aten.mm.default, (relu, x))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (x, mm)))
    gm = fxsd.transform(fx.GraphModule(nn.Module(), graph), 0.0)
    again = pickle.loads(pickle.dumps(gm))
    x = torch.randn(3, 3)
    assert torch.equal(again(x), x + x.relu() @ x)
    assert torch.ops.aten.mm.default in {node.target for node in again.graph.nodes}


def test_a_copied_graph_has_the_same_names_and_metadata():
    graph = fxsd.transform(torchvision.models.resnet18()).graph
    other = copy_graph(graph)
    assert [node.name for node in other.nodes] == [node.name for node in graph.nodes]
    assert [node.meta for node in other.nodes] == [node.meta for node in graph.nodes]
    assert not set(other.nodes) & set(graph.nodes)


def test_modules_between_keep_their_class_and_stay_out_of_the_original():
    model = torchvision.models.resnet18()
    names = [name for name, _ in model.named_modules()]
    gm = fxsd.transform(model)
    assert [name for name, _ in model.named_modules()] == names
    assert isinstance(gm.layer1[0], type(model.layer1[0]))
    assert type(gm.layer1) is type(model.layer1)
    assert gm.layer1[0] is not model.layer1[0]
    assert gm.layer1[0].conv1 is model.layer1[0].conv1
    assert gm.layer1[0].conv1.weight is model.layer1[0].conv1.weight


def test_moving_or_casting_one_does_so_for_the_other():
    model = torchvision.models.vit_b_32(num_classes=2, image_size=32)
    gm = fxsd.transform(model)
    gm.double()
    assert {t.dtype for t in model.state_dict().values()} == {torch.float64}
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert gm(x).dtype == torch.float64


def test_an_attribute_that_a_graph_module_needs_itself_is_not_shadowed():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.graph, self.code, self.meta = nn.Linear(2, 2), "mine", "mine", "mine"

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(x).relu()

    gm = fxsd.transform(Odd(), compute="skip", example_inputs=(torch.ones(2, 2),))  # a graph runs
    assert isinstance(gm.graph, fx.Graph)
    assert "def forward" in gm.code
    assert gm(torch.ones(1, 2)).shape == (1, 2)


def test_a_model_with_attributes_named_as_those_of_a_graph_module_keeps_them():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.graph = nn.Linear(2, 2), "mine"

        def code(self) -> str:
            return self.graph

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(x).relu()

    gm = fxsd.transform(Odd(), 1.0)
    assert (gm.graph, gm.code()) == ("mine", "mine")
    assert torch.equal(gm(torch.ones(1, 2)), torch.ones(1, 2))
    assert [site.add.name for site in fxsd.sites(gm)] == ["add"]


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x + self.conv(x).relu(), 2)


def test_functions_that_pickle_cannot_find_by_name_are_pickled():
    gm = fxsd.transform(Pools(), scaling="train").eval()  # F.max_pool2d is made by another function
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(gm))(x), gm(x))


def test_a_forward_that_was_patched_onto_the_root_is_the_one_that_runs():
    model = Pools()
    model.forward = lambda x: F.max_pool2d(x + model.conv(x).relu(), 4)
    gm = fxsd.transform(model, 1.0, scaling="train")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(gm.train()(x), F.max_pool2d(x, 4))
    assert torch.equal(gm.eval()(x), model(x))


def test_a_transformed_model_has_the_methods_and_properties_of_its_class():
    class Named(Pools):
        @property
        def width(self) -> int:
            return self.conv.out_channels

        def features(self, x: Tensor) -> Tensor:
            return self.conv(x)

    model = Named()
    gm = fxsd.transform(model)
    assert isinstance(gm, Named)
    assert isinstance(gm, torch.fx.GraphModule)
    assert gm.width == 3
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(gm.features(x), model.features(x))
    assert isinstance(copy.deepcopy(gm), Named)


def test_hooks_can_be_registered_on_a_transformed_model_and_not_on_the_original_by_it():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    gm = fxsd.transform(model, 0.5, example_inputs=(torch.zeros(2, 3, 4),))
    seen = []
    for module in (gm, gm[0]):
        module.register_forward_pre_hook(lambda module, args: seen.append("before")).remove()
    handle = gm.register_forward_hook(lambda module, args, output: seen.append("after"))
    gm(torch.zeros(2, 3, 4))
    model(torch.zeros(2, 3, 4))
    assert seen == ["after"]
    handle.remove()
    gm(torch.zeros(2, 3, 4))
    assert seen == ["after"]
