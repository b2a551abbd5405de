"""The sites of a transformed model: what they are, and moving their rates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import fx, nn

from fxsd.errors import FxsdError
from fxsd.graph.graphmodule import META, StochasticGraphModule
from fxsd.rates import check_rate, largest_rate
from fxsd.run.ops import StochasticDepth


@dataclass(frozen=True)
class ResidualSite:
    """A residual add that is rewritten, `add = shortcut + branch`.

    Attributes:
        name: unique in the model: `"layer1.0"`, or `"blocks.3.1"` for the second add that `blocks.3` executes.
        module: qualified name of the module whose forward executes the add.
        depth: 0-based place of its block in topological order.
        drop_rate: probability that the branch of a sample is dropped.
        kind: `"identity"` or `"projection"`: what the shortcut is.
        compute: `"mask"`: the branch is computed and multiplied by 0 or 1. `"skip"`: it is not computed for dropped samples.
        add, branch, shortcut, fork: nodes of the graph; both operands come from `fork`. In a transformed model `branch` is what
            enters the site's op.
        reason: why the branch is not skipped, or not by compiled code, where that was asked for.
    """

    name: str
    module: str
    depth: int
    drop_rate: float
    kind: str
    compute: str
    add: fx.Node
    branch: fx.Node
    shortcut: fx.Node
    fork: fx.Node
    reason: str = ""


def sites(gm: nn.Module) -> tuple[ResidualSite, ...]:
    """Lists the sites of a transformed model, in topological order, with the rates as they are now.

    Args:
        gm: what `fxsd.transform` returned, or a module that holds it: compiled, DDP, FSDP, EMA.

    Raises:
        FxsdError: there is no transformed model in `gm`.

    Example:
        >>> import fxsd, torchvision
        >>> gm = fxsd.transform(torchvision.models.resnet18(), drop_rate=0.7)
        >>> [(site.name, round(site.drop_rate, 2)) for site in fxsd.sites(gm)][:3]
        [('layer1.0', 0.0), ('layer1.1', 0.1), ('layer2.0', 0.2)]
    """
    found = [tuple(_sites_of(part)) for part in _outermost(_graph_modules(gm))]
    # Parts of one model count their depths together; the Python around them does not tell which comes first.
    found.sort(key=lambda part: part[0].depth if part else 0)
    return tuple(chain.from_iterable(found))


def get_drop_rate(gm: nn.Module) -> float:
    """The model-wide rate, which `set_drop_rate` sets: that of a site over its share.

    Raises:
        FxsdError: there is no transformed model in `gm`.
    """
    ops = _ops(gm)
    heaviest = max(ops, key=lambda op: op.weight, default=None)
    return heaviest.rate / heaviest.weight if heaviest is not None and heaviest.weight else 0.0


def set_drop_rate(gm: nn.Module, drop_rate: float) -> None:
    """Moves the rates of all sites in place, keeping their distribution.

    Compiled code sees it without compiling again in mask mode. Where it skips branches it compiles once more, the first time a rate
    moves. On a CPU, branches that put other dims before the batch and back then run all rows, until a `DropRateSchedule` says that the
    rate stays, as `fxsd.DropRateSchedule(gm)` does at once.

    Where the distribution stated rates itself (a sequence or a mapping), they keep their proportions and the largest becomes `drop_rate`.

    Args:
        gm: what `fxsd.transform` returned, or a module that holds it: compiled, DDP, FSDP, EMA.
        drop_rate: as in `fxsd.transform`, in [0, 1].

    Raises:
        FxsdError: the rate is out of range, or there is no transformed model in `gm`.

    Example:
        >>> import fxsd, torchvision
        >>> gm = fxsd.transform(torchvision.models.resnet18(), drop_rate=0.7)
        >>> fxsd.set_drop_rate(gm, 0.0)
        >>> {site.drop_rate for site in fxsd.sites(gm)}
        {0.0}
    """
    rate = check_rate("drop_rate", drop_rate)
    ops = _ops(gm)
    top = largest_rate([op.weight for op in ops])
    if rate > top:
        raise FxsdError(
            f"drop_rate must be at most {top:.6g} here, so that no site's rate exceeds 1 "
            f"(the distribution's largest weight is {1 / top:.6g}), but got {drop_rate!r}."
        )
    for op in ops:
        op.set_drop_rate(rate * op.weight)
    for op in ops:
        op.settle()


def rest(gm: nn.Module) -> None:
    """Says that rates stay as they are: compiled code that skips may take the numbers of rows for constants again, until a rate moves.

    Raises:
        FxsdError: there is no transformed model in `gm`.
    """
    for op in _ops(gm):
        op.rest()


def start_step(gm: nn.Module, step: int) -> None:
    """Makes sites that draw the same on all ranks go on as a run does that has taken so many training steps.

    Raises:
        FxsdError: there is no transformed model in `gm`.
    """
    for op in _ops(gm):
        op.start_step(step)


def _ops(gm: nn.Module) -> list[StochasticDepth]:
    return [module for part in _graph_modules(gm) for module in part.modules() if isinstance(module, StochasticDepth)]


def _graph_modules(gm: nn.Module) -> list[StochasticGraphModule]:
    found = [module for module in gm.modules() if isinstance(module, StochasticGraphModule)] if isinstance(gm, nn.Module) else []
    if not found:
        raise FxsdError(f"there is no transformed model in this {type(gm).__name__}; fxsd.transform(model) makes one.")
    return found


def _outermost(found: Sequence[StochasticGraphModule]) -> list[StochasticGraphModule]:
    inner = {module for part in found for module in part.modules() if module is not part}
    return [part for part in found if part not in inner]


def _sites_of(gm: StochasticGraphModule) -> Iterator[ResidualSite]:
    """The sites of a graph, and where it calls another one, that one's."""
    named = {node.name: node for node in gm.graph.nodes}
    parts = [module for module in _graph_modules(gm) if module is not gm]
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        op = gm.get_submodule(str(node.target))
        if isinstance(op, StochasticDepth) and META in node.meta:
            add, branch, shortcut, fork = (named[node.meta[META][role]] for role in ("add", "branch", "shortcut", "fork"))
            compute = "mask" if node.kwargs.get("mask") else op.compute
            yield ResidualSite(op.site, op.module, op.depth, op.rate, op.kind, compute, add, branch, shortcut, fork, op.reason)
        elif parts:
            called = _outermost([module for module in op.modules() if module in parts])
            for part in called:
                parts.remove(part)  # a part that is called twice has its sites once
                yield from _sites_of(part)
