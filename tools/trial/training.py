"""One training run: a net, with or without stochastic depth, from its start to its test score."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from measure.measuring import quiet
from measure.stepping import Rate
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset

import fxsd
from fxsd import FxsdError
from trial.nets import CharTransformer, ConvNet, Size
from trial.tasks import ACCURACY, Source, Task, load

RESNET, TRANSFORMER = "resnet", "transformer"
POINTS = 30  # of a learning curve at most; evaluation takes time too


@dataclass(frozen=True)
class Arm:
    """One way to train that is compared with others.

    Attributes:
        compute: `"base"` without stochastic depth, or as in `fxsd.transform`.
        epochs_of: of the epochs that were asked for, how many times as many.
    """

    label: str
    compute: str
    lr: float
    rate: Rate | None = None
    epochs_of: float = 1.0


@dataclass(frozen=True)
class Setting:
    """What the arms have in common."""

    source: Source
    size: Size
    model: str = RESNET
    method: str = "sample"
    epochs: int = 20
    batch: int = 100
    weight_decay: float = 0.01
    drop_warmup: float = 0.0  # the share of the epochs in which the drop rate rises
    compile: str = ""  # the backend of torch.compile; empty for eager
    device: str = "cpu"


@dataclass
class Run:
    """What came out. Losses are means over samples, in nats."""

    arm: Arm
    seed: int
    metric: str
    train_loss: list[float] = field(default_factory=list)  # of each epoch, in training mode
    validation: list[float] = field(default_factory=list)  # the metric, after each of the epochs in `validated`
    validated: list[int] = field(default_factory=list)  # numbers of epochs, from 1; the last is among them
    seconds: list[float] = field(default_factory=list)  # of each epoch, without evaluation
    train: float = 0.0  # the metric in evaluation mode, at the end
    test: float = 0.0

    @property
    def total_seconds(self) -> float:
        """Of all epochs, by the median one: the first compiles, and others may have been disturbed."""
        return median(self.seconds) * len(self.seconds)


def train(arm: Arm, seed: int, setting: Setting, final: bool = True, say: Callable[[str], None] = lambda text: None) -> Run:
    """Trains one arm. Runs of one seed have the same data, the same start and the same order of samples.

    Args:
        final: are test data used?
    """
    task = cached_task(setting.source, seed)
    torch.manual_seed(seed)
    model = build(setting, task)
    if arm.rate is not None:
        model = fxsd.transform(
            model,
            arm.rate.drop_rate,
            drop_distribution=arm.rate.distribution,
            stochastic_method=setting.method,
            compute=arm.compute,
            example_inputs=(torch.stack([task.train[i][0] for i in range(2)]),),
            subset_batch_norm=arm.compute != "mask",
        )
    return _fit(model.to(setting.device), arm, seed, setting, task, final, say)


@cache
def cached_task(source: Source, seed: int) -> Task:
    """`tasks.load`; a process asks for the same data for every arm."""
    with quiet():
        return load(source, seed)


def build(setting: Setting, task: Task) -> nn.Module:
    """The net to train.

    Raises:
        FxsdError: there is no such model, or it is not for these data.
    """
    image = len(task.shape) > 1
    if setting.model == TRANSFORMER and not image:
        return CharTransformer(task.classes, task.shape[0], setting.size)
    if setting.model == RESNET and image:
        return ConvNet(task.shape[0], len(task.shape) - 1, task.classes, setting.size)
    if setting.model.startswith("torchvision:") and task.shape[:1] == (3,):
        from torchvision import models

        name = setting.model.partition(":")[2]
        try:
            classifier: nn.Module = models.get_model(name, weights=None, num_classes=task.classes)
        except ValueError as error:
            raise FxsdError(f"--model must be a torchvision classifier, but got {name!r}: {error}") from error
        return classifier
    raise FxsdError(
        f"--model must be {TRANSFORMER!r} for text, {RESNET!r} for signals and images, or torchvision:NAME for images of 3 channels, "
        f"but got {setting.model!r} for samples of shape {task.shape}."
    )


def _fit(model: nn.Module, arm: Arm, seed: int, setting: Setting, task: Task, final: bool, say: Callable[[str], None]) -> Run:
    device = torch.device(setting.device)
    epochs = max(round(setting.epochs * arm.epochs_of), 1)
    batches = _batches(task.train, setting.batch, torch.Generator().manual_seed(seed))
    steps = epochs * len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), arm.lr, weight_decay=setting.weight_decay)
    warm_up = max(round(0.05 * steps), 1)
    schedulers: list[Any] = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm_up, total_iters=warm_up),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - warm_up, 1)),
    ]
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, [warm_up])
    rates = fxsd.DropRateSchedule(model, warmup_steps=round(setting.drop_warmup * steps)) if arm.rate is not None else None
    run_model: nn.Module = torch.compile(model, fullgraph=True, backend=setting.compile) if setting.compile else model  # type: ignore[assignment]
    run = Run(arm, seed, task.metric)
    torch.manual_seed(seed)
    for epoch in range(epochs):
        say(f"{arm.label}, seed {seed}, epoch {epoch + 1} of {epochs}")
        model.train()
        losses = []
        began = time.perf_counter()
        for x, y in batches:
            loss = _loss(run_model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            if rates is not None:
                rates.step()
            losses.append(loss.detach())
        run.train_loss.append(torch.stack(losses).mean().item())  # waits for the device
        run.seconds.append(time.perf_counter() - began)
        if (epoch + 1) % -(-epochs // POINTS) == 0 or epoch + 1 == epochs:
            run.validation.append(score(model, task.validation, task.metric, device))
            run.validated.append(epoch + 1)
    run.train = score(model, task.train, task.metric, device)
    if final:
        run.test = score(model, task.test, task.metric, device)
    return run


def score(model: nn.Module, data: Dataset[Any], metric: str, device: torch.device) -> float:
    """The metric over `data` in evaluation mode: accuracy in percent, or the loss."""
    model.eval()
    values = []
    with torch.no_grad():
        for x, y in _batches(data, 500):
            out, y = model(x.to(device)), y.to(device)
            if metric == ACCURACY:
                values.append((100.0 * (out.argmax(-1) == y).float().mean().item(), len(y)))
            else:
                values.append((_loss(out, y).item(), len(y)))
    return fmean(*zip(*values, strict=True))


def _loss(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


def _batches(data: Dataset[Any], size: int, order: torch.Generator | None = None) -> DataLoader[Any]:
    """Batches in a new order each time, or in that of the data. Training leaves out what is left over."""
    sampler: Any = SequentialSampler(data) if order is None else RandomSampler(data, generator=order)  # type: ignore[arg-type]
    drop_last = order is not None and len(sampler) >= size
    if isinstance(data, TensorDataset):  # rows are taken at once
        return DataLoader(data, sampler=BatchSampler(sampler, size, drop_last), batch_size=None)
    return DataLoader(data, size, sampler=sampler, drop_last=drop_last, num_workers=2)
