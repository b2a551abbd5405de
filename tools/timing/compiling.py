"""The command `compile` of bench.py: what it takes to compile a model block by block, and whole."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from measure import measuring
from measure.arguments import check, positive, spread
from measure.stepping import Rate, Step
from measure.variants import BASE, MASK, TIMM, variants
from rich.text import Text
from torch import nn
from torch._dynamo.utils import counters

import fxsd
from timing.commands import add_model, write_figures
from timing.subjects import trainable

WHOLE, BY_BLOCK = "whole", "by block"


@dataclass(frozen=True)
class CompileRow:
    """What compiling took: of a first training step, and of one after all rates have moved."""

    model: str
    variant: str
    how: str
    graphs: int | None = None
    seconds: float | None = None
    graphs_moved: int | None = None  # None where the variant's rates are numbers in its code
    failure: str | None = None


def compile_(args: argparse.Namespace) -> None:
    """Compiles each model in each way, prints a table, and writes the figures where asked to."""
    check(args)
    rows: list[CompileRow] = []
    names = args.model or ["vit"]
    with measuring.progress(len(names) * 6) as say:
        for name in names:
            model, shape = trainable(name, args.shape and tuple(args.shape))
            x = torch.randn(args.batch or 4, *shape)
            made, missing = variants(model, [BASE, MASK, TIMM], args.rate.drop_rate, args.rate.distribution, "train", x[:2])
            blocks = _blocks(made[MASK])
            for variant in (BASE, MASK, TIMM):
                for how in (WHOLE, BY_BLOCK):
                    if variant in missing:
                        rows.append(CompileRow(name, variant, how, failure=missing[variant]))
                    else:
                        rows.append(_measure(name, variant, made[variant], how, blocks, x, args.backend))
                    say(f"{name}: {variant} {how}", done=1)
    table = measuring.table("To compile a training step", "model", "variant", "how", "graphs", "seconds", "more as rates move")
    for r in rows:
        table.add_row(r.model, r.variant, r.how, *(measuring.figure(f) for f in (r.graphs, r.seconds, r.graphs_moved)))
    measuring.show(table, *(Text(f"{r.model} {r.variant} {r.how}: {r.failure}") for r in rows if r.failure))
    write_figures(args, {"rows": [*map(asdict, rows)]})


def _blocks(gm: nn.Module) -> list[str]:
    """The modules that execute residual adds."""
    return list(dict.fromkeys(site.module for site in fxsd.sites(gm)))


def _measure(name: str, variant: str, model: nn.Module, how: str, blocks: Sequence[str], x: torch.Tensor, backend: str) -> CompileRow:
    torch._dynamo.reset()
    counters.clear()
    model = copy.deepcopy(model).train()
    empty: Any = nullcontext()
    if backend == "inductor":
        from torch._inductor.utils import fresh_cache

        empty = fresh_cache()
    try:
        step = Step(_compiled(model, how, blocks, backend), x).ready()
        with measuring.quiet(), empty:
            began = time.perf_counter()
            step()
            seconds = time.perf_counter() - began
            graphs = counters["stats"]["unique_graphs"]
            if variant != MASK:
                return CompileRow(name, variant, how, graphs, seconds)
            fxsd.set_drop_rate(model, 0.1)
            step.ready()()
    except Exception as error:  # a compiler's own, such as its limit
        return CompileRow(name, variant, how, failure=measuring.line(error))
    return CompileRow(name, variant, how, graphs, seconds, counters["stats"]["unique_graphs"] - graphs)


def _compiled(model: nn.Module, how: str, blocks: Sequence[str], backend: str) -> nn.Module:
    if how == WHOLE:
        whole: Any = torch.compile(model, fullgraph=True, backend=backend)
        return whole  # type: ignore[no-any-return]
    for path in blocks:
        model.get_submodule(path).compile(fullgraph=True, backend=backend)
    return model


def add_compile(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of a command the arguments of `compile`."""
    parser.set_defaults(run=compile_)
    add_model(parser)
    parser.add_argument("--batch", metavar="N", type=positive, help="samples in the step; default 4")
    parser.add_argument("--rate", metavar="NAME:P", type=spread, default=Rate("linear", 0.3), help="default linear:.3")
    parser.add_argument("--backend", metavar="BACKEND", default="inductor", help="of torch.compile; default inductor")
    parser.add_argument("--threads", metavar="N", type=positive, default=2, help="default 2")
    parser.add_argument("--json", metavar="FILE", help="writes all figures, with the machine and the settings")
    parser.set_defaults(device="cpu")
