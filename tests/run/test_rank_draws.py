"""Draws that are the same on all ranks: two models that were made alike stand for two ranks here; tests/test_ranks.py has real ones."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from ranks import blocks
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fxsd
from fxsd.run.ops import StochasticDepth
from fxsd.run.rank_draws import RankDraws

X = torch.linspace(-1, 1, 30).view(5, 6)
PARTITIONED = "aot_eager_decomp_partition"  # chooses what backward computes again, as Inductor does
Step = Callable[[Tensor], Tensor]


def made(compute: str = "mask", scaling: str = "inference") -> nn.Module:
    return blocks(stochastic_method="block", compute=compute, scaling=scaling, sync_ranks=True)


def steps(run: Step, gm: nn.Module, seed: int, times: int = 6) -> list[list[Tensor]]:
    """Output and gradients of some training steps, with torch's generator as another rank may have it."""
    torch.manual_seed(seed)
    found = []
    for _ in range(times):
        y = run(X.clone().requires_grad_())
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(gm.parameters()))])
    return found


def draws(draw: RankDraws, times: int) -> Tensor:
    return torch.stack([draw() for _ in range(times)]).double()


def test_the_numbers_are_those_of_splitmix64() -> None:
    draw = RankDraws("block.1")
    for number in range(100):
        state = (int(draw._key) + number * 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
        assert draw().item() == ((state >> 40) + 2**23) % 2**24 / 2**24


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_blocks_are_dropped_at_their_rate_and_independently_of_other_sites_and_steps(rate: float) -> None:
    torch.manual_seed(0)
    sites, times = 4, 2000
    ops = [StochasticDepth(rate, "block", site=f"blocks.{i}", sync_ranks=True) for i in range(sites)]
    one = torch.ones(1)
    kept = torch.stack([torch.cat([op(one) for op in ops]) for _ in range(times)]).double().T
    sigma = math.sqrt(rate * (1 - rate) / times)
    assert (kept.mean(1) - (1 - rate)).abs().max() < 4 * sigma
    others = torch.corrcoef(torch.cat([kept[:, 1:], kept[:, :-1]])).fill_diagonal_(0)  # each site at this step and at the one before
    assert others.abs().max() < 4.5 / math.sqrt(times)


def test_numbers_spread_evenly_from_zero_to_one() -> None:
    torch.manual_seed(0)
    counts = torch.histc(draws(RankDraws("block"), 5000), 50, 0, 1)
    assert ((counts - 100) ** 2 / 100).sum() < 49 + 4 * math.sqrt(98)  # chi squared


def test_a_draw_depends_on_the_seed_and_the_name_and_on_nothing_later() -> None:
    torch.manual_seed(0)
    one, same, named = RankDraws("a"), RankDraws("a"), RankDraws("b")
    torch.manual_seed(1)
    seeded = RankDraws("a")
    expected = draws(one, 5)
    torch.manual_seed(2)
    assert torch.equal(draws(same, 5), expected)
    assert not torch.equal(draws(named, 5), expected)
    assert not torch.equal(draws(seeded, 5), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("compute", "compiled"), [("mask", False), ("skip", False), ("mask", True)])
def test_what_a_checkpoint_computes_again_draws_again_what_it_drew(compute: str, compiled: bool, use_reentrant: bool) -> None:
    torch._dynamo.reset()
    plain, gm = made(compute), made(compute)
    run = torch.compile(gm, backend=PARTITIONED) if compiled else gm

    def again(x: Tensor) -> Tensor:
        return checkpoint(run, x, use_reentrant=use_reentrant)

    def trained(run: Step, gm: nn.Module, seed: int) -> list[list[Tensor]]:
        torch.manual_seed(seed)
        found = []
        for _ in range(5):
            gm.zero_grad()
            x = X.clone().requires_grad_()
            (run(x) + 2 * run(x + 1)).square().sum().backward()  # both forwards come before both backwards
            found.append([p.grad.clone() for p in gm.parameters() if p.grad is not None])
        return found

    expected = trained(plain, plain, seed=1)
    assert_close(trained(again, gm, seed=2), expected, rtol=1e-4, atol=1e-4)
    assert len({float(step[0].sum()) for step in expected}) > 2


@pytest.mark.parametrize(("compute", "backend", "scaling"), [("mask", "inductor", "inference"), ("skip", "eager", "train")])
def test_compiled_code_draws_what_eager_code_draws_and_compiles_once(compute: str, backend: str, scaling: str) -> None:
    torch._dynamo.reset()
    plain, gm = made(compute, scaling), made(compute, scaling)
    counter = CompileCounterWithBackend(backend)
    found = steps(torch.compile(gm, fullgraph=True, backend=counter), gm, seed=1, times=8)
    assert_close(found, steps(plain, plain, seed=2, times=8), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_a_checkpoint_in_compiled_code_draws_again_what_it_drew() -> None:
    torch._dynamo.reset()
    plain, gm = made(), made()
    run = torch.compile(lambda x: checkpoint(gm, x, use_reentrant=False), fullgraph=True)
    expected = steps(plain, plain, seed=1)
    assert_close(steps(run, gm, seed=2), expected, rtol=1e-4, atol=1e-4)
    assert len({float(step[0].sum()) for step in expected}) > 2


def test_masked_and_skipped_blocks_draw_alike() -> None:
    mask, skip = made("mask"), made("skip")
    assert_close(steps(mask, mask, seed=1), steps(skip, skip, seed=2))


def test_evaluation_takes_no_draw() -> None:
    plain, gm = made(), made()

    def evaluated(x: Tensor) -> Tensor:
        gm.eval()(x)
        return gm.train()(x)

    assert_close(steps(evaluated, gm, seed=1), steps(plain, plain, seed=2))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))], ids=["deepcopy", "pickle"])
