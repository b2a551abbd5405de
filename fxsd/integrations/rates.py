"""What the callbacks of all trainers share: the arguments of a `DropRateSchedule` whose model is known when a run begins."""

from __future__ import annotations

from fxsd.schedule import DropRateSchedule, Schedule


class PlannedRates:
    """Checks and keeps the arguments of a schedule, and the schedule of the run once there is one.

    Args:
        schedule, drop_rate, steps, warmup_steps: as for `fxsd.DropRateSchedule`; `steps` may be left out, for all those of the run.

    Raises:
        FxsdError: an argument is out of range.

    Example:
        >>> PlannedRates("cosine", 0.2).plan is None
        True
    """

    def __init__(
        self,
        schedule: Schedule = "constant",
        drop_rate: float | None = None,
        *,
        steps: int | None = None,
        warmup_steps: int = 0,
    ) -> None:
        DropRateSchedule.check(schedule, drop_rate, 1 if steps is None else steps, warmup_steps)
        self.schedule, self.drop_rate, self.steps, self.warmup_steps = schedule, drop_rate, steps, warmup_steps
        self.plan: DropRateSchedule | None = None
