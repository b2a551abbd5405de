"""Measures fxsd: `python tools/bench.py COMMAND`.

`transform` times capture, detection and rewriting against `torch.fx.symbolic_trace` alone. Its first table is over whole models: the
calls take turns in one process, and a ratio is the median of the ratios of the rounds. The second is over graphs that grow: where the
time is linear in their size, ms per node stays the same from row to row.

`step` and `op` measure training; they are in timing/commands.py. `compile` measures compiling, in timing/compiling.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import measuring
from measure.arguments import positive, shape
from rich.text import Text
from timing import growing
from timing.commands import add_op, add_step
from timing.compiling import add_compile
from timing.subjects import build, example_shape
from torch import fx, nn

import fxsd
from fxsd import FxsdError

MODELS = (
    "resnet50", "vit_b_16", "swin_t", "swin_v2_t", "convnext_tiny", "efficientnet_b0", "regnet_y_400mf", "mobilenet_v3_large", "maxvit_t",
    "mvit_v2_s", "swin3d_t", "densenet121", "googlenet", "fcn_resnet50",
)  # fmt: skip
QUICK_MODELS = ("resnet50", "swin_t", "densenet121")
TRACE, PLAIN, EXAMPLE = "symbolic_trace", "fxsd", "fxsd with example inputs"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0, or 2 with one line on standard error."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (FxsdError, OSError) as error:
        print(f"bench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


# --- transform ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelRow:
    """The times of one model, medians in ms; None where there is nothing to measure, and `failures` says why."""

    model: str
    nodes: int | None
    sites: int | None
    trace_ms: float | None
    fxsd_ms: float | None
    fxsd_example_ms: float | None
    ratio: float | None  # fxsd / symbolic_trace
    ratio_example: float | None
    failures: tuple[str, ...]


@dataclass(frozen=True)
class GrowthRow:
    """The times of one graph of a family, medians in ms."""

    graph: str
    size: int
    nodes: int
    sites: int
    trace_ms: float
    fxsd_ms: float
    fxsd_ms_per_node: float
    ratio: float  # fxsd / symbolic_trace


def transform(args: argparse.Namespace) -> None:
    """The sub-command: measures, prints the tables, and writes the figures where asked to."""
    names = _names(args)
    repeats = args.repeats or (2 if args.quick else 7)
    sizes = _sizes(args)
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise FxsdError(f"--json must be a file in a folder that exists, but got {args.json!r}.")
    for name in args.model or ():  # a wrong name shows before minutes are spent on the others
        build(name)
    rows, growth = [], []
    with measuring.progress(len(names)) as say:
        for name in names:
            say(f"building {name}")
            rows.append(measure_model(name, build(name), repeats, args.shape, say))
            say(name, done=1)
    _show_models(rows)
    with measuring.progress(len(sizes)) as say:
        for graph, size in sizes:
            growth.append(measure_growth(graph, size, args.growth_repeats, say))
            say(graph, done=1)
    _show_growth(growth)
    if args.json:
        settings = {"command": "transform", "models": names, "repeats": repeats, "shape": args.shape, "growth_repeats": args.growth_repeats}
        figures = {"machine": measuring.machine(), "settings": settings, "models": [*map(asdict, rows)], "growth": [*map(asdict, growth)]}
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure_model(name: str, model: nn.Module, repeats: int, shape: Sequence[int] | None, say: Callable[[str], None]) -> ModelRow:
    """Times `symbolic_trace` and fxsd, without and with example inputs, in turns. A model without sites is analyzed, not transformed."""
    shape = example_shape(name, model) or shape
    given: dict[str, dict[str, Any]] = {PLAIN: {}}
    if shape:
        given[EXAMPLE] = {"example_inputs": (torch.zeros(*shape),)}
    say(f"{name}: looking for sites")
    nodes, sites = _look(model, list(given.values()))
    call = fxsd.analyze if sites == 0 else fxsd.transform
    works: dict[str, Callable[[], object]] = {TRACE: partial(fx.symbolic_trace, model)}
    works |= {label: partial(call, model, **options) for label, options in given.items()}
    times, failures = measuring.in_turns(works, repeats, 1, lambda text: say(f"{name}: {text}"))
    trace, plain, example = (times.get(label, []) for label in (TRACE, PLAIN, EXAMPLE))
    medians = measuring.medianed(trace), measuring.medianed(plain), measuring.medianed(example)
    return ModelRow(name, nodes, sites, *medians, measuring.ratio(plain, trace), measuring.ratio(example, trace), failures)


def measure_growth(graph: str, size: int, repeats: int, say: Callable[[str], None]) -> GrowthRow:
    """Times `symbolic_trace` and `fxsd.transform` on a graph of `growing.GRAPHS`.

    Raises:
        FxsdError: one of the two fails, which it never should.
    """
    small = growing.GRAPHS[graph](8)  # the first call of a process pays for imports
    with measuring.quiet():
        fx.symbolic_trace(small)
        fxsd.transform(small)
    say(f"building {graph} {size:,}")
    model = growing.GRAPHS[graph](size)
    results: list[nn.Module] = []

    def work() -> nn.Module:
        gm = fxsd.transform(model)
        if not results:
            results.append(gm)  # where sites and nodes are counted: to look for them apart would take as long again
        return gm

    works: dict[str, Callable[[], object]] = {TRACE: partial(fx.symbolic_trace, model), PLAIN: work}
    times, failures = measuring.in_turns(works, repeats, 0, lambda text: say(f"{graph} {size:,}: {text}"))
    if failures:
        raise FxsdError(f"{graph} of size {size}: {'; '.join(failures)}")
    found = fxsd.sites(results[0])
    sites = len(found)
    nodes = len(found[0].add.graph.nodes) - sites  # as captured: a site adds one
    trace, own = median(times[TRACE]), median(times[PLAIN])
    ratio = median(a / b for a, b in zip(times[PLAIN], times[TRACE], strict=True))
    return GrowthRow(graph, size, nodes, sites, trace, own, own / nodes, ratio)


def _look(model: nn.Module, ways: Sequence[dict[str, Any]]) -> tuple[int | None, int | None]:
    """Nodes of the captured graph, or of the traced one where no add leads to it, and sites, for the first way in which capture works."""
    for options in ways:
        with measuring.quiet():
            try:
                found = fxsd.analyze(model, **options)
            except FxsdError:
                continue
            adds = [*(site.add for site in found.sites), *(rejected.add for rejected in found.rejected)]
            if adds:
                return len(adds[0].graph.nodes), len(found.sites)
            try:
                return len(fx.symbolic_trace(model).graph.nodes), 0
            except Exception:  # the model's own code
                return None, 0
    return None, None


# --- what is shown --------------------------------------------------------------------------------------------------------


def _show_models(rows: Sequence[ModelRow]) -> None:
    table = measuring.table(
        "Models: ms, and times symbolic_trace", "model", "nodes", "sites", "trace", "fxsd", "ratio", "with inputs", "ratio"
    )
    for r in rows:
        figures = (r.nodes, r.sites, r.trace_ms, r.fxsd_ms, r.ratio, r.fxsd_example_ms, r.ratio_example)
        table.add_row(r.model, *(measuring.figure(f) for f in figures))
    notes = ["A model without sites is analyzed: there is nothing to rewrite."] if any(r.sites == 0 for r in rows) else []
    measuring.show(table, *(Text(note) for note in (*notes, *(f"{r.model}: {failure}" for r in rows for failure in r.failures))))


def _show_growth(rows: Sequence[GrowthRow]) -> None:
    if not rows:
        return
    table = measuring.table(
        "Growth: ms, and times symbolic_trace", "graph", "size", "nodes", "sites", "trace", "fxsd", "fxsd / node", "ratio"
    )
    for r in rows:
        figures = (r.size, r.nodes, r.sites, r.trace_ms, r.fxsd_ms)
        table.add_row(r.graph, *(measuring.figure(f) for f in figures), f"{r.fxsd_ms_per_node:.3f}", measuring.figure(r.ratio))
    measuring.show(table)


# --- the command line -----------------------------------------------------------------------------------------------------


def _names(args: argparse.Namespace) -> list[str]:
    names = list(args.model or ())
    if args.zoo:
        from torchvision import models

        names += [f"torchvision:{name}" for name in models.list_models(models)]
    if not names:
        names = [f"torchvision:{name}" for name in (QUICK_MODELS if args.quick else MODELS)]
    return list(dict.fromkeys(names))


def _sizes(args: argparse.Namespace) -> list[tuple[str, int]]:
    """(graph, size) of each row of the second table."""
    long, wide = ((250, 1_000), (50, 200)) if args.quick else ((5_000, 10_000, 20_000), (500, 1_000, 2_000))
    chains = long if args.chain is None else args.chain
    merges = wide if args.merges is None else args.merges
    return [("chain", n) for n in chains] + [(graph, n) for graph in growing.GRAPHS if graph != "chain" for n in merges]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description="Measures fxsd.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_transform(commands.add_parser("transform", help="the time of fxsd.transform against torch.fx.symbolic_trace alone"))
    add_step(commands.add_parser("step", help="time and memory of a training step against the model without stochastic depth"))
    add_compile(commands.add_parser("compile", help="what it takes to compile a model block by block, and whole"))
    add_op(commands.add_parser("op", help="the time of x + drop(branch) against a plain add"))
    return parser


def _add_transform(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=transform)
    names = "torchvision:NAME, timm:NAME or package.module:factory; may be given several times"
    parser.add_argument("--model", metavar="MODEL", action="append", help=names)
    parser.add_argument("--zoo", action="store_true", help="all torchvision classification models")
    parser.add_argument(
        "--shape", metavar="2x3x224x224", type=shape, help="of the example input, where the name of the model does not tell"
    )
    parser.add_argument("--repeats", metavar="N", type=positive, help="rounds over a model, after one that does not count; default 7")
    parser.add_argument("--quick", action="store_true", help="fewer models, smaller graphs and 2 rounds: half a minute")
    parser.add_argument("--json", metavar="FILE", help="writes all figures, with the machine and the settings")
    growth = parser.add_argument_group("graphs that grow")
    growth.add_argument(
        "--chain", metavar="N", type=positive, nargs="*", help="blocks in series; default 5000 10000 20000, '--chain' for none"
    )
    growth.add_argument(
        "--merges", metavar="N", type=positive, nargs="*", help="of wide graphs; default 500 1000 2000, '--merges' for none"
    )
    growth.add_argument("--growth-repeats", metavar="N", type=positive, default=1, help="rounds over each; default 1")


if __name__ == "__main__":
    sys.exit(main())
