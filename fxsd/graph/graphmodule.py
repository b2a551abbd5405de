"""The GraphModule that `transform` returns: the model's own module tree around one graph, or one graph a mode.

What runs is the tree, whose modules have ops in their code, until somebody calls `recompile()`; then, and where branches are skipped, the
graph does.

A stock `fx.GraphModule` keeps only what its graph names, loses unused parameters, plain attributes and the classes of
the modules between, and pickles by tracing its own code again, which would freeze `training`. This one keeps the
tree and pickles the graph itself.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from types import MappingProxyType
from typing import Any, cast

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
from fxsd.tree import CONSTANTS, Home, Rewritten, Writing, new_class, ops_of, rebuilt
from fxsd.tree.classes import with_own_functions_as_they_were, write_own
from fxsd.tree.objects import HOOKS, copied, follow
from fxsd.tree.once import once

META = "fxsd"  # the key of fxsd's own entries in node.meta

_GENERATED = {"_graph", "_code", "_lineno_map", "_prologue_start", "eval_graph"}
_RUNS = "_runs_graph"


class StochasticGraphModule(Rewritten, fx.GraphModule):
    """An `fx.GraphModule` with live train and eval modes, which is an instance of the original model's class too. Made by `fxsd.transform`.

    `graph` is the program of the call that was captured; where training and evaluation are different programs, `graph` is the training
    one and `eval_graph` the other, else `eval_graph` is None. Calls run the code of the modules, until `recompile` makes the graph what
    runs.
    """

    eval_graph: fx.Graph | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def recompile(self) -> Any:
        if not self.__dict__[_RUNS]:
            self.__class__ = cast(Any, _class(self.original_class, self.writings))  # one of its own, which is given the graph's forward
            self.__dict__[_RUNS] = True
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
        memo[id(self)] = gm = self._empty()
        eval_graph = None if self.eval_graph is None else copy_graph(self.eval_graph)
        return _fill(gm, copy.deepcopy(self._state(), memo), copy_graph(self.graph), eval_graph)

    def __copy__(self) -> StochasticGraphModule:
        return _fill(self._empty(), self._state(), self.graph, self.eval_graph)

    def _empty(self) -> StochasticGraphModule:
        return _empty(self.original_class, self.writings, runs_graph(self))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        eval_rows = None if self.eval_graph is None else dump(self.eval_graph)
        state = with_own_functions_as_they_were(self, self._state())
        return _empty, (self.original_class, self.writings, runs_graph(self)), (state, dump(self.graph), eval_rows)

    def __setstate__(self, state: Any) -> None:
        attributes, rows, eval_rows = state
        _fill(self, attributes, read(rows), None if eval_rows is None else read(eval_rows))
        write_own(self, self.writings)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.__reduce_ex__(2)

    # That of a GraphModule copies the module, and with it shares dictionaries that replicas fill.
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel

    def _state(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _GENERATED and k != "_compiled_call_impl"}


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
        root._modules[CONSTANTS] = _holder(constants)
    return root


def _holder(constants: Mapping[str, torch.Tensor]) -> nn.Module:
    holder = nn.Module()
    for name, tensor in constants.items():
        holder.register_buffer(name, tensor, persistent=False)
    return holder


def _hold(root: nn.Module, constants: Mapping[str, torch.Tensor]) -> None:
    """Gives a root the tensors of its graph beside its children, which code may run one by one."""
    root.__dict__.pop(CONSTANTS, None)
    if constants:
        root.__dict__[CONSTANTS] = _holder(constants)


def replace_inside(module: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """`module` with other modules in place of some inside it: a copy of itself and of the modules around those, which runs its own code."""
    return _Tree(module, {module}, replaced).root


def build(root: nn.Module, graph: fx.Graph, eval_graph: fx.Graph | None = None) -> StochasticGraphModule:
    """The GraphModule that runs a graph over a tree of its own.

    Plain attributes of the root carry over, but for names that a GraphModule needs itself.
    """
    taken = set(dir(fx.GraphModule)) - set(dir(nn.Module)) | _GENERATED
    own = {k: copy.copy(v) for k, v in _graph_module_attributes().items()}
    state = {k: v for k, v in (own | root.__dict__).items() if k not in taken}
    return _fill(_empty(_of(type(root)), (), True), {**state, _RUNS: True}, graph, eval_graph)


@once
def tree_class(original: type[nn.Module], writings: tuple[Writing, ...]) -> type[nn.Module]:
    """The class of the root of a tree with ops in its code, which has a graph beside. `complete` gives it that.

    Models that are alike share it, so that compiled code of one serves the others.
    """
    return _class(_of(original), writings)


def complete(root: nn.Module, graph: fx.Graph, eval_graph: fx.Graph | None, constants: Mapping[str, torch.Tensor]) -> StochasticGraphModule:
    """Gives a root whose class `tree_class` made its graph, and the tensors that this needs besides."""
    assert isinstance(root, StochasticGraphModule)
    for name, value in _graph_module_attributes().items():
        root.__dict__.setdefault(name, copy.copy(value))
    _hold(root, constants)
    return _fill(root, {_RUNS: False}, graph, eval_graph)


def without_ops(model: nn.Module) -> nn.Module:
    """A model as its author wrote it: of one with ops in its code a copy without, which shares all else; of another one itself."""
    homes = {id(module): Home(module.original_class, (), {}) for module in model.modules() if isinstance(module, Rewritten)}
    if not homes:
        return model
    root = rebuilt(model, homes, {key: home.original for key, home in homes.items()}, lambda original, _: original)
    if isinstance(model, StochasticGraphModule):
        for name in {*_GENERATED, *_graph_module_attributes(), _RUNS}:
            root.__dict__.pop(name, None)
    return root


def runs_graph(module: nn.Module) -> bool:
    """Is a graph what a GraphModule runs?"""
    return not isinstance(module, StochasticGraphModule) or bool(module.__dict__[_RUNS])


def takes_graph(module: nn.Module) -> bool:
    """Can a module have a graph beside, with all that is named so, without losing anything of its own?"""
    needed = {name for name in dir(fx.GraphModule) if not hasattr(nn.Module, name) and not name.startswith("__")} | _GENERATED
    own = {*vars(module), *module._modules, *module._parameters, *module._buffers}
    classes = (cls for cls in type(module).__mro__ if not issubclass(fx.GraphModule, cls) and not issubclass(cls, fx.GraphModule))
    if isinstance(module, StochasticGraphModule):
        own -= {*_GENERATED, *_graph_module_attributes(), _RUNS}
    try:
        tree_class(_of(type(module)), ())
    except TypeError:
        return False
    return needed.isdisjoint(own) and not any(needed.intersection(vars(cls)) for cls in classes if cls is not Rewritten)


def become(module: nn.Module, transformed: nn.Module) -> None:
    """Turns a module into its transformed copy in place, so that every reference to it sees the change.

    The object gets another class, as `torch.distributed.fsdp.fully_shard` gives it one. Its dicts of hooks stay: the handles refer to them.
    """
    module.__class__ = type(transformed)
    state = vars(transformed) | {name: hooks for name, hooks in vars(module).items() if name in HOOKS}
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
            stand_ins = {id(old): new for old, new in (*self._copies.items(), *replaced.items())}
            for new in self._copies.values():
                follow(new, stand_ins)

    def _copy(self, module: nn.Module, opened: bool) -> nn.Module:
        if module in self._replaced:
            return self._replaced[module]
        if isinstance(module, StochasticDepth):
            return copy.deepcopy(module, {})  # the rates of two transformed models move apart
        opened = opened and module not in self._called
        if not opened and not (self._replaced and any(inner in self._replaced for inner in module.modules())):
            return module
        if module not in self._copies:
            ops = ops_of(module)  # a graph runs them, and the author's code
            cls = _of(type(module)) if ops or isinstance(module, StochasticGraphModule) else type(module)
            self._copies[module] = new = copied(module, cls)
            for name in ops:
                del new.__dict__[name]
            new.__dict__["_modules"] = {
                name: child if child is None else self._copy(child, opened) for name, child in {**module._modules, **ops}.items()
            }
        return self._copies[module]


def _of(original: type[nn.Module]) -> type[nn.Module]:
    """The author's class, of a class that may be one of ours."""
    if issubclass(original, Rewritten):
        return original.original_class
    return nn.Module if issubclass(original, fx.GraphModule) else original


