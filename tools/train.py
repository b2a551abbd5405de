"""Trains a residual net with and without stochastic depth: `python tools/train.py --quick`.

Each arm (the net without, and with fxsd's mask or skip) is trained under the same seeds. Where several learning rates or drop rates are
given, arms first get those that are best on validation data, under seeds of their own; test data are used once, at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measure import measuring
from measure.arguments import check, positive, probability, spread
from measure.stepping import Rate
from measure.variants import BASE
from rich.text import Text
from trial.curves import curves
from trial.nets import NORMS, Size
from trial.tasks import DIGITS, LOSS, MNIST1D, STDLIB, Source
from trial.training import RESNET, TRANSFORMER, Arm, Run, Setting, build, cached_task
from trial.trials import SEARCH_SEEDS, Candidate, Summary, best, for_equal_time, run_all, summarize

from fxsd import FxsdError
from fxsd.run.ops import METHODS

QUICK = {"seeds": 4, "epochs": 15, "samples": 1000, "jobs": 2}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0, or 2 with one line on standard error."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    try:
        run(args)
    except (FxsdError, OSError) as error:
        print(f"train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Searches, trains, prints the table and writes the files asked for."""
    check(args)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    setting = _setting(args)
    task = cached_task(setting.source, 0)
    build(setting, task)  # bad arguments show before minutes are spent
    options = [Arm(BASE, BASE, lr) for lr in args.lr], [Arm("fxsd", args.compute[0], lr, rate) for lr, rate in product(args.lr, args.rate)]
    found = _search([candidates for candidates in options if len(candidates) > 1], setting, task.metric, args)
    base, own = (next((c[0].arm for c in found if c[0].arm in candidates), candidates[0]) for candidates in options)
    arms = [base, *(replace(own, label=f"fxsd {compute}", compute=compute) for compute in args.compute)]
    results: list[Run] = []

    def collect(arms: Sequence[Arm]) -> None:
        for runs in run_all([(seed, arms) for seed in range(args.seeds)], setting, args.jobs, say):
            results.extend(runs)
            _write(args, found, results)

    with measuring.progress(args.seeds * (len(arms) + bool(args.equal_time))) as say:
        try:
            collect(arms)
            if args.equal_time:
                collect([for_equal_time(arms[-1], results)])
        except KeyboardInterrupt:
            if not results:
                raise
    _show(summarize(results), setting, task.metric)
    if args.plot:
        curves(results, _metric(task.metric), Path(args.plot))


def _search(options: Sequence[Sequence[Arm]], setting: Setting, metric: str, args: argparse.Namespace) -> list[list[Candidate]]:
    """Trains the candidates of each arm. Returns them from the best to the worst."""
    if not options:
        return []
    arms = [arm for candidates in options for arm in candidates]
    jobs = [(SEARCH_SEEDS + i, [arm]) for i in range(args.search_seeds) for arm in arms]
    with measuring.progress(len(jobs)) as say:
        runs = [run for found in run_all(jobs, setting, args.jobs, say, final=False) for run in found]
    found = [best(candidates, runs) for candidates in options]
    _show_search(found, metric)
    return found


def _setting(args: argparse.Namespace) -> Setting:
    return Setting(
        source=Source(args.data, tuple(args.noise), args.samples, args.side),
        size=Size(args.blocks, args.width, args.stages, args.norm, args.dropout),
        model=args.model or (TRANSFORMER if args.data == STDLIB else RESNET),
        method=args.method,
        epochs=args.epochs,
        batch=args.batch,
        weight_decay=args.weight_decay,
        drop_warmup=args.drop_warmup,
        compile=args.compile,
        device=args.device,
    )


# --- what is shown --------------------------------------------------------------------------------------------------------


def _show_search(found: Sequence[Sequence[Candidate]], metric: str) -> None:
    table = measuring.table("Search: the last epoch, on validation data", "arm", "drop rate", "lr", _metric(metric))
    for candidates in found:
        table.add_section()
        for candidate in candidates:
            arm = candidate.arm
            table.add_row(arm.label, str(arm.rate or "-"), f"{arm.lr:g}", f"{candidate.validation:.3f}")
    measuring.show(table)


def _show(summaries: Sequence[Summary], setting: Setting, metric: str) -> None:
    seeds = min(s.seeds for s in summaries)
    title = f"{setting.source.name}, {setting.size.blocks} blocks: {_metric(metric)}, mean of {seeds} seeds ± 95 % confidence"
    table = measuring.table(title, "arm", "drop rate", "lr", "epochs", "train", "test", "to base", "time / base")
    for s in summaries:
        shown = [str(value) if value else "-" for value in (s.train, s.test, s.difference)]
        table.add_row(s.arm.label, str(s.arm.rate or "-"), f"{s.arm.lr:g}", str(s.epochs), *shown, measuring.figure(s.time_ratio))
    notes = ["Differences and times are to the base under the same seed; times are medians, without evaluation."]
    measuring.show(table, *map(Text, notes))


