"""What each rank of a distributed run does, in a module of its own: new processes import it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchvision
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxsd

STEPS = 50
SHARDED_STEPS = 4
SAVED_STEP, LAST_STEP = 5, 10


def work(rank: int, folder: str, jobs: Mapping[int, Mapping[str, tuple[str, Mapping[str, Any]]]]) -> None:
    """Does the jobs of each number of ranks, name -> (a function of this module, options), and writes what each returns."""
    torch.set_num_threads(1)
    for world, named in jobs.items():
        if rank >= world:
            continue
        place = Path(folder) / str(world)
        place.mkdir(exist_ok=True)
        meet = f"file://{place}/meet-{next(iter(named))}"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        for name, (job, options) in named.items():
            torch.save(globals()[job](rank, world, place, **options), place / f"{name}-{rank}.pt")
        dist.destroy_process_group()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def blocks(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(3)])
    return fxsd.transform(model, 0.6, drop_distribution="uniform", example_inputs=(torch.ones(5, 6),), **options)


# --- DDP ------------------------------------------------------------------------------------------------------------------------


def train(rank: int, world: int, folder: Path, **options: Any) -> dict[str, Any]:
    """Trains with DDP for some steps while the rate rises."""
    gm = blocks(**options)
    torch.manual_seed(rank + 1)
    model = DistributedDataParallel(gm)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    schedule = fxsd.DropRateSchedule(model, warmup_steps=STEPS // 2)
    losses = [_step(model, torch.randn(5, 6), optimizer, schedule) for _ in range(STEPS)]
    rates = [site.drop_rate for site in fxsd.sites(model)]
    return {"losses": losses, "rates": rates, "parameters": list(gm.parameters()), "gradients": [p.grad for p in gm.parameters()]}


def _step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, schedule: fxsd.DropRateSchedule) -> float:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    schedule.step()
    return loss.item()


def outputs(rank: int, world: int, folder: Path, **options: Any) -> list[Tensor]:
    """What the ranks get for one input, where all else that they do is different."""
    gm = blocks(**options)
    torch.manual_seed(rank + 1)
    x = torch.ones(5, 6)
    found = []
    for _ in range(20):
        torch.randn(rank)
        found.append(gm(x))
        if rank == 0:
            gm.eval()(x)
            gm.train()
    return found


# --- FSDP -----------------------------------------------------------------------------------------------------------------------


def vit() -> tuple[nn.Module, tuple[int, ...]]:
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=2)
    nn.init.normal_(model.heads.head.weight)
    return model, (3, 16, 16)


def convolutions() -> tuple[nn.Module, tuple[int, ...]]:
    block = torchvision.models.resnet.BasicBlock
    parts = [block(4, 4, norm_layer=lambda channels: nn.GroupNorm(2, channels)) for _ in range(2)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), *parts, nn.Flatten(), nn.Linear(144, 2)), (3, 8, 8)


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, tuple[int, ...]]], str]] = {
    "vit": (vit, "encoder.layers.encoder_layer_"),
    "convolutions": (convolutions, ""),
}


def made(model: str, options: Mapping[str, Any], seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A transformed model, and a batch for each step."""
    torch.manual_seed(seed)
    plain, size = MODELS[model][0]()
    x = torch.randn(SHARDED_STEPS, 6, *size, dtype=torch.float64)
    return fxsd.transform(plain.double(), example_inputs=(x[0],), **options), x


def fit(gm: nn.Module, batches: Iterable[Tensor]) -> None:
    optimizer = torch.optim.SGD(gm.parameters(), 0.05)
    for x in batches:
        optimizer.zero_grad()
        gm(x).square().mean().backward()
        optimizer.step()


def shard(rank: int, world: int, folder: Path, path: str, model: str, whole: bool, **options: Any) -> dict[str, Any]:
    """Trains with FSDP, saves, and loads into another one."""
    gm, x = made(model, options)
    _fully_shard(gm, model, whole)
    torch.manual_seed(rank + 1)
    fit(gm, x[:, rank::world])
    saved = get_model_state_dict(gm)
    dcp.save(saved, checkpoint_id=folder / path)
    other, _ = made(model, options, seed=1)
    _fully_shard(other, model, whole)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder / path)
    set_model_state_dict(other, state)
    return {"keys": list(saved), "trained": _full(gm), "loaded": _full(other)}


def _fully_shard(gm: nn.Module, model: str, whole: bool) -> None:
    """As one unit, or with one for each block: the modules in it that the graph calls."""
    called = [gm.get_submodule(str(node.target)) for node in gm.graph.nodes if node.op == "call_module"]  # type: ignore[union-attr]
    if not whole:
        for block in {site.module for site in fxsd.sites(gm)}:
            inside = set(gm.get_submodule(block).modules())
            fully_shard([module for module in dict.fromkeys(called) if module in inside and list(module.parameters())])
    fully_shard(gm)


def _full(gm: nn.Module) -> dict[str, Tensor]:
    return get_model_state_dict(gm, options=StateDictOptions(full_state_dict=True))


# --- killed and resumed ---------------------------------------------------------------------------------------------------------


def go_on(rank: int, world: int, folder: Path, path: str, first: int, die: bool = False, **options: Any) -> list[float]:
    """Trains with DDP from a step on, from the checkpoint at `path` unless it is the first one, and writes one on the way."""
    gm = blocks(**options)
    model = DistributedDataParallel(gm)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = fxsd.DropRateSchedule(model, "linear", steps=LAST_STEP)
    torch.manual_seed(100 * first + rank)

    def state() -> dict[str, Any]:
        return {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
            "schedule": schedule.state_dict(),
            f"rng of rank {rank}": torch.get_rng_state(),
        }

    if first:
        saved = state()
        dcp.load(saved, checkpoint_id=folder / path)
        set_model_state_dict(model, saved["model"])
        set_optimizer_state_dict(model, optimizer, saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved[f"rng of rank {rank}"])
    losses = []
    for step in range(first, LAST_STEP):
        losses.append(_step(model, torch.randn(5, 6), optimizer, schedule))
        if step + 1 == SAVED_STEP:
            dcp.save(state(), checkpoint_id=folder / path)
        if die and step == SAVED_STEP + 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return losses
