"""Graphs that grow, to see what grows with them: a chain of residual blocks, and wide graphs with merges that lie far apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def light() -> nn.Sequential:
    """The smallest branch that is worth dropping: two nodes."""
    return nn.Sequential(nn.Linear(1, 1), nn.ReLU())


class Block(nn.Module):
    """A residual block of three nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = light()

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.branch(x)
        return x + branch


class Fan(nn.Module):
    """`n` values of the input, and their product; `n` sites add to each value, made early, a branch of the product, made late.

    No value dominates its branch, and the paths between them pass n / 2 products on average.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.early = nn.ModuleList(light() for _ in range(n))
        self.late = nn.ModuleList(light() for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        values = [branch(x) for branch in self.early]
        product = values[0]
        for value in values[1:]:
            product = product * value
        branches = [branch(product) for branch in self.late]
        return torch.cat([value + branch for value, branch in zip(values, self.merged(branches, values), strict=True)])

    def merged(self, branches: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        return branches


class Cross(Fan):
    """As `Fan`, but each branch is multiplied by one of the values, so that each has a merge of its own."""

    def merged(self, branches: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        return [branch * other for branch, other in zip(branches, reversed(values), strict=True)]


class Nest(nn.Module):
    """A chain of `2 n` values; `n` sites add to the first a branch of the last, to the second one of the last but one, and so on.

    The branches lie around each other, and 2 n + 2 nodes make a branch on average.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.early = nn.ModuleList(light() for _ in range(2 * n))
        self.late = nn.ModuleList(light() for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        values = []
        for step in self.early:
            x = step(x)
            values.append(x)
        half = len(self.late)
        pairs = zip(values[:half], reversed(values[half:]), self.late, strict=True)
        return torch.cat([first + branch(last) for first, last, branch in pairs])


def chain(n: int) -> nn.Sequential:
    """`n` residual blocks in series."""
    return nn.Sequential(*(Block() for _ in range(n)))


GRAPHS: dict[str, Callable[[int], nn.Module]] = {"chain": chain, "fan": Fan, "cross": Cross, "nest": Nest}
