"""How `drop_rate` moves over training time: step -> rate, set on the model at each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from fxsd.errors import FxsdError
from fxsd.rates import check_rate
from fxsd.site import get_drop_rate, rest, set_drop_rate, start_step

Schedule: TypeAlias = "str | Callable[[int], float]"

# The factor of `drop_rate` when `t` of `steps` steps are done.
NAMED: dict[str, Callable[[int, int], float]] = {
    "constant": lambda t, steps: 1.0,
    "linear": lambda t, steps: min(t / steps, 1.0),
    "cosine": lambda t, steps: (1.0 - math.cos(math.pi * min(t / steps, 1.0))) / 2.0,
    "progressive": lambda t, steps: 1.0 - math.exp(-100.0 * t / steps),
    "early": lambda t, steps: 1.0 if t < steps else 0.0,
    "early_linear": lambda t, steps: max(1.0 - t / steps, 0.0),
    "late": lambda t, steps: 0.0 if t < steps else 1.0,
}


class DropRateSchedule:
    """Moves the rate of a transformed model over training, as a learning-rate scheduler moves that of an optimizer.

    The rate of step 0 is set at once; call `step()` after each training step (or epoch: the unit of `steps` is how often it is called).
    All sites move together and keep their distribution. In mask mode compiled code does not compile again; where it skips branches, it
    does so once or twice, and once more when a named schedule is over: the numbers of rows may be constants then. Sites that draw the
    same on all ranks (`sync_ranks`) draw by the step: a run that is resumed goes on as it would have.

    Args:
        gm: what `fxsd.transform` returned, or a module that holds it: compiled, DDP, FSDP.
        schedule: what happens to the rate in `steps` steps, or a callable `f(step)` that gives the rate:

            - `"constant"`: nothing, so that `warmup_steps` is all that moves it.
            - `"linear"`, `"cosine"`: it rises from 0.
            - `"progressive"`: it rises as 1 - exp(-100 t / steps), where most layers are dropped soon: progressive layer dropping, whose
              theta(t) is the rate to keep, 1 - rate, and whose gamma is 100 / steps.
            - `"early"`, `"early_linear"`: on, or falling, until `steps`, then 0.
            - `"late"`: 0 until `steps`, then on.
        drop_rate: the full rate, in [0, 1]; the model's own by default. Not for a callable.
        steps: a positive number; all but `"constant"` and callables need it.
        warmup_steps: in how many first steps the rate rises linearly from 0, on top of the schedule (Composer's `drop_warmup`).

    Raises:
        FxsdError: an argument is out of range, or there is no transformed model in `gm`.

    References:
        Liu et al., "Dropout Reduces Underfitting", 2023, https://arxiv.org/abs/2303.01500 (early, late); Zhang and He, "Accelerating
        Training of Transformer-Based Language Models with Progressive Layer Dropping", 2020, https://arxiv.org/abs/2010.13369

    Example:
        >>> import fxsd, torchvision
        >>> gm = fxsd.transform(torchvision.models.resnet18(), drop_rate=0.2)
        >>> schedule = fxsd.DropRateSchedule(gm, warmup_steps=4)
        >>> rates = [schedule.get_last_rate()]
        >>> for _ in range(5):
        ...     schedule.step()
        ...     rates.append(schedule.get_last_rate())
        >>> [round(rate, 3) for rate in rates]
        [0.0, 0.05, 0.1, 0.15, 0.2, 0.2]
    """

    def __init__(
        self,
        gm: nn.Module,
        schedule: Schedule = "constant",
        drop_rate: float | None = None,
        *,
        steps: int | None = None,
        warmup_steps: int = 0,
    ) -> None:
        self.check(schedule, drop_rate, steps, warmup_steps)
        self.gm, self.schedule, self.steps, self.warmup_steps = gm, schedule, steps, warmup_steps
        self.drop_rate = get_drop_rate(gm) if drop_rate is None else float(drop_rate)
        self.last_step = 0
        self._apply()

    @staticmethod
    def check(schedule: object, drop_rate: object, steps: object, warmup_steps: object) -> None:
        """Raises `FxsdError` where an argument is out of range."""
        if not callable(schedule) and schedule not in NAMED:
            raise FxsdError(f"schedule must be one of {', '.join(map(repr, NAMED))} or a callable f(step), but got {schedule!r}.")
        if callable(schedule) and drop_rate is not None:
            raise FxsdError(f"drop_rate must be left out where schedule is a callable, which gives the rate itself, but got {drop_rate!r}.")
        if drop_rate is not None:
            check_rate("drop_rate", drop_rate)
        needed = not callable(schedule) and schedule != "constant"
        if (needed or steps is not None) and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise FxsdError(f"steps must be a positive whole number for schedule={schedule!r}, but got {steps!r}.")
        if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 0:
            raise FxsdError(f"warmup_steps must be a whole number of 0 or more, but got {warmup_steps!r}.")

    def step(self) -> None:
        """Sets the rate of the next step."""
        self.last_step += 1
        self._apply()

    def get_last_rate(self) -> float:
        """The model-wide rate that was set last; each site has its share of it, as `fxsd.sites` shows."""
        return self._last_rate

    def rate_at(self, step: int) -> float:
        """The model-wide rate when `step` steps are done."""
        if callable(self.schedule):
            rate = check_rate(f"the rate that schedule gives for step {step}", self.schedule(step))
        else:
            rate = self.drop_rate * NAMED[self.schedule](step, self.steps or 1)
        return rate * min(step / self.warmup_steps, 1.0) if self.warmup_steps else rate

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here; a callable is not part of it."""
        kept = ("schedule", "drop_rate", "steps", "warmup_steps", "last_step")
        return {key: getattr(self, key) for key in kept if not callable(getattr(self, key))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken, and sets the rate of that step, which the model's own state dict does not hold.

        Raises:
            FxsdError: the state is that of a schedule of another kind; nothing has changed then.
        """
        expected = self.state_dict()
        if not isinstance(state, dict) or state.keys() != expected.keys():
            raise FxsdError(
                f"state must be what state_dict of a schedule of the same kind gave, with {', '.join(expected)}, but got "
                f"{', '.join(map(str, state)) if isinstance(state, dict) else repr(state)}."
            )
        self.check(state.get("schedule", self.schedule), None, state["steps"], state["warmup_steps"])
        self.__dict__.update(state)
        self._apply()

    def _apply(self) -> None:
        self._last_rate = self.rate_at(self.last_step)
        set_drop_rate(self.gm, self._last_rate)
        start_step(self.gm, self.last_step)
        if self._is_over():
            rest(self.gm)

    def _is_over(self) -> bool:
        """Is the rate the same from now on? Nobody knows of a callable."""
        steps = 0 if self.schedule == "constant" else self.steps or 0
        return not callable(self.schedule) and self.last_step >= max(steps, self.warmup_steps)
