"""The ops of an add that runs several times in one call of a function: `for block in self.blocks: x = x + block(x)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fxsd.errors import FxsdError
from fxsd.run.ops import StochasticDepth


class Runs(nn.Module):
    """An op for each run of an add in one call of the function around it.

    Args:
        ops: in the order of the runs; None where the branch of a run stays.
        site: names the add in errors.

    Example:
        >>> import torch
        >>> runs = Runs([StochasticDepth(0.0), StochasticDepth(1.0)], "blocks")
        >>> count = []  # a list that is new in each call of the function, and counts the runs
        >>> [runs(torch.ones(1), count).item() for _ in range(2)]
        [1.0, 0.0]
    """

    def __init__(self, ops: Sequence[StochasticDepth | None], site: str) -> None:
        super().__init__()
        self.site, self.of = site, [None if op is None else str(run) for run, op in enumerate(ops)]
        for run, op in enumerate(ops):
            if op is not None:
                self.add_module(str(run), op)

    def forward(self, branch: Tensor, count: list[Any]) -> Tensor:
        op = self.next(count)
        return branch if op is None else op(branch)

    def next(self, count: list[Any]) -> Any:
        """The op of the next run."""
        run = len(count)
        count.append(None)
        if run >= len(self.of):
            run = self._beyond(run)
        name = self.of[run]
        return None if name is None else self._modules[name]

    def _beyond(self, run: int) -> int:
        ops = [self._modules[name] if name is not None else None for name in self.of]
        idle = not self.training and all(op is None or op.scaling == "train" for op in ops)
        if not idle and len({op.rate if isinstance(op, StochasticDepth) else None for op in ops}) > 1:
            raise FxsdError(
                f"the residual add of {self.site or 'the model'} runs {run + 1} times or more in one call, or again for a "
                f"checkpoint in which nothing tells its run, and its {len(ops)} sites have different rates. Use "
                "drop_distribution='uniform', or transform with example_inputs in which it runs as often."
            )
        return len(ops) - 1
