"""torch.compile takes a transformed model whole, and rates and modes move without surprises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxsd

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Block(nn.Module):
    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, stride, 1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, width, 1, stride) if stride > 1 else nn.Identity()
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        y = nn.functional.dropout(self.norm2(self.conv2(y)), 0.1, self.training)
        return (y + self.down(x)).relu()


@pytest.fixture
def model() -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return nn.Sequential(Block(4), Block(4, 2), Block(4))


@pytest.mark.parametrize("method", ["sample", "block"])
@pytest.mark.parametrize("scaling", ["inference", "train"])
def test_rates_move_without_recompiling_and_modes_are_two_graphs(model: nn.Module, method: str, scaling: str):
    gm = fxsd.transform(model, 0.3, stochastic_method=method, scaling=scaling)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gm, fullgraph=True, backend=counter)
    x = torch.randn(4, 4, 8, 8)
    for step in range(20):
        fxsd.set_drop_rate(compiled, step / 20)
        compiled(x).sum().backward()
    assert counter.frame_count == 1
    for mode in (False, True, False):
        compiled.train(mode)
        compiled(x)
    assert counter.frame_count == 2


def test_another_batch_size_is_at_most_one_more_graph(model: nn.Module):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(fxsd.transform(model), fullgraph=True, backend=counter)
    for batch in (4, 5, 6, 7, 8):
        assert compiled(torch.randn(batch, 4, 8, 8)).shape[0] == batch
    assert counter.frame_count == 2


def test_inductor_draws_and_drops(model: nn.Module):
    gm = fxsd.transform(model, 1.0, drop_distribution="uniform")
    compiled = torch.compile(gm, fullgraph=True)
    x = torch.randn(4, 4, 8, 8)
    down = model[1].down
    assert torch.allclose(compiled(x), down(x.relu()).relu(), atol=1e-6)
    compiled.eval()
    fxsd.set_drop_rate(compiled, 0.0)
    assert torch.allclose(compiled(x), model.eval()(x), atol=1e-5)
    compiled.train()
    fxsd.set_drop_rate(compiled, 0.5)
    assert not torch.equal(compiled(x), compiled(x))


class TwoPrograms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.aux = Block(4), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.block(x)
        return (x, self.aux(x)) if self.training else x


def test_a_model_that_is_two_programs_compiles_as_two_graphs():
    torch._dynamo.reset()
    gm = fxsd.transform(TwoPrograms(), 0.5)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(gm, fullgraph=True, backend=counter)
    x = torch.randn(4, 4, 8, 8)
    for mode in (True, False, True, False):
        compiled.train(mode)
        assert isinstance(compiled(x), tuple) == mode
    assert counter.frame_count == 2
