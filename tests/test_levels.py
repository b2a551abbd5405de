"""Numbers of rows that are rounded up so that few are left."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from fxsd.levels import levels

BATCH = 12


def running(rows: list[int], chosen: tuple[int, ...]) -> int:
    return sum(min(level for level in (BATCH, *chosen) if level >= number) for number in rows)


@given(st.lists(st.integers(1, BATCH), min_size=1, max_size=20))
def test_they_are_the_fewest_that_give_up_a_tenth_of_what_is_saved_or_the_best_three(rows: list[int]):
    most = sum(rows) + (BATCH * len(rows) - sum(rows)) / 10
    whole, *found = levels(tuple(rows), BATCH)
    others = sorted(set(rows) - {BATCH})
    assert whole == BATCH
    assert set(found) <= set(others)
    assert running(rows, tuple(found)) <= most or len(found) == 3
    least = [min(running(rows, chosen) for chosen in combinations(others, count)) for count in range(len(found) + 1)]
    assert not any(total <= most for total in least[:-1])
    assert running(rows, tuple(found)) == least[-1]


def test_one_rate_is_not_rounded():
    assert levels((7,) * 24, 16) == (16, 7)


def test_twelve_blocks_at_rates_up_to_04_have_few():
    rates = [0.4 * (site + 1) / 24 for site in range(24)]
    found = {batch: levels(tuple(-int(-batch * (1 - rate) // 1) for rate in rates), batch) for batch in (16, 64, 512)}
    assert [len(numbers) for numbers in found.values()] == [4, 4, 4]
