"""What training loops do with a model: lower precision, averages of weights, accumulated gradients, functional calls, interruptions."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from draws import at_random, forced
from ranks import Block
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fxsd

MODES = list(itertools.product(("sample", "block"), ("mask", "skip")))
LOW = [torch.bfloat16, torch.float16]


def transformed(method: str, compute: str, net: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    net = net or nn.Sequential(*[Block() for _ in range(3)])
    options = {"drop_distribution": "uniform", "example_inputs": (torch.ones(8, 6),)} | options
    return fxsd.transform(net, 0.5, stochastic_method=method, compute=compute, **options)


def rows(*shape: int) -> Tensor:
    return torch.randn(*(shape or (8, 6)), generator=torch.Generator().manual_seed(1))


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(6, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


# --- precision and memory formats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("method", "compute"), MODES)
def test_autocast_is_near_float32_under_the_same_draws(method: str, compute: str, dtype: torch.dtype) -> None:
    gm, found = transformed(method, compute), []
    for enabled in (False, True):
        gm.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = gm(rows()).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in gm.parameters())])
    for exact, low in zip(*found, strict=True):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, exact, rtol=0.05, atol=0.02 * float(exact.abs().max()) + 1e-6)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("method", "compute"), MODES)
def test_a_gradient_scaler_trains_and_leaves_out_a_step_that_overflows(method: str, compute: str, dtype: torch.dtype) -> None:
    gm = transformed(method, compute)
    optimizer, scaler = torch.optim.SGD(gm.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in gm.parameters()]
        with torch.autocast("cpu", dtype):
            loss = gm(rows()).float().square().mean()
        scaler.scale(loss * (float("inf") if step == 20 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        same = [torch.equal(a, b) for a, b in zip(before, gm.parameters(), strict=True)]
        assert all(same) if step == 20 else not any(same) or method == "block" or step == 19
    assert sum(losses[-8:]) < sum(losses[:8])
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("method", "compute"), MODES)
def test_a_model_in_low_precision_keeps_its_rates_and_drops_exactly(method: str, compute: str, dtype: torch.dtype) -> None:
    gm = transformed(method, compute, nn.Sequential(Block()), scaling="train")
    fxsd.set_drop_rate(gm, 0.3001)
    gm.to(dtype)
    assert fxsd.sites(gm)[0].drop_rate == 0.3001
    x = rows(40, 6).to(dtype)
    dropped = 0
    for _ in range(10):
        y = gm(x)
        assert y.dtype == dtype
        dropped += int((y == x).all(1).sum())
    assert 0 < dropped < 400
    y.square().sum().backward()
    assert {p.grad.dtype for p in gm.parameters()} == {dtype}
    full = copy.deepcopy(gm).float().eval()
    torch.testing.assert_close(gm.eval()(x).float(), full(x.float()), rtol=0.02, atol=0.05)


@pytest.mark.parametrize(("method", "compute"), MODES)
def test_channels_last_stays_and_changes_nothing(method: str, compute: str) -> None:
    x = rows(8, 6, 5, 5)
    gm = transformed(method, compute, nn.Sequential(Convs(), Convs()), example_inputs=(x,), subset_batch_norm=True)
    last = copy.deepcopy(gm).to(memory_format=torch.channels_last)
    for seed in range(4):
        found = []
        for model, given in ((gm, x), (last, x.to(memory_format=torch.channels_last))):
            given = given.clone().requires_grad_()
            model.zero_grad()
            torch.manual_seed(seed)
            y = model(given)
            y.square().sum().backward()
            found.append([y, given.grad, *(p.grad for p in model.parameters())])
        assert found[1][0].is_contiguous(memory_format=torch.channels_last)
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- averages of weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize(("method", "compute"), MODES)
def test_an_average_of_the_weights_follows_the_rates(method: str, compute: str, use_buffers: bool) -> None:
    gm = transformed(method, compute)
    schedule = fxsd.DropRateSchedule(gm, "linear", steps=4)  # begins at 0
    ema = AveragedModel(gm, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(gm.parameters(), 0.1)
    weight, rate = 0.0, 0.0
    for step in range(8):
        optimizer.zero_grad()
        gm(rows()).square().mean().backward()
        optimizer.step()
        schedule.step()
        ema.update_parameters(gm)
        now = gm.get_submodule("0.f.1").weight.detach().clone()
        weight = now if step == 0 else (weight + now) / 2
        rate = schedule.get_last_rate() if step == 0 else (rate + schedule.get_last_rate()) / 2
    if not use_buffers:
        rate = schedule.get_last_rate()
    torch.testing.assert_close(ema.module.get_submodule("0.f.1").weight, weight)
    assert [site.drop_rate for site in fxsd.sites(ema)] == pytest.approx([rate] * 3)
    assert [site.drop_rate for site in fxsd.sites(gm)] == pytest.approx([0.5] * 3)

    with torch.no_grad():
        x = rows(400, 6)
        expected = x
        for block in ema.module:
            expected = expected + (1 - rate) * block.f(expected)
        torch.testing.assert_close(ema.eval()(x), expected)
        drawn = torch.stack([(ema.train()(x) == x).all(1).float() for _ in range(50)]).mean()
    assert abs(float(drawn) - rate**3) < 0.15 * (method == "block") + 0.02  # it drops, at the rates that it has


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(Convs(), Convs(), nn.BatchNorm2d(6))


@pytest.mark.parametrize(("method", "compute"), MODES)
@pytest.mark.parametrize("scaling", ["train", "inference"])
def test_statistics_of_batch_norm_for_an_average(method: str, compute: str, scaling: str) -> None:
    """`update_bn` sees dropped branches, as training does; in evaluation mode but for batch norm, none are."""
    x = rows(64, 6, 5, 5) + 1
    gm = transformed(method, compute, Normed(), scaling=scaling, example_inputs=(x,), subset_batch_norm=True)
    ema = AveragedModel(gm)
    norm = ema.module.get_submodule("2")
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))

    def error() -> float:
        """Of the statistics for what the last layer gets in evaluation."""
        ema.eval()(x)
        mean, variance = seen[-1].mean((0, 2, 3)), seen[-1].var((0, 2, 3))
        return float(torch.cat([norm.running_mean - mean, (norm.running_var - variance) / variance]).abs().max())

    update_bn([x], ema)
    assert ema.training
    assert error() > 0.01

    ema.eval()
    for module in ema.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
            module.train()
    with torch.no_grad():
        ema(x)
    assert error() < 0.005

    if scaling == "train":
        fxsd.set_drop_rate(ema, 0.0)
        update_bn([x], ema)
        assert error() < 0.005


# --- gradients that are summed, functional calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["mask", "skip"])
def test_gradients_of_small_batches_add_up_to_that_of_the_whole(compute: str) -> None:
    gm = transformed("sample", compute).double()
    x, table = rows(8, 6).double(), at_random(0)
    gradients = []
    for parts in (1, 4):
        gm.zero_grad()
        size = 8 // parts
        for part in range(parts):
            with forced(lambda site, batch, start=part * size: table(site, 8)[start : start + batch]):
                (gm(x[part * size :][:size]).square().sum() / 8).backward()
        gradients.append([p.grad for p in gm.parameters()])
    for whole, summed in zip(*gradients, strict=True):
        assert whole.abs().max() > 0
        torch.testing.assert_close(summed, whole)


@pytest.mark.parametrize(("method", "compute"), MODES)
def test_functional_calls_take_the_original_s_keys(method: str, compute: str) -> None:
    net = nn.Sequential(*[Block() for _ in range(3)])
    gm, x = transformed(method, compute, net), rows()
    state = {name: tensor + 0.1 for name, tensor in net.state_dict().items()}

    def loss(state: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(2)
        return torch.func.functional_call(gm, state, (x,)).square().sum()

    gradients = torch.func.grad(loss)(state)
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.add_(0.1)
    torch.manual_seed(2)
    gm(x).square().sum().backward()
    for name, parameter in gm.named_parameters():
        assert torch.equal(gradients[name], parameter.grad)


@pytest.mark.parametrize("batch", [200, 201])  # members run equally many rows, or not
@pytest.mark.parametrize("compute", ["mask", "skip"])
@pytest.mark.parametrize("method", ["sample", "block"])
def test_an_ensemble_is_trained_by_vmap(method: str, compute: str, batch: int) -> None:
    members = [transformed(method, compute) for _ in range(3)]
    for number, member in enumerate(members):
        with torch.no_grad():
            for parameter in member.parameters():
                parameter.add_(0.1 * number)
    gm, x = members[0], rows(batch, 6)
    state = {name: torch.stack([member.state_dict()[name] for member in members]) for name in gm.state_dict()}

    def run(state: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(gm, state, (x,))

    y = torch.vmap(run, randomness="different")(state)
    assert y.shape == (3, batch, 6)
    kept = [~(each == x).all(1) for each in y]
    if method == "sample":
        assert not torch.equal(kept[0], kept[1])
    losses = lambda state: run(state).square().mean()  # noqa: E731
    gradients = torch.vmap(torch.func.grad(losses), randomness="different")(state)
    assert {tensor.shape[0] for tensor in gradients.values()} == {3}
    torch.manual_seed(3)
    same = torch.vmap(torch.func.grad(losses), randomness="same")(state)
    for number in range(len(members)):
        torch.manual_seed(3)
        alone = torch.func.grad(losses)({name: tensor[number] for name, tensor in state.items()})
        for name, gradient in alone.items():
            torch.testing.assert_close(same[name][number], gradient)


# --- seeds and interruptions --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Any, list[float]], dict[Any, list[float]]]:
    """The losses of whole runs in this process, which left their state behind at `runs.STOP`, and those of another process."""
    folder = tmp_path_factory.mktemp("runs")
    here: dict[Any, list[float]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for mode in runs.MODES:
        run = runs.Run(*mode)
        losses = run.train(runs.STOP)
        run.save(folder / f"{'-'.join(mode)}.pt")
        here[mode] = losses + run.train(runs.STEPS - runs.STOP)
    torch.set_num_threads(threads)
    subprocess.run([sys.executable, runs.__file__, str(folder)], check=True, cwd=Path(__file__).parents[1])
    return here, torch.load(folder / "losses.pt")


@pytest.mark.parametrize("mode", runs.MODES)
def test_a_seed_means_the_same_losses_in_another_process(mode: tuple[str, str], processes: Any) -> None:
    here, there = processes
    assert there[(*mode, "whole")] == here[mode]
    assert len(set(here[mode])) == runs.STEPS


@pytest.mark.parametrize("mode", runs.MODES)
def test_a_run_that_was_interrupted_goes_on_exactly(mode: tuple[str, str], processes: Any) -> None:
    here, there = processes
    assert there[(*mode, "rest")] == here[mode][runs.STOP :]
