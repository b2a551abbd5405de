"""The kernels of one pass give, to the bit, what operators of PyTorch do. Here Triton interprets them, without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxsd
from fxsd.run import one_pass, rows

pytest.importorskip("triton")

WEIGHTS = {"no weight": None, "one weight": torch.tensor(1.37), "weights": torch.rand(5, generator=torch.Generator().manual_seed(0))}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "rows in pieces": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "with gaps": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "expanded": lambda x: x[:, :1, :1, :1].expand_as(x),
}


class Interpreted:
    """Stands for the kernels; counts their calls."""

    def __init__(self, kernels: ModuleType) -> None:
        self.kernels, self.calls = kernels, 0

    def add_rows(self, *args: Tensor | None) -> None:
        self.calls += 1
        self.kernels.add_rows(*args)

    def take_rows(self, *args: Tensor | None) -> None:
        self.calls += 1
        self.kernels.take_rows(*args)

    def of(self, value: Tensor) -> Interpreted | None:
        return self if one_pass.is_fit(value) else None


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Interpreted:
    """Those of a module of their own, since Triton reads the variable as it decorates them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(rows, "kernels_for", lambda value: None)
    spec = importlib.util.find_spec("fxsd.run.kernels")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fxsd.run.kernels", module)
    spec.loader.exec_module(module)
    return Interpreted(module)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    ("stream", "branch"), [(torch.float32, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.float16)], ids=str
)
def test_rows_are_those_of_operators(
    stream: torch.dtype, branch: torch.dtype, weight: str, layout: str, kernels: Interpreted, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    base, value = torch.randn(8, 3, 29, 31).to(stream), torch.randn(5, 3, 29, 31).to(branch)
    order = torch.randperm(8)
    arrange, weights = LAYOUTS[layout], WEIGHTS[weight]
    for one, other in ((arrange(base), value), (base, arrange(value)), (arrange(base), arrange(value))):
        for like in (one, other):
            found = []
            for kernels_for in (rows.kernels_for, kernels.of):
                with monkeypatch.context() as patch, torch.no_grad():
                    patch.setattr(rows, "kernels_for", kernels_for)
                    found.append(
                        (rows._add_rows(one, order[:5], other, like, order, weights), rows._select_as(branch, one, order[:5], weights))
                    )
            for operators, ours in zip(*found, strict=True):
                assert ours.dtype == operators.dtype
                assert ours.stride() == operators.stride()
                assert torch.equal(ours, operators)
    assert kernels.calls


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@pytest.mark.parametrize("compute", [torch.float32, torch.float16])
def test_a_model_trains_as_with_operators(compute: torch.dtype, kernels: Interpreted, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(9, 4, 8, requires_grad=True)
    gm = fxsd.transform(model, 0.3, drop_distribution="uniform", scaling="train", compute="skip", example_inputs=(x[:2].detach(),)).train()
    found = []
    for kernels_for in (rows.kernels_for, kernels.of):
        monkeypatch.setattr(rows, "kernels_for", kernels_for)
        torch.manual_seed(1)
        gm.zero_grad()
        with torch.autocast("cpu", compute, enabled=compute != torch.float32):
            out = gm(x)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        found.append((out, grad))
    assert kernels.calls == 6  # at each site, adding in forward and in backward, and taking in backward
    for operators, ours in zip(*found, strict=True):
        assert torch.equal(operators, ours)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # of torch's own forward mode
def test_derivatives_of_any_kind(kernels: Interpreted, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()).double(), torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True)
    gm = fxsd.transform(model, 0.4, drop_distribution="uniform", scaling="train", compute="skip", example_inputs=(x[:2].detach(),)).train()
    monkeypatch.setattr(rows, "kernels_for", kernels.of)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return gm(x)

    assert torch.autograd.gradcheck(run, (x,), fast_mode=True, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, (x,), fast_mode=True)
    assert kernels.calls


def test_modes_that_look_on_see_operators(kernels: Interpreted, monkeypatch: pytest.MonkeyPatch):
    gm = fxsd.transform(Block(), 0.5, drop_distribution="uniform", compute="skip", example_inputs=(torch.randn(2, 8),)).train()
    monkeypatch.setattr(rows, "kernels_for", kernels.of)
    with FlopCounterMode(display=False):
        gm(torch.randn(4, 8)).sum().backward()
    assert not kernels.calls
    gm(torch.randn(4, 8)).sum().backward()
    assert kernels.calls


def test_where_triton_does_not_work_operators_do(monkeypatch: pytest.MonkeyPatch):
    one_pass._kernels.cache_clear()
    try:
        monkeypatch.setitem(sys.modules, "fxsd.run.kernels", None)
        monkeypatch.delattr(fxsd.run, "kernels", raising=False)
        assert one_pass._kernels(torch.device("cpu")) is None
    finally:
        one_pass._kernels.cache_clear()


@torch.no_grad()
def test_on_a_cpu_there_are_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(one_pass, "_kernels", lambda device: rows)
    assert one_pass.is_fit(torch.zeros(2, 3))
    assert one_pass.kernels_for(torch.zeros(2, 3)) is None
