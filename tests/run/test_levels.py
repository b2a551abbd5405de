"""Numbers of rows that are rounded up so that few are left."""

from __future__ import annotations

from itertools import combinations, product

from hypothesis import given
from hypothesis import strategies as st

from fxsd.run.levels import levels, next_level


def running(rows: list[int], chosen: tuple[int, ...]) -> int:
    return sum(min(level for level in chosen if level >= number) for number in rows)


def least(rows: list[int]) -> list[int]:
    """How many rows have to run with one number, with two and so on."""
    others = set(rows) - {max(rows)}
    return [min(running(rows, (max(rows), *chosen)) for chosen in combinations(others, count)) for count in range(len(others) + 1)]


@given(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=12), min_size=1, max_size=3), st.integers(0, 6))
def test_the_fewest_rows_run_that_can_with_so_many_numbers_more_than_kinds(kinds: list[list[int]], more: int):
    found = levels(tuple(map(tuple, kinds)), more)
    assert all(set(chosen) <= set(rows) for chosen, rows in zip(found, kinds, strict=True))
    assert sum(map(len, found)) <= len(kinds) + more
    possible = product(*(enumerate(least(rows), 1) for rows in kinds))
    best = min(sum(total for _, total in choice) for choice in possible if sum(count for count, _ in choice) <= len(kinds) + more)
    assert sum(map(running, kinds, found)) == best


def test_a_site_rounds_up_to_the_next_number():
    assert [next_level((16, 12, 9), own) for own in (16, 13, 12, 10, 9, 1)] == [16, 16, 12, 12, 9, 9]


def test_one_rate_is_not_rounded():
    assert levels(((7,) * 24,), 6) == ((7,),)


def test_attention_and_mlp_of_twelve_blocks_at_rates_up_to_04_have_four_each():
    rates = [0.4 * (site + 1) / 24 for site in range(24)]
    for batch in (16, 64, 512):
        rows = [-int(-batch * (1 - rate) // 1) for rate in rates]
        assert [len(found) for found in levels((tuple(rows[::2]), tuple(rows[1::2])), 6)] == [4, 4]


def test_a_kind_of_many_rates_gets_what_others_leave():
    rows = (16, 15, 14, 12, 11, 10, 8, 7, 6, 5, 4)
    assert [len(found) for found in levels((rows,), 6)] == [7]
    assert [len(found) for found in levels((rows, (8, 8)), 6)] == [7, 1]
    assert [len(found) for found in levels((rows, rows), 6)] == [4, 4]
