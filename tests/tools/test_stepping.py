"""tools/stepping.py and the files around it: what is measured of a training step. No test looks at how long anything took."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.ops import StochasticDepth

import fxsd


class Net(nn.Module):
    """Two sites that hold nearly all of the FLOPs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.b(x)


class Sometimes(nn.Module):
    """Stochastic depth that no library has."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x * (torch.rand(len(x), *[1] * (x.dim() - 1)) < 0.5) if self.training else x


class Dropping(Net):
    """Drops branches by itself."""

    def __init__(self):
        super().__init__()
        self.a.append(Sometimes())


class Saves(nn.Module):
    """Keeps its input and the logarithm of it, once each, and its weight, for backward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).exp()


@pytest.fixture(autouse=True)
def _fast(tool: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Without the collections of garbage, which take most of the time where little is measured."""
    monkeypatch.setattr(tool.measuring.gc, "collect", lambda *args: 0)


def quiet(text: str, done: int = 0) -> None:
    pass


def setting(tool: ModuleType, mode: str = "eager") -> object:
    return tool.Setting(torch.device("cpu"), mode, "eager", 2, 4, "inference")


def rows(tool: ModuleType, model: nn.Module, shape: tuple[int, ...], labels: tuple[str, ...], mode: str = "eager", rate: float = 0.5):
    found = tool.measure("net", model, shape, tool.Rate("uniform", rate), labels, setting(tool, mode), quiet)
    return {row.variant: row for row in found}


def test_each_variant_is_a_row_and_skip_alone_has_a_lower_ceiling(tool: ModuleType):
    pytest.importorskip("timm")
    labels = ("fxsd mask", "fxsd skip", "fxsd auto", "timm DropPath", "torchvision")
    found = rows(tool, Net().train(), (8, 8), labels)
    assert tuple(found) == ("base", *labels)
    assert [row.failure for row in found.values()] == [None] * 6
    assert min(row.ratio for row in found.values()) > 0
    assert [len(row.ratios) for row in found.values()] == [2] * 6
    assert (found["fxsd skip"].sites, found["fxsd skip"].skipped) == (2, 2)
    assert (found["fxsd mask"].sites, found["fxsd mask"].skipped) == (2, 0)
    assert found["fxsd skip"].flops == pytest.approx(0.5)
    assert {found[label].flops for label in ("base", "fxsd mask", "timm DropPath", "torchvision")} == {1.0}
    assert found["fxsd skip"].saved_ratio < 0.8
    assert found["fxsd mask"].saved_ratio > 1


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_under_autocast_forward_keeps_less(tool: ModuleType, mode: str):
    plain = setting(tool, mode)
    found = [
        tool.measure("net", Net().train(), (256, 8), tool.Rate("uniform", 0.5), ["fxsd skip"], used, quiet)
        for used in (plain, replace(plain, autocast=torch.bfloat16))
    ]
    for without, with_autocast in zip(*found, strict=True):
        assert with_autocast.failure is None
        assert with_autocast.saved_bytes < without.saved_bytes


def test_the_small_models_are_built_without_stochastic_depth_of_their_own(tool: ModuleType):
    subjects = importlib.import_module("timing.subjects")
    assert list(subjects.SMALL) == ["vit", "swin_t", "convnext_tiny", "resnet50"]
    for name in subjects.SMALL:
        with torch.device("meta"):
            model, shape = subjects.trainable(name, None)
        assert model.training
        assert shape[:1] == (3,)
        assert {module.p for module in model.modules() if isinstance(module, StochasticDepth)} <= {0.0}


def test_stochastic_depth_of_the_models_own_is_taken_out_whatever_it_is_called(tool: ModuleType):
    model, shape = importlib.import_module("timing.subjects").trainable("test_stepping:Dropping", (8,))
    assert shape == (8,)
    assert not any(type(module).__name__ == "Sometimes" for module in model.modules())
    assert len(list(model.parameters())) == 8


def test_compiled_steps_count_their_graphs(tool: ModuleType):
    found = rows(tool, Net().train(), (8, 8), ("fxsd mask", "fxsd skip"), mode="compiled")
    assert [row.failure for row in found.values()] == [None] * 3
    assert (found["base"].compiles, found["fxsd mask"].compiles) == (1, 1)
    assert found["fxsd skip"].compiles >= 1
    assert min(row.compile_ratio for row in found.values()) > 0
    assert min(row.saved_bytes for row in found.values()) > 0


def test_a_variant_that_there_is_not_is_a_row_that_says_why(tool: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "dinov2", None)
    row = rows(tool, Net().train(), (8, 8), ("DINOv2",))["DINOv2"]
    assert (row.ms, row.ratio, row.flops) == (None, None, None)
    assert row.failure == "dinov2 is not installed (pip install --no-deps dinov2)"


def test_saved_bytes_are_those_of_distinct_storages_that_are_not_the_model_s(tool: ModuleType):
    x = torch.rand(4, 16, requires_grad=True)  # so that the weight is kept too
    weightless = tool.saved_bytes(tool.Step(Saves(), x))
    squares = 4 * 16 * 4  # of the loss, which squares the same storage that exp keeps
    assert weightless == x.nbytes + squares


def test_the_rate_rises_from_nought_in_a_warm_up(tool: ModuleType):
    gm, seen = fxsd.transform(Net(), 0.5, drop_distribution="uniform"), []
    gm.register_forward_pre_hook(lambda module, args: seen.append(fxsd.sites(gm)[0].drop_rate))
    tool._warm_up(tool.Step(gm, torch.randn(4, 8)), 0.5)
    assert seen == sorted(set(seen))
    assert (len(seen), seen[0], seen[-1]) == (tool.WARM_UP, 0.0, 0.5)


def test_a_step_sets_its_rate_and_leaves_no_gradient_of_an_earlier_one(tool: ModuleType):
    gm = fxsd.transform(Net(), 0.5, drop_distribution="uniform")
    for parameter in gm.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    tool.Step(gm, torch.randn(4, 8), 0.25).ready()()
    assert [site.drop_rate for site in fxsd.sites(gm)] == [0.25, 0.25]
    assert all(parameter.grad.isfinite().all() for parameter in gm.parameters())
    assert list(gm.parameters())


@pytest.mark.parametrize(
    ("ratios", "rate"),
    [((1.2, 1.1, 0.9), 0.25), ((0.9, 1.1, 0.8), 0.1), ((1.2, 1.1, 1.05), None), ((1.1, 1.0, 1.2), 0.2), ((1.3, 0.9, 0.8), 0.175)],
)
def test_the_break_even_is_where_the_line_comes_down_to_one(tool: ModuleType, ratios: tuple[float, ...], rate: float | None):
    found = tool.crossing((0.1, 0.2, 0.3), ratios)
    assert found == (None if rate is None else pytest.approx(rate))


def test_other_ops_stand_on_the_same_sites_at_the_sites_rates(tool: ModuleType):
    found, missing = tool.variants(Net().train(), ["torchvision"], 0.5, "linear", "inference", torch.randn(2, 8))
    assert missing == {}
    ops = [module for module in found["torchvision"].modules() if isinstance(module, StochasticDepth)]
    assert [(op.p, op.mode) for op in ops] == [(0.5, "row")], "the first one's rate is 0"
    assert [m for m in found["torchvision"].modules() if isinstance(m, fxsd.run.ops.StochasticDepth)] == []


def test_dinov2_s_function_gets_the_branches_of_a_transformer(tool: ModuleType, monkeypatch: pytest.MonkeyPatch):
    model = VisionTransformer(8, 4, 3, 2, 8, 16, num_classes=3).train()
    called: list[float] = []

    def subset(x: Tensor, branch: nn.Module, rate: float) -> Tensor:
        called.append(rate)
        return x + branch(x)

    for name, content in (
        ("block", {"drop_add_residual_stochastic_depth": subset}),
        ("drop_path", {"DropPath": lambda rate: nn.Identity()}),
    ):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"dinov2.layers.{name}", module)
    monkeypatch.setitem(sys.modules, "dinov2", ModuleType("dinov2"))
    monkeypatch.setitem(sys.modules, "dinov2.layers", ModuleType("dinov2.layers"))
    x = torch.randn(2, 3, 8, 8)
    found, missing = tool.variants(model, ["DINOv2"], 0.4, "linear", "inference", x)
    assert missing == {}
    torch.testing.assert_close(found["DINOv2"](x), model(x))
    assert called == pytest.approx([0.2, 0.2, 0.4, 0.4])