def _class(original: type[nn.Module], writings: tuple[Writing, ...]) -> type[nn.Module]:
    """A class of its own, which may be given the forward that is generated from a graph.

    It is a subclass of `original` too, and has its methods.

    Raises:
        TypeError: Python cannot combine the two.
    """
    cls = new_class(original, writings, StochasticGraphModule)
    for name in dir(original):
        if _switches_checkpointing(original, name):
            setattr(cls, name, _told_too_late(getattr(original, name)))
    return cls


def _empty(original: type[nn.Module], writings: tuple[Writing, ...], runs_graph: bool) -> StochasticGraphModule:
    if not runs_graph:
        return cast(StochasticGraphModule, object.__new__(tree_class(original, writings)))
    try:
        cls = _class(original, writings)
    except TypeError:  # a graph needs nothing of the class
        cls = new_class(nn.Module, (), StochasticGraphModule)
        cls.__name__ = cls.__qualname__ = original.__name__
    return cast(StochasticGraphModule, object.__new__(cls))


def _switches_checkpointing(cls: type[nn.Module], name: str) -> bool:
    """Is this a method that switches checkpointing of activations on and off, as its name says, and its argument `enable`?"""
    method = getattr(cls, name, None) if "checkpointing" in name else None
    return inspect.isfunction(method) and list(inspect.signature(method).parameters)[1:2] == ["enable"]


def _told_too_late(switch: Callable[..., Any]) -> Callable[..., Any]:
    """A method that would switch what a graph has fixed already, where one runs."""

    @wraps(switch)
    def checked(self: StochasticGraphModule, enable: bool = True, *args: Any, **kwargs: Any) -> Any:
        if runs_graph(self) and bool(enable) != is_checkpointed(self.graph):
            raise FxsdError(
                f"whether activations are checkpointed is part of the graph of a transformed {type(self).__name__}: "
                f"switch it {'on' if enable else 'off'} on the original model, and transform that."
            )
        return switch(self, enable, *args, **kwargs)

    return checked


def _fill(gm: StochasticGraphModule, state: dict[str, Any], graph: fx.Graph, eval_graph: fx.Graph | None) -> StochasticGraphModule:
    gm.__dict__.update(state)
    gm.__dict__["eval_graph"] = eval_graph
    if eval_graph is not None:
        eval_graph.owning_module = gm
    if runs_graph(gm):
        gm.__dict__.pop("forward", None)  # one that was patched onto the original is in the graph
        gm.graph = graph
        return gm
    graph.owning_module = gm
    code = graph.python_code(root_module="self")
    # Dynamo looks for all of these where the code of a GraphModule breaks its graph.
    gm.__dict__.update(_graph=graph, _code=code.src, _lineno_map=code._lineno_map, _prologue_start=getattr(code, "_prologue_start", 0))
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


def dump(graph: fx.Graph) -> list[tuple[Any, ...]]:
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


def read(rows: list[tuple[Any, ...]]) -> fx.Graph:
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
