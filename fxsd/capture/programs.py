"""A module whose Python decides on `self.training`: one graph that holds in both modes, or one a mode.

Which modules decide becomes known by tracing. Where one of them holds no residual add it is kept whole, as a call. Where one does, the
two modes are traced and compared: mostly they turn out to be the same program. The modules that make a difference
are to be captured by themselves, each with two programs on its own flag, and the rest is one graph again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Set

from torch import fx

from fxsd.capture.tracer import Tracer
from fxsd.residual import call, owner


def trace_modes(
    root: str, trace: Callable[[Set[str], bool], Tracer], owners_of_sites: Callable[[fx.Graph], Set[str]]
) -> tuple[Tracer, Tracer | None, Set[str]]:
    """Traces as often as it takes.

    Args:
        root: the path of the module that is traced.
        trace: traces it with modules, named by path, as leaves, in training mode or not.
        owners_of_sites: the modules whose forwards execute a residual add of a graph.

    Returns:
        The training program; the evaluation program where it is another; the modules to be captured by themselves.
    """
    train = trace(frozenset(), True)
    if not train.branched:
        return train, None, frozenset()
    owners = owners_of_sites(train.graph) | train.broken.keys() | train.apart
    leaves = frozenset(path for path in train.branched if path != root and not any(within(owner, path) for owner in owners))
    if leaves:
        train = trace(leaves, True)
    evaluated = trace(leaves, False)
    apart = frozenset(_differing(root, train, evaluated)) - {root}
    if apart:
        train, evaluated = trace(leaves | apart, True), trace(leaves | apart, False)
    return train, None if _same(train.graph, evaluated.graph) else evaluated, apart


def within(path: str, ancestor: str) -> bool:
    """Is the module at `path` the one at `ancestor`, or inside it?"""
    return not ancestor or path == ancestor or path.startswith(f"{ancestor}.")


def _differing(root: str, train: Tracer, evaluated: Tracer) -> set[str]:
    """The modules whose decisions make the two programs differ: around each piece that differs the nearest one that decides."""
    if _same(train.graph, evaluated.graph):
        return set()
    decided = {*train.branched, *evaluated.branched}
    ours, theirs = _pieces(train.graph), _pieces(evaluated.graph)
    differing = {key[0] for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    return {max((module for module in decided if within(path, module)), key=len, default=root) for path in differing} or {root}


def _pieces(graph: fx.Graph) -> dict[tuple[str, str], list[str]]:
    """(module, call of it) -> what its own forward does, whatever the names of the values."""
    pieces: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node in graph.nodes:
        if node.op != "placeholder" and not _is_flag(node):
            args = fx.node.map_arg((node.args, node.kwargs), lambda arg: "%")
            pieces[owner(node), call(node)].append(f"{node.op} {node.target} {args}")
    return pieces


def _is_flag(node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target).rpartition(".")[2] == "training"


def _same(a: fx.Graph, b: fx.Graph) -> bool:
    return str(a) == str(b)
