"""nn.Module -> fx.Graph, by running the model's Python once on proxies."""

from __future__ import annotations

import inspect
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from typing import Any

import numpy
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.proxy import TracerBase
from torch.nn.utils import parametrize

from fxsd.capture.calls import Call, is_plain
from fxsd.capture.composites import COMPOSITES
from fxsd.capture.examples import Examples
from fxsd.capture.guards import check_bound, check_decision, check_given
from fxsd.capture.leftovers import take_out_what_is_left
from fxsd.capture.modes import Flag, live_training
from fxsd.capture.objects import Constant, MakeObject, is_made_of_attributes, set_attribute
from fxsd.capture.patches import (
    KeepsState,
    Untraceable,
    noticed_contexts,
    noticed_draws,
    random_states,
    recorded_autograd_functions,
    recorded_checkpoints,
    recorded_functions,
)
from fxsd.capture.proxies import Attribute, Value, Weight, itself, known_types
from fxsd.capture.signature import bind
from fxsd.capture.snapshot import Snapshot
from fxsd.capture.source import failing_line, this_line
from fxsd.capture.trace import Trace
from fxsd.errors import CaptureError, FxsdError
from fxsd.find.residual import is_add
from fxsd.find.values import is_reading, is_size, op_name
from fxsd.graph.checkpoints import MARK, Checkpoint
from fxsd.tree import CONSTANTS, PLACE, Frames

