"""`functools.cache` with the signature kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def once(function: F) -> F:
    """Computes a value for the same arguments once."""
    return cast(F, functools.cache(function))
