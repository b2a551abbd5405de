"""The user's model as it was: whatever a trace leaves in its modules is put back.

Tracing runs the model's own Python, which may store proxies (`self.attn_map = attn`), resize lists or count calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Snapshot:
    """The attributes of every module of a model, and the containers in them, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = {module: _shallow(module.__dict__) for module in model.modules()}

    def restore(self, part: nn.Module) -> None:
        """Puts back `part` and every module in it."""
        for module in self._inside(part):
            _restore(module.__dict__, self._kept[module])

    def _inside(self, part: nn.Module) -> set[nn.Module]:
        """The modules in `part` at the time of the snapshot, whatever a trace did to the tree since."""
        found, stack = {part}, [part]
        while stack:
            kept = self._kept[stack.pop()]["_modules"][1]
            new = {child for child in kept.values() if child is not None and child not in found}
            found |= new
            stack.extend(new)
        return found


@contextmanager
def unchanged(model: nn.Module) -> Iterator[Snapshot]:
    """On exit the model is as it was, and so is the random state."""
    snapshot = Snapshot(model)
    with torch.random.fork_rng(devices=[]):
        try:
            yield snapshot
        finally:
            snapshot.restore(model)


def _shallow(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """name -> (the object itself, a copy of what it holds if it is a container)."""
    return {k: (v, v.copy() if isinstance(v, (dict, list, set)) else None) for k, v in attributes.items()}


def _restore(attributes: dict[str, Any], kept: dict[str, tuple[Any, Any]]) -> None:
    for name in attributes.keys() - kept.keys():
        del attributes[name]
    for name, (value, content) in kept.items():
        attributes[name] = value
        if isinstance(value, (dict, set)):
            if value != content if isinstance(value, set) else not _same(value, content):
                value.clear()
                value.update(content)
        elif isinstance(value, list) and not _same_items(value, content):
            value[:] = content


def _same(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    return list(a) == list(b) and _same_items(list(a.values()), list(b.values()))


def _same_items(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
