"""What the op alone costs: forward and backward of `x + drop(branch)`, where all of the branch is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from measure import measuring
from measure.variants import BASE, MASK, TIMM, TORCHVISION, Missing, timm_drop_path
from torch import Tensor, nn
from torchvision.ops import StochasticDepth as TorchvisionStochasticDepth

from fxsd.run.ops import StochasticDepth

SHAPES: Mapping[str, tuple[tuple[int, ...], torch.memory_format]] = {
    "[B, C, H, W]": ((16, 96, 28, 28), torch.contiguous_format),
    "[B, C, H, W] channels_last": ((16, 96, 28, 28), torch.channels_last),
    "[B, N, C]": ((16, 197, 384), torch.contiguous_format),
}


@dataclass(frozen=True)
class OpRow:
    """One op on one shape; the base is a plain add."""

    shape: str
    size: tuple[int, ...]
    op: str
    ms: float | None
    ratio: float | None
    failure: str | None = None


@dataclass(frozen=True)
class AddDropped:
    """Forward and backward, several times."""

    drop: Callable[[Tensor], Tensor]
    x: Tensor
    branch: Tensor
    grad: Tensor
    times: int

    def __call__(self) -> None:
        for _ in range(self.times):
            torch.autograd.grad(self.x + self.drop(self.branch), (self.x, self.branch), self.grad)


def op_ms(work: AddDropped) -> float:
    """How long one forward and backward takes, as `measuring.busy_ms` has it."""
    return measuring.busy_ms(work, work.x.is_cuda) / work.times


def measure_ops(
    shape: str, drop_rate: float, scaling: str, device: torch.device, rounds: int, times: int, say: Callable[[str], None]
) -> list[OpRow]:
    """Times each op on a shape of `SHAPES`, in turns."""
    size, layout = SHAPES[shape]
    x, branch, grad = (torch.randn(size, device=device).contiguous(memory_format=layout) for _ in range(3))
    ops: dict[str, nn.Module] = {
        BASE: nn.Identity(),
        MASK: StochasticDepth(drop_rate, scaling=scaling, device=device),
        TORCHVISION: TorchvisionStochasticDepth(drop_rate, "row"),
    }
    failures: dict[str, str] = {}
    try:
        ops[TIMM] = timm_drop_path(drop_rate)
    except Missing as error:
        failures[TIMM] = str(error)
    works = {label: AddDropped(op.train(), x.requires_grad_(), branch.requires_grad_(), grad, times) for label, op in ops.items()}
    taken, failed = measuring.in_turns(works, rounds, 1, say, op_ms)
    failures |= dict(text.split(": ", 1) for text in failed)
    return [
        OpRow(
            shape,
            size,
            label,
            measuring.medianed(taken.get(label, [])),
            measuring.ratio(taken.get(label, []), taken[BASE]),
            failures.get(label),
        )
        for label in (BASE, MASK, TIMM, TORCHVISION)
    ]
