"""What each rank of a distributed run does, in a module of its own: new processes import it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxsd

STEPS = 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def work(rank: int, world: int, folder: str, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Trains once for each of `runs`, name -> options, and writes what the rank has in the end."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.set_num_threads(1)
    for name, options in runs.items():
        torch.save(train(rank, options), Path(folder) / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def train(rank: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Trains with DDP for some steps while the rate rises."""
    torch.manual_seed(0)
    gm = fxsd.transform(nn.Sequential(*[Block() for _ in range(3)]), 0.6, example_inputs=(torch.ones(5, 6),), **options)
    torch.manual_seed(rank + 1)
    model = DistributedDataParallel(gm)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    schedule = fxsd.DropRateSchedule(model, warmup_steps=STEPS // 2)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(torch.randn(5, 6)).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    rates = [site.drop_rate for site in fxsd.sites(model)]
    return {"losses": losses, "rates": rates, "parameters": list(gm.parameters()), "gradients": [p.grad for p in gm.parameters()]}
