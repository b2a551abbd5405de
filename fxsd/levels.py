"""Few numbers of rows for many sites: compiled code has kernels of its own for each number."""

from __future__ import annotations

from collections import Counter
from functools import cache

# Twelve blocks at rates up to .4 and a batch of 16 have six numbers to round to. With all of them they took 2.1 times the time without to
# compile, with three 1.5.
_GIVEN_UP = 0.1  # of the rows that need not run
_NUMBERS = 3  # below the batch


@cache
def levels(rows: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """The whole batch and the fewest smaller numbers for which sites that round up to the next give up at most a tenth of what they save.

    Where that takes more than three, it is the three that give up least.

    Args:
        rows: how many each site has to run.
        batch: how many there are.

    Returns:
        The numbers, the largest first. Those below `batch` are some of `rows`.

    Example:
        >>> levels((16, 15, 14, 13, 12, 12, 11, 10), batch=16)
        (16, 14, 12, 10)
    """
    sites = Counter(rows)
    numbers = sorted(sites, reverse=True)
    below = [sum(sites[number] for number in numbers[:end]) for end in range(len(numbers) + 1)]  # sites with the first so many numbers
    most = sum(rows) + _GIVEN_UP * (batch * len(rows) - sum(rows))
    # best[end]: for the first so many numbers, the least sum of rows that run and the levels for it; in each turn with one level more.
    best: list[tuple[int, tuple[int, ...]]] = [(batch * count, (batch,)) for count in below]
    while best[-1][0] > most and len(best[-1][1]) <= _NUMBERS:
        best = [
            min((best[i][0] + numbers[i] * (below[end] - below[i]), (*best[i][1], numbers[i])) for i in range(end)) if end else best[0]
            for end in range(len(best))
        ]
    return best[-1][1]
