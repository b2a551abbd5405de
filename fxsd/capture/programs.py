"""A module whose Python decides on `self.training`: one graph that holds in both modes, or one a mode.

Which modules decide becomes known by tracing; both modes are traced then, and compared. Mostly they turn out to be the same program, or
one in which numbers differ (`0.1 if self.training else 0.0`), which are picked at run time. A module that makes a greater
difference is kept whole, as a call, if no residual add is inside; otherwise it is to be captured by itself, with two programs on its own
flag, and the rest is one graph again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Set
from typing import Any

from torch import fx

from fxsd.capture.tracer import Tracer
from fxsd.find.residual import call, owner
from fxsd.find.values import is_flag


def trace_modes(
    root: str,
    trace: Callable[[Set[str], bool], Tracer],
    owners_of_sites: Callable[[fx.Graph], Set[str]],
    called_differently: bool = False,
) -> tuple[Tracer, Tracer | None, Set[str]]:
    """Traces as often as it takes.

    Args:
        root: the path of the module that is traced.
        trace: traces it with modules, named by path, as leaves, in training mode or not.
        owners_of_sites: the modules whose forwards execute a residual add of a graph.
        called_differently: the two modes may differ even if no Python in the module decides on the mode.

    Returns:
        The training program; the evaluation program where it is another; the modules to be captured by themselves.
    """
    train = trace(frozenset(), True)
    if not (train.branched or called_differently):
        return train, None, frozenset()
    evaluated = trace(frozenset(), False)
    differing = _differing(root, train, evaluated)
    leaves = differing - {root}
    apart: Set[str] = frozenset()
    if leaves:
        owners = owners_of_sites(train.graph) | owners_of_sites(evaluated.graph) | train.broken.keys() | train.apart
        apart = frozenset(path for path in leaves if any(within(owner, path) for owner in owners))
        train, evaluated = trace(leaves, True), trace(leaves, False)
    if _pick_numbers(root, train, evaluated):
        return train, None, apart
    return train, evaluated, apart


def pick(training: bool, value: Any, otherwise: Any) -> Any:
    """A number that depends on the mode."""
    return value if training else otherwise


def within(path: str, ancestor: str) -> bool:
    """Is the module at `path` the one at `ancestor`, or inside it?"""
    return not ancestor or path == ancestor or path.startswith(f"{ancestor}.")


def _differing(root: str, train: Tracer, evaluated: Tracer) -> frozenset[str]:
    """The modules whose decisions make more than numbers differ: around each piece that differs the nearest one that decides.

    A module that decides and writes to its attributes, such as a counter, is one of them: its Python has to run.
    """
    decided = {*train.branched, *evaluated.branched}
    ours, theirs = _pieces(train.graph), _pieces(evaluated.graph)
    different = {key[0] for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    found = {_nearest(path, decided, root) for path in different}
    return frozenset(found | {path for path in decided if path in train.changed | evaluated.changed})


def _nearest(path: str, modules: Iterable[str], default: str) -> str:
    return max((module for module in modules if within(path, module)), key=len, default=default)


def _pieces(graph: fx.Graph) -> dict[tuple[str, str], list[str]]:
    """(module, call of it) -> what its own forward does, whatever the names of the values and the numbers."""
    pieces: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node in graph.nodes:
        if node.op not in ("placeholder", "output") and not is_flag(node):
            args = fx.node.map_aggregate((node.args, node.kwargs), _shape)
            pieces[owner(node), call(node)].append(f"{node.op} {node.target} {args}")
    return pieces


def _shape(arg: Any) -> str:
    return "%" if isinstance(arg, fx.Node) else "#"


def _pick_numbers(root: str, train: Tracer, evaluated: Tracer) -> bool:
    """Makes the training graph hold in both modes, if it differs from the other one in numbers alone. Says whether it does."""
    ours = [node for node in train.graph.nodes if not is_flag(node)]
    theirs = [node for node in evaluated.graph.nodes if not is_flag(node)]
    if len(ours) != len(theirs):
        return False
    twin: dict[fx.Node, fx.Node] = {}  # of the other graph -> of this one
    flags = {node.target: node for node in train.graph.nodes if is_flag(node)}
    differing: list[tuple[fx.Node, Any]] = []
    for mine, other in zip(ours, theirs, strict=True):
        twin[other] = mine
        if (mine.op, mine.target) != (other.op, other.target):
            return False
        args = fx.node.map_arg((other.args, other.kwargs), lambda node: twin.get(node) or flags.get(node.target, node))
        if _shapes((mine.args, mine.kwargs)) != _shapes(args):
            return False
        if str((mine.args, mine.kwargs)) != str(args):
            if mine.op in ("placeholder", "output"):
                return False
            differing.append((mine, args))
    for mine, args in differing:
        _pick(root, train, mine, args)
    return True


def _shapes(args: Any) -> str:
    return str(fx.node.map_aggregate(args, lambda arg: arg if isinstance(arg, fx.Node) else "#"))


def _pick(root: str, train: Tracer, node: fx.Node, others: Any) -> None:
    """Gives `node`, where its arguments differ from `others`, a choice between the two."""
    path = _nearest(owner(node), train.branched, root)
    local = path[len(root) + 1 :] if root else path
    graph = node.graph
    with graph.inserting_before(node):
        flag = graph.create_node("get_attr", f"{local}.training" if local else "training")

        def choose(mine: Any, other: Any) -> Any:
            if isinstance(mine, (tuple, list)):
                return type(mine)(choose(a, b) for a, b in zip(mine, other, strict=True))
            if isinstance(mine, dict):
                return {key: choose(mine[key], other[key]) for key in mine}
            if isinstance(mine, slice):
                return slice(choose(mine.start, other.start), choose(mine.stop, other.stop), choose(mine.step, other.step))
            return mine if isinstance(mine, fx.Node) or str(mine) == str(other) else graph.call_function(pick, (flag, mine, other))

        node.args, node.kwargs = choose(tuple(node.args), others[0]), choose(dict(node.kwargs), others[1])
    for new in (flag, *(user for user in flag.users)):
        new.meta.update(node.meta)
