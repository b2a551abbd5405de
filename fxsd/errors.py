"""The one error family of the package."""

from __future__ import annotations


class FxsdError(Exception):
    """Base of every error that fxsd raises on purpose.

    A message states the rule, the value that broke it, and what to do next.
    """


def told(error: Exception) -> str:
    """What another library's error says, in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


class CaptureError(FxsdError):
    """The model, or a part of it that holds residual adds, cannot be captured as a graph."""
