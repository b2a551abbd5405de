"""The command `step`: what a training step costs with stochastic depth, against the model without.

The variants take turns in one process, and a ratio is the median of the ratios of the rounds. Beside it stands the ceiling: the
FLOPs of forward and backward over those of the model without, the mean of several draws.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fxsd
from fxsd import FxsdError
from fxsd.legal.flops import flop_counter
from measure import measuring
from measure.measuring import quiet
from measure.variants import AUTO, BASE, MASK, SKIP, SUBSETS, variants

EAGER, DEFAULT, GRAPHS = "eager", "compiled", "reduce-overhead"
WARM_UP = 20  # steps in which a rate rises


@dataclass(frozen=True)
class Rate:
    """A drop rate and how it is spread over depth; `uniform:.5` on the command line."""

    distribution: str
    drop_rate: float

    def __str__(self) -> str:
        return f"{self.distribution}:{self.drop_rate:g}"


@dataclass(frozen=True)
class Setting:
    """How steps are taken."""

    device: torch.device
    mode: str  # EAGER, or how it is compiled
    backend: str
    rounds: int
    draws: int
    scaling: str
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class StepRow:
    """One variant of a model at one rate; None where there is nothing to measure, and `failure` says why if there should be."""

    model: str
    rate: str
    mode: str
    batch: int
    variant: str
    sites: int | None = None
    skipped: int | None = None  # sites
    ms: float | None = None
    ratio: float | None = None  # to the base
    ratios: tuple[float, ...] = ()  # of each round
    flops: float | None = None  # the ceiling, to the base
    saved_bytes: int | None = None
    saved_ratio: float | None = None
    compile_s: float | None = None
    compile_ratio: float | None = None
    compiles: int | None = None  # graphs, first to last
    failure: str | None = None


@dataclass(frozen=True)
class BreakEven:
    """The smallest uniform rate at which skip is no longer slower than the base; None: at none of `rates`."""

    model: str
    mode: str
    rates: tuple[float, ...]
    ratios: tuple[float | None, ...]
    rate: float | None


@dataclass(frozen=True)
class Step:
    """Forward and backward."""

    module: nn.Module
    x: Tensor
    drop_rate: float | None = None  # set before the step, if given
    autocast: torch.dtype | None = None  # of forward, if given

    def __call__(self) -> None:
        self.loss().backward()  # type: ignore[no-untyped-call]

    def loss(self) -> Tensor:
        with torch.autocast(self.x.device.type, self.autocast, enabled=self.autocast is not None):
            leaves = torch.utils._pytree.tree_leaves(self.module(self.x))
        return sum((leaf.float().square().mean() for leaf in leaves if isinstance(leaf, Tensor)), torch.zeros((), device=self.x.device))

    def ready(self) -> Step:
        """Without gradients of an earlier step, and with its own rate."""
        for parameter in self.module.parameters():
            parameter.grad = None
        if self.drop_rate is not None:
            fxsd.set_drop_rate(self.module, self.drop_rate)
        if self.x.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return self


def step_ms(step: Step) -> float:
    """How long a step takes, as `measuring.busy_ms` has it."""
    return measuring.busy_ms(step.ready(), step.x.is_cuda)


def saved_bytes(step: Step) -> int:
    """The memory that forward keeps for backward: distinct storages, without the model's parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensors in (step.module.parameters(), step.module.buffers()) for tensor in tensors}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage)  # held, so that no other gets the same place
        return tensor

    with quiet():
        step.ready()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = step.loss()
        loss.backward()  # type: ignore[no-untyped-call]
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own)


def flops(step: Step, draws: int) -> float:
    """FLOPs of forward and backward, the mean of several draws."""
    counted = []
    for _ in range(draws):
        with quiet(), flop_counter() as counter:
            step.ready()()
        counted.append(counter.get_total_flops())
    return fmean(counted)


@dataclass
class Compiler:
    """Compiles with empty caches, and counts graphs."""

    setting: Setting
    seconds: dict[str, float] = field(default_factory=dict)
    compiles: dict[str, int] = field(default_factory=dict)

    def __call__(self, label: str, module: nn.Module, x: Tensor) -> nn.Module:
        """Compiles a module by a first step."""
        empty: Any = nullcontext()
        if self.setting.backend == "inductor":
            from torch._inductor.utils import fresh_cache

            empty = fresh_cache()
        mode = GRAPHS if self.setting.mode == GRAPHS else None
        compiled: Any = torch.compile(module, fullgraph=True, backend=self.setting.backend, mode=mode)
        with quiet(), empty, self.counting(label):
            step = Step(compiled, x, autocast=self.setting.autocast).ready()
            began = time.perf_counter()
            step()
            if x.is_cuda:
                torch.cuda.synchronize()
            self.seconds[label] = time.perf_counter() - began
        made: nn.Module = compiled
        return made

    @contextmanager
    def counting(self, label: str) -> Iterator[None]:
        """Adds the graphs that are compiled inside to those of `label`."""
        before = counters["stats"]["unique_graphs"]
        yield
        self.compiles[label] = self.compiles.get(label, 0) + counters["stats"]["unique_graphs"] - before


