"""The GraphModule that `transform` returns: the model's own module tree around one graph, or one graph a mode.

A stock `fx.GraphModule` keeps only what its graph names, loses unused parameters, plain attributes and the classes of
the modules between, and pickles by tracing its own code again, which would freeze `training`. This one keeps the
tree and pickles the graph itself.
"""

from __future__ import annotations

import copy
import inspect
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from types import MappingProxyType, MethodType
from typing import Any, ClassVar, cast

import torch
from torch import fx, nn
from torch.fx.graph_module import _forward_from_src

from fxsd.errors import FxsdError
from fxsd.graph.checkpoints import MARK, is_checkpointed, outline
from fxsd.graph.conditional import conditional
from fxsd.run.again import taking_again
from fxsd.run.ops import StochasticDepth
from fxsd.run.rows import fork, take
from fxsd.run.skip import SkipStochasticDepth

META = "fxsd"  # the key of fxsd's own entries in node.meta
CONSTANTS = "fxsd_constants"  # the module that holds tensors made while tracing

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name)
_REGISTERED = {*_HOOKS, "_modules", "_parameters", "_buffers"}
_GENERATED = {"_graph", "_code", "_lineno_map", "_prologue_start", "eval_graph"}


class StochasticGraphModule(fx.GraphModule):
    """An `fx.GraphModule` with live train and eval modes, which is an instance of the original model's class too. Made by `fxsd.transform`.

    `graph` is what runs; where training and evaluation are different programs, `graph` is the training one and
    `eval_graph` the other, else `eval_graph` is None.
    """

    eval_graph: fx.Graph | None
    original_class: ClassVar[type[nn.Module]] = nn.Module  # of the model that was transformed

    def recompile(self) -> Any:
        code = super().recompile()
        cls = type(self)
        generated = cls.forward
        plain = self._function("train", self.graph) if is_checkpointed(self.graph) else generated
        evaluate = plain if self.eval_graph is None else self._function("eval", self.eval_graph)
        compiled = self._conditional_forward() or plain
        train = taking_again(plain) if any(node.target in (fork, take) and node.args[2:] == (True,) for node in self.graph.nodes) else plain
        if {evaluate, compiled, generated} != {train}:

            @wraps(generated)  # its signature
            def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                if not self.training:
                    return evaluate(self, *args, **kwargs)
                if torch.compiler.is_dynamo_compiling():
                    return compiled(self, *args, **kwargs)
                return train(self, *args, **kwargs)

            cls.forward = forward
        return code

    def _conditional_forward(self) -> Callable[..., Any] | None:
        """What compiled code runs in training where it may leave branches out."""
        sites = {str(node.target) for node in self.graph.nodes if node.op == "call_module" and META in node.meta}
        targets = {path for path in sites if isinstance(op := self.get_submodule(path), SkipStochasticDepth) and op.conditional}
        if not targets:
            return None
        graph, branches = conditional(copy_graph(self.graph), targets)
        for name, branch in branches.items():
            setattr(type(self), name, _function(branch))
        return self._function("compiled", graph)

    def _function(self, name: str, graph: fx.Graph) -> Callable[..., Any]:
        """The code of a graph, as a method; what it checkpoints are methods of the class."""
        if is_checkpointed(graph):
            graph = copy_graph(graph)
            for method, inner in outline(graph, f"_checkpointed_{name}").items():
                setattr(type(self), method, _function(inner))
        return _function(graph)

    def __deepcopy__(self, memo: dict[int, Any]) -> StochasticGraphModule:
        memo[id(self)] = gm = _empty(type(self))
        eval_graph = None if self.eval_graph is None else copy_graph(self.eval_graph)
        return _fill(gm, copy.deepcopy(self._state(), memo), copy_graph(self.graph), eval_graph)

    def __copy__(self) -> StochasticGraphModule:
        return _fill(_empty(type(self)), self._state(), self.graph, self.eval_graph)

    def __reduce__(self) -> tuple[Any, ...]:
        eval_rows = None if self.eval_graph is None else _dump(self.eval_graph)
        return _load, (self._state(), _dump(self.graph), eval_rows, self.original_class)

    def _state(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _GENERATED}


