"""Transforming a model that skips: what comes back is the graph with masks, and then whatever is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsd
from fxsd.run.skip import SkipStochasticDepth


class Block(nn.Module):
    def __init__(self, branch_first: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.branch_first = branch_first

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x if self.branch_first else x + self.branch(x)


class Parallel(nn.Module):
    """The sum of two branches and their input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(False).branch, Block(False).branch

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.a(x) + self.b(x)
        return out


EXAMPLE = (torch.zeros(4, 6),)
SKIP: dict[str, Any] = {"compute": "skip", "example_inputs": EXAMPLE, "scaling": "train"}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(False), Block(True), Parallel())


@pytest.mark.parametrize("method", ["sample", "block"])
@pytest.mark.parametrize("options", [{"scaling": "train"}, SKIP], ids=["mask", "skip"])
def test_transforming_again_is_as_transforming_once(method: str, options: dict[str, Any]) -> None:
    original, x = model(), torch.randn(16, 6)
    skipping = fxsd.transform(original, 0.5, drop_distribution="uniform", stochastic_method=method, **SKIP)
    again = fxsd.transform(skipping, 0.3, drop_distribution="uniform", **options)
    once = fxsd.transform(original, 0.3, drop_distribution="uniform", **options)
    facts = [[(s.name, s.drop_rate, s.kind, s.compute) for s in fxsd.sites(gm)] for gm in (again, once)]
    assert facts[0] == facts[1]
    outputs = []
    for gm in (again, once):
        torch.manual_seed(1)
        outputs.append(gm.train()(x))
    assert torch.equal(*outputs)
    assert torch.equal(again.eval()(x), original.eval()(x))
    assert list(again.state_dict()) == list(original.state_dict())
    assert all(isinstance(op, SkipStochasticDepth) for op in skipping.modules() if hasattr(op, "drop_rate"))  # left as it was


def test_sites_that_are_left_alone_keep_their_rate_as_a_mask() -> None:
    skipping = fxsd.transform(model(), 0.5, drop_distribution="uniform", **SKIP)
    again = fxsd.transform(skipping, 0.2, drop_distribution="uniform", exclude="1", **SKIP)
    found = {site.name: (site.drop_rate, site.compute) for site in fxsd.sites(again)}
    assert found["1"] == (0.5, "mask")
    assert found["0"] == (0.2, "skip")
    x = torch.randn(4000, 6)
    alone = again.get_submodule("1.stochastic_depth")
    dropped = (alone(x, mask=True) == 0).all(1).float().mean().item()
    assert abs(dropped - 0.5) < 4 * 0.5 / 4000**0.5


def test_skipping_needs_example_inputs() -> None:
    for compute in ("skip", "auto"):
        with pytest.raises(fxsd.FxsdError, match="needs example_inputs"):
            fxsd.transform(model(), 0.5, compute=compute)


def test_a_dropped_block_runs_on_no_rows_and_gives_gradients_of_zero() -> None:
    original, x = model(), torch.randn(5, 6)
    gm = fxsd.transform(original, 1.0, drop_distribution="uniform", stochastic_method="block", **SKIP)
    rows: list[int] = []
    for layer in original.modules():
        if isinstance(layer, nn.GELU):
            layer.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    assert torch.equal(gm(x), x)
    gm(x).sum().backward()
    assert set(rows) == {0}
    assert all(p.grad is not None and not p.grad.any() for p in original.parameters())


def test_the_block_method_skips_batch_norm_without_being_asked() -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, padding=1))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu_(x + self.block(x))

    x = torch.randn(4, 3, 8, 8)
    gm = fxsd.transform(Residual(), 0.5, stochastic_method="block", compute="skip", example_inputs=(x,))
    assert [site.compute for site in fxsd.sites(gm)] == ["skip"]
    before = block[1].running_mean.clone()
    fxsd.set_drop_rate(gm, 1.0)
    gm(x)
    assert torch.equal(block[1].running_mean, before)
    fxsd.set_drop_rate(gm, 0.0)
    gm(x)
    assert not torch.equal(block[1].running_mean, before)


def test_auto_skips_where_the_branch_is_worth_it() -> None:
    x = torch.zeros(2, 64)

    class Wide(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.branch = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 64))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.branch(x)
            return out

    found = fxsd.analyze(nn.Sequential(Wide(256), Wide(2), Wide(256)), 0.2, compute="auto", example_inputs=(x,)).sites
    assert [site.compute for site in found] == ["mask", "mask", "skip"]
    assert "never drops" in found[0].reason
    assert "FLOPs a value" in found[1].reason
