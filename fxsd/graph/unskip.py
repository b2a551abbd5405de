"""A graph that skips branches -> the graph with masks that means the same, for whoever reads it again."""

from __future__ import annotations

import operator

from torch import fx, nn

from fxsd.graph.graphmodule import META
from fxsd.run.rows import fork, merge, spread, take
from fxsd.run.skip import SkipStochasticDepth


def unskip(graph: fx.Graph, module: nn.Module) -> None:
    """Puts all rows back through the branches of `graph`, which `module` owns, and a mask behind them."""
    for node in list(graph.nodes):
        if node.op == "call_module" and META in node.meta and isinstance(module.get_submodule(str(node.target)), SkipStochasticDepth):
            _unskip(node)


def _unskip(rows: fx.Node) -> None:
    graph = rows.graph
    for user in list(rows.users):
        value = user.args[0]
        assert isinstance(value, fx.Node)
        if user.target is fork:
            for part in list(user.users):
                part.replace_all_uses_with(value)
                graph.erase_node(part)
        elif user.target is take:
            user.replace_all_uses_with(value)
        else:
            shortcut, branch = (value, user.args[1]) if user.target is merge else (None, value)
            with graph.inserting_before(user):
                drop = graph.call_module(str(rows.target), (branch,), {"mask": True})
            drop.meta.update(rows.meta)
            if shortcut is not None:
                user.target, user.args = operator.add, (drop, shortcut) if user.args[3] else (shortcut, drop)
                continue
            assert user.target is spread
            user.replace_all_uses_with(drop)
        graph.erase_node(user)
    graph.erase_node(rows)
