"""The ops of an add that runs several times in one call of a function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxsd
from fxsd.run import StochasticDepth
from fxsd.run.runs import Runs


class Loop(nn.Module):
    def __init__(self, count: int = 3, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(count))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, again: int = 1) -> Tensor:
        for block in list(self.blocks) * again:
            x = checkpoint(lambda x, block=block: x + block(x), x, use_reentrant=False) if self.checkpointed else x + block(x)
        return x


def test_each_run_has_an_op_with_a_rate_of_its_own():
    torch.manual_seed(0)
    gm = fxsd.transform(Loop(), 1.0, drop_distribution=[0.0, 1.0, 0.0])
    assert [(site.name, site.drop_rate) for site in fxsd.sites(gm)] == [("0", 0.0), ("1", 1.0), ("2", 0.0)]
    x = torch.randn(5, 4)
    expected = x + gm.blocks[0](x)
    expected = expected + gm.blocks[2](expected)
    assert torch.equal(gm(x), expected)
    assert torch.equal(copy.deepcopy(gm)(x), expected)


def test_more_runs_than_were_seen_are_an_error_where_rates_differ():
    gm = fxsd.transform(Loop(), 0.5, scaling="train")
    x = torch.randn(5, 4)
    with pytest.raises(fxsd.FxsdError, match=r"runs 4 times or more in one call.* its 3 sites have different rates"):
        gm(x, again=2)
    assert torch.equal(gm.eval()(x, again=2), Loop.forward(gm, x, again=2)), "there is nothing to scale"


def test_more_runs_than_were_seen_drop_alike_where_rates_are_equal():
    gm = fxsd.transform(Loop(), 1.0, drop_distribution="uniform")
    x = torch.randn(5, 4)
    assert torch.equal(gm(x, again=2), x)
    fxsd.set_drop_rate(gm, 0.5)
    assert not torch.equal(gm(x, again=2), gm(x, again=2))


def test_a_checkpoint_of_a_loop_s_body_is_an_error_where_rates_differ():
    x = torch.randn(5, 4, requires_grad=True)
    gm = fxsd.transform(Loop(checkpointed=True), 0.5)
    with pytest.raises(fxsd.FxsdError, match="again for a checkpoint in which nothing tells its run"):
        gm(x).sum().backward()


def test_a_checkpoint_of_a_loop_s_body_draws_again_what_it_drew_where_rates_are_equal():
    x = torch.randn(64, 4, requires_grad=True)
    torch.manual_seed(0)
    model = Loop(checkpointed=True)
    gm = fxsd.transform(model, 0.5, drop_distribution="uniform")
    model.checkpointed = False
    plain = fxsd.transform(model, 0.5, drop_distribution="uniform")
    gradients = []
    for each in (gm, plain):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(each(x).square().sum(), [x, *each.parameters()]))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_run_that_is_no_site_keeps_its_branch():
    runs = Runs([None, StochasticDepth(1.0)], "blocks")
    count: list[None] = []
    assert [runs(torch.ones(2), count).tolist() for _ in range(2)] == [[1.0, 1.0], [0.0, 0.0]]
