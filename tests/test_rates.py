"""How a rate is spread over depth, against the table of numbers, closed forms, and the rates of whole models."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import AuxiliaryHead, BranchRight, PreNorm, Stack, ThreeBlocks

import fxsd
from fxsd.rates import NAMED, check_rate, largest_rate, weights

quick = settings(derandomize=True, deadline=None, max_examples=80, database=None)
rates = st.floats(0.0, 1.0)
counts = st.integers(1, 60)

# name -> the rate of depth i of n at 1, as an exact fraction where it is one
CLOSED = {
    "uniform": lambda i, n: Fraction(1),
    "linear": lambda i, n: Fraction(i, n - 1) if n > 1 else Fraction(1),
    "huang": lambda i, n: Fraction(i + 1, n),
    "efficientnet": lambda i, n: Fraction(i, n),
    "exponential": lambda i, n: math.exp(math.log(2) * i / (n - 1)) - 1 if n > 1 else Fraction(1),
}


def spread(distribution: object, count: int, rate: float) -> list[float]:
    base, factors = weights(rate, [f"b.{i}" for i in range(count)], list(range(count)), distribution)
    return [base * factor for factor in factors]


def four_blocks() -> Stack:
    return Stack(*[BranchRight() for _ in range(4)])


def site_rates(gm) -> list[float]:
    found = [site.drop_rate for site in fxsd.sites(gm)]
    assert found
    return found


# --- named ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", [0.2, 0.2, 0.2, 0.2]),
        ("linear", [0.0, 0.067, 0.133, 0.2]),
        ("huang", [0.05, 0.1, 0.15, 0.2]),
        ("efficientnet", [0.0, 0.05, 0.1, 0.15]),
        ("exponential", [0.0, 0.052, 0.117, 0.2]),
    ],
)
def test_four_blocks_at_a_fifth_have_the_rates_of_the_table(name: str, expected: list[float]):
    assert [round(rate, 3) for rate in spread(name, 4, 0.2)] == expected
    assert [round(rate, 3) for rate in site_rates(fxsd.transform(four_blocks(), 0.2, drop_distribution=name))] == expected


def test_the_names_are_these_and_linear_is_the_default():
    assert set(NAMED) == set(CLOSED)
    assert site_rates(fxsd.transform(four_blocks(), 0.3)) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert site_rates(fxsd.transform(four_blocks())) == pytest.approx([0.0, 0.1 / 3, 0.2 / 3, 0.1])


@pytest.mark.parametrize("name", CLOSED)
@given(count=counts, rate=rates)
@quick
def test_every_depth_has_the_rate_of_the_closed_form(name: str, count: int, rate: float):
    found = spread(name, count, rate)
    expected = [rate * float(CLOSED[name](i, count)) for i in range(count)]
    assert len(found) == count
    assert found == pytest.approx(expected, abs=1e-12)
    assert all(0.0 <= value <= rate + 1e-15 for value in found)
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("name", "alone"), [("uniform", 0.4), ("linear", 0.4), ("huang", 0.4), ("exponential", 0.4), ("efficientnet", 0.0)]
)
def test_a_single_block_has_the_full_rate_but_for_efficientnet(name: str, alone: float):
    assert spread(name, 1, 0.4) == [alone]
    assert site_rates(fxsd.transform(BranchRight(), 0.4, drop_distribution=name)) == [alone]


def test_sites_of_one_depth_have_one_rate():
    gm = fxsd.transform(Stack(PreNorm(), BranchRight(), PreNorm()), 0.4)
    assert site_rates(gm) == [0.0, 0.0, 0.2, 0.4, 0.4]


# --- given by the user ----------------------------------------------------------------------------------------------------------


@given(count=counts, rate=rates, data=st.data())
@quick
def test_a_callable_gives_a_factor_for_every_depth(count: int, rate: float, data: st.DataObject):
    factors = data.draw(st.lists(rates, min_size=count, max_size=count))
    asked = []

    def distribution(depth: int, depths: int) -> float:
        asked.append((depth, depths))
        return factors[depth]

    assert spread(distribution, count, rate) == pytest.approx([rate * factor for factor in factors], abs=1e-15)
    assert asked == [(i, count) for i in range(count)]


@given(values=st.lists(rates, min_size=1, max_size=30), rate=rates)
@quick
def test_a_sequence_states_the_rate_of_every_depth_itself(values: list[float], rate: float):
    assert spread(values, len(values), rate) == pytest.approx(values, rel=1e-12, abs=1e-300)
    assert spread(tuple(values), len(values), rate) == spread(values, len(values), rate)


def test_a_sequence_counts_depths_and_not_sites():
    gm = fxsd.transform(Stack(PreNorm(), BranchRight()), drop_distribution=[0.1, 0.3])
    assert site_rates(gm) == [0.1, 0.1, 0.3]


def test_a_mapping_gives_a_rate_to_the_first_glob_that_matches_and_none_to_the_rest():
    gm = fxsd.transform(four_blocks(), 0.9, drop_distribution={"blocks.1": 0.5, "blocks.[12]": 0.25})
    assert site_rates(gm) == [0.0, 0.5, 0.25, 0.0]


def test_a_mapping_goes_by_the_names_of_sites():
    gm = fxsd.transform(Stack(PreNorm(), BranchRight()), drop_distribution={"blocks.0.1": 0.5, "*": 0.125})
    assert site_rates(gm) == [0.125, 0.5, 0.125]


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        ([0.1, 0.2], r"needs one rate a depth: the model has 3 depths, but got 2 rates"),
        ([], r"3 depths, but got 0 rates"),
        ([0.1, 0.2, 1.5], r"drop_distribution\[2\] must be a number from 0 to 1, but got 1\.5"),
        ([0.1, "x", 0.2], r"drop_distribution\[1\] must be a number from 0 to 1, but got 'x'"),
        ({"blocks.*": -0.1}, r"drop_distribution\['blocks\.\*'\] must be a number from 0 to 1, but got -0\.1"),
        ({"layer.*": 0.1}, r"the glob 'layer\.\*', which matches no site\. The sites are: blocks\.0, blocks\.1, blocks\.2"),
        (lambda depth, depths: 3.0, r"drop_rate \* drop_distribution\(0, 3\) must be a number from 0 to 1, but got 1\.5"),
        (lambda depth, depths: -1.0, r"drop_distribution\(0, 3\) must be a number from 0 to 1, but got -0\.5"),
        (lambda depth, depths: "much", r"drop_distribution\(0, 3\) must be a number from 0 to 1, but got 'much'"),
        (lambda depth, depths: math.nan, r"drop_distribution\(0, 3\) must be a number from 0 to 1, but got nan"),
        ("lineal", r"must be one of 'uniform', 'linear', 'huang', 'efficientnet', 'exponential'.*but got 'lineal'"),
        (3, r"must be a name, a callable.*but got 3"),
        (None, r"must be a name, a callable.*but got None"),
    ],
)
def test_a_distribution_that_cannot_be_is_refused(distribution: object, message: str):
    with pytest.raises(fxsd.FxsdError, match=message):
        fxsd.transform(ThreeBlocks(), 0.5, drop_distribution=distribution)
    with pytest.raises(fxsd.FxsdError, match=message):
        fxsd.analyze(ThreeBlocks(), 0.5, drop_distribution=distribution)


@given(value=st.floats(allow_nan=True).filter(lambda v: not 0 <= v <= 1))
@quick
def test_no_number_outside_zero_to_one_is_a_rate(value: float):
    with pytest.raises(fxsd.FxsdError, match="here must be a number from 0 to 1, but got"):
        check_rate("here", value)


@given(value=rates)
@quick
def test_every_number_from_zero_to_one_is_a_rate(value: float):
    assert check_rate("here", value) == value
    assert type(check_rate("here", 1)) is float


# --- moving the rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLOSED)
def test_rates_move_and_keep_their_distribution(name: str):
    gm = fxsd.transform(four_blocks(), 0.1, drop_distribution=name)
    for rate in (0.3, 1.0, 0.0, 0.2):
        fxsd.set_drop_rate(gm, rate)
        assert site_rates(gm) == pytest.approx(spread(name, 4, rate), abs=1e-7)


def test_a_model_made_at_rate_zero_can_be_warmed_up():
    gm = fxsd.transform(four_blocks(), 0.0)
    assert site_rates(gm) == [0.0] * 4
    fxsd.set_drop_rate(gm, 0.3)
    assert site_rates(gm) == pytest.approx([0.0, 0.1, 0.2, 0.3], abs=1e-7)


def test_stated_rates_keep_their_proportions_and_the_largest_becomes_the_rate():
    for distribution in ([0.1, 0.2, 0.4], {"blocks.0": 0.1, "blocks.1": 0.2, "blocks.2": 0.4}):
        gm = fxsd.transform(ThreeBlocks(), drop_distribution=distribution)
        fxsd.set_drop_rate(gm, 0.8)
        assert site_rates(gm) == pytest.approx([0.2, 0.4, 0.8], abs=1e-7)


def test_a_rate_that_would_lift_a_site_over_one_is_refused_and_changes_nothing():
    gm = fxsd.transform(ThreeBlocks(), 0.25, drop_distribution=lambda depth, depths: float(depth))
    assert site_rates(gm) == [0.0, 0.25, 0.5]
    fxsd.set_drop_rate(gm, 0.5)
    assert site_rates(gm) == [0.0, 0.5, 1.0]
    with pytest.raises(fxsd.FxsdError, match=r"drop_rate must be at most 0\.5 here.*largest weight is 2.*but got 0\.6"):
        fxsd.set_drop_rate(gm, 0.6)
    assert site_rates(gm) == [0.0, 0.5, 1.0]


def test_rates_move_in_a_model_of_two_programs():
    gm = fxsd.transform(AuxiliaryHead(), 0.5, drop_distribution="uniform")
    fxsd.set_drop_rate(gm, 0.125)
    assert site_rates(gm) == [0.125, 0.125]


@given(found=st.lists(st.floats(0.0, 20.0), max_size=10))
@quick
def test_the_largest_rate_is_the_largest_one_that_no_site_exceeds_one_with(found: list[float]):
    top = largest_rate(found)
    assert 0.0 < top <= 1.0
    assert all(top * weight <= 1.0 + 1e-12 for weight in found)
    assert top == 1.0 or max(top * weight for weight in found) == pytest.approx(1.0)
