"""What the values of a trace are for one example call: computed on fake tensors, and only when Python asks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fxsd.capture.calls import without_values
from fxsd.capture.leftovers import take_out_what_is_left
from fxsd.capture.modes import in_mode


def computed(node: fx.Node, known: Mapping[fx.Node, Any], call_module: Callable[[str, Any, Any], Any]) -> Any:
    """What a call gives, from the values of what enters it. `call_module` is given a path, args and kwargs."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return call_module(str(node.target), args, kwargs)


class Examples:
    """The values of a graph's nodes under example inputs, as fake tensors and plain Python values.

    Args:
        root: the model that is traced.
        inputs: placeholder name -> example value.
        constants: tensors made while tracing, by the last part of their name.
        training: what `training` flags are.
        aside: a context inside which calls reach torch and the model instead of the trace.
        fakes: of the values.
    """

    def __init__(
        self,
        root: nn.Module,
        inputs: dict[str, Any],
        constants: dict[str, torch.Tensor],
        training: bool,
        aside: Callable[[], AbstractContextManager[None]],
        fakes: FakeTensorMode,
    ) -> None:
        self._root, self._inputs, self._constants, self._training, self._aside = root, inputs, constants, training, aside
        self._mode = fakes
        self._values: dict[fx.Node, Any] = {}
        self._made: list[weakref.ref[torch.Tensor]] = []

    def value(self, node: fx.Node) -> Any:
        """The value of `node`; raises whatever computing it raises."""
        stack = [node]
        while stack:
            missing = [arg for arg in stack[-1].all_input_nodes if arg not in self._values]
            if stack[-1] in self._values:
                stack.pop()
            elif missing:
                stack.extend(missing)
            else:
                current = stack.pop()
                with self._aside(), self._mode:
                    self._values[current] = self._compute(current)
        return self._values[node]

    def close(self) -> None:
        """There are no more questions: what modules that ran have kept of these values, in caches outside of the model, is taken out."""
        self._values.clear()
        take_out_what_is_left(self._made)

    def forget(self, node: fx.Node) -> None:
        self._values.pop(node, None)

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return without_values(self._inputs[str(node.target)], self._mode)  # a copy: the forward may write into it
        if node.op == "get_attr":
            return self._fake(self.attribute(str(node.target)))
        return computed(node, self._values, self._call)

    def _call(self, path: str, args: Any, kwargs: Any) -> Any:
        module = self._root.get_submodule(path)
        state = {name: self._fake(t) for name, t in (*module.named_parameters(), *module.named_buffers())}
        try:
            with in_mode(module, self._training):
                return self._run(module, state, args, kwargs)
        except Exception:
            with in_mode(module, False):  # what a module only looks at in training, NaNs for example, has no say in shapes
                return self._run(module, state, args, kwargs)

    def _run(self, module: nn.Module, state: dict[str, Any], args: Any, kwargs: Any) -> Any:
        if type(module).__module__.startswith("torch."):
            return torch.func.functional_call(module, state, args, kwargs)
        with _Noted(self._made):
            result = torch.func.functional_call(module, state, args, kwargs)
        # Others, lest what it returns be in a cache too.
        return tree_map_only(torch.Tensor, lambda tensor: tensor if tensor.requires_grad else tensor.detach(), result)

    def attribute(self, name: str) -> Any:
        """What a `get_attr` node stands for."""
        path, _, last = name.rpartition(".")
        if last == "training":
            return self._training
        if last in self._constants:
            return self._constants[last]
        return getattr(self._root.get_submodule(path), last)

    def _fake(self, value: Any) -> Any:
        def fake(tensor: torch.Tensor) -> torch.Tensor:
            fake = self._mode.from_tensor(tensor)
            # Views of what asks for a gradient, made while there are none, stop the module tracker of the flop counter.
            return fake if torch.is_grad_enabled() else fake.detach()

        return tree_map_only(torch.Tensor, fake, value)


class _Noted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds the tensors that are made to a list."""

    def __init__(self, made: list[weakref.ref[torch.Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made = made

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._made += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result
