"""How `drop_rate` is spread over depth: (drop_rate, N, distribution) -> one rate a site.

Every distribution is a *weight* in [0, 1] for each depth, times `drop_rate`. Keeping the weights lets
`set_drop_rate` move all rates later without knowing where they came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from fxsd.errors import FxsdError

Distribution: TypeAlias = "str | Callable[[int, int], float] | Mapping[str, float] | Sequence[float]"

# i is the depth, n the number of depths.
NAMED: dict[str, Callable[[int, int], float]] = {
    "uniform": lambda i, n: 1.0,
    "linear": lambda i, n: i / (n - 1) if n > 1 else 1.0,
    "huang": lambda i, n: (i + 1) / n,
    "efficientnet": lambda i, n: i / n,
    "exponential": lambda i, n: 2 ** (i / (n - 1)) - 1 if n > 1 else 1.0,
}


def check_rate(name: str, value: object) -> float:
    """Returns `value` as a float, or raises `FxsdError` if it is not a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise FxsdError(f"{name} must be a number from 0 to 1, but got {value!r}.")
    return float(value)


def check_distribution(distribution: object) -> None:
    """Raises `FxsdError` if `distribution` is of no kind that `weights` takes."""
    if isinstance(distribution, str):
        if distribution not in NAMED:
            raise FxsdError(
                f"drop_distribution must be one of {', '.join(map(repr, NAMED))}, a callable f(depth, depths), "
                f"a sequence of rates or a mapping of site globs to rates, but got {distribution!r}."
            )
    elif isinstance(distribution, Mapping):
        for glob, rate in distribution.items():
            check_rate(f"drop_distribution[{glob!r}]", rate)
    elif isinstance(distribution, Sequence):
        for depth, rate in enumerate(distribution):
            check_rate(f"drop_distribution[{depth}]", rate)
    elif not callable(distribution):
        raise FxsdError(
            "drop_distribution must be a name, a callable f(depth, depths), a sequence of rates or a mapping of "
            f"site globs to rates, but got {distribution!r}."
        )


def weights(drop_rate: float, names: Sequence[str], depths: Sequence[int], distribution: Distribution) -> tuple[float, list[float]]:
    """Spreads `drop_rate` over the sites.

    Args:
        drop_rate: the rate that named and callable distributions scale, in [0, 1].
        names: the name of each site.
        depths: the depth of each site, in the same order; N is the largest plus one.
        distribution: a key of `NAMED`; a callable `f(i, N)` that gives a weight; a sequence with one *rate* a
            depth; or a mapping from globs of site names to *rates* (the first glob that matches decides; a site
            that none matches gets 0).

    Returns:
        `(base, weights)`: the rate of site k is `base * weights[k]`. For names and callables `base` is
        `drop_rate`; a sequence or mapping states rates itself, so `drop_rate` plays no part and `base` is the largest of them.

    Raises:
        FxsdError: a rate falls outside [0, 1], a sequence has not N entries, or a glob matches no site.

    Example:
        >>> base, w = weights(0.2, ["a", "b", "c", "d"], [0, 1, 2, 3], "linear")
        >>> [round(base * x, 3) for x in w]
        [0.0, 0.067, 0.133, 0.2]
        >>> base, w = weights(0.2, ["a", "b", "c", "d"], [0, 1, 2, 3], "huang")
        >>> [round(base * x, 3) for x in w]
        [0.05, 0.1, 0.15, 0.2]
    """
    check_distribution(distribution)
    count = max(depths, default=-1) + 1
    if isinstance(distribution, str):
        return drop_rate, [NAMED[distribution](depth, count) for depth in depths]
    if isinstance(distribution, Mapping):
        return _relative([_first_match(name, distribution) for name in _all_used(names, distribution)])
    if isinstance(distribution, Sequence):
        if len(distribution) != count:
            raise FxsdError(
                f"drop_distribution as a sequence needs one rate a depth: the model has {count} depths, "
                f"but got {len(distribution)} rates. fxsd.analyze(model) shows the depths."
            )
        return _relative([float(distribution[depth]) for depth in depths])
    found = [distribution(depth, count) for depth in depths]
    for depth, weight in zip(depths, found, strict=True):
        rate = weight * drop_rate if isinstance(weight, (int, float)) else weight
        check_rate(f"drop_rate * drop_distribution({depth}, {count})", rate)
    return drop_rate, [float(weight) for weight in found]


def largest_rate(found: Sequence[float]) -> float:
    """The largest `drop_rate` that keeps every `drop_rate * weight` in [0, 1]."""
    top = max(found, default=0.0)
    return 1.0 if top <= 1.0 else 1.0 / top


def _relative(rates: list[float]) -> tuple[float, list[float]]:
    base = max(rates, default=0.0)
    return base, [rate / base if base else 0.0 for rate in rates]


def _first_match(name: str, distribution: Mapping[str, float]) -> float:
    return float(next((rate for glob, rate in distribution.items() if fnmatchcase(name, glob)), 0.0))


def _all_used(names: Sequence[str], distribution: Mapping[str, float]) -> Sequence[str]:
    for glob in distribution:
        if not any(fnmatchcase(name, glob) for name in names):
            raise FxsdError(f"drop_distribution has the glob {glob!r}, which matches no site. The sites are: {', '.join(names)}.")
    return names