_FIXED = ("dim", "dtype", "layout", "ndim", "ndimension", "type")  # what a tensor is, whatever its size; `type` of its device
_SIZES = (int, float, bool, torch.Size, torch.dtype, torch.device)
_PLAIN = {tuple, list, dict, slice, str, int, float, bool, type(None)}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Tracer(Trace):
    """Traces a model whole, with three differences from `fx.Tracer`.

    - `training` stays live (see `modes`); `branched` names the modules whose Python decided on it.
    - A submodule that cannot be traced becomes a leaf. `broken` says why if residual adds are out of reach in it, `opaque` if not.
      One that must be called, since it has hooks, is a leaf too; `apart` has those with residual adds inside.
    - Nothing is written to the model; `constants` collects the tensors that are made while tracing.

    Paths are those in the whole model, but for the targets of nodes, which start at the module that is traced.

    Args:
        snapshot: of the whole model; it takes back what a failed attempt left in the attributes of a module.
        path: of the module that will be traced in the whole model.
        leaves: paths of modules to keep as calls.
        training: the mode that Python decisions on `self.training` see.
        hides_sites: told a module that failed, returns how many residual adds would be out of reach inside it.
        constants: where to put tensors that are made while tracing.
        fakes: of the example values.
        modules: path -> module of the whole model, to note where adds run.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        snapshot: Snapshot,
        path: str = "",
        leaves: Set[str] = frozenset(),
        training: bool = True,
        hides_sites: Callable[[nn.Module], int] = lambda module: 0,
        constants: dict[str, torch.Tensor] | None = None,
        fakes: FakeTensorMode | None = None,
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self._frames = None if modules is None else Frames(modules)
        self.path, self.leaves, self.training, self.hides_sites, self.snapshot = path, leaves, training, hides_sites, snapshot
        self.fakes = fakes
        self.branched: dict[str, None] = {}
        self.opaque: dict[str, str] = {}
        self.broken: dict[str, str] = {}
        self.apart: set[str] = set()
        # For the caller to say: modules to whose attributes the trace has written, and what they keep so for their next call.
        self.changed: set[str] = set()
        self.kept: dict[nn.Module, dict[str, Any]] = {}
        self.constants: dict[str, torch.Tensor] = {} if constants is None else constants
        self._attributes: dict[str, Value] = {}
        self._values: list[weakref.ref[Value]] = []
        self.is_open = True
        self._returning = False
        self._open: set[int] = set()  # objects that are being made
        self._flags: dict[str, fx.Proxy] = {}
        self.examples: Examples | None = None
        self._decided: dict[tuple[fx.Node, Callable[[Any], Any]], Any] = {}
        self._targets: dict[Any, Any] = {}
        self.set_aside = False
        self.checkpoint: Checkpoint | None = None  # what is traced now runs under it
        self._checkpoints = 0
        self.journal: list[tuple[Any, fx.Node | None]] = []  # values whose node has changed, and the one before

    def trace_model(self, root: nn.Module, call: Call | None) -> fx.Graph:
        """Traces `root`. The caller restores the model (see `snapshot`)."""
        self._call = call
        self._names = {id(t): n for n, t in [*root.named_parameters(), *root.named_buffers()]}
        with ExitStack() as stack:
            self._read_flag: Callable[[nn.Module], Any] = lambda module: module.__dict__["training"]
            stack.enter_context(live_training(lambda module: self._read_flag(module)))
            stack.enter_context(recorded_functions(self))
            stack.enter_context(recorded_autograd_functions(self))
            stack.enter_context(torch.enable_grad())  # Python that asks shall not take this for a run that trains nothing
            stack.enter_context(noticed_contexts(self))
            stack.enter_context(noticed_draws(self))
            stack.enter_context(recorded_checkpoints(self))
            stack.enter_context(known_types(self))
            fastpath = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
            before = random_states()
            try:
                graph = self.trace(root)
                if random_states() != before:
                    raise Untraceable("it draws random numbers, which the graph would draw once and for all")
            except FxsdError:  # the call does not fit
                raise
            except Exception as error:
                raise CaptureError(self._why(self.path, root, error)) from _without_locals(error)
        place_in_model(graph, self.path, type(root))
        for node in reversed(graph.nodes):
            if not node.users and is_reading(node):
                graph.erase_node(node)
        return graph

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        root = self.root
        own = root.__dict__.get("forward")  # a forward patched onto the instance is the one that runs
        target = own or root.forward
        binding = bind(target, self._call)
        if self._call is not None:
            fakes = self.fakes or FakeTensorMode(allow_non_fake_inputs=True)
            self.examples = Examples(root, binding.example, self.constants, self.training, self._aside, fakes)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in binding.parameters:
            name = parameter.name
            default = () if parameter.default is inspect.Parameter.empty else (parameter.default,)
            if not default and any(node.args for node in self.graph.nodes):
                default = (None,)  # Python wants a default after the first one
            value: Any = self.create_proxy("placeholder", name, default, {})
            if name in binding.fixed:
                fixed = binding.fixed[name]
                if self._recordable(fixed):
                    self.create_proxy("call_function", check_bound, (value, fixed, name), {})
                value = fixed
            elif default and self._recordable(default[0]):
                self.create_proxy("call_function", check_given, (value, default[0], name), {})
            # An argument that the call leaves out stays left out: decorators tell the difference.
            if name in binding.positional:
                args.append(value)
            elif name in binding.given or not default:
                kwargs[name] = value
        self._read_flag = self._flag

        def run(*values):  # type: ignore[no-untyped-def]  # its annotations would show in the generated code
            result = target(*values, **kwargs)
            self._set_attributes()
            self._returning = True
            return result

        return run, args

    def _set_attributes(self) -> None:
        """Records that modules hold the tensors that their forwards have put in their attributes. The root is no value of a graph."""
        for module, path in (self.submodule_paths or {}).items():
            values = [(name, value) for name, value in module.__dict__.items() if type(value) in (Value, Attribute)]
            tensors = [(name, value) for name, value in values if not is_size(value.node)]
            if path and tensors:
                owner = self.create_proxy("get_attr", path, (), {})
                for name, value in tensors:
                    self.create_proxy("call_function", set_attribute, (owner, name, value), {})

    @staticmethod
    def _recordable(value: Any) -> bool:
        leaves = torch.utils._pytree.tree_leaves(value)
        return all(leaf is None or isinstance(leaf, (bool, int, float, str)) for leaf in leaves)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return self._made(Value(node, self))

    def _made(self, value: Value) -> Value:
        self._values.append(weakref.ref(value))
        return value

    def close(self) -> None:
        """The trace is over: nobody outside of it may keep its values."""
        self.is_open = False
        if self._frames is not None:
            self._frames.close()
        self._attributes.clear()
        self.journal.clear()
        if self.examples is not None:
            self.examples.close()
        take_out_what_is_left(self._values)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        # The code generator of torch 2.7 takes equal targets, such as two `Constant`s, only if they are the same object.
        node = super().create_node(kind, self._targets.setdefault(target, target), *args, **kwargs)
        if self.checkpoint:
            node.meta[MARK] = self.checkpoint
        if self._frames is not None and is_add(node):
            node.meta[PLACE] = self._frames.here(self._in_model(next(reversed(self.module_stack.values()))[0] if self.module_stack else ""))
        return node

    # --- where Python must know a value -----------------------------------------------------------------------------

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.decide(obj, bool))

    def iter(self, obj: Any) -> Iterator[Any]:
        return (obj[i] for i in range(len(obj)))

    def keys(self, obj: fx.Proxy) -> Any:
        return list(self.known(obj))

    def decide(self, obj: fx.Proxy, kind: Callable[[Any], Any]) -> Any:
        """The value of `obj` as a `kind`, which the graph then takes for granted and checks."""
        known = self.known(obj)
        if isinstance(known, torch.Tensor):
            raise Untraceable(f"{kind.__name__}() of a tensor: it decides on values, which differ from call to call.")
        node = obj.node
        if (node, kind) not in self._decided:
            self._decided[node, kind] = kind(known)
            self.create_node("call_function", check_decision, (node, self._decided[node, kind], this_line()), {})
        return self._decided[node, kind]

    def is_a(self, obj: Value, classes: Any) -> bool:
        """Does `obj` stand for an instance of `classes`?"""
        if self.examples is not None:
            return isinstance(self.known(obj), classes)
        answers = {issubclass(kind, classes) for kind in self._kinds(obj.node)}
        if len(answers) > 1:
            raise Untraceable("it asks of which type a value is")
        return answers.pop()

    def _kinds(self, node: fx.Node) -> tuple[type, ...]:
        """What a value may be if there is no example."""
        if is_size(node):
            return _SIZES
        if node.op != "call_module":
            return (torch.Tensor,)
        module = self.root.get_submodule(str(node.target))
        plain = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, (nn.RNNBase, nn.MultiheadAttention))
        return (torch.Tensor,) if plain else (torch.Tensor, tuple, dict)

    def hashed(self, obj: Value, as_argument: bool) -> int:
        """Tensors are looked up in a set or a dictionary as the objects that they are, all else by value.

        Args:
            as_argument: of a call. A size is the object that it is there too.
        """
        if not self.is_open or (as_argument and is_size(obj.node) and op_name(obj.node) not in _FIXED):
            return object.__hash__(obj)
        if not (is_size(obj.node) if self.examples is None else is_plain(self.known(obj))):
            return object.__hash__(obj)
        return hash(self.decide(obj, itself))

    def known(self, obj: fx.Proxy) -> Any:
        """The value of `obj` in the example call."""
        if self.examples is None:
            raise Untraceable("it decides on a value of the trace.")
        return self.examples.value(obj.node)

    @contextmanager
    def checkpointed(self, options: dict[str, Any]) -> Iterator[None]:
        """Inside, what is recorded runs under `torch.utils.checkpoint`."""
        if self.checkpoint:
            raise Untraceable("it checkpoints activations inside a checkpoint")
        self.checkpoint = Checkpoint(self._checkpoints, options)
        self._checkpoints += 1
        try:
            yield
        finally:
            self.checkpoint = None

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Inside, calls reach torch and the model as if nothing were traced."""
        before, self.set_aside = self.set_aside, True
        try:
            yield
        finally:
            self.set_aside = before

    # --- what is a leaf ---------------------------------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        path = self._in_model(module_qualified_name)
        if path in self.leaves:
            return True
        # A module answers slowly that it has no such attribute, and every one is asked.
        if any(map(m.__dict__.get, _HOOKS)) or ("parametrizations" in m._modules and parametrize.is_parametrized(m)):
            reason = "has hooks or parametrizations, which run only when it is called"
        elif isinstance(m, torch.jit.ScriptModule) or "_orig_mod" in m._modules:
            reason = "is compiled"
        else:
            reason = None
        if reason and next(m.children(), None):
            if self.hides_sites(m):
                self.apart.add(path)
            else:
                self.opaque[path] = f"module {path!r} ({type(m).__name__}) {reason}"
        if reason:
            return True
        return super().is_leaf_module(m, module_qualified_name) and not isinstance(m, COMPOSITES)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.set_aside:
            return forward(*args, **kwargs)
        path = self.submodule_paths.get(m) if self.submodule_paths else None
        if path is None:
            return self._call_unregistered(m, forward, args, kwargs)
        nodes, written, depth = len(self.graph.nodes), len(self.journal), len(self.module_stack)
        try:
            result = super().call_module(m, forward, args, kwargs)
            if (keeps := self.snapshot.written(m)) and not self.hides_sites(m):
                raise KeepsState(keeps)
            return result
        except Exception as error:
            path = self._in_model(path)
            kept = self.broken if self.hides_sites(m) else self.opaque
            kept[path] = self._why(path, m, error)
            self._roll_back(nodes, written, depth)
            self.snapshot.restore(m)
            self.leaves |= {path}
            return super().call_module(m, forward, args, kwargs)

    def _call_unregistered(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module made inside a forward, `nn.Softmax(-1)(x)`: its ops are its caller's."""
        if next(m.parameters(), None) is not None or next(m.buffers(), None) is not None:
            raise Untraceable(f"it calls a {type(m).__name__} that is not one of its submodules")
        return forward(*args, **kwargs)

    def _roll_back(self, nodes: int, written: int, depth: int) -> None:
        """Takes back all but the first so many nodes, entries of the journal and modules on the stack."""
        while len(self.journal) > written:
            value, node = self.journal.pop()
            value.node = node
        erased = set()
        while len(self.graph.nodes) > nodes:
            node = next(iter(reversed(self.graph.nodes)))
            self.graph.erase_node(node)
            erased.add(node)
            if self.examples:
                self.examples.forget(node)
        for cache in (self._attributes, self._flags):
            for key in [key for key, proxy in cache.items() if proxy.node in erased]:
                del cache[key]
        for decided in [key for key in self._decided if key[0] in erased]:
            del self._decided[decided]
        while len(self.module_stack) > depth:
            self.module_stack.popitem()

    # --- attributes and constants -----------------------------------------------------------------------------------

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if self.set_aside:
            return attr_val
        name = self._names.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if name is None:
            return attr_val
        if name not in self._attributes:
            node = self.create_node("get_attr", name, (), {})
            self._attributes[name] = self._made(Weight(node, self, attr_val))
        return self._attributes[name]

    def create_arg(self, a: Any) -> Any:
        if type(a) in _PLAIN:  # `fx.Tracer` asks first whether it is a parameter, a module, an opaque object
            return TracerBase.create_arg(self, a)
        if isinstance(a, fx.Proxy):
            if a.node._erased:
                raise Untraceable("it uses a value that a module, which cannot be traced, has left behind")
            return a.node
        if isinstance(a, dict) and type(a) is not dict:  # a ModelOutput, an OrderedDict: built again as what it is
            items = {k: self.create_arg(v) for k, v in a.items()}
            return self.create_node("call_function", type(a), *(((), items) if is_dataclass(a) else ((items,), {})))
        if isinstance(a, FakeTensor):
            raise Untraceable("it hands on a tensor that a hook or another side effect of a module has kept")
        if isinstance(a, torch.Tensor):
            name = self._names.get(id(a)) or self.tensor_attrs.get(a)
            if name is None:
                name = f"{CONSTANTS}.{self._constant(a.detach())}"
                self.tensor_attrs[a] = name
            return self.create_node("get_attr", name, (), {})
        if isinstance(a, type):
            return self.create_node("call_function", Constant(a), (), {})
        if isinstance(a, (numpy.generic, numpy.ndarray)):
            return self.create_arg(a.item() if a.ndim == 0 else torch.from_numpy(a.copy()))
        if is_made_of_attributes(a) and not is_dataclass(a):
            if not self._returning:  # what is called would change a copy
                raise Untraceable(f"it passes on a {type(a).__name__} of its own making")
            if id(a) in self._open:
                raise Untraceable(f"it returns a {type(a).__name__} that refers to itself")
            self._open.add(id(a))
            try:
                return self.create_node("call_function", MakeObject(type(a)), (self.create_arg(vars(a)),), {})
            finally:
                self._open.remove(id(a))
        return super().create_arg(a)

    def _constant(self, tensor: torch.Tensor) -> str:
        """The name of a tensor made while tracing: that of an equal one that an earlier trace made."""
        for name, known in self.constants.items():
            alike = known.dtype == tensor.dtype and known.device == tensor.device and not tensor.is_meta and torch.equal(known, tensor)
            if alike and f"{CONSTANTS}.{name}" not in self.tensor_attrs.values():
                return name
        name = f"constant{len(self.constants)}"
        self.constants[name] = tensor
        return name

    def _flag(self, module: nn.Module) -> Any:
        path = self.submodule_paths.get(module) if self.submodule_paths else None
        if path is None or self.set_aside:
            return module.__dict__.get("training", True)
        if path not in self._flags:
            node = self.create_node("get_attr", f"{path}.training" if path else "training", (), {})

            def decide() -> bool:
                self.branched[self._in_model(path)] = None
                return self.training

            self._flags[path] = Flag(node, self, decide)
        return self._flags[path]

    def _in_model(self, path: str) -> str:
        return ".".join(filter(None, (self.path, path)))

    def _why(self, path: str, module: nn.Module, error: Exception) -> str:
        where = named(path, module)
        if isinstance(error, KeepsState):
            return f"{where} {error}"
        cause = (str(error).splitlines()[0] if str(error) else type(error).__name__).removesuffix(".")
        tensor_ops = "write this line with tensor ops"
        if self._call is None:
            way_out = f"Pass example_inputs if the decision rests on shapes or on optional arguments; otherwise {tensor_ops}"
        else:
            way_out = f"To have it captured, {tensor_ops}"
        return f"{where} stopped tracing at {failing_line(error)}: {cause}. {way_out}, or keep the module out of the forward."


def named(path: str, module: nn.Module) -> str:
    return f"module {path!r} ({type(module).__name__})" if path else f"the model ({type(module).__name__})"


def place_in_model(graph: fx.Graph, path: str, cls: type[nn.Module]) -> None:
    """Makes the metadata of a graph, which was traced from the module at `path`, speak of the whole model."""
    if not path:
        return
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        inside = {f"{path}.{key}": (f"{path}.{name}", kind) for key, (name, kind) in stack.items()}
        node.meta["nn_module_stack"] = {path: (path, cls), **inside}


def _without_locals(error: Exception) -> Exception:
    """The same error, which no longer keeps alive what the functions it went through held."""
    chain: list[BaseException | None] = [error]
    for current in chain:
        if current is not None:
            traceback.clear_frames(current.__traceback__)
            chain += [other for other in (current.__cause__, current.__context__) if not any(other is one for one in chain)]
    return error
