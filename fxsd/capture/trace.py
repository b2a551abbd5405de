"""What the values of a trace, and torch while it is patched, ask of the tracer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import fx

from fxsd.capture.examples import Examples


class Trace(fx.Tracer):
    """A trace as seen from its values: `fxsd.capture.tracer.Tracer` is the one that runs.

    Attributes:
        examples: the values of an example call, where there is one.
        is_open: is the trace still going on?
        set_aside: calls reach torch and the model as if nothing were traced.
        journal: values whose node has changed, and the one before.
    """

    examples: Examples | None
    is_open: bool
    set_aside: bool
    journal: list[tuple[Any, fx.Node | None]]

    @abstractmethod
    def decide(self, obj: fx.Proxy, kind: Callable[[Any], Any]) -> Any:
        """The value of `obj` as a `kind`, which the graph then takes for granted and checks."""

    @abstractmethod
    def known(self, obj: fx.Proxy) -> Any:
        """The value of `obj` in the example call."""

    @abstractmethod
    def is_a(self, obj: Any, classes: Any) -> bool:
        """Does `obj` stand for an instance of `classes`?"""

    @abstractmethod
    def hashed(self, obj: Any, as_argument: bool) -> int:
        """Tensors are looked up in a set or a dictionary as the objects that they are, all else by value."""

    @abstractmethod
    def checkpointed(self, options: dict[str, Any]) -> AbstractContextManager[None]:
        """Inside, what is recorded runs under `torch.utils.checkpoint`."""
