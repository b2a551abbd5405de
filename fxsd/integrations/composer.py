"""Stochastic depth with the arguments of MosaicML's Composer, for training code that comes from there.

What differs from Composer's own: any model and layer class, not torchvision's `Bottleneck` alone; `drop_warmup` for both methods and in
every unit of time; and what a dropped block does, see `apply_stochastic_depth`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fxsd.errors import FxsdError, told
from fxsd.graph.graphmodule import become
from fxsd.options import Names, Options
from fxsd.pipeline import transform
from fxsd.rates import Distribution
from fxsd.site import get_drop_rate, set_drop_rate, sites

_missing: Exception | None = None
try:
    from composer.core import Algorithm, Event, Time, TimeUnit
except Exception as error:  # absent, or not for this version of torch; `apply_stochastic_depth` needs nothing of it
    Algorithm, _missing = object, error


def apply_stochastic_depth(
    model: nn.Module,
    target_layer_name: Names,
    stochastic_method: str = "block",
    drop_rate: float = 0.2,
    drop_distribution: Distribution = "linear",
    **options: Any,
) -> nn.Module:
    """Adds stochastic depth to a model in place, as `composer.functional.apply_stochastic_depth` does. Works without Composer too.

    `model` itself becomes what `fxsd.transform` makes of it: every reference to it, in an optimizer or around it, stays good, since its
    parameters and state-dict keys stay. Of a `ComposerModel` the network that it holds is what changes: its only child with parameters, or
    where it has several, the whole.

    A dropped block computes its branch and multiplies it by 0, so that batch norms in it go on counting; Composer leaves it out. With
    `compute="skip", example_inputs=(x,)` it is left out here too.

    Args:
        model: any module, a `ComposerModel` or not.
        target_layer_name: the class of the layers that hold the residual adds, or globs of module paths, or a list; Composer's
            `"ResNetBottleneck"` is `"Bottleneck"`.
        stochastic_method: `"block"`: one draw for the whole batch. `"sample"`: each sample (dim 0) draws for itself.
        drop_rate: probability that a branch is dropped, in [0, 1].
        drop_distribution: `"uniform"`, or Composer's `"linear"`: block i of N has (i + 1) / N of `drop_rate`, so the first one's is not 0,
            whatever Composer's text says. `fxsd.transform` calls that `"huang"`, and knows others, which may be given here.
        options: other arguments of `fxsd.transform`.

    Returns:
        `model`.

    Raises:
        FxsdError: as `fxsd.transform`, also where no layer is found; `model` is as it was then.

    References:
        https://github.com/mosaicml/composer/tree/v0.32.1/composer/algorithms/stochastic_depth

    Example:
        >>> import fxsd, torchvision
        >>> from fxsd.integrations.composer import apply_stochastic_depth
        >>> model = torchvision.models.resnet50()
        >>> _ = apply_stochastic_depth(model, "ResNetBottleneck", drop_rate=0.16)
        >>> [round(site.drop_rate, 3) for site in fxsd.sites(model)][:3]
        [0.01, 0.02, 0.03]
    """
    network = _network(model)
    arguments = _arguments(target_layer_name, stochastic_method, drop_rate, drop_distribution, options)
    become(network, transform(network, **arguments))
    return model


class FxsdStochasticDepth(Algorithm):  # type: ignore[misc]
    """Stochastic depth as an algorithm of Composer's `Trainer`, with the arguments of `composer.algorithms.StochasticDepth`.

    On `Event.INIT` the model gets it by `apply_stochastic_depth`, which says what differs. On `Event.BATCH_START` the rates rise if there
    is a warm-up: they reach `drop_rate` when it is over, where Composer's stay at the last step before. A run that is resumed goes on where
    it was: rates follow from the trainer's own clock.

    Args:
        target_layer_name, stochastic_method, drop_rate, drop_distribution, **options: as for `apply_stochastic_depth`.
        drop_warmup: how long the rates rise linearly from 0: a `Time`, a string such as `"10ep"`, `"500ba"` or `"0.1dur"`, or a number, a
            fraction of the training. For both methods.

    Raises:
        FxsdError: Composer is not installed, or an argument is out of range.

    Example:
        >>> from composer import Trainer  # doctest: +SKIP
        >>> Trainer(model, algorithms=[StochasticDepth("ResNetBottleneck", drop_warmup=0.1)], ...)  # doctest: +SKIP
    """

    # Its class has a name of its own: a trainer that loads a checkpoint makes an algorithm called `StochasticDepth` of Composer's anew.

    def __init__(
        self,
        target_layer_name: Names,
        stochastic_method: str = "block",
        drop_rate: float = 0.2,
        drop_distribution: Distribution = "linear",
        drop_warmup: Any = 0.0,
        **options: Any,
    ) -> None:
        if _missing is not None:
            raise FxsdError(f"StochasticDepth needs Composer (pip install mosaicml): importing it failed, {told(_missing)}.") from _missing
        Options.of(**_arguments(target_layer_name, stochastic_method, drop_rate, drop_distribution, options))
        self.target_layer_name, self.stochastic_method, self.drop_rate = target_layer_name, stochastic_method, drop_rate
        self.drop_distribution, self.options = drop_distribution, options
        self.drop_warmup = Time.from_input(drop_warmup, TimeUnit.DURATION)
        if self.drop_warmup.value < 0:
            raise FxsdError(f"drop_warmup must be a time of 0 or more, but got {drop_warmup!r}.")
        self.full_rate = float(drop_rate)

    def __repr__(self) -> str:
        shown = ("target_layer_name", "stochastic_method", "drop_rate", "drop_distribution", "drop_warmup")
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def match(self, event: Any, state: Any) -> bool:
        """On `Event.INIT`, and with a warm-up on `Event.BATCH_START`."""
        return bool(event == Event.INIT or (event == Event.BATCH_START and self.drop_warmup.value > 0))

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        """Transforms `state.model` in place, or sets the rate of the next batch; logs `stochastic_depth/...` as Composer's does."""
        if event == Event.INIT:
            apply_stochastic_depth(
                state.model, self.target_layer_name, self.stochastic_method, self.drop_rate, self.drop_distribution, **self.options
            )
            self.full_rate = get_drop_rate(state.model)  # where the distribution states rates, the largest
            logger.log_metrics({"stochastic_depth/num_stochastic_layers": len(sites(state.model))})
            return
        unit = self.drop_warmup.unit
        elapsed = state.get_elapsed_duration() if unit == TimeUnit.DURATION else state.timestamp.get(unit)
        rate = self.full_rate * min(elapsed.value / self.drop_warmup.value, 1.0)
        set_drop_rate(state.model, rate)
        logger.log_metrics({"stochastic_depth/drop_rate": rate})


StochasticDepth = FxsdStochasticDepth


def _arguments(
    target_layer_name: Names, stochastic_method: str, drop_rate: float, drop_distribution: Distribution, options: dict[str, Any]
) -> dict[str, Any]:
    """What `transform` is told."""
    return {
        "target_layer_name": "Bottleneck" if target_layer_name == "ResNetBottleneck" else target_layer_name,
        "stochastic_method": stochastic_method,
        "drop_rate": drop_rate,
        "drop_distribution": "huang" if drop_distribution == "linear" else drop_distribution,
        **options,
    }


def _network(model: nn.Module) -> nn.Module:
    """What computes in a `ComposerModel`, whose own forward takes batches apart; any other model is that itself."""
    if any(cls.__name__ == "ComposerModel" for cls in type(model).__mro__):
        networks = [child for child in model.children() if next(child.parameters(), None) is not None]
        if len(networks) == 1:
            return networks[0]
    return model
