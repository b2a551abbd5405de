"""Training runs in all modes, in a module of its own: a new process imports it.

python runs.py FOLDER runs each mode once from its seed, and once more from the state that FOLDER holds, and writes the losses there.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from ranks import Block
from torch import nn

import fxsd

MODES = list(itertools.product(("sample", "block"), ("mask", "skip")))
STEPS, STOP = 8, 3


class Run:
    """A training run: all that a checkpoint has to hold, and no more."""

    def __init__(self, method: str, compute: str) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Sequential(nn.Dropout(0.1), Block()) for _ in range(3)])
        self.model = fxsd.transform(
            net, 0.6, stochastic_method=method, compute=compute, drop_distribution="huang", example_inputs=(torch.ones(7, 6),)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.05)
        self.schedule = fxsd.DropRateSchedule(self.model, "cosine", steps=STEPS // 2)

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.model(torch.randn(7, 6)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.item())
        return losses

    def save(self, path: Path) -> None:
        states = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        torch.save({**states, "rng": torch.get_rng_state()}, path)

    def resume(self, path: Path) -> None:
        state = torch.load(path)
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["rng"])


def again(folder: Path) -> dict[Any, list[float]]:
    torch.set_num_threads(1)
    losses = {}
    for mode in MODES:
        losses[(*mode, "whole")] = Run(*mode).train(STEPS)
        rest = Run(*mode)
        rest.resume(folder / f"{'-'.join(mode)}.pt")
        losses[(*mode, "rest")] = rest.train(STEPS - STOP)
    return losses


if __name__ == "__main__":
    torch.save(again(Path(sys.argv[1])), Path(sys.argv[1]) / "losses.pt")
