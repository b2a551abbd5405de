"""The commands `step` and `op` of bench.py: arguments, tables, and files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import arguments, measuring
from measure.arguments import check, positive, probability, spread
from measure.stepping import DEFAULT, EAGER, GRAPHS, BreakEven, Rate, Setting, StepRow, break_even, measure
from measure.variants import BASE, LABELS
from rich.text import Text

from timing.bars import bars
from timing.dropping import SHAPES, OpRow, measure_ops
from timing.subjects import SMALL, trainable

DTYPES = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def step(args: argparse.Namespace) -> None:
    """Measures training steps, prints a table for each model, and writes the files asked for."""
    check(args)
    names = args.model or ["vit"]
    subjects = {name: trainable(name, args.shape and tuple(args.shape)) for name in names}
    rates = args.rate or [Rate("uniform", 0.5)]
    rows: list[StepRow] = []
    crossings: list[BreakEven] = []
    for name, (model, shape) in subjects.items():
        batch = args.batch or (SMALL[name][2] if name in SMALL else 8)
        own: list[StepRow] = []
        with measuring.progress(len(rates) * len(_modes(args)) + len(_modes(args)) * bool(args.break_even)) as say:
            for mode in _modes(args):
                setting = Setting(
                    torch.device(args.device), mode, args.compile or "", args.rounds, args.draws, args.scaling, DTYPES[args.autocast]
                )
                for rate in rates:
                    told = partial(_tell, say, f"{name} {rate}")
                    own += measure(name, model, (batch, *shape), rate, args.variant or LABELS, setting, told)
                    say(name, done=1)
                if args.break_even:
                    crossings.append(break_even(name, model, (batch, *shape), args.break_even, setting, say))
                    say(name, done=1)
        _show_steps(name, own)
        rows += own
    _show_crossings(crossings)
    write_figures(args, {"rows": [*map(asdict, rows)], "break_even": [*map(asdict, crossings)]})
    if args.plot:
        bars(rows, Path(args.plot))


def op(args: argparse.Namespace) -> None:
    """Measures the op alone, prints a table, and writes the figures where asked to."""
    check(args)
    rows: list[OpRow] = []
    with measuring.progress(len(SHAPES)) as say:
        for shape in SHAPES:
            rows += measure_ops(shape, args.rate, args.scaling, torch.device(args.device), args.rounds, args.times, say)
            say(shape, done=1)
    table = measuring.table("x + drop(branch), forward and backward", "shape", "size", "op", "ms", "/ add")
    for r in rows:
        table.add_row(r.shape, "x".join(map(str, r.size)), r.op, _ratio(r.ms), _ratio(r.ratio))
    measuring.show(table, *(Text(f"{r.op}: {r.failure}") for r in rows if r.failure))
    write_figures(args, {"rows": [*map(asdict, rows)]})


def _tell(say: Callable[[str], None], where: str, text: str) -> None:
    say(f"{where}: {text}")


def _modes(args: argparse.Namespace) -> tuple[str, ...]:
    """How steps are to run: eager, or compiled, on a GPU with CUDA graphs as well."""
    if not args.compile:
        return (EAGER,)
    return (DEFAULT, GRAPHS) if args.device == "cuda" and args.compile == "inductor" else (DEFAULT,)


def write_figures(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Writes figures, with the machine and the settings, where asked to."""
    if not args.json:
        return
    settings = {"command": args.run.__name__, **{key: value for key, value in vars(args).items() if key != "run"}}
    machine = measuring.machine()
    if args.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    text = json.dumps({"machine": machine, "settings": settings, **figures}, indent=2, default=str)
    Path(args.json).write_text(text + "\n", encoding="utf-8")


