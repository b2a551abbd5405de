"""A captured model as plain data: its parts, each a module as graphs, and what is known of the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxsd.capture.calls import Call, Place, differing
from fxsd.capture.observe import SHAPE, Observed
from fxsd.capture.programs import within


@dataclass(frozen=True)
class Part:
    """A module as graphs of its own; the modules in it are the user's.

    Targets of nodes are paths inside `module`; `nn_module_stack` in their metadata has paths in the whole model.
    """

    path: str  # of `module` in the model; '' is the model itself
    module: nn.Module
    graphs: tuple[fx.Graph, ...]  # one, or where the two modes are different programs, that of training and that of evaluation
    drop_paths: Set[str] = frozenset()  # modules in it that are stochastic depth already
    constants: dict[str, torch.Tensor] = field(default_factory=dict)  # tensors made while tracing
    call: Call | None = None  # how it is called in training, where that is known
    places: Sequence[Place | None] | None = None  # where the tensors in the call have samples, where that was seen

    @property
    def graph(self) -> fx.Graph:
        return self.graphs[0]

    @property
    def eval_graph(self) -> fx.Graph | None:
        return self.graphs[1] if len(self.graphs) > 1 else None

    def to_global(self, target: Any) -> str:
        """The path in the model of a module inside the part."""
        return join(self.path, str(target))

    def to_local(self, path: str) -> str:
        return path[len(self.path) + 1 :] if self.path else path


@dataclass(frozen=True)
class Captured:
    """A model as parts: one where it is one graph. A part may lie inside another, whose graph then calls it, or a module around it.

    Attributes:
        parts: in the order in which they run first, but parts inside others in no order.
        drop_paths: paths of modules that are stochastic depth already.
        opaque: modules inside parts that had to stay calls -> why.
        failed: modules that could not be one graph, though they are not torch's own -> why.
        hidden: of these, how many residual adds are out of reach in each.
        run_error: what ended the run in eval mode that should show how the modules are called, if it was run and failed.
        observed: runs in both modes, where something of the model is not in a graph.
    """

    model: nn.Module
    parts: tuple[Part, ...]
    drop_paths: Set[str] = frozenset()
    opaque: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, int] = field(default_factory=dict)
    run_error: Exception | None = None
    observed: tuple[Observed, ...] = ()

    def path_of(self, node: fx.Node) -> str:
        """The path in the model of the module that `node` calls."""
        return next(part.to_global(node.target) for part in self.parts if node.graph in part.graphs)

    def inside(self) -> dict[fx.Node, list[Part]]:
        """The nodes that call parts, directly or through a module around them."""
        found: dict[fx.Node, list[Part]] = {}
        if len(self.parts) > 1:
            for host in self.parts:
                for node in (node for graph in host.graphs for node in graph.nodes if node.op == "call_module"):
                    called = [p for p in self.parts if p is not host and within(p.path, host.to_global(node.target))]
                    # A part inside a part that is called here is that one's affair.
                    own = [p for p in called if not any(q is not p and within(p.path, q.path) for q in called)]
                    if own:
                        found[node] = own
        return found

    def batch_dims(self) -> Iterator[dict[fx.Node, int]]:
        """For each run that was observed, the dims of sums that hold samples, by how they differ where there are twice as many."""
        for observed in self.observed:
            if observed.doubled is None:
                continue
            pairs = zip(observed.graph.nodes, observed.doubled.nodes, strict=False)
            if len(observed.graph.nodes) == len(observed.doubled.nodes):
                yield {a: dims[0] for a, b in pairs if len(dims := differing(a.meta.get(SHAPE, ()), b.meta.get(SHAPE, ()))) == 1}


def join(path: str, name: str) -> str:
    return ".".join(filter(None, (path, name)))
