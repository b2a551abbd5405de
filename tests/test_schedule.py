"""Rates over training time: against formulas of the papers, and a restart against a run that was not interrupted."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from ranks import Block
from torch import nn
from torch._dynamo.testing import CompileCounter

import fxsd
from fxsd import DropRateSchedule, FxsdError


def model(drop_rate: float = 0.4, **options: Any) -> nn.Module:
    return fxsd.transform(nn.Sequential(*[Block() for _ in range(4)]), drop_rate, **options)


def rates(schedule: DropRateSchedule, count: int) -> list[float]:
    found = [schedule.get_last_rate()]
    for _ in range(count - 1):
        schedule.step()
        found.append(schedule.get_last_rate())
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.4] * 7),
        ("linear", [0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4]),
        ("cosine", [0.0, 0.2 - 0.2 * math.sqrt(0.5), 0.2, 0.2 + 0.2 * math.sqrt(0.5), 0.4, 0.4, 0.4]),
        ("early", [0.4, 0.4, 0.4, 0.4, 0.0, 0.0, 0.0]),
        ("early_linear", [0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0]),
        ("late", [0.0, 0.0, 0.0, 0.0, 0.4, 0.4, 0.4]),
    ],
)
def test_named_schedules(name: str, expected: list[float]) -> None:
    assert rates(DropRateSchedule(model(), name, steps=4), 7) == pytest.approx(expected)


def test_progressive_layer_dropping_keeps_what_its_paper_says() -> None:
    theta, total = 0.5, 1000
    gamma = 100 / total
    kept = [1 - rate for rate in rates(DropRateSchedule(model(), "progressive", 1 - theta, steps=total), 50)]
    assert kept == pytest.approx([(1 - theta) * math.exp(-gamma * t) + theta for t in range(50)])


def test_warm_up_is_on_top_of_any_schedule() -> None:
    assert rates(DropRateSchedule(model(), warmup_steps=4), 6) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert rates(DropRateSchedule(model(), "early", steps=3, warmup_steps=2), 5) == pytest.approx([0.0, 0.2, 0.4, 0.0, 0.0])
    assert rates(DropRateSchedule(model(), lambda step: 0.1 * step, warmup_steps=2), 4) == pytest.approx([0.0, 0.05, 0.2, 0.3])


@pytest.mark.parametrize(
    ("name", "steps", "warmup_steps", "first"),
    [
        ("constant", None, 0, 0),
        ("constant", 9, 3, 3),
        ("linear", 4, 0, 4),
        ("cosine", 4, 6, 6),
        ("progressive", 4, 0, 4),
        ("early", 4, 2, 4),
        ("early_linear", 4, 0, 4),
        ("late", 4, 0, 4),
        (lambda step: 0.1, None, 2, None),
    ],
)
def test_rates_rest_from_where_they_stay(monkeypatch: Any, name: Any, steps: int | None, warmup_steps: int, first: int | None) -> None:
    rested: list[int] = []
    schedule = DropRateSchedule(model(), name, steps=steps, warmup_steps=warmup_steps)
    monkeypatch.setattr("fxsd.schedule.rest", lambda gm: rested.append(schedule.last_step))
    schedule.load_state_dict(schedule.state_dict())
    found = rates(schedule, 12)
    assert rested == ([] if first is None else list(range(first, 12)))
    assert first is None or set(found[first:]) == {found[first]}
    assert not first or found[first - 1] != found[first] or name == "progressive"  # which comes to rest sooner


def test_the_sites_have_their_share_at_every_step() -> None:
    gm = model(0.4, drop_distribution="linear")
    shares = [site.drop_rate / 0.4 for site in fxsd.sites(gm)]
    schedule = DropRateSchedule(gm, "linear", steps=3)
    for step in range(5):
        assert [site.drop_rate for site in fxsd.sites(gm)] == pytest.approx([share * schedule.rate_at(step) for share in shares], abs=1e-7)
        schedule.step()


def test_the_full_rate_is_the_model_s_own_or_that_which_is_given() -> None:
    assert DropRateSchedule(model(0.3, drop_distribution="huang")).get_last_rate() == pytest.approx(0.3)
    assert DropRateSchedule(model(0.3), drop_rate=0.1).get_last_rate() == 0.1
    assert DropRateSchedule(model(0.0)).get_last_rate() == 0.0


@pytest.mark.parametrize("schedule", ["cosine", lambda step: 0.3 / (1 + step)])
def test_a_restart_goes_on_exactly(schedule: object) -> None:
    def run(gm: nn.Module, plan: DropRateSchedule, steps: int) -> list[torch.Tensor]:
        outputs = []
        for _ in range(steps):
            torch.manual_seed(plan.last_step)
            outputs.append(gm(torch.ones(8, 6)))
            plan.step()
        return outputs

    torch.manual_seed(0)
    gm = model(scaling="train")
    options = {} if callable(schedule) else {"steps": 6}
    whole = DropRateSchedule(gm, schedule, **options)
    run(gm, whole, 3)
    state, weights = pickle.loads(pickle.dumps(whole.state_dict())), {k: v.clone() for k, v in gm.state_dict().items()}
    expected = run(gm, whole, 5)

    other = model(0.1, scaling="train")
    other.load_state_dict(weights)
    resumed = DropRateSchedule(other, schedule, **options)
    resumed.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(run(other, resumed, 5), expected, strict=True))


@pytest.mark.parametrize(("compute", "most"), [("mask", 1), ("skip", 2)])
def test_a_compiled_model_sees_it_without_compiling_each_time(compute: str, most: int) -> None:
    torch._dynamo.reset()
    x = torch.randn(8, 6)
    gm = model(0.5, compute=compute, drop_distribution="uniform", example_inputs=(x,))
    counter = CompileCounter()
    compiled = torch.compile(gm, fullgraph=True, backend=counter)
    compiled(x)
    schedule = DropRateSchedule(compiled, "linear", steps=10)
    for _ in range(12):
        compiled(x)
        schedule.step()
    assert counter.frame_count <= most
    assert {site.drop_rate for site in fxsd.sites(gm)} == {0.5}


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("sideways",), {}, "schedule must be one of 'constant'"),
        (("linear",), {}, "steps must be a positive whole number for schedule='linear', but got None"),
        (("late",), {"steps": 0}, "but got 0"),
        (("late",), {"steps": True}, "but got True"),
        ((), {"warmup_steps": -1}, "warmup_steps must be a whole number of 0 or more, but got -1"),
        ((), {"drop_rate": 1.5}, "drop_rate must be a number from 0 to 1, but got 1.5"),
        ((lambda step: 0.1,), {"drop_rate": 0.1}, "drop_rate must be left out"),
        ((lambda step: 2.0,), {}, "the rate that schedule gives for step 0 must be a number from 0 to 1, but got 2.0"),
    ],
)
def test_bad_arguments_change_nothing(args: tuple[object, ...], options: dict[str, object], message: str) -> None:
    gm = model(0.3)
    with pytest.raises(FxsdError, match=message):
        DropRateSchedule(gm, *args, **options)  # type: ignore[arg-type]
    assert max(site.drop_rate for site in fxsd.sites(gm)) == pytest.approx(0.3)


def test_a_model_that_was_not_transformed_is_told() -> None:
    with pytest.raises(FxsdError, match="there is no transformed model in this Linear"):
        DropRateSchedule(nn.Linear(2, 2))


def test_a_state_of_another_kind_changes_nothing() -> None:
    schedule = DropRateSchedule(model(), "linear", steps=4)
    for state in ({}, None, DropRateSchedule(model(), lambda step: 0.1).state_dict()):
        with pytest.raises(FxsdError, match="state must be what state_dict"):
            schedule.load_state_dict(state)  # type: ignore[arg-type]
    assert (schedule.last_step, schedule.get_last_rate()) == (0, 0.0)
