"""How many rows the sites of one graph run on in compiled code: a constant of it, or a variable.

Compiled code has kernels of its own for each constant. With variables sites share their kernels, and numbers can move without another
graph; but each takes time to compile, most of all where it is in strides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxsd.levels import levels
from fxsd.versions import SIZES_MOVE


class Sizes:
    """What the sites of one graph that skip know of each other.

    Args:
        rates: their drop rates, those of like branches together.
        vary: numbers of rows may be variables from the start where rates ask for many; else they are rounded up, so that there are few.
    """

    def __init__(self, rates: Sequence[Sequence[float]], vary: bool = False) -> None:
        self.rates, self.vary = rates, vary and SIZES_MOVE
        self._now: dict[str, int] = {}  # the rate of each site, in parts
        self._groups: dict[str, int | str] = {}  # of sites that share a variable
        self._made: dict[tuple[int | str, int], Tensor] = {}

    def follow(self, site: str, parts: int) -> None:
        """A site has this rate now."""
        self._now[site] = parts

    def before_moves(self, like: int, own: int, rows: Callable[[float], int], device: torch.device) -> tuple[int, bool]:
        """On how many rows a site runs whose rate has not moved, and whether that is a variable.

        Args:
            like: the place in `rates` of branches like its own.
            own: how many it has to run.
            rows: how many a site of a rate has to.
            device: of the batch.
        """
        kinds = tuple(tuple(map(rows, rates)) for rates in self.rates)
        numbers = levels(kinds)
        if self.vary and device.type == "cpu" and any(set(rows) != set(few) for rows, few in zip(kinds, numbers, strict=True)):
            # On an H200, with CUDA graphs, a ConvNeXt with variables compiled 1.5 times as long as rounded up, and its steps took twice as
            # long.
            return own, True
        return min((number for number in numbers[like] if number >= own), default=own), False

    def group(self) -> None:
        """Code is compiled: sites of one rate share a variable. Once their rates part, each has its own for good.

        With one variable a ViT of 24 sites took 1.2 times the time without to compile, with 24 of them 2.1 times.
        """
        if not self._groups:
            self._groups = dict(self._now)
        elif len({(group, self._now[site]) for site, group in self._groups.items()}) > len(set(self._groups.values())):
            self._groups = {site: site for site in self._now}

    def variable(self, site: str, batch: int, rows: int) -> Tensor:
        """A tensor of so many rows, of which compiled code takes the number for a variable: the same one for all that share it."""
        group = self._groups[site], batch
        if group not in self._made or self._made[group].shape[0] != rows:
            self._made[group] = torch.empty(rows, 0, device="cpu")
            torch._dynamo.maybe_mark_dynamic(self._made[group], 0)
        return self._made[group]
