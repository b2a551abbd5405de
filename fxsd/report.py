"""What a person sees: the tables of `analyze`, and a sign of life when work takes over a second."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fxsd.find.residual import RejectedAdd
from fxsd.site import ResidualSite

_PATIENCE = 1.0  # seconds before progress is shown


@dataclass(frozen=True)
class Analysis:
    """What `fxsd.analyze` found. `print()` and `str()` show it as tables.

    Attributes:
        model: class name of the model.
        sites: the adds that `fxsd.transform` would rewrite, in topological order.
        rejected: every other tensor add, each with a sentence why.
        notes: modules that were kept as calls or as Python, with the residual adds in them, and stochastic depth that stays.
    """

    model: str
    sites: tuple[ResidualSite, ...]
    rejected: tuple[RejectedAdd, ...]
    notes: tuple[str, ...] = ()

    def print(self) -> None:
        """Writes the tables to standard output."""
        Console().print(self._tables())

    def __str__(self) -> str:
        out = StringIO()
        Console(file=out, width=120).print(self._tables())
        return out.getvalue()

    def _tables(self) -> RenderableType:
        depths = len({site.depth for site in self.sites})
        table = Table(title=f"{self.model}: {_count(len(self.sites), 'site')}, {_count(depths, 'depth')}", title_justify="left")
        for column in ("site", "module"):
            table.add_column(column, overflow="fold")
        table.add_column("depth", justify="right")
        table.add_column("kind")
        table.add_column("rate", justify="right")
        table.add_column("compute", overflow="fold")
        for site in self.sites:
            compute = ": ".join(filter(None, (site.compute, site.reason)))
            table.add_row(site.name, site.module, str(site.depth), site.kind, f"{site.drop_rate:.4g}", compute)
        parts: list[RenderableType] = [table]
        if self.rejected:
            other = Table(title=f"{_count(len(self.rejected), 'add')} rejected", title_justify="left")
            for column in ("add", "module", "reason"):
                other.add_column(column, overflow="fold")
            for rejected in self.rejected:
                other.add_row(rejected.add.name, rejected.module, rejected.reason)
            parts.append(other)
        parts.extend(Text(note) for note in self.notes)
        return Group(*parts)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


@contextmanager
def stage(text: str) -> Iterator[None]:
    """Shows `text` with a spinner on a terminal's standard error, once the work inside has taken a second."""
    if not sys.stderr.isatty() or threading.current_thread() is not threading.main_thread():
        yield
        return
    status = Console(stderr=True).status(text)
    timer = threading.Timer(_PATIENCE, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        status.stop()
