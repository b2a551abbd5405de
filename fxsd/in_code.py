"""Which adds of which graphs are one site of the code: the same operand of the same expression of the same module.

A module that runs twice has its sites once. An expression that runs several times in one call of its function, as in a loop over blocks, is
a site each time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from fxsd.find import RejectedAdd, Residual, op_name, operands
from fxsd.tree import PLACE, NoSource, Spot, Whereabouts, spot


@dataclass(frozen=True)
class CodeSite:
    """A site of the code.

    Attributes:
        spot: where it stands.
        run: which run of the expression in one call of its function it is; None where there is only one.
        runs: how many there are.
        residuals: where graphs show it: once for each call of the module, in each graph.
    """

    spot: Spot
    run: int | None
    runs: int
    residuals: tuple[Residual, ...]

    def seen_in(self, graphs: Iterable[fx.Graph]) -> Residual | None:
        """How the first of some graphs that shows the site shows it."""
        return next((r for graph in graphs for r in self.residuals if r.add.graph is graph), None)


def code_sites(model: nn.Module, found: Sequence[Residual], graphs: Iterable[fx.Graph]) -> tuple[list[CodeSite], list[RejectedAdd]]:
    """The sites of the code that residual adds show, in the order of these, and those adds that nothing can be written at, with the reason.

    Args:
        model: whose graphs they are in.
        found: of all graphs.
        graphs: where they were found.
    """
    runs_at: dict[tuple[str, Any], int] = defaultdict(int)  # adds that are no sites count too
    for node in (node for graph in graphs for node in graph.nodes if PLACE in node.meta):
        seen: Whereabouts | None = node.meta[PLACE]
        if seen is not None and seen.home is not None:
            runs_at[seen.home, seen.steps] = max(runs_at[seen.home, seen.steps], seen.run + 1)
    times: dict[Spot, int] = defaultdict(int)
    by_spot: dict[Spot, dict[int, list[Residual]]] = {}
    order: list[tuple[Spot, int]] = []
    refused: list[RejectedAdd] = []
    for residual in found:
        where: Whereabouts | None = residual.add.meta.get(PLACE)
        place = operands(residual.add).index(residual.branch)
        try:
            here = spot(model, where, 1 - place if op_name(residual.add) == "radd" else place)
        except NoSource as error:
            refused.append(RejectedAdd(residual.add, residual.module, str(error)))
            continue
        assert where is not None
        run = 0 if here.several else where.run
        runs = by_spot.setdefault(here, {})
        if run not in runs:
            order.append((here, run))
        runs.setdefault(run, []).append(residual)
        times[here] = max(times[here], 1 if here.several else runs_at[str(where.home), where.steps])
    return [CodeSite(here, run if times[here] > 1 else None, times[here], tuple(by_spot[here][run])) for here, run in order], refused


def with_samples(site: CodeSite, placed: Mapping[fx.Node, Residual]) -> CodeSite:
    """The site with the samples where they are seen to be in one of the graphs."""
    known = next((found for r in site.residuals if (found := placed.get(r.add, r)).placed), None)
    if known is None:
        return site
    return replace(site, residuals=tuple(replace(r, batch_dim=known.batch_dim, placed=True) for r in site.residuals))
