"""What a captured graph takes for granted, checked each time it runs: never a silently wrong result on other inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.node import has_side_effect

from fxsd.errors import FxsdError


@has_side_effect
def check_bound(value: Any, expected: Any, name: str) -> None:
    """Stands for an argument that was not given when the model was captured, or whose value shaped the graph.

    Raises:
        FxsdError: the argument has another value than the one the model was captured with.
    """
    if value is not expected and (isinstance(value, torch.Tensor) or value != expected):
        raise FxsdError(
            f"the model was captured with {name}={expected!r}, and takes no other value; "
            f"pass example_inputs with {name} to fxsd.transform to capture that call."
        )


@has_side_effect
def check_given(value: Any, default: Any, name: str) -> None:
    """Stands for an optional argument that was given when the model was captured.

    Raises:
        FxsdError: it is not given now.
    """
    if value is default:
        raise FxsdError(
            f"the model was captured with {name} given, and cannot do without it; "
            f"pass example_inputs without {name} to fxsd.transform to capture that call."
        )


@has_side_effect
def check_decision(value: Any, expected: Any, where: str) -> None:
    """Stands for a size, a dtype or the like (or what was computed from them) that the model's Python made a decision on.

    Raises:
        FxsdError: it is another one than at capture.
    """
    if (type(expected)(value) if isinstance(expected, (bool, int, float)) else value) != expected:
        raise FxsdError(
            f"the model was captured for inputs of another size: {where} was {expected!r} then and is {value!r} now. "
            "Transform the model again with example_inputs of this size."
        )
