"""A run of a model as a graph: every call of torch that it makes, by whatever Python.

Nothing is traced: the model runs on real tensors, so that nothing in it stops the recording, neither decisions on values nor side effects,
and what hides an add from a reader (helpers, children that are handed both operands, caches) does not hide it here. The graph is to be
read, not run: it holds what one call did, with sizes as numbers.
"""

from __future__ import annotations

import copy
import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from fxsd.capture.calls import Call
from fxsd.capture.composites import COMPOSITES
from fxsd.capture.modes import in_mode
from fxsd.capture.patches import Apply
from fxsd.capture.proxies import assign_item, assign_property
from fxsd.find.residual import is_add
from fxsd.find.values import written
from fxsd.tree import PLACE, Frames

SHAPE = "fxsd_shape"  # the key of a tensor's shape in node.meta
_GET, _SET = "__get__", "__set__"


@dataclass(frozen=True)
class Observed:
    """What was seen of one run.

    Attributes:
        graph: the calls, in order; targets are paths in the model.
        training: in which mode it ran.
        error: what ended the run too early, if something did.
        doubled: the same of a run with twice as many samples, for the shapes.
    """

    graph: fx.Graph
    training: bool
    error: Exception | None = None
    doubled: fx.Graph | None = None


def observe(model: nn.Module, call: Call, training: bool, leaves: Sequence[str] = ()) -> Observed:
    """Runs `model` once, without gradients, and records it.

    Args:
        model: its attributes may change; its buffers do not.
        call: what to run it on.
        training: the mode.
        leaves: paths of modules to keep as calls.
    """
    recorder = _Recorder(model, training, leaves)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    failure: Exception | None = None
    args, kwargs = copy.deepcopy(tree_map_only(Tensor, Tensor.detach, call))  # what has a history cannot be copied
    try:
        with (
            in_mode(model, training),
            torch.no_grad(),
            _no_fast_paths(),
            torch.nn.utils.stateless._reparametrize_module(model, buffers),
            recorder.recording(args, kwargs, buffers),
        ):
            recorder.end(model(*args, **kwargs))
    except Exception as error:  # the model's own code
        failure = error
    finally:
        recorder.close()
    return Observed(recorder.graph, training, failure)


