"""The op of a site: its semantics table, its statistics, and that its rate stays what it is.

All seeds are fixed. A tolerance of k sigma is k standard deviations of the estimate, from the binomial law.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fxsd.run.ops import METHODS, SCALINGS, StochasticDepth


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- one call -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scaling", "kept"), [("inference", 1.0), ("train", 4.0)])
@pytest.mark.parametrize("method", METHODS)
def test_in_training_a_sample_is_zero_or_the_branch_times_one_constant(method: str, scaling: str, kept: float):
    drop, branch = StochasticDepth(0.75, method, scaling), torch.randn(8, 3, 2)
    seen = set()
    for _ in range(60):
        for row, source in zip(drop(branch), branch, strict=True):
            factor = 0.0 if torch.equal(row, torch.zeros_like(row)) else kept
            assert torch.equal(row, factor * source)
            seen.add(factor)
    assert seen == {0.0, kept}


@pytest.mark.parametrize("method", METHODS)
def test_in_eval_scaling_at_inference_multiplies_by_keep_prob_and_draws_nothing(method: str):
    drop, branch = StochasticDepth(0.25, method, "inference").eval(), torch.randn(5, 3)
    state = torch.get_rng_state()
    assert torch.equal(drop(branch), 0.75 * branch)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_in_eval_scaling_in_training_gives_the_very_tensor_back(method: str):
    branch = torch.randn(5, 3)
    assert StochasticDepth(0.25, method, "train").eval()(branch) is branch


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rate_zero_keeps_everything_and_rate_one_nothing(method: str, scaling: str, dtype: torch.dtype):
    branch = torch.randn(1000, 2, dtype=dtype)
    assert torch.equal(StochasticDepth(0.0, method, scaling)(branch), branch)
    assert torch.equal(StochasticDepth(1.0, method, scaling)(branch), torch.zeros_like(branch))
    changed = StochasticDepth(0.5, method, scaling)
    changed.set_drop_rate(1.0)
    assert torch.equal(changed(branch), torch.zeros_like(branch))
    changed.set_drop_rate(0.0)
    assert torch.equal(changed(branch), branch)
    assert torch.equal(changed.eval()(branch), branch)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_at_rate_one_evaluation_follows_the_scaling(scaling: str):
    branch = torch.randn(4, 2)
    assert torch.equal(StochasticDepth(1.0, "sample", scaling).eval()(branch), branch if scaling == "train" else torch.zeros(4, 2))


def test_the_gradient_of_a_sample_is_the_factor_of_the_sample():
    drop, branch = StochasticDepth(0.5, scaling="train"), torch.ones(64, 2, requires_grad=True)
    out = drop(branch)
    out.sum().backward()
    assert torch.equal(branch.grad, out.detach())
    assert set(out.flatten().tolist()) == {0.0, 2.0}


def test_the_branch_is_not_written_to():
    branch = torch.randn(16, 2)
    before = branch.clone()
    out = StochasticDepth(0.5)(branch)
    assert torch.equal(branch, before)
    assert branch._version == 0
    assert out.data_ptr() != branch.data_ptr()


@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 2, 3), (6, 2, 3, 4), (6, 2, 3, 4, 2), (0, 2), ()])
@pytest.mark.parametrize("method", METHODS)
def test_every_number_of_dimensions_is_taken(shape: tuple[int, ...], method: str):
    out = StochasticDepth(0.5, method)(torch.ones(shape))
    assert out.shape == shape
    assert set(out.flatten().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_memory_format_are_those_of_the_branch(dtype: torch.dtype):
    branch = torch.randn(2, 3, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    for drop in (StochasticDepth(0.5), StochasticDepth(0.5).eval(), StochasticDepth(0.5, scaling="train")):
        out = drop(branch)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)


# --- statistics -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_samples_are_dropped_as_often_as_the_rate_says(rate: float, scaling: str):
    samples = 20_000
    dropped = float((StochasticDepth(rate, "sample", scaling)(torch.ones(samples, 2))[:, 0] == 0).double().mean())
    assert dropped == pytest.approx(rate, abs=3 * math.sqrt(rate * (1 - rate) / samples))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_blocks_are_dropped_as_often_as_the_rate_says_and_whole(rate: float):
    calls, drop, branch = 20_000, StochasticDepth(rate, "block"), torch.ones(3, 1)
    kept = torch.stack([drop(branch).flatten() for _ in range(calls)])
    assert torch.equal(kept[:, 0], kept[:, 1])
    assert torch.equal(kept[:, 0], kept[:, 2])
    assert float(kept[:, 0].mean()) == pytest.approx(1 - rate, abs=3 * math.sqrt(rate * (1 - rate) / calls))


@pytest.mark.parametrize(("method", "draws"), [("sample", 7), ("block", 1)])
def test_a_call_draws_one_number_a_sample_or_one_in_all(method: str, draws: int):
    torch.manual_seed(3)
    expected = torch.rand(draws) >= 0.5
    after = torch.rand(1)
    torch.manual_seed(3)
    out = StochasticDepth(0.5, method)(torch.ones(7, 4, 4))
    assert torch.equal(out[:, 0, 0] == 1, expected.expand(7))
    assert torch.equal(torch.rand(1), after)


def test_samples_and_steps_draw_independently():
    steps, batch = 5_000, 4
    drop, branch = StochasticDepth(0.3), torch.ones(batch, 1)
    kept = torch.stack([drop(branch).flatten() for _ in range(steps)]).double()
    across_samples = torch.corrcoef(kept.T)
    across_steps = torch.corrcoef(torch.stack([kept[:-1, 0], kept[1:, 0]]))[0, 1]
    off_diagonal = across_samples[~torch.eye(batch, dtype=torch.bool)]
    assert off_diagonal.numel() == 12
    assert float(off_diagonal.abs().max()) < 4 / math.sqrt(steps)
    assert abs(float(across_steps)) < 4 / math.sqrt(steps)


def test_sites_draw_independently():
    samples = 20_000
    ones = torch.ones(samples, 1)
    kept = torch.stack([StochasticDepth(0.4)(ones).flatten() for _ in range(3)]).double()
    off_diagonal = torch.corrcoef(kept)[~torch.eye(3, dtype=torch.bool)]
    assert off_diagonal.numel() == 6
    assert float(off_diagonal.abs().max()) < 4 / math.sqrt(samples)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_rates_are_unbiased_in_low_precision(dtype: torch.dtype):
    """`floor(keep + rand)` in bfloat16 gives .0117 here; one standard deviation is .00016."""
    drop = StochasticDepth(0.01).to(dtype)
    dropped = float((drop(torch.ones(400_000, 1, dtype=dtype)) == 0).double().mean())
    assert dropped == pytest.approx(0.01, abs=0.0006)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_training_and_evaluation_agree_in_the_mean(rate: float, scaling: str):
    samples, drop = 100_000, StochasticDepth(rate, "sample", scaling)
    ones = torch.ones(samples, 1)
    expected = 1.0 if scaling == "train" else 1 - rate
    sigma = expected * math.sqrt(rate / (1 - rate) / samples)
    assert float(drop(ones).double().mean()) == pytest.approx(expected, abs=4 * sigma)
    assert float(drop.eval()(ones[:1])) == pytest.approx(expected, abs=1e-6)


def test_draws_follow_the_manual_seed():
    drop, branch = StochasticDepth(0.5), torch.ones(64, 1)
    torch.manual_seed(5)
    first = drop(branch)
    second = drop(branch)
    torch.manual_seed(5)
    assert torch.equal(drop(branch), first)
    assert not torch.equal(first, second)


# --- the rate -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda drop: drop.half(),
        lambda drop: drop.to(torch.bfloat16),
        lambda drop: drop.double(),
        lambda drop: drop.to("cpu", torch.bfloat16),
        lambda drop: drop.to_empty(device="cpu"),
        lambda drop: nn.Sequential(drop).bfloat16()[0],
    ],
    ids=["half", "bfloat16", "double", "device and dtype", "to_empty", "from outside"],
)
def test_a_cast_or_a_move_leaves_the_rate_as_precise_as_it_was(change):
    drop = StochasticDepth(0.1)
    change(drop)
    assert drop.drop_rate.dtype == torch.float32
    assert drop.rate == 0.1
    assert dict(drop.named_buffers())["drop_rate"] is drop.drop_rate


def test_the_rate_is_a_buffer_outside_the_state_dict():
    drop = StochasticDepth(0.3)
    assert list(dict(drop.named_buffers())) == ["drop_rate"]
    assert list(drop.state_dict()) == []
    assert list(drop.parameters()) == []


def test_a_new_rate_is_written_into_the_same_tensor():
    drop = StochasticDepth(0.3)
    tensor = drop.drop_rate
    drop.set_drop_rate(0.7)
    assert drop.drop_rate is tensor
    assert drop.rate == 0.7


def test_an_op_made_at_rate_zero_drops_once_its_rate_is_raised():
    drop, branch = StochasticDepth(0.0), torch.ones(64, 1)
    assert torch.equal(drop(branch), branch)
    drop.set_drop_rate(1.0)
    assert torch.equal(drop(branch), torch.zeros(64, 1))
    drop.set_drop_rate(0.5)
    assert 0 < int(drop(branch).sum()) < 64


def test_the_repr_says_what_the_op_stands_for():
    drop = StochasticDepth(0.12345678, "block", "train", site="layer1.0", module="layer1.0", depth=3, kind="projection")
    assert repr(drop) == "StochasticDepth(0.1235, 'block', 'train', site='layer1.0', depth=3, kind='projection')"
    assert "meta" in repr(StochasticDepth(0.1).to("meta"))
