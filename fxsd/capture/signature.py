"""The root's placeholders: which arguments stay live and which keep the value they have in the example call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

from fxsd.capture.calls import Call, is_plain
from fxsd.errors import FxsdError


@dataclass(frozen=True)
class Binding:
    """The root's parameters in order, `*args` spelt out as far as the example goes and `**kwargs` by name.

    Attributes:
        parameters: what becomes a placeholder each.
        fixed: values of those that are not live: defaults that the example call does not supply, and plain example values.
        example: values of the others in the example call, if there is one.
        positional: names of the arguments that the call passes by position.
        given: names of all that it passes.
    """

    parameters: list[inspect.Parameter]
    fixed: dict[str, Any]
    example: dict[str, Any]
    positional: Set[str]
    given: Set[str]


def bind(forward: Callable[..., Any], call: Call | None) -> Binding:
    """Reads the signature of the root against the example call.

    Raises:
        FxsdError: the example inputs do not fit the signature.
    """
    signature = inspect.signature(forward)
    given: dict[str, Any] = {}
    by_keyword: Set[str] = set()
    if call is not None:
        args, kwargs = call
        try:
            given = dict(signature.bind(*args, **kwargs).arguments)
            by_keyword = kwargs.keys()
        except TypeError as error:
            raise FxsdError(f"example_inputs do not fit the model's forward{signature}: {error}.") from error
    parameters: list[inspect.Parameter] = []
    fixed: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            extra = given.pop(parameter.name, {})
            given |= extra
            parameters.extend(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra)
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            if call is None:
                raise FxsdError(f"the model's forward takes *{parameter.name}; pass example_inputs, so that their number is known.")
            extra = {f"{parameter.name}_{i}": value for i, value in enumerate(given.pop(parameter.name, ()))}
            given |= extra
            parameters.extend(inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in extra)
        else:
            parameters.append(parameter)
            if parameter.name not in given and parameter.default is not inspect.Parameter.empty:
                fixed[parameter.name] = parameter.default
    if call is None:
        given = {p.name: None for p in parameters if p.name not in fixed}
        by_keyword = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        return Binding(parameters, fixed, {}, given.keys() - by_keyword, given.keys())
    fixed |= {name: value for name, value in given.items() if is_plain(value)}
    example = {name: value for name, value in given.items() if name not in fixed}
    return Binding(parameters, fixed, example, given.keys() - by_keyword, given.keys())
