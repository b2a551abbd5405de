"""The user's model as it was: whatever a trace leaves in its modules is put back.

Tracing runs the model's own Python, which may store proxies (`self.attn_map = attn`), resize lists or count calls.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn

from fxsd.capture.calls import is_plain
from fxsd.capture.proxies import Weight


class Snapshot:
    """The attributes of every module of a model, and the containers in them, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        # By id: what a module says of itself to a dictionary may change, as a metric's hash does.
        self._kept = {id(module): _Kept(module.__dict__) for module in model.modules()}

    def restore(self, part: nn.Module) -> set[int]:
        """Puts back `part` and every module in it. Returns the ids of those that had changed."""
        return {id(module) for module in self._inside(part) if self._kept[id(module)].restore(module.__dict__)}

    def written(self, module: nn.Module) -> dict[str, Any]:
        """What `module` itself keeps for its next call: attributes that are plain, with their values, and buffers that are others now."""
        return self._kept[id(module)].written(module.__dict__)

    def _inside(self, part: nn.Module) -> list[nn.Module]:
        """The modules in `part` at the time of the snapshot, whatever a trace did to the tree since."""
        found, stack = {id(part): part}, [part]
        while stack:
            new = {id(child): child for child in self._kept[id(stack.pop())].modules if id(child) not in found}
            found |= new
            stack.extend(new.values())
        return list(found.values())


@contextmanager
def unchanged(model: nn.Module) -> Iterator[Snapshot]:
    """On exit the random states of torch, Python and NumPy are as they were, and so is the model after an exception.

    Whoever runs the model inside restores it, which takes time: once is enough.
    """
    snapshot = Snapshot(model)
    own = [(generator, _state_of(generator)) for generator in _generators(model)]
    python, numpy_random = random.getstate(), sys.modules.get("numpy.random")
    numpy_state = numpy_random and numpy_random.get_state()
    gpus = {tensor.device for tensor in chain(model.parameters(), model.buffers()) if tensor.is_cuda}
    with torch.random.fork_rng(devices=gpus):
        try:
            yield snapshot
        except BaseException:
            snapshot.restore(model)
            raise
        finally:
            random.setstate(python)
            for generator, state in own:
                _set_state(generator, state)
            if numpy_random:
                numpy_random.set_state(numpy_state)


def _generators(model: nn.Module) -> list[Any]:
    """Generators of random numbers that modules hold themselves, or draw from by a method that they hold."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            generator = getattr(value, "__self__", value)
            if isinstance(generator, (random.Random, torch.Generator)) or type(generator).__module__.startswith("numpy.random"):
                found[id(generator)] = generator
    return list(found.values())


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return copy.deepcopy(generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state())


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, torch.Generator) or not hasattr(generator, "bit_generator"):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


class _Kept:
    """The attributes of one module, as they were. Comparing them is what takes the time of a restore: it is left to C."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self._attributes, self._buffers = attributes.copy(), attributes["_buffers"].copy()
        self.modules = [child for child in attributes["_modules"].values() if child is not None]
        containers = [value for value in attributes.values() if isinstance(value, (dict, list, set))]
        self._empty = [container for container in containers if not container]
        self._full = [(container, container.copy()) for container in containers if container]

    def written(self, attributes: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: None
            for name, buffer in attributes["_buffers"].items()
            if (buffer.tensor if type(buffer) is Weight else buffer) is not self._buffers.get(name)  # `self.buffer += 1` leaves it there
        }
        if not _same(attributes, self._attributes):
            for name, value in attributes.items():
                before = self._attributes.get(name, self)
                if value is not before and is_plain(value) and not (is_plain(before) and value == before):
                    found[name] = value
        return found

    def restore(self, attributes: dict[str, Any]) -> bool:
        """Says whether there was anything to do."""
        changed = not _same(attributes, self._attributes)
        if changed:
            attributes.clear()
            attributes.update(self._attributes)
        for container, content in self._full:
            if not _same(container, content):
                changed = True
                if isinstance(container, list):
                    container[:] = content
                else:
                    container.clear()
                    container.update(content)
        if any(self._empty):
            changed = True
            for container in self._empty:
                container.clear()
        return changed


def _same(a: Any, b: Any) -> bool:
    """Do two containers hold the very same objects?"""
    if len(a) != len(b):
        return False
    if isinstance(a, set):
        return bool(a == b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(is_, a.values(), b.values()))
    return all(map(is_, a, b))
