"""The sites of a transformed model: what they are, and moving their rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import fx, nn

from fxsd.errors import FxsdError
from fxsd.graph import META, StochasticGraphModule, runs_graph
from fxsd.graph import SHOWN as KEY
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
    found = [tuple(_sites_of(root)) for root in _outermost(_roots(gm))]
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
    found = [module for module in gm.modules() if isinstance(module, StochasticDepth)] if isinstance(gm, nn.Module) else []
    if not found:
        _roots(gm)  # a model without sites, or none
    return found


def _roots(gm: nn.Module) -> list[nn.Module]:
    found = [module for module in gm.modules() if _is_root(module)] if isinstance(gm, nn.Module) else []
    if not found:
        raise FxsdError(f"there is no transformed model in this {type(gm).__name__}; fxsd.transform(model) makes one.")
    return found


def _is_root(module: nn.Module) -> bool:
    return isinstance(module, StochasticGraphModule) or KEY in vars(module)


def _outermost(found: Sequence[nn.Module]) -> list[nn.Module]:
    inner = {module for root in found for module in root.modules() if module is not root}
    return [root for root in found if root not in inner]


def _sites_of(root: nn.Module) -> Iterator[ResidualSite]:
    if isinstance(root, StochasticGraphModule) and runs_graph(root):
        yield from _sites_in_order(root)
        return
    graphs = [root.graph, root.eval_graph] if isinstance(root, StochasticGraphModule) else []
    graphs += [shown.graph for shown in vars(root).get(KEY, ())]
    found: dict[int, tuple[int, ResidualSite]] = {}
    for graph in filter(None, graphs):
        for op, site in _sites_in(root, graph):
            found.setdefault(id(op), (op.order, site))
    yield from (site for _, site in sorted(found.values(), key=lambda each: each[0]))


def _sites_in(root: nn.Module, graph: fx.Graph) -> Iterator[tuple[StochasticDepth, ResidualSite]]:
    """The sites whose ops a graph calls, or would call."""
    named = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        if node.op == "call_module" and META in node.meta:
            op = _module_at(root, str(node.target))
            if isinstance(op, StochasticDepth):
                yield op, _site(op, node, named)


def _module_at(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a path; None where its owner was replaced or removed."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _site(op: StochasticDepth, node: fx.Node, named: Mapping[str, fx.Node]) -> ResidualSite:
    add, branch, shortcut, fork = (named[node.meta[META][role]] for role in ("add", "branch", "shortcut", "fork"))
    compute = "mask" if node.kwargs.get("mask") else op.compute
    return ResidualSite(op.site, op.module, op.depth, op.rate, op.kind, compute, add, branch, shortcut, fork, op.reason)


def _sites_in_order(gm: StochasticGraphModule) -> Iterator[ResidualSite]:
    """The sites of a graph that runs, and where it calls another one, that one's."""
    found = {id(op): site for op, site in _sites_in(gm, gm.graph)}
    parts = [module for module in _roots(gm) if module is not gm]
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        op = gm.get_submodule(str(node.target))
        if META in node.meta and id(op) in found:
            yield found[id(op)]
        elif parts:
            for part in _outermost([module for module in op.modules() if module in parts]):
                parts.remove(part)  # a part that is called twice has its sites once
                yield from _sites_of(part)
