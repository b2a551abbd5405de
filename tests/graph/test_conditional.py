"""Branches that compiled code leaves out as a whole: against the mask of the same draws, which rates of 0 and 1 force."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
import torchvision
from draws import left_out
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torchvision.models.convnext import CNBlockConfig

import fxsd
from fxsd.legal import probe
from fxsd.run.ops import StochasticDepth
from fxsd.run.skip import SkipStochasticDepth


class Block(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.norm, self.linear, self.scale = nn.LayerNorm(6), nn.Linear(6, 6), nn.Parameter(torch.tensor(0.5))
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x)).view(x.shape[0], 2, 3).tanh().view(x.shape) * self.scale
        return y + x if self.first else x + y


def toy() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 6), Block(True), Block(False), nn.Linear(6, 2)), torch.randn(3, 6)


class SizeUsedTwice(Block):
    """A size that is read in the branch and used behind the add, a weight that two modules share, and two views of another."""

    def __init__(self) -> None:
        super().__init__(False)
        self.other = nn.Linear(6, 6)
        self.other.weight = self.linear.weight
        self.table = nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        width = y.shape[1]
        times, plus = self.table.unbind(0)
        y = self.other(self.linear(y).view(-1, width).tanh() * times) + plus
        return (x + y).view(-1, width) * 2


def shared() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 6), SizeUsedTwice(), SizeUsedTwice()), torch.randn(3, 6)


class LayerScale(Block):
    """Under autocast the shortcut of the first one is in half precision, and its branch is not."""

    def __init__(self) -> None:
        super().__init__(False)
        self.scale = nn.Parameter(torch.randn(6))


def layer_scale() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 6), LayerScale(), LayerScale(), nn.Linear(6, 2)), torch.randn(3, 6)


def vit() -> tuple[nn.Module, Tensor]:
    model = torchvision.models.VisionTransformer(16, 8, 1, 2, 8, 16, num_classes=2)
    nn.init.normal_(model.heads.head.weight)
    return model, torch.randn(2, 3, 16, 16)


def pooling() -> tuple[nn.Module, Tensor]:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.pool = nn.GroupNorm(1, 4), nn.AvgPool2d(3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.pool(self.norm(x))

    return nn.Sequential(nn.Conv2d(3, 4, 3), Pool(), nn.Conv2d(4, 4, 3), Pool(), nn.Flatten(), nn.Linear(64, 2)), torch.randn(2, 3, 8, 8)


def convnext() -> tuple[nn.Module, Tensor]:
    model = torchvision.models.ConvNeXt([CNBlockConfig(8, None, 2)], stochastic_depth_prob=0.0, num_classes=2)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.ones_(parameter)
    return model.to(memory_format=torch.channels_last), torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)


def group_norm() -> tuple[nn.Module, Tensor]:
    block = torchvision.models.resnet.BasicBlock(4, 4, norm_layer=lambda channels: nn.GroupNorm(2, channels))
    return nn.Sequential(nn.Conv2d(3, 4, 3), block, nn.Flatten(), nn.Linear(144, 2)), torch.randn(2, 3, 8, 8)


def transformed(build: Callable[[], tuple[nn.Module, Tensor]], compute: str, scaling: str = "inference") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = build()
    model, x = model.double(), x.double()
    model(x)
    return fxsd.transform(model.train(), 0.5, stochastic_method="block", compute=compute, scaling=scaling, example_inputs=(x,)), x


def ops(module: nn.Module) -> list[StochasticDepth]:
    return [op for op in module.modules() if isinstance(op, StochasticDepth)]


def run(module: nn.Module, drops: tuple[int, ...], owner: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients where these branches are dropped."""
    for op, drop in zip(ops(owner), drops, strict=True):
        op.set_drop_rate(float(drop))
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    return [out, *torch.autograd.grad(out.square().sum(), [leaf, *owner.parameters()], materialize_grads=True)]


