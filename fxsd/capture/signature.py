"""The root's placeholders: which arguments stay live and which keep the value they have in the example call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxsd.errors import FxsdError

ExampleInputs = "tuple[Any, ...] | Mapping[str, Any] | None"


def check_bound(value: Any, expected: Any, name: str) -> None:
    """Stands in the captured graph for an argument whose value shaped the graph.

    Raises:
        FxsdError: the argument has another value than the one the model was captured with.
    """
    if value is not expected and (isinstance(value, torch.Tensor) or value != expected):
        raise FxsdError(
            f"the model was captured with {name}={expected!r}, and takes no other value; "
            f"pass example_inputs with {name} to fxsd.transform to capture that call."
        )


def bind(forward: Callable[..., Any], example_inputs: Any) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """Reads the signature of the root.

    Returns:
        `(parameters, bound)`: the parameters in order, `*args` spelt out as far as the example goes and `**kwargs` left out;
        and the values of those that are fixed: defaults that the example call does not supply, and example values that hold no tensor.

    Raises:
        FxsdError: the example inputs do not fit the signature.
    """
    signature = inspect.signature(forward)
    given: dict[str, Any] = {}
    if example_inputs is not None:
        args, kwargs = as_call(example_inputs)
        try:
            given = dict(signature.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise FxsdError(f"example_inputs do not fit the model's forward{signature}: {error}.") from error
    parameters, bound = [], {}
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            for name, value in given.get(parameter.name, {}).items():
                parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY))
                if not holds_tensor(value):
                    bound[name] = value
            continue
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            if example_inputs is None:
                raise FxsdError(f"the model's forward takes *{parameter.name}; pass example_inputs, so that their number is known.")
            for index in range(len(given.get(parameter.name, ()))):
                parameters.append(inspect.Parameter(f"{parameter.name}_{index}", inspect.Parameter.POSITIONAL_ONLY))
            continue
        parameters.append(parameter)
        if parameter.name in given:
            if not holds_tensor(given[parameter.name]):
                bound[parameter.name] = given[parameter.name]
        elif parameter.default is not inspect.Parameter.empty:
            bound[parameter.name] = parameter.default
    return parameters, bound


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`example_inputs` as the `(args, kwargs)` of a call."""
    if isinstance(example_inputs, torch.Tensor):
        raise FxsdError("example_inputs must be a tuple of args or a dict of kwargs, but got a Tensor; write (x,).")
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise FxsdError(f"example_inputs must be a tuple of args or a dict of kwargs, but got {type(example_inputs).__name__}.")


def holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, (torch.Tensor, nn.Module)) for leaf in torch.utils._pytree.tree_leaves(value))
