"""nn.Module -> graphs whose train and eval modes stay live.

The front end is `Tracer`. Which leaves it needs becomes known by tracing: modules whose Python decides on `self.training` are
kept whole where no residual add is inside them; where one is, the model is traced once in each mode.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxsd.capture.droppath import drop_paths
from fxsd.capture.hidden import hidden_residual_adds
from fxsd.capture.snapshot import unchanged
from fxsd.capture.tracer import Tracer
from fxsd.errors import FxsdError
from fxsd.graphmodule import copy_graph


@dataclass(frozen=True)
class Captured:
    """A model as graphs of its own; the modules in it are the user's."""

    model: nn.Module
    graph: fx.Graph
    eval_graph: fx.Graph | None = None  # only where the two modes are different programs
    drop_paths: Set[str] = frozenset()  # modules that are stochastic depth already
    constants: dict[str, torch.Tensor] = field(default_factory=dict)  # tensors made while tracing
    opaque: dict[str, str] = field(default_factory=dict)  # modules that had to stay calls -> why


def capture(model: nn.Module, example_inputs: Any, owners_of_sites: Callable[[Captured], Set[str]]) -> Captured:
    """Captures `model`, which is left exactly as it was.

    Args:
        model: any module. A GraphModule brings its graph along.
        example_inputs: a tuple of args, a dict of kwargs, or None.
        owners_of_sites: the paths of the modules that execute a residual add of a capture.

    Raises:
        CaptureError: the model cannot be traced.
        FxsdError: `model` is no module, or wraps one, or `example_inputs` do not fit its forward.
    """
    _check(model)
    with unchanged(model) as snapshot:
        found = drop_paths(model)
        known = frozenset(name for name, module in model.named_modules() if module in found)
        if isinstance(model, fx.GraphModule):
            eval_graph = getattr(model, "eval_graph", None)
            return Captured(model, copy_graph(model.graph), eval_graph and copy_graph(eval_graph), known)

        def trace(leaves: frozenset[str], training: bool) -> Tracer:
            tracer = Tracer(leaves, training, hidden_residual_adds, constants, snapshot.restore)
            tracer.trace_model(model, example_inputs)
            snapshot.restore(model)  # the next trace must not see the values of this one
            return tracer

        constants: dict[str, torch.Tensor] = {}
        train = trace(known, True)
        if train.branched:
            held = owners_of_sites(Captured(model, train.graph, None, known))
            whole = frozenset(p for p in train.branched if p and not any(_within(owner, p) for owner in held))
            leaves = known | whole
            if whole:
                constants.clear()
                train = trace(leaves, True)
            evaluated = trace(leaves, False) if train.branched else train
            if str(evaluated.graph) != str(train.graph):
                opaque = train.opaque | evaluated.opaque
                return Captured(model, train.graph, evaluated.graph, known, constants, opaque)
        return Captured(model, train.graph, None, known, constants, train.opaque)


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise FxsdError(f"model must be a torch.nn.Module, but got {type(model).__name__}.")
    wrapped = getattr(model, "_orig_mod", None) or (
        getattr(model, "module", None) if type(model).__module__.startswith("torch.nn.parallel") else None
    )
    if isinstance(wrapped, nn.Module):
        raise FxsdError(
            f"the model is wrapped in {type(model).__name__}; transform the model inside it first "
            f"({type(wrapped).__name__}), and compile or distribute the result."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise FxsdError("a ScriptModule has no Python left to trace; transform the model before torch.jit.script.")


def _within(path: str, ancestor: str) -> bool:
    return path == ancestor or path.startswith(f"{ancestor}.")
