"""The user's model as it was: whatever a trace leaves in its modules is put back.

Tracing runs the model's own Python, which may store proxies (`self.attn_map = attn`), resize lists or count calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restores every module's attributes, and the containers in them, and the random state, on exit."""
    kept = [(module, _shallow(module.__dict__)) for module in model.modules()]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for module, attributes in kept:
                _restore(module.__dict__, attributes)


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