def test_copies_go_on_with_the_same_draws_by_themselves(copied: Callable[[nn.Module], nn.Module]) -> None:
    gm = made()
    steps(gm, gm, seed=1)
    other = copied(gm)
    assert list(other.state_dict()) == list(gm.state_dict()) == list(blocks().state_dict())
    assert_close(steps(gm, gm, seed=2), steps(other, other, seed=3))


def test_draws_that_are_seeded_again_are_drawn_again() -> None:
    gm = made()
    first = steps(gm, gm, seed=1)
    assert_close(steps(gm, gm, seed=1), first)
    assert not torch.equal(torch.stack([step[0] for step in steps(gm, gm, seed=2)]), torch.stack([step[0] for step in first]))


def test_a_schedule_starts_a_resumed_run_with_the_draws_of_its_step() -> None:
    def run(schedule: fxsd.DropRateSchedule, gm: nn.Module, seed: int, times: int) -> list[list[Tensor]]:
        found = []
        for number in range(times):
            found += steps(gm, gm, seed + number, times=2)  # gradients of two batches are added up
            schedule.step()
        return found

    gm, resumed = made(), made()
    schedule, other = fxsd.DropRateSchedule(gm), fxsd.DropRateSchedule(resumed)
    run(schedule, gm, 10, times=3)
    other.load_state_dict(schedule.state_dict())
    expected = run(schedule, gm, 20, times=4)
    assert_close(run(other, resumed, 30, times=4), expected)
    assert len({float(step[0].sum()) for step in expected}) > 2


def test_the_sample_method_is_refused(subtests: pytest.Subtests) -> None:
    for verb in (fxsd.transform, fxsd.analyze):
        with (
            subtests.test(verb.__name__),
            pytest.raises(fxsd.FxsdError, match=r"^sync_ranks=True needs stochastic_method='block', but got 'sample'.*leave .* out\.$"),
        ):
            verb(nn.Sequential(), sync_ranks=True)
