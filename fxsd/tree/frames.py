"""Where an add ran: the frames from it up to the function of the module whose code executes it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import nn

from fxsd.tree.functions import find, find_own
from fxsd.tree.source import contains

PLACE = "fxsd_place"  # the key of a `Whereabouts` in node.meta
_MACHINERY = ("torch.fx", "torch.overrides", "torch._tensor", "torch._ops", "torch.functional", "torch._C", "fxsd.capture", "fxsd.run")
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_FAR = 64  # frames to look through for a function that holds another
_CALLS = "torch.nn.modules.module"  # where modules are called


@dataclass(frozen=True)
class Whereabouts:
    """Where an add ran.

    Attributes:
        steps: code and instruction of the frames, from that of the home's function to that of the add.
        home: path of the module whose function it is; None if no module's function was seen.
        owner: the variable of that function that holds the module; '' where none does, in a function that is an attribute of it.
        thing: the attribute of the home that holds the object whose function it is; '' for the module itself.
        call: number of the call of that function.
        run: how many adds ran before at the same place in that call.
    """

    steps: tuple[tuple[CodeType, int], ...]
    home: str | None = None
    owner: str = ""
    thing: str = ""
    call: int = 0
    run: int = 0

    @property
    def add(self) -> tuple[CodeType, int]:
        return self.steps[-1]


class Frames:
    """Notes where adds run.

    Args:
        modules: path -> module of the model.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules, self._paths = modules, {id(module): path for path, module in reversed(list(modules.items()))}
        self._calls = 0
        self._running: dict[FrameType, int] = {}  # functions of modules that still run -> the number of their call
        self._runs: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}

    def here(self, owner: str) -> Whereabouts | None:
        """Where the function that is called runs. `owner` is the path of the module that runs."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and _is_machinery(frame):
            frame = frame.f_back
        steps: list[tuple[CodeType, int]] = []
        nearest: tuple[FrameType, tuple[tuple[CodeType, int], ...], tuple[str, str, str]] | None = None
        while frame is not None:
            if not _is_machinery(frame):
                steps.insert(0, (frame.f_code, frame.f_lasti))
                inside = contains(frame.f_code, steps[-1][0])
                # A function made in another, and run by others still, stands in the code of the first.
                home = self._home(frame, owner, inside) if inside or nearest is None else None
                if home is not None and inside:
                    return self._numbered(frame, tuple(steps), *home)
                if home is not None:
                    nearest = frame, tuple(steps), home
                if nearest is not None and len(steps) > _FAR:
                    break
            frame = frame.f_back
        if nearest is not None:
            return self._numbered(nearest[0], nearest[1], *nearest[2])
        return Whereabouts(tuple(steps[-1:])) if steps else None

    def close(self) -> None:
        self._running.clear()

    def _home(self, frame: FrameType, owner: str, inside: bool) -> tuple[str, str, str] | None:
        code, values = frame.f_code, frame.f_locals
        if frame.f_globals.get("__name__") == _CALLS:
            return None
        name = code.co_varnames[0] if code.co_argcount else ""
        first = values.get(name)
        if issubclass(type(first), nn.Module):  # a trace answers `isinstance` of its values by computing them
            path = self._paths.get(id(first))
            if path is not None and find(first, code):
                return path, name, ""
        module = self._modules.get(owner)
        if inside and module is not None and find_own(module, code) is not None:
            return owner, "", ""
        if first is None or issubclass(type(first), (nn.Module, type)) or not hasattr(first, "__dict__") or find(first, code) is None:
            return None
        # The function of an object that adds for a module, which it is given.
        for variable, value in list(values.items()):
            if issubclass(type(value), nn.Module) and self._paths.get(id(value)) == owner:
                attributes = [key for key, kept in vars(value).items() if kept is first]
                if attributes:
                    return owner, variable, attributes[0]
        return None

    def _numbered(self, frame: FrameType, steps: tuple[tuple[CodeType, int], ...], home: str, owner: str, thing: str) -> Whereabouts:
        if frame not in self._running:
            self._forget_those_that_returned(frame)
            self._calls += 1
            self._running[frame] = self._calls
        call = self._running[frame]
        key = call, tuple((id(code), instruction) for code, instruction in steps)
        run = self._runs[key] = self._runs.get(key, -1) + 1
        return Whereabouts(steps, home, owner, thing, call, run)

    def _forget_those_that_returned(self, frame: FrameType) -> None:
        running = set()
        current: FrameType | None = frame
        while current is not None:
            running.add(current)
            current = current.f_back
        for other in [other for other in self._running if other not in running]:
            del self._running[other]
            if not other.f_code.co_flags & _GENERATOR:
                other.clear()  # its variables hold values


def _is_machinery(frame: FrameType) -> bool:
    name: Any = frame.f_globals.get("__name__", "")
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in _MACHINERY)
