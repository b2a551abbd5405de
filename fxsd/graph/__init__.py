"""Graphs that run: the GraphModule that `fxsd.transform` returns, and the programs that it is made of.

In: a rewritten graph and a tree of modules. Out: a module that runs it, is copied and pickled with it, and
is checkpointed as the model was.
Above: `capture`, `legal` and the verbs at the top. Below: `find`, `tree` and `run`, what such a graph calls.
"""

from fxsd.graph.graphmodule import (
    META,
    StochasticGraphModule,
    build,
    complete,
    copy_graph,
    replace_inside,
    runs_graph,
    shallow_tree,
    takes_graph,
    tree_class,
    without_ops,
)
from fxsd.graph.shown import KEY as SHOWN
from fxsd.graph.shown import Shown

__all__ = [
    "META", "SHOWN", "Shown", "StochasticGraphModule", "build", "complete", "copy_graph", "replace_inside", "runs_graph", "shallow_tree",
    "takes_graph", "tree_class", "without_ops",
]  # fmt: skip
