"""Graphs that run: the GraphModule that `fxsd.transform` returns, and the programs that it is made of.

In: a rewritten graph and a tree of modules. Out: a module that runs it, is copied and pickled with it, and
is checkpointed as the model was.
Above: `find`, `capture`, `legal` and the verbs at the top. Below: `run`, what such a graph calls.
"""

from fxsd.graph.graphmodule import META, StochasticGraphModule, build, copy_graph, replace_inside, shallow_tree

__all__ = ["META", "StochasticGraphModule", "build", "copy_graph", "replace_inside", "shallow_tree"]