def measure(
    name: str, model: nn.Module, shape: Sequence[int], rate: Rate, labels: Sequence[str], setting: Setting, say: Callable[[str], None]
) -> list[StepRow]:
    """Measures the variants `labels` of a model at one rate, a row each; the base is always among them."""
    labels = [BASE, *(label for label in labels if label != BASE)]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(setting.device)
    model = model.to(setting.device)
    say("transforming")
    modules, failures = variants(model, labels, rate.drop_rate, rate.distribution, setting.scaling, x)
    counted: dict[str, float] = {}
    for label in (label for label in (BASE, *SUBSETS) if label in modules):
        say(f"FLOPs of {label}")
        counted[label] = flops(Step(modules[label], x, autocast=setting.autocast), 1 if label == BASE else setting.draws)
    compiler = Compiler(setting)
    steps = {label: Step(module, x, autocast=setting.autocast) for label, module in modules.items()}
    if setting.mode != EAGER:
        steps = _compiled(compiler, modules, x, failures, say)
    times, failed = measuring.in_turns(steps, setting.rounds, 1, say, step_ms)
    failures |= dict(text.split(": ", 1) for text in failed)
    saved = {label: saved_bytes(step) for label, step in steps.items() if times[label]}
    if setting.mode != EAGER:
        for label in (label for label in (MASK, SKIP, AUTO) if times.get(label)):
            say(f"rates that move, {label}")
            try:
                with compiler.counting(label):
                    _warm_up(steps[label], rate.drop_rate)
            except Exception as error:  # compiling again, or too often
                failures[label] = measuring.line(error)
    rows = []
    for label in labels:
        own, base = times.get(label, []), times.get(BASE, [])
        there = fxsd.sites(modules[label]) if label in modules and label in (MASK, SKIP, AUTO) else None
        rows.append(
            StepRow(
                name,
                str(rate),
                setting.mode,
                len(x),
                label,
                sites=None if there is None else len(there),
                skipped=None if there is None else sum(site.compute == "skip" for site in there),
                ms=measuring.medianed(own),
                ratio=measuring.ratio(own, base),
                ratios=tuple(a / b for a, b in zip(own, base, strict=True)) if own and base else (),
                flops=_over(counted, label, 1.0 if label in modules else None),
                saved_bytes=saved.get(label),
                saved_ratio=_over(saved, label),
                compile_s=compiler.seconds.get(label),
                compile_ratio=_over(compiler.seconds, label),
                compiles=compiler.compiles.get(label),
                failure=failures.get(label),
            )
        )
    return rows


def break_even(
    name: str, model: nn.Module, shape: Sequence[int], rates: Sequence[float], setting: Setting, say: Callable[[str], None]
) -> BreakEven:
    """Measures skip against the base at uniform `rates`."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(setting.device)
    model, rates = model.to(setting.device), sorted(rates)
    modules, failures = variants(model, [BASE, SKIP], rates[-1], "uniform", setting.scaling, x)
    if SKIP in failures:
        raise FxsdError(f"{name}: {failures[SKIP]}")
    if setting.mode != EAGER:
        compiled = _compiled(Compiler(setting), modules, x, failures, say)
        if failures:
            raise FxsdError(f"{name}: {'; '.join(failures.values())}")
        modules = {label: step.module for label, step in compiled.items()}
    steps = {BASE: Step(modules[BASE], x, autocast=setting.autocast)}
    steps |= {f"{SKIP} {rate:g}": Step(modules[SKIP], x, rate, setting.autocast) for rate in rates}
    times, failed = measuring.in_turns(steps, setting.rounds, 1, say, step_ms)
    if failed:
        raise FxsdError(f"{name}: {'; '.join(failed)}")
    ratios = [measuring.ratio(times[f"{SKIP} {rate:g}"], times[BASE]) or 0.0 for rate in rates]
    return BreakEven(name, setting.mode, tuple(rates), tuple(ratios), crossing(rates, ratios))


def crossing(rates: Sequence[float], ratios: Sequence[float]) -> float | None:
    """Where the line through the points (rate, ratio) first comes down to 1."""
    for i, ratio in enumerate(ratios):
        if ratio <= 1.0:
            if i == 0:
                return rates[0]
            before = ratios[i - 1]
            return rates[i - 1] + (rates[i] - rates[i - 1]) * (before - 1.0) / (before - ratio)
    return None


def _compiled(
    compiler: Compiler, modules: dict[str, nn.Module], x: Tensor, failures: dict[str, str], say: Callable[[str], None]
) -> dict[str, Step]:
    """Compiles each module. What cannot be compiled is added to `failures`."""
    torch.compiler.reset()
    say("the first compilation of the process")  # it pays for imports
    Compiler(compiler.setting)("", nn.Linear(2, 2).to(x.device), torch.randn(2, 2, device=x.device))
    steps = {}
    for label, module in modules.items():
        say(f"compiling {label}")
        try:
            steps[label] = Step(compiler(label, module, x), x, autocast=compiler.setting.autocast)
        except Exception as error:  # Dynamo and Inductor raise anything
            failures[label] = measuring.line(error)
    return steps


def _warm_up(step: Step, drop_rate: float) -> None:
    """The rate rises from 0."""
    with quiet():
        for i in range(WARM_UP):
            replace(step, drop_rate=drop_rate * i / (WARM_UP - 1)).ready()()


def _over(values: dict[str, Any], label: str, otherwise: float | None = None) -> float | None:
    return values[label] / values[BASE] if label in values and values.get(BASE) else otherwise
