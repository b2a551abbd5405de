"""What only a GPU shows: its random state, waiting for it, and CUDA graphs. Nothing of fxsd is made on a default device."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fxsd

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # of Inductor


class Plus(nn.Module):
    """Adds 1 to each feature by a branch that may be dropped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        nn.init.zeros_(self.one[0].weight)
        nn.init.ones_(self.one[0].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one(x)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


def plus(sites: int, **options: object) -> nn.Module:
    model = nn.Sequential(*(Plus(8) for _ in range(sites))).cuda()
    example = torch.zeros(2, 8, device="cuda")
    return fxsd.transform(model, drop_distribution="uniform", scaling="train", example_inputs=(example,), **options).train()  # type: ignore[arg-type]


def check_frequency(counts: Tensor, trials: int, rate: float) -> None:
    """Each of `counts` is within 4.5 standard deviations of what a binomial has."""
    worst = (counts - trials * (1 - rate)).abs().max().item()
    assert worst <= 4.5 * math.sqrt(trials * rate * (1 - rate)) + 1


@pytest.mark.parametrize("compute", ["mask", "skip", "auto"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_default_device_changes_nothing(compute: str, compiled: bool):
    model, x = nn.Sequential(Attention(8), Plus(8), Attention(8)).train(), torch.randn(6, 3, 8)
    with torch.device("meta"):
        gm = fxsd.transform(model, 0.5, compute=compute, example_inputs=(x[:2],)).train()
        step = torch.compile(gm, fullgraph=True, backend="aot_eager") if compiled else gm
        for rate in (0.5, 0.3):
            fxsd.set_drop_rate(gm, rate)
            step(x).sum().backward()
    assert all(p.grad is not None and p.grad.device.type == "cpu" for p in model.parameters())


@gpu
def test_transforming_leaves_the_random_state_of_the_gpu():
    model, x = nn.Sequential(Attention(8), Attention(8)).cuda().train(), torch.randn(2, 3, 8, device="cuda")
    before = torch.cuda.get_rng_state()
    fxsd.transform(model, 0.5, compute="skip", example_inputs=(x,))
    assert torch.equal(before, torch.cuda.get_rng_state())
    model(x)
    assert not torch.equal(before, torch.cuda.get_rng_state())


@gpu
@pytest.mark.parametrize("method", ["sample", "block"])
@pytest.mark.parametrize("compute", ["mask", "skip"])
def test_eager_steps_never_wait_for_the_gpu(compute: str, method: str):
    model, x = nn.Sequential(Attention(8), Plus(8), Attention(8)).cuda().train(), torch.randn(6, 3, 8, device="cuda")
    options = {"stochastic_method": method, "drop_distribution": "uniform", "compute": compute}
    gm = fxsd.transform(model, 0.5, example_inputs=(x,), **options).train()  # type: ignore[arg-type]
    gm(x).sum().backward()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for i in range(4):
            fxsd.set_drop_rate(gm, 0.1 * i)
            gm(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_small_rates_have_masks():
    model, x = nn.Sequential(Plus(512), Plus(512)).cuda(), torch.zeros(2, 512, device="cuda")
    gm = fxsd.transform(model, drop_distribution=[0.03, 0.2], compute="auto", example_inputs=(x,))
    assert [site.compute for site in fxsd.sites(gm)] == ["mask", "skip"]


@gpu
@pytest.mark.parametrize("mode", ["eager", "default", "reduce-overhead"])
@pytest.mark.parametrize("method", ["sample", "block"])
@pytest.mark.parametrize("compute", ["mask", "skip"])
def test_each_sample_is_dropped_as_often_as_the_rate_says(compute: str, method: str, mode: str):
    torch.compiler.reset()
    gm = plus(2, drop_rate=0.3, compute=compute, stochastic_method=method)
    step = gm if mode == "eager" else torch.compile(gm, fullgraph=True, mode=mode)
    batch, steps = 7, 1500
    x = torch.zeros(batch, 8, device="cuda")
    for rate in (0.3, 0.45):
        fxsd.set_drop_rate(gm, rate)
        found = torch.zeros(3, batch, device="cuda")
        torch.manual_seed(0)
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                out = step(x) * (1 - rate)  # the number of blocks that were kept
            assert torch.equal(out, out[:, :1].expand_as(out))
            found += torch.stack([out[:, 0].round() == kept for kept in range(3)])
        assert int(found.sum()) == batch * steps
        check_frequency(found[2].cpu(), steps, 1 - (1 - rate) ** 2)
        check_frequency(found[0].cpu(), steps, 1 - rate**2)


@gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_rates_move_with_few_graphs(mode: str):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    gm = plus(3, drop_rate=0.5, compute="skip")
    step = torch.compile(gm, fullgraph=True, mode=mode)
    x = torch.randn(16, 8, device="cuda")
    for i in range(20):
        fxsd.set_drop_rate(gm, 0.5 * i / 19)
        gm.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        step(x).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_rows_that_ran_under_autocast(compiled: bool, device: str):
    """On a CPU too: torch 2.11 gave others where compiled code converts rows in forward to the dtype that they have."""
    torch.compiler.reset()
    torch.manual_seed(0)
    width, batch = 16, 32
    model = nn.Sequential(Attention(width)).to(device).train()
    model[0].attention.dropout = 0.0
    x = torch.randn(batch, 5, width, device=device, requires_grad=True)
    gm = fxsd.transform(model, 0.5, compute="skip", scaling="train", example_inputs=(x[:2],)).train()
    step = torch.compile(gm, fullgraph=True) if compiled else gm
    with torch.autocast(device, torch.bfloat16):
        out, branch = step(x), model(x) - x
        (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
        kept = (out - x).flatten(1).norm(dim=1) > 0
        expected = x + kept[:, None, None] * branch * 2
        (wanted,) = torch.autograd.grad(expected.float().square().sum(), x)
    assert 4 <= int(kept.sum()) <= 28
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)
    assert torch.equal(out[~kept], x[~kept])
    torch.testing.assert_close(gradient, wanted, atol=0.2, rtol=0.1)
