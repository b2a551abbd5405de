"""The values of a trace that is over, taken out of what outlives it.

A forward may keep what it has computed for its next call outside of the model: in a cache of a function, a dictionary of its file, an
attribute of a class. A trace fills such a cache with its own values, which nobody else can use.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from types import CellType, FrameType, FunctionType
from typing import Any

from torch import fx

_CACHE = type(functools.cache(lambda: None))


def take_out_what_is_left(made: list[weakref.ref[Any]]) -> None:
    """Takes out those of the values that were made which are still alive, and forgets them all."""
    kept = [value for value in (each() for each in made) if value is not None]
    made.clear()
    if kept:
        take_out(kept)


def take_out(values: Sequence[Any]) -> None:
    """Takes values out of whatever holds them, but for the frames that still run, and each other.

    Caches of functions lose all their entries, containers those with such a value in them. A variable or an attribute is None
    afterwards, or what its class says.
    """
    gone = {id(value): value for value in values}  # the objects too: no id is given to another one meanwhile
    pending = list(values)
    while pending:
        holders = [holder for holder in gc.get_referrers(*pending) if holder is not pending and holder is not values and holder is not gone]
        owners = _owners([holder for holder in holders if isinstance(holder, dict)])
        pending = [holder for holder in holders if id(holder) not in gone and not _take_out(gone, holder, owners.get(id(holder)))]
        gone.update((id(holder), holder) for holder in pending)


def _take_out(gone: dict[int, Any], holder: Any, owner: Any) -> bool:
    """Says whether this ends here; if not, `holder` itself is to be taken out of what holds it."""
    if isinstance(holder, _CACHE):
        holder.cache_clear()
    elif isinstance(holder, list):
        holder[:] = [item for item in holder if id(item) not in gone]
    elif isinstance(holder, set):
        holder.intersection_update([item for item in holder if id(item) not in gone])
    elif isinstance(holder, CellType):
        holder.cell_contents = None
    elif isinstance(holder, dict):
        kept = {key: item for key, item in holder.items() if id(key) not in gone and id(item) not in gone}
        if owner is None:
            base = OrderedDict if isinstance(holder, OrderedDict) else dict  # a class of its own may not want to be written to
            base.clear(holder)
            base.update(holder, kept)
        else:
            for name in [name for name in holder if name not in kept]:
                _reset(owner, name)
    elif isinstance(holder, (tuple, frozenset, fx.Proxy)):
        return False
    elif not isinstance(holder, FrameType):
        for name in [name for name, item in getattr(holder, "__dict__", {}).items() if id(item) in gone]:
            _reset(holder, name)
    return True


def _owners(dicts: list[dict[Any, Any]]) -> dict[int, Any]:
    """By the id of a dictionary the object, class or file whose attributes it holds; those that are for their own sake have none."""
    found: dict[int, Any] = {}
    for holder in gc.get_referrers(*dicts) if dicts else ():
        # A class hides its dictionary, which must not be written to behind its back.
        own = gc.get_referents(vars(holder)) if isinstance(holder, type) else [getattr(holder, "__dict__", None)]
        found.update((id(each), holder) for each in own if any(each is one for one in dicts))
    return found


def _reset(owner: Any, name: str) -> None:
    """Makes an attribute what it was before a forward wrote it, as far as one can tell: absent, or None."""
    bases = owner.__mro__[1:] if isinstance(owner, type) else type(owner).__mro__
    if isinstance(owner, FunctionType) or any(name in vars(base) for base in bases):
        delattr(owner, name)
    else:
        setattr(owner, name, None)