def _show_steps(name: str, rows: Sequence[StepRow]) -> None:
    compiled = any(row.mode != EAGER for row in rows)
    columns = [
        "variant",
        "skip",
        "ms",
        "/ base",
        "ceiling",
        "saved MB",
        "/ base",
        *(["compile s", "/ base", "compiles"] if compiled else []),
    ]
    table = measuring.table(f"Training step: {name}, batch {rows[0].batch}", "rate", *columns)
    for r in rows:
        if r.variant == BASE and table.row_count:
            table.add_section()
        rate = f"{r.rate} {r.mode if r.mode != EAGER else ''}".strip() if r.variant == BASE else ""
        saved = None if r.saved_bytes is None else r.saved_bytes / 1e6
        skipped = "" if r.sites is None else f"{r.skipped}/{r.sites}"
        figures = [measuring.figure(r.ms), _ratio(r.ratio), _ratio(r.flops), measuring.figure(saved), _ratio(r.saved_ratio)]
        extra = [measuring.figure(r.compile_s), _ratio(r.compile_ratio), measuring.figure(r.compiles)] if compiled else []
        table.add_row(rate, r.variant, skipped, *figures, *extra)
    notes = dict.fromkeys(f"{r.variant}, {r.rate}: {r.failure}" for r in rows if r.failure)
    measuring.show(table, *(Text(note) for note in notes))


def _show_crossings(found: Sequence[BreakEven]) -> None:
    if not found:
        return
    table = measuring.table("Break-even: skip over base at uniform rates", "model", "mode", "ratios", "no slower from")
    for f in found:
        ratios = "  ".join(f"{rate:g}: {_ratio(ratio)}" for rate, ratio in zip(f.rates, f.ratios, strict=True))
        table.add_row(f.model, f.mode, ratios, "-" if f.rate is None else f"{f.rate:.3f}")
    measuring.show(table)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# --- the command line -----------------------------------------------------------------------------------------------------


def add_step(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of a command the arguments of `step`."""
    parser.set_defaults(run=step)
    add_model(parser)
    parser.add_argument("--batch", metavar="N", type=positive, help="samples in a step; default what is quick for the model, else 8")
    rate = "a distribution and a rate, such as linear:.4; may be given several times; default uniform:.5"
    parser.add_argument("--rate", metavar="NAME:P", type=spread, action="append", help=rate)
    parser.add_argument("--variant", choices=LABELS, action="append", help="only these, and the base; may be given several times")
    parser.add_argument(
        "--compile", metavar="BACKEND", nargs="?", const="inductor", help="compiled steps instead of eager ones, and what compiling takes"
    )
    parser.add_argument(
        "--autocast", choices=[name for name in DTYPES if name], help="the dtype of `torch.autocast` in forward; default none"
    )
    parser.add_argument("--break-even", metavar="P", type=probability, nargs="+", help="uniform rates to look for the break-even in")
    parser.add_argument("--draws", metavar="N", type=positive, default=6, help="steps whose FLOPs are averaged; default 6")
    parser.add_argument("--plot", metavar="FILE.png", help="draws the ratios as bars; needs matplotlib")
    _add_common(parser, 7)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the arguments that say which models are measured."""
    names = f"{', '.join(SMALL)}, torchvision:NAME, timm:NAME or package.module:factory; may be given several times; default vit"
    parser.add_argument("--model", metavar="MODEL", action="append", help=names)
    parser.add_argument(
        "--shape", metavar="3x224x224", type=arguments.shape, help="of one sample, where the name of the model does not tell"
    )


def add_op(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of a command the arguments of `op`."""
    parser.set_defaults(run=op)
    parser.add_argument("--rate", metavar="P", type=probability, default=0.2, help="default 0.2")
    parser.add_argument("--times", metavar="N", type=positive, default=10, help="calls that a round times together; default 10")
    _add_common(parser, 15)


def _add_common(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument("--scaling", choices=("inference", "train"), default="inference", help="of fxsd's variants; default inference")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", metavar="N", type=positive, default=1, help="of torch on the CPU; default 1")
    parser.add_argument("--rounds", metavar="N", type=positive, default=rounds, help=f"after one that does not count; default {rounds}")
    parser.add_argument("--json", metavar="FILE", help="writes all figures, with the machine and the settings")
