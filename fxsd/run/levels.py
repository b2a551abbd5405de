"""Few numbers of rows for many sites: compiled code has kernels of its own for each number that a kind of branch runs on."""

from __future__ import annotations

from collections import Counter
from functools import cache


@cache
def levels(kinds: tuple[tuple[int, ...], ...], more: int) -> tuple[tuple[int, ...], ...]:
    """The numbers of rows to run on with which the fewest rows run in all, if sites round up to the next one of their kind.

    Args:
        kinds: for each kind of branch, how many rows each of its sites has to run.
        more: how many numbers there may be besides the one that each kind needs.

    Returns:
        For each kind its numbers, the largest first: some of its `rows`.

    Example:
        >>> levels(((16, 15, 14, 13, 12, 12, 11, 10), (16, 12)), 6)
        ((16, 14, 13, 12, 11, 10), (16, 12))
    """
    best = [_best(rows, 1 + more) for rows in kinds]
    chosen = [1] * len(kinds)
    for _ in range(more):
        # One more saves the less the more there are, so that taking the best one each time is best in all.
        saved = [totals[count - 1][0] - totals[count][0] if count < len(totals) else 0 for totals, count in zip(best, chosen, strict=True)]
        if not any(saved):
            break
        chosen[saved.index(max(saved))] += 1
    return tuple(totals[count - 1][1] for totals, count in zip(best, chosen, strict=True))


def next_level(numbers: tuple[int, ...], own: int) -> int:
    """The number that a site rounds up to."""
    return min(number for number in numbers if number >= own)


def _best(rows: tuple[int, ...], most: int) -> list[tuple[int, tuple[int, ...]]]:
    """How many rows of one kind run at least with one number, with two and so on, and with which numbers."""
    sites = Counter(rows)
    numbers = sorted(sites, reverse=True)
    below = [0]  # sites that have to run one of the first so many numbers
    for number in numbers:
        below.append(below[-1] + sites[number])
    # found[end]: for the first so many numbers; in each turn with one level more.
    found: list[tuple[int, tuple[int, ...]]] = [(0, ()), *((numbers[0] * count, (numbers[0],)) for count in below[1:])]
    best = [found[-1]]
    while len(best) < min(most, len(numbers)):
        found[2:] = [
            min((found[i][0] + numbers[i] * (below[end] - below[i]), (*found[i][1], numbers[i])) for i in range(1, end))
            for end in range(2, len(found))
        ]
        best.append(found[-1])
    return best