def _metric(metric: str) -> str:
    return "loss, nats" if metric == LOSS else "accuracy, %"


def _write(args: argparse.Namespace, found: Sequence[Sequence[Candidate]], runs: Sequence[Run]) -> None:
    """Writes what there is so far, so that a run that is stopped loses nothing."""
    if not args.json:
        return
    figures: dict[str, Any] = {
        "machine": measuring.machine(),
        "settings": vars(args),
        "search": [[asdict(candidate) for candidate in candidates] for candidates in found],
        "summaries": [*map(asdict, summarize(runs))],
        "runs": [*map(asdict, runs)],
    }
    Path(args.json).write_text(json.dumps(figures, indent=1, default=str) + "\n", encoding="utf-8")


# --- the command line -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train", description="Trains a residual net with and without stochastic depth.")
    own = "or a folder with CIFAR-10 or images"
    data = f"{MNIST1D} (generated), {DIGITS} (scikit-learn's), {STDLIB} (the source of Python's library, by characters), {own}"
    parser.add_argument("--data", metavar="NAME", default=MNIST1D, help=f"{data}; default {MNIST1D}")
    parser.add_argument(
        "--noise", metavar="X", type=float, nargs=2, default=(0.6, 0.12), help="of MNIST-1D, correlated and independent; default .6 .12"
    )
    parser.add_argument("--samples", metavar="N", type=positive, help="to train on at most")
    parser.add_argument("--side", metavar="N", type=positive, default=64, help="of images from a folder; default 64")
    net = parser.add_argument_group("the net")
    net.add_argument("--model", metavar="NAME", help=f"{RESNET}, {TRANSFORMER} (for text) or torchvision:NAME; default what suits the data")
    net.add_argument("--blocks", metavar="N", type=positive, default=16, help="residual blocks; default 16")
    net.add_argument("--width", metavar="N", type=positive, default=32, help="channels; default 32")
    net.add_argument("--stages", metavar="N", type=positive, default=1, help="after each but the last, sides are halved; default 1")
    net.add_argument("--norm", choices=NORMS, default="batch", help="of the resnet; default batch")
    net.add_argument("--dropout", metavar="P", type=probability, default=0.0, help="inside the branches; default 0")
    depth = parser.add_argument_group("stochastic depth")
    rates = "a distribution and a rate, such as linear:.4; of several, the best on validation data; default linear:.3"
    depth.add_argument("--rate", metavar="NAME:P", type=spread, nargs="+", default=[Rate("linear", 0.3)], help=rates)
    depth.add_argument("--compute", choices=("mask", "skip", "auto"), nargs="+", default=["skip"], help="an arm for each; default skip")
    depth.add_argument("--method", choices=METHODS, default="sample")
    depth.add_argument(
        "--drop-warmup", metavar="P", type=probability, default=0.0, help="share of the training in which the rate rises; default 0"
    )
    training = parser.add_argument_group("training")
    training.add_argument("--seeds", metavar="N", type=positive, default=5, help="default 5")
    training.add_argument("--epochs", metavar="N", type=positive, default=30, help="default 30")
    training.add_argument("--batch", metavar="N", type=positive, default=100, help="default 100")
    training.add_argument(
        "--lr", metavar="X", type=float, nargs="+", default=[1e-2], help="of several, each arm's best on validation data; default .01"
    )
    training.add_argument("--weight-decay", metavar="X", type=float, default=0.01, help="default .01")
    training.add_argument("--search-seeds", metavar="N", type=positive, default=3, help="for each candidate; default 3")
    training.add_argument("--equal-time", action="store_true", help="the last arm once more, with as many epochs as take the base's time")
    training.add_argument("--compile", metavar="BACKEND", nargs="?", const="inductor", default="", help="with torch.compile")
    training.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    training.add_argument("--threads", metavar="N", type=positive, default=1, help="of torch on the CPU; default 1")
    training.add_argument("--jobs", metavar="N", type=positive, default=1, help="processes, one thread each; default 1")
    training.add_argument("--quick", action="store_true", help="1,000 samples, 15 epochs, 4 seeds and 2 processes: a minute or two")
    parser.add_argument("--json", metavar="FILE", help="writes all figures, with the machine and the settings")
    parser.add_argument("--plot", metavar="FILE.png", help="draws learning curves; needs matplotlib")
    return parser


if __name__ == "__main__":
    sys.exit(main())