@left_out
@pytest.mark.parametrize("build", [toy, shared, vit, pooling, convnext, group_norm])
def test_compiled_blocks_are_those_of_the_mask(build: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    gm, x = transformed(build, "skip")
    mask = fxsd.transform(gm, 0.5, stochastic_method="block")
    sites = ops(gm)
    assert all(isinstance(op, SkipStochasticDepth) and op.conditional for op in sites)
    assert {site.reason for site in fxsd.sites(gm)} == {""}
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    before = counters["stats"]["unique_graphs"]
    for drops in itertools.product((0, 1), repeat=len(sites)):
        got, want = run(compiled, drops, gm, x), run(mask, drops, mask, x)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert counters["stats"]["unique_graphs"] == before + 1


@left_out
def test_a_branch_that_is_dropped_does_not_run() -> None:
    gm, x = transformed(toy, "skip")
    nn.init.constant_(gm.get_submodule("1.linear").weight, torch.nan)  # type: ignore[arg-type]
    compiled = torch.compile(gm, fullgraph=True, backend="eager")
    assert all(value.isfinite().all() for value in run(compiled, (1, 0), gm, x))
    assert run(compiled, (0, 0), gm, x)[0].isnan().all()


def test_blocks_are_dropped_at_their_rate_and_the_kept_are_scaled() -> None:
    torch._dynamo.reset()
    gm = fxsd.transform(
        nn.Sequential(Block(False)), 0.3, stochastic_method="block", compute="skip", scaling="train", example_inputs=(torch.ones(2, 6),)
    )
    x = torch.randn(2, 6)
    branch = gm.get_submodule("0")(x) - x  # the copy of the block, without the op
    compiled = torch.compile(gm, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    times = 600
    kept = 0
    for _ in range(times):
        with torch.no_grad():
            added = compiled(x) - x
        if added.any():
            torch.testing.assert_close(added, branch / 0.7)
            kept += 1
    assert abs(kept / times - 0.7) < 3 * (0.21 / times) ** 0.5


class Scaled(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.linear(self.norm(x)).tanh(), alpha=2)


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (lambda: torchvision.models.resnet.BasicBlock(6, 6), "its branch writes into the buffers of 1.bn2"),
        (lambda: Scaled(True), "its add is more than the sum of two values"),
    ],
)
def test_branches_that_cannot_be_left_out_take_the_mask_and_say_so(block: Callable[[], nn.Module], why: str) -> None:
    def build() -> tuple[nn.Module, Tensor]:
        return nn.Sequential(nn.Conv2d(6, 6, 1), block()), torch.randn(2, 6, 6, 6)

    gm, x = transformed(build, "skip")
    (site,) = fxsd.sites(gm)
    assert site.compute == "skip"
    assert site.reason == f"compiled code takes the mask: {why}"
    mask = fxsd.transform(gm, 0.5, stochastic_method="block")
    compiled = torch.compile(gm, fullgraph=True, backend="eager")
    for drops in ((0,), (1,)):
        for a, b in zip(run(compiled, drops, gm, x), run(mask, drops, mask, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_where_torch_cannot_leave_branches_out_compiled_code_takes_the_mask_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "NO_COND", "this torch cannot")
    gm, x = transformed(toy, "skip")
    assert [(site.compute, site.reason) for site in fxsd.sites(gm)] == [("skip", "compiled code takes the mask: this torch cannot")] * 2
    mask = fxsd.transform(gm, 0.5, stochastic_method="block")
    compiled = torch.compile(gm, fullgraph=True, backend="eager")
    for drops in ((0, 1), (1, 0)):
        for a, b in zip(run(compiled, drops, gm, x), run(mask, drops, mask, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@left_out
def test_evaluation_copies_and_pickles_are_as_of_any_model() -> None:
    gm, x = transformed(toy, "skip")
    for other in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert list(other.state_dict()) == list(gm.state_dict())
        compiled = torch.compile(other, fullgraph=True, backend="eager")
        for drops in ((1, 0), (0, 1)):
            torch.testing.assert_close(run(compiled, drops, other, x)[0], run(gm, drops, gm, x)[0])
        torch.testing.assert_close(compiled.eval()(x), gm.eval()(x))
        gm.train()


def test_the_signature_stays() -> None:
    gm, _ = transformed(toy, "skip")
    assert list(inspect.signature(gm.forward).parameters) == ["input"]


def test_parameters_that_are_parametrized_later_are_seen() -> None:
    gm, x = transformed(toy, "skip")
    torch.nn.utils.parametrizations.weight_norm(gm.get_submodule("1.linear"))
    compiled = torch.compile(gm, fullgraph=True, backend="eager")
    for a, b in zip(run(compiled, (0, 0), gm, x), run(gm, (0, 0), gm, x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("build", [vit, layer_scale])
def test_autocast(build: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    gm, x = transformed(build, "skip")
    gm, x = gm.float(), x.float()
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    for drops in ((0, 0), (0, 1)):
        with torch.autocast("cpu", torch.bfloat16):
            got, want = run(compiled, drops, gm, x), run(gm, drops, gm, x)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_the_sample_method_is_not_conditional() -> None:
    model, x = toy()
    gm = fxsd.transform(model, 0.5, compute="skip", example_inputs=(x,))
    assert [op.conditional for op in ops(gm) if isinstance(op, SkipStochasticDepth)] == [False, False]
