"""What the commands of bench.py share: calls that take turns under a clock, the machine, tables, and the progress bar."""

from __future__ import annotations

import gc
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fxsd

Work = TypeVar("Work", bound=Callable[[], object])


def in_turns(
    works: Mapping[str, Work],
    repeats: int,
    warm_ups: int,
    say: Callable[[str], None],
    clock: Callable[[Work], float] | None = None,
) -> tuple[dict[str, list[float]], tuple[str, ...]]:
    """Runs `works` in turns, `repeats` rounds after `warm_ups` that do not count.

    Args:
        clock: runs one of them and returns the ms it took; `milliseconds` by default.

    Returns:
        label -> ms a round, none for work that fails; and a sentence for each work that fails.
    """
    clock = clock or milliseconds
    times: dict[str, list[float]] = {label: [] for label in works}
    failed: dict[str, str] = {}
    for turn in range(warm_ups + repeats):
        first = turn % max(len(works), 1)  # what runs after what changes from round to round
        for label, work in [*works.items()][first:] + [*works.items()][:first]:
            if label in failed:
                continue
            say(f"round {turn + 1} of {warm_ups + repeats}, {label}")
            try:
                ms = clock(work)
            except Exception as error:  # tracing runs the model's own code
                failed[label] = f"{label}: {line(error)}"
                times[label] = []
                continue
            if turn >= warm_ups:
                times[label].append(ms)
    return times, tuple(failed.values())


def milliseconds(work: Callable[[], object]) -> float:
    """How long `work` takes, without letting go of its result. Garbage of earlier work is collected before."""
    gc.collect()
    with quiet():
        began = time.perf_counter()
        result = work()
        taken = time.perf_counter() - began
    del result
    return taken * 1e3


def busy_ms(work: Callable[[], object], gpu: bool) -> float:
    """How long `work` keeps the machine busy: the process's CPU time, or on a GPU that of the clock until it is idle. In ms."""
    clock = time.perf_counter if gpu else time.process_time
    gc.collect()
    with quiet():
        if gpu:
            torch.cuda.synchronize()
        began = clock()
        work()
        if gpu:
            torch.cuda.synchronize()
        return (clock() - began) * 1e3


def medianed(times: Sequence[float]) -> float | None:
    return median(times) if times else None


def ratio(times: Sequence[float], base: Sequence[float]) -> float | None:
    return median(a / b for a, b in zip(times, base, strict=True)) if times and base else None


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fxsd": fxsd.__version__,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def show(*parts: RenderableType) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    for part in parts:
        console.print(part)


def table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 160 else text[:157] + '...'}"


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, and standard error is no terminal: fxsd then starts no spinner, which would take time from what is measured."""
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def progress(total: int) -> Iterator[Callable[..., None]]:
    """A bar on a terminal's standard error, drawn between the timed calls and by no thread of its own. Gives `say(text, done=0)`."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    hidden = not sys.stderr.isatty()
    console = Console(stderr=True, quiet=hidden)  # rich 13 ends a disabled bar with an empty line
    with Progress(*columns, console=console, auto_refresh=False, redirect_stderr=False, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, done=0: bar.update(task, description=text, advance=done, refresh=True)
