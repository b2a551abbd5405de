"""Stochastic depth that a model already has, told by what it does rather than by its name.

A drop-path module has no parameters, buffers or children, is the identity in eval, and in training multiplies each
sample by one number: zero, or the same constant for all samples that it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxsd.run.ops import StochasticDepth

_PROBE_SAMPLES = 2048  # a rate of .005 goes unseen with probability 4e-5, and then only where kept samples are not rescaled
_TRIES = 8  # draws for a module that decides once for the whole batch


def drop_paths(model: nn.Module, restore: Callable[[nn.Module], object] = lambda module: None) -> frozenset[nn.Module]:
    """The modules of `model` that are stochastic depth: fxsd's own, and any other that behaves like it.

    Args:
        model: some of the modules in it are run.
        restore: takes back what running a module has left in its attributes.
    """
    seen: dict[Any, bool] = {}
    found: list[nn.Module] = []
    x = torch.rand(_PROBE_SAMPLES, 3, 2, 2, device="cpu") + 0.5
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            found.append(module)
        elif _candidate(module):
            key = _key(module)
            if key not in seen:
                seen[key] = _drops_samples(module, x.clone())
                restore(module)
            if seen[key]:
                found.append(module)
    return frozenset(found)


def _candidate(module: nn.Module) -> bool:
    return not (
        type(module).__module__.startswith("torch.")
        or module._modules
        or module._parameters
        or module._buffers
        or type(module).forward is nn.Module.forward
    )


def _key(module: nn.Module) -> Any:
    """Modules of one class with the same plain settings behave alike; anything else is probed by itself."""
    own = {k: v for k, v in module.__dict__.items() if not (k.startswith("_") or k == "training")}
    plain = all(isinstance(v, (bool, int, float, str, type(None))) for v in own.values())
    return (type(module), tuple(sorted(own.items()))) if plain else id(module)


def _drops_samples(module: nn.Module, x: torch.Tensor) -> bool:
    mode = module.training
    try:
        with torch.no_grad():
            module.training = False
            if not (_equal(module(x[:2]), x[:2]) and _equal(module(x), x)):  # first a few: what else a module does may take long
                return False
            module.training = True
            return any(_multiplies_samples(module(x), x) for _ in range(_TRIES))
    except Exception:  # a module that cannot take this input is no drop path
        return False
    finally:
        module.training = mode


def _equal(y: Any, x: torch.Tensor) -> bool:
    return isinstance(y, torch.Tensor) and y.shape == x.shape and torch.equal(y, x)


def _multiplies_samples(y: Any, x: torch.Tensor) -> bool:
    if not isinstance(y, torch.Tensor) or y.shape != x.shape or torch.equal(y, x):
        return False
    factor = (y / x).flatten(1)
    first = factor[:, :1]
    if not torch.allclose(factor, first.expand_as(factor), rtol=1e-4, atol=1e-6):
        return False  # dropout of elements or channels, or a change of values
    kept = first[first != 0]
    return bool(kept.numel() == 0 or (torch.allclose(kept, kept[0], rtol=1e-4) and kept[0] >= 1.0 - 1e-4))
