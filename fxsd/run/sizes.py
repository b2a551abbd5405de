"""How many rows the sites of one graph run on in compiled code: a constant of it, or a variable.

Compiled code has kernels of its own for each constant. With variables sites share their kernels, and numbers can move without another
graph; but each takes time to compile, most of all where it is in strides. So there are few of either, and sites round up to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxsd.run.levels import levels, next_level
from fxsd.versions import SIZES_MOVE

PARTS = 1 << 40  # keep_prob in whole parts: a size that compiled code may compute with
SLACK = 1 << 20  # parts of a row that are rounding, not rate

# Constants besides one for each kind of branch. With them a ViT of twelve blocks took 1.3 to 1.5 times the time without to compile; with
# all that its rates ask for, 2.1 times, and a Swin 1.6 times.
_MORE_CONSTANTS = 6
# Where more than these are asked for, variables take their place if they may. Each constant of both kinds took such a ViT 3.4 s.
_MORE_BEFORE_VARIABLES = 4
# With one, two, four and six variables, a ViT of 24 sites took 1.49, 1.52, 1.56 and 1.65 times the time without to compile, before draws
# were one operator (with six 1.5 since); with four its steps took .86 of those without, with six .85, and with one for each rate .84.
_VARIABLES = 6
# Sites that share a variable may come to run so much more of the rows that could be left out before others share.
_LOST = 0.05
_GROUPINGS = 2  # so often; then each has its own


@dataclass
class _Site:
    kind: object
    least: int
    parts: int
    turns: bool

    def rows(self, batch: int) -> int:
        return at_least(self.least, rows_kept(batch, self.parts), batch)


class Sizes:
    """What the sites of one graph that skip know of each other.

    Args:
        vary: numbers of rows may be variables from the start where rates ask for many.

    Attributes:
        moved: has a rate been another one, so that it may move again?
        changes: how often has what `of` says changed, or may it have?
    """

    def __init__(self, vary: bool = False) -> None:
        self.vary = vary and SIZES_MOVE
        self.moved, self.changes = False, 0
        self._sites: dict[str, _Site] = {}
        self._groups: dict[str, int] = {}  # of sites that share a variable
        self._groupings, self._lost_at_first = 0, 0.0
        self._settled = 0  # of the changes
        self._made: dict[tuple[int, int], Tensor] = {}

    def add(self, site: str, kind: object, least: int, parts: int, turns: bool) -> None:
        """A site that keeps so many parts of a batch, and whose branch, like others of its kind, needs so many rows at least.

        Args:
            turns: the branch puts other dims before that of the rows, and back.
        """
        self._sites[site] = _Site(kind, least, parts, turns)

    def follow(self, site: str, parts: int) -> None:
        """A site has another rate."""
        self._sites[site].parts, self.moved = parts, True
        self.changes += 1
        for group, batch in self._made:
            if group == self._groups[site]:
                self._resize(group, batch)

    def of(self, name: str, batch: int, device: torch.device) -> int | Tensor:
        """How many rows compiled code has to run of a batch: a constant, or a tensor that has a variable number of them."""
        varies = self.moved or self._varies(batch, device)
        if not self._groups:
            # While rates stand still whole rows count, else only the rates' proportions do: of small rates all rows may be equal.
            self._group({name: site.parts if self.moved or not varies else site.rows(batch) for name, site in self._sites.items()})
        own = self._sites[name]
        if varies and own.turns and device.type == "cpu":
            # All rows run: with a variable Inductor finds each number by divisions, and steps of a ViT took 1.28 of those without skipping.
            return batch
        if varies:
            return self._variable(self._groups[name], batch)
        kinds = self._kinds(batch)
        numbers = levels(tuple(map(tuple, kinds.values())), _MORE_CONSTANTS)[list(kinds).index(own.kind)]
        return next_level(numbers, own.rows(batch))

    def rest(self) -> None:
        """Rates stay as they are from now on, so that numbers may be constants again. Variables stay, should a rate move after all."""
        if self.moved:
            self.moved = False
            self.changes += 1

    def settle(self) -> None:
        """All rates are set: where too many rows run now, other sites are to share a variable."""
        if self._settled == self.changes:
            return
        self._settled = self.changes
        if self._groups and self._lost() > self._lost_at_first + _LOST:
            self._made.clear()
            self._group({name: site.parts for name, site in self._sites.items()})

    def _lost(self) -> float:
        """The share of the rows that could be left out that run all the same, since sites share variables."""
        groups = [[site.parts for site in self._members(group)] for group in set(self._groups.values())]
        lost = sum(max(parts) * len(parts) - sum(parts) for parts in groups)
        return lost / max(sum(PARTS - site.parts for site in self._sites.values()), 1)

    def _varies(self, batch: int, device: torch.device) -> bool:
        # On an H200, with CUDA graphs, a ConvNeXt with variables compiled 1.5 times as long as rounded up; its steps took twice as long.
        more = sum(len(set(rows)) - 1 for rows in self._kinds(batch).values())
        return self.vary and device.type == "cpu" and more > _MORE_BEFORE_VARIABLES

    def _kinds(self, batch: int) -> dict[object, list[int]]:
        kinds: dict[object, list[int]] = {}
        for site in self._sites.values():
            kinds.setdefault(site.kind, []).append(site.rows(batch))
        return kinds

    def _group(self, run: dict[str, int]) -> None:
        """Sites share a variable that run about as much. Where rates go apart again and again each has its own, for good."""
        self._groupings += 1
        if self._groupings > _GROUPINGS:
            self._groups = {name: place for place, name in enumerate(self._sites)}
        else:
            (numbers,) = levels((tuple(run.values()),), _VARIABLES - 1)
            self._groups = {name: numbers.index(next_level(numbers, own)) for name, own in run.items()}
        self._lost_at_first = self._lost()

    def _variable(self, group: int, batch: int) -> Tensor:
        if (group, batch) not in self._made:
            with torch.inference_mode(False):  # else it could not be resized outside of one
                self._made[group, batch] = torch.empty(0, 0, device="cpu")
            self._resize(group, batch)
            torch._dynamo.maybe_mark_dynamic(self._made[group, batch], 0)
        return self._made[group, batch]

    def _resize(self, group: int, batch: int) -> None:
        self._made[group, batch].resize_(max(site.rows(batch) for site in self._members(group)), 0)

    def _members(self, group: int) -> list[_Site]:
        return [self._sites[name] for name, other in self._groups.items() if other == group]


def rows_kept(batch: int, parts: int) -> int:
    """How many rows may be kept."""
    return (batch * parts + PARTS - 1 - SLACK) // PARTS


def at_least(least: int, rows: int, batch: int) -> int:
    """So many rows, but one, and no fewer than a branch needs."""
    return min(max(rows, least, 1), batch)
