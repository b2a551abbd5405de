"""The arguments of `transform` and `analyze`, and what is legal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fxsd.errors import FxsdError
from fxsd.rates import Distribution, check_distribution, check_rate
from fxsd.run.ops import METHODS, SCALINGS

Names: TypeAlias = "str | Sequence[str] | None"


@dataclass(frozen=True)
class Options:
    """The arguments of `transform`, checked; names are tuples."""

    drop_rate: float = 0.1
    drop_distribution: Distribution = "linear"
    stochastic_method: str = "sample"
    target_layer_name: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scaling: str = "inference"
    compute: str = "mask"
    depth_by: str = "block"
    existing: str = "replace"
    example_inputs: Any = None
    subset_batch_norm: bool = False
    sync_ranks: bool = False

    @classmethod
    def of(cls, **arguments: Any) -> Options:
        """From the arguments as the user gave them: names may be one string, a list or None."""
        for name in ("target_layer_name", "include", "exclude"):
            arguments[name] = _names(name, arguments.get(name))
        return cls(**arguments)

    def __post_init__(self) -> None:
        check_rate("drop_rate", self.drop_rate)
        check_distribution(self.drop_distribution)
        for name, legal in (
            ("stochastic_method", METHODS),
            ("scaling", SCALINGS),
            ("compute", ("mask", "skip", "auto")),
            ("depth_by", ("block", "add")),
            ("existing", ("replace", "keep", "error")),
        ):
            value = getattr(self, name)
            if value not in legal:
                raise FxsdError(f"{name} must be one of {', '.join(map(repr, legal))}, but got {value!r}.")
        if self.compute != "mask" and self.example_inputs is None:
            raise FxsdError(
                f"compute={self.compute!r} needs example_inputs, a tuple of args or a dict of kwargs of the model's forward: "
                "they show where the batch is, and which branches may run on a part of it."
            )
        for name in ("subset_batch_norm", "sync_ranks"):
            if not isinstance(getattr(self, name), bool):
                raise FxsdError(f"{name} must be True or False, but got {getattr(self, name)!r}.")
        if self.sync_ranks and self.stochastic_method != "block":
            raise FxsdError(
                f"sync_ranks=True needs stochastic_method='block', but got {self.stochastic_method!r}: samples are not shared between "
                "ranks, so their draws cannot be. Pass stochastic_method='block', or leave sync_ranks out."
            )


def _names(argument: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    listed = (value,) if isinstance(value, str) else value
    if not isinstance(listed, Sequence) or not all(isinstance(name, str) for name in listed):
        raise FxsdError(f"{argument} must be a string, a list of strings or None, but got {value!r}.")
    return tuple(listed)