def shallow_tree(
    module: nn.Module,
    graphs: Sequence[fx.Graph],
    constants: Mapping[str, torch.Tensor],
    replaced: Mapping[nn.Module, nn.Module] = MappingProxyType({}),
) -> nn.Module:
    """A copy of a module tree to build a GraphModule around: same keys, order, classes and plain attributes.

    Args:
        module: the root of the tree.
        graphs: what will run in place of its code. Modules that they call are shared with it; those between are shallow copies, so that
            what is added to them stays out of `module`, while parameters and buffers are the same objects.
        constants: tensors that the graphs need besides.
        replaced: modules inside that others stand for from now on.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    called = {modules[str(node.target)] for graph in graphs for node in graph.nodes if node.op == "call_module"}
    root = _Tree(module, called, replaced).root
    if constants:
        holder = nn.Module()
        for name, tensor in constants.items():
            holder.register_buffer(name, tensor, persistent=False)
        root._modules[CONSTANTS] = holder
    return root


def replace_inside(module: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """`module` with other modules in place of some inside it: a copy of itself and of the modules around those, which runs its own code."""
    return _Tree(module, {module}, replaced).root


def build(root: nn.Module, graph: fx.Graph, eval_graph: fx.Graph | None = None) -> StochasticGraphModule:
    """The GraphModule over a tree of its own. Plain attributes of the root carry over, but for names that a GraphModule needs itself."""
    taken = set(dir(fx.GraphModule)) - set(dir(nn.Module)) | _GENERATED
    own = {k: copy.copy(v) for k, v in _graph_module_attributes().items()}
    state = {k: v for k, v in (own | root.__dict__).items() if k not in taken}
    return _fill(_empty(type(root)), state, graph, eval_graph)


def become(module: nn.Module, transformed: nn.Module) -> None:
    """Turns a module into its transformed copy in place, so that every reference to it sees the change.

    The object gets another class, as `torch.distributed.fsdp.fully_shard` gives it one. Its dicts of hooks stay: the handles refer to them.
    """
    module.__class__ = type(transformed)
    state = vars(transformed) | {name: hooks for name, hooks in vars(module).items() if name in _HOOKS}
    vars(module).clear()
    if isinstance(module, StochasticGraphModule) and isinstance(transformed, StochasticGraphModule):
        _fill(module, {k: v for k, v in state.items() if k not in _GENERATED}, transformed.graph, transformed.eval_graph)
    else:
        vars(module).update(state)


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


def _function(graph: fx.Graph) -> Callable[..., Any]:
    """The code of a graph, as a method."""
    source = graph.python_code(root_module="self")
    return _forward_from_src(source.src, source.globals, {})


@cache
def _graph_module_attributes() -> dict[str, Any]:
    """What a GraphModule has besides the attributes of every module."""
    return {k: v for k, v in vars(fx.GraphModule(nn.Module(), fx.Graph())).items() if k not in vars(nn.Module())}


class _Tree:
    """Copies the modules of a tree from the root down to those in `called`, and below these only the ones around replaced modules."""

    def __init__(self, module: nn.Module, called: Set[nn.Module], replaced: Mapping[nn.Module, nn.Module]) -> None:
        self._called, self._replaced = called, replaced
        self._copies: dict[nn.Module, nn.Module] = {}
        self.root = self._copy(module, True)
        if replaced:
            for copied in self._copies.values():
                copied.__dict__.update({k: self._moved(v) for k, v in copied.__dict__.items() if k not in _REGISTERED})

    def _copy(self, module: nn.Module, opened: bool) -> nn.Module:
        if module in self._replaced:
            return self._replaced[module]
        if isinstance(module, StochasticDepth):
            return copy.deepcopy(module, {})  # the rates of two transformed models move apart
        opened = opened and module not in self._called
        if not opened and not (self._replaced and any(inner in self._replaced for inner in module.modules())):
            return module
        if module not in self._copies:
            self._copies[module] = new = object.__new__(type(module))
            new.__dict__.update(module.__dict__)
            for hooks in _HOOKS:
                new.__dict__[hooks] = OrderedDict(module.__dict__.get(hooks) or {})  # no dict: the handles of hooks refer to it weakly
            new.__dict__["_modules"] = {
                name: child if child is None else self._copy(child, opened) for name, child in module._modules.items()
            }
        return self._copies[module]

    def _moved(self, value: Any) -> Any:
        """A plain attribute that refers to a module of the tree: to the one that stands for it."""
        if isinstance(value, nn.Module):
            return self._replaced.get(value, self._copies.get(value, value))
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self._moved(value.__self__))
        if type(value) in (list, tuple):
            moved = [self._moved(item) for item in value]
            return value if all(map(operator.is_, moved, value)) else type(value)(moved)
        if type(value) is dict:
            moved_values = {k: self._moved(item) for k, item in value.items()}
            return value if all(map(operator.is_, moved_values.values(), value.values())) else moved_values
        return value


def _empty(original: type[nn.Module]) -> StochasticGraphModule:
    """An instance of a class of its own, which is given the forward that is generated from its graph.

    It is a subclass of `original` too, and has its methods; of GraphModule alone where Python cannot combine the two.
    """
    if issubclass(original, StochasticGraphModule):
        original = original.original_class
    elif issubclass(original, fx.GraphModule):
        original = nn.Module
    bases = (StochasticGraphModule,) if original is nn.Module else (StochasticGraphModule, original)
    switches = {name: _told_too_late(getattr(original, name)) for name in dir(original) if _switches_checkpointing(original, name)}
    try:
        cls = type(original.__name__, bases, {"original_class": original, **switches})
    except TypeError:
        cls = type(original.__name__, (StochasticGraphModule,), {})
    return cast(StochasticGraphModule, object.__new__(cls))


def _switches_checkpointing(cls: type[nn.Module], name: str) -> bool:
    """Is this a method that switches checkpointing of activations on and off, as its name says, and its argument `enable`?"""
    method = getattr(cls, name, None) if "checkpointing" in name else None
    return inspect.isfunction(method) and list(inspect.signature(method).parameters)[1:2] == ["enable"]


def _told_too_late(switch: Callable[..., Any]) -> Callable[..., Any]:
    """A method that would switch what the graph has fixed already."""

    @wraps(switch)
    def checked(self: StochasticGraphModule, enable: bool = True, *args: Any, **kwargs: Any) -> Any:
        if bool(enable) != is_checkpointed(self.graph):
            raise FxsdError(
                f"whether activations are checkpointed is part of the graph of a transformed {type(self).__name__}: "
                f"switch it {'on' if enable else 'off'} on the original model, and transform that."
            )
        return switch(self, enable, *args, **kwargs)

    return checked


def _fill(gm: StochasticGraphModule, state: dict[str, Any], graph: fx.Graph, eval_graph: fx.Graph | None) -> StochasticGraphModule:
    gm.__dict__.update(state)
    gm.__dict__.pop("forward", None)  # one that was patched onto the original is in the graph
    gm.__dict__["eval_graph"] = eval_graph
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


@dataclass(frozen=True)
class _Function:
    """A function that is made by another one, as `F.max_pool2d` is: pickle looks for those by `__qualname__`, in vain."""

    module: str
    name: str

    def resolve(self) -> Any:
        return getattr(import_module(self.module), self.name)


def _dump(graph: fx.Graph) -> list[tuple[Any, ...]]:
    def refs(args: Any) -> Any:
        return fx.node.map_arg(args, lambda node: cast(Any, _Ref(node.name)))

    def target(node: fx.Node) -> Any:
        found = node.target
        if isinstance(found, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return _TorchOp(str(found))
        module, name = getattr(found, "__module__", None), getattr(found, "__name__", "")
        made = "<locals>" in getattr(found, "__qualname__", "") and getattr(sys.modules.get(str(module)), name, None) is found
        return _Function(str(module), name) if made else found

    kept = ("nn_module_stack", META, MARK)
    return [(n.op, n.name, target(n), refs(n.args), refs(n.kwargs), {k: n.meta[k] for k in kept if k in n.meta}) for n in graph.nodes]


def _load(
    state: dict[str, Any], rows: list[tuple[Any, ...]], eval_rows: list[tuple[Any, ...]] | None, original: type[nn.Module]
) -> StochasticGraphModule:
    return _fill(_empty(original), state, _read(rows), None if eval_rows is None else _read(eval_rows))


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
        target = target.resolve() if isinstance(target, (_TorchOp, _Function)) else target
        node = graph.create_node(op, target, resolve(args), resolve(kwargs), name)
        node.meta.update(meta)
        nodes[name] = node
    return graph
