"""The GraphModule that `transform` returns: the model's own module tree around one graph, or one graph a mode.

A stock `fx.GraphModule` keeps only what its graph names, loses unused parameters, plain attributes and the classes of
the modules between, and pickles by tracing its own code again, which would freeze `training`. This one keeps the
tree and pickles the graph itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.graph_module import _forward_from_src

from fxsd.ops import StochasticDepth

META = "fxsd"  # the key of fxsd's own entries in node.meta
CONSTANTS = "fxsd_constants"  # the module that holds tensors made while tracing

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name)
_GENERATED = {"_graph", "_code", "_lineno_map", "_prologue_start", "eval_graph"}


class StochasticGraphModule(fx.GraphModule):
    """An `fx.GraphModule` with live train and eval modes. Made by `fxsd.transform`.

    `graph` is what runs; where training and evaluation are different programs, `graph` is the training one and
    `eval_graph` the other, else `eval_graph` is None.
    """

    eval_graph: fx.Graph | None

    def recompile(self) -> Any:
        code = super().recompile()
        if self.eval_graph is not None:
            cls = type(self)
            train = cls.forward
            source = self.eval_graph.python_code(root_module="self")
            evaluate = _forward_from_src(source.src, source.globals, {})

            def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return train(self, *args, **kwargs) if self.training else evaluate(self, *args, **kwargs)

            cls.forward = forward
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> StochasticGraphModule:
        memo[id(self)] = gm = _empty()
        eval_graph = None if self.eval_graph is None else copy_graph(self.eval_graph)
        return _fill(gm, copy.deepcopy(self._state(), memo), copy_graph(self.graph), eval_graph, type(self).__name__)

    def __copy__(self) -> StochasticGraphModule:
        return _fill(_empty(), self._state(), self.graph, self.eval_graph, type(self).__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        eval_rows = None if self.eval_graph is None else _dump(self.eval_graph)
        return _load, (self._state(), _dump(self.graph), eval_rows, type(self).__name__)

    def _state(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _GENERATED}


def shallow_tree(model: nn.Module, graphs: Sequence[fx.Graph], constants: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of `model`'s module tree to build a GraphModule around: same keys, order, classes and plain attributes.

    Modules that the graphs call are shared with `model`; those between are shallow copies, so that what is added to them
    stays out of `model`, while parameters and buffers are the same objects.
    """
    called = {model.get_submodule(str(node.target)) for graph in graphs for node in graph.nodes if node.op == "call_module"}
    root = _copy_tree(model, called, {})
    if constants:
        holder = nn.Module()
        for name, tensor in constants.items():
            holder.register_buffer(name, tensor, persistent=False)
        root._modules[CONSTANTS] = holder
    return root


def build(root: nn.Module, graph: fx.Graph, eval_graph: fx.Graph | None = None) -> StochasticGraphModule:
    """The GraphModule over a tree of its own. Plain attributes of the root carry over, but for names that a GraphModule needs itself."""
    taken = set(dir(fx.GraphModule)) - set(dir(nn.Module)) | _GENERATED
    own = vars(fx.GraphModule(nn.Module(), fx.Graph()))
    state = {k: v for k, v in (own | root.__dict__).items() if k not in taken}
    return _fill(_empty(), state, graph, eval_graph, type(root).__name__)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names and metadata."""
    new = fx.Graph(tracer_cls=graph._tracer_cls)
    nodes: dict[fx.Node, fx.Node] = {}
    output = new.graph_copy(graph, nodes, return_output_node=True)
    if isinstance(output, tuple):
        value, old = output
        result = new.output(value, old.type)
        result.meta = copy.copy(old.meta)
    new._codegen = copy.deepcopy(graph._codegen)
    return new


def _copy_tree(module: nn.Module, shared: Set[nn.Module], memo: dict[nn.Module, nn.Module]) -> nn.Module:
    if isinstance(module, StochasticDepth):
        return copy.deepcopy(module, {})  # the rates of two transformed models move apart
    if module in shared:
        return module
    if module not in memo:
        memo[module] = new = object.__new__(type(module))
        new.__dict__.update(module.__dict__)
        for hooks in _HOOKS:
            new.__dict__[hooks] = copy.copy(module.__dict__[hooks]) if hooks in module.__dict__ else {}
        new.__dict__["_modules"] = {
            name: child if child is None else _copy_tree(child, shared, memo) for name, child in module._modules.items()
        }
    return memo[module]


def _empty() -> StochasticGraphModule:
    return cast(StochasticGraphModule, StochasticGraphModule.__new__(StochasticGraphModule))


def _fill(
    gm: StochasticGraphModule, state: dict[str, Any], graph: fx.Graph, eval_graph: fx.Graph | None, class_name: str
) -> StochasticGraphModule:
    gm.__dict__.update(state)
    gm.__dict__["eval_graph"] = eval_graph
    type(gm).__name__ = class_name
    if eval_graph is not None:
        eval_graph.owning_module = gm
    gm.graph = graph
    return gm


# --- the graph as plain data, flat, so that depth of a model is no depth of recursion -----------------------------------


@dataclass(frozen=True)
class _Ref:
    name: str


@dataclass(frozen=True)
class _TorchOp:
    """An `OpOverload` or its packet, which cannot be pickled themselves."""

    name: str

    def resolve(self) -> Any:
        found: Any = torch.ops
        for part in self.name.split("."):
            found = getattr(found, part)
        return found


def _dump(graph: fx.Graph) -> list[tuple[Any, ...]]:
    def refs(args: Any) -> Any:
        return fx.node.map_arg(args, lambda node: cast(Any, _Ref(node.name)))

    def target(node: fx.Node) -> Any:
        is_op = isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
        return _TorchOp(str(node.target)) if is_op else node.target

    kept = ("nn_module_stack", META)
    return [(n.op, n.name, target(n), refs(n.args), refs(n.kwargs), {k: n.meta[k] for k in kept if k in n.meta}) for n in graph.nodes]


def _load(
    state: dict[str, Any], rows: list[tuple[Any, ...]], eval_rows: list[tuple[Any, ...]] | None, class_name: str
) -> StochasticGraphModule:
    return _fill(_empty(), state, _read(rows), None if eval_rows is None else _read(eval_rows), class_name)


def _read(rows: list[tuple[Any, ...]]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        if isinstance(value, _Ref):
            return nodes[value.name]
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            return type(value)(resolve(item) for item in value)
        if isinstance(value, tuple):
            return type(value)(*(resolve(item) for item in value))
        if isinstance(value, dict):
            return {k: resolve(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(resolve(value.start), resolve(value.stop), resolve(value.step))
        return value

    for op, name, target, args, kwargs, meta in rows:
        target = target.resolve() if isinstance(target, _TorchOp) else target
        node = graph.create_node(op, target, resolve(args), resolve(kwargs), name)
        node.meta.update(meta)
        nodes[name] = node
    return graph
