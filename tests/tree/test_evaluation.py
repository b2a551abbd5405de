"""What evaluation runs where it is not the author's Python alone: torch's own fast path, and stochastic depth that stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import fxsd


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layers", [0, 2])
def test_the_fast_path_of_torch_s_encoder_is_off_where_branches_are_scaled(layers: int, padded: bool):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, layers) if layers else layer
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    given = {"src_key_padding_mask": padding} if padded else {}
    gm = fxsd.transform(model, 1.0, drop_distribution="uniform").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        fast = gm(x, **given)
    torch.testing.assert_close(fast, gm.train()(x, **given))  # at rate 1 both leave the norms of the shortcuts
    same = fxsd.transform(model, 0.5, scaling="train").eval()
    with torch.no_grad():
        assert torch.equal(same(x, **given), model.eval()(x, **given)), "and on where nothing is"


class DropsTheSumToo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), StochasticDepth(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x + self.drop(self.f(x)))


def test_stochastic_depth_that_is_called_for_something_else_too_stays_and_is_told():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    model = nn.Sequential(Plain(), DropsTheSumToo())
    found = fxsd.analyze(model)
    assert [site.module for site in found.sites] == ["0"]
    assert [each.reason for each in found.rejected] == ["its stochastic depth, 1.drop, is called elsewhere too, and stays"]
    gm = fxsd.transform(model, 0.0)
    x = torch.randn(64, 4)
    assert not torch.equal(gm[1](x), gm[1](x)), "it drops as its author wrote it"