@contextmanager
def _no_fast_paths() -> Iterator[None]:
    """Inside, torch's own layers add in Python."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, training: bool, leaves: Sequence[str]) -> None:
        super().__init__()
        self.model, self.training, self.graph = model, training, fx.Graph()
        modules = dict(model.named_modules())
        self.paths = {id(module): path for path, module in modules.items()}
        self.leaves = set(leaves)
        self.frames = Frames(modules)
        self.stack: OrderedDict[str, tuple[str, Any]] = OrderedDict()
        self.times: dict[str, int] = {}
        self.aside = 0  # inside of a call that is recorded as one
        self.known: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        self.weights: dict[int, str] = {}

    @contextmanager
    def recording(self, args: Any, kwargs: Any, buffers: dict[str, Tensor]) -> Iterator[None]:
        self.weights = {id(tensor): name for name, tensor in (*self.model.named_parameters(), *buffers.items())}
        for place, leaf in enumerate(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)):
            self._know(leaf, self.graph.placeholder(f"input_{place}"))
        original, apply = nn.Module.__call__, vars(torch.autograd.Function)["apply"]

        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._module(original, module, args, kwargs)

        def applied(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
            return self._whole(apply.__get__(None, cls), Apply(cls), args, kwargs)

        try:
            nn.Module.__call__ = called  # type: ignore[method-assign]
            torch.autograd.Function.apply = classmethod(applied)
            with self:
                yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]
            torch.autograd.Function.apply = apply

    def end(self, result: Any) -> None:
        self.graph.output(tree_map_only(Tensor, self._node, tuple(self._tensors(result))))

    def close(self) -> None:
        self.frames.close()
        self.known.clear()

    # --- what is recorded -------------------------------------------------------------------------------------------

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not self.aside:
            self._function(function, args, kwargs, result)
        return result

    def _function(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = getattr(function, "__name__", "")
        if name == _SET or name == "__setitem__":
            node = self._create("call_function", assign_property if name == _SET else assign_item, args, kwargs)
            self._know(args[0], node)
            return
        if not self._tensors(result):
            return
        if name == _GET:
            node = self._create("call_function", getattr, (args[0], getattr(function.__self__, "__name__", "")), {})
        elif getattr(Tensor, name, None) is function:
            node = self._create("call_method", name, args, kwargs)
        else:
            node = self._create("call_function", function, args, kwargs)
        if is_add(node):
            node.meta[PLACE] = self.frames.here(self._owner())
        self._results(node, result)
        if written(node) is not None and isinstance(args[0], Tensor):
            self._know(args[0], node)

    def _module(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        path = self.paths.get(id(module))
        if self.aside or path is None:
            return call(module, *args, **kwargs)
        with self._inside(path, module):
            if self._is_leaf(path, module):
                return self._whole(lambda *args, **kwargs: call(module, *args, **kwargs), path, args, kwargs)
            result = call(module, *args, **kwargs)
            unknown = [tensor for tensor in self._tensors(result) if self._found(tensor) is None and id(tensor) not in self.weights]
            if unknown:  # made by what is not Python
                self._results(self._create("call_module", path, args, kwargs), result)
            return result

    def _whole(self, call: Callable[..., Any], target: Any, args: Any, kwargs: Any) -> Any:
        """Runs what is one call in the graph."""
        before = self._tensors((args, kwargs))
        self.aside += 1
        try:
            result = call(*args, **kwargs)
        finally:
            self.aside -= 1
        if not self.aside and self._tensors(result) and before:
            kind = "call_module" if isinstance(target, str) else "call_function"
            self._results(self._create(kind, target, args, kwargs), result)
        return result

    def _is_leaf(self, path: str, module: nn.Module) -> bool:
        if path in self.leaves or isinstance(module, torch.jit.ScriptModule) or "_orig_mod" in module._modules:
            return True
        if "parametrizations" in module._modules and parametrize.is_parametrized(module):
            return True
        return type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, COMPOSITES)

    @contextmanager
    def _inside(self, path: str, module: nn.Module) -> Iterator[None]:
        times = self.times[path] = self.times.get(path, -1) + 1
        key = f"{path}@{times}" if times else path
        self.stack[key] = (path, type(module))
        try:
            yield
        finally:
            self.stack.pop(key, None)

    def _owner(self) -> str:
        return str(next(reversed(self.stack.values()))[0]) if self.stack else ""

    # --- values -----------------------------------------------------------------------------------------------------

    def _create(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        args, kwargs = self._argument(args), self._argument(kwargs)
        node = self.graph.create_node(kind, target, tuple(args), dict(kwargs))
        node.meta["nn_module_stack"] = OrderedDict(self.stack)
        return node

    def _argument(self, value: Any) -> Any:
        """A value as an argument of a node: what is no tensor, and no number or name, plays no part."""
        if isinstance(value, Tensor):
            return self._node(value)
        if isinstance(value, (tuple, list)):
            return [self._argument(item) for item in value] if isinstance(value, list) else tuple(self._argument(item) for item in value)
        if isinstance(value, dict):
            return {str(key): self._argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(part if isinstance(part, int) else None for part in (value.start, value.stop, value.step)))
        if isinstance(value, (bool, int, float, complex, str, type(None), torch.dtype, torch.device, type(...))):
            return value
        tensors = self._tensors(value)
        return [self._node(tensor) for tensor in tensors] if tensors else None

    def _node(self, tensor: Tensor) -> fx.Node:
        found = self._found(tensor)
        if found is None:
            name = self.weights.get(id(tensor), "constant")
            found = fx.Graph.create_node(self.graph, "get_attr", name)
            self._know(tensor, found)
        return found

    def _found(self, tensor: Tensor) -> fx.Node | None:
        known = self.known.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def _know(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta.setdefault(SHAPE, tuple(tensor.shape))
        self.known[id(tensor)] = weakref.ref(tensor), node

    def _results(self, node: fx.Node, result: Any) -> None:
        if isinstance(result, Tensor):
            self._know(result, node)
            return
        leaves, _ = tree_flatten(result)
        leaves = leaves if any(isinstance(leaf, Tensor) for leaf in leaves) else self._tensors(result)
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and (self._found(leaf) is None or leaf.numel() > 0):
                part = self.graph.call_function(operator.getitem, (node, place))
                part.meta["nn_module_stack"] = node.meta["nn_module_stack"]
                self._know(leaf, part)

    def _tensors(self, value: Any) -> list[Tensor]:
        """The tensors in a value, those in the attributes of plain objects included."""
        found: list[Tensor] = []
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif isinstance(leaf, dict):  # a ModelOutput that pytree does not know
                found += self._tensors(list(leaf.values()))
        return found
