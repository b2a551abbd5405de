"""The drop rate in a run of Hugging Face's Trainer. Needs `transformers` and `accelerate`."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxsd.errors import FxsdError
from fxsd.integrations.rates import PlannedRates
from fxsd.schedule import DropRateSchedule
from fxsd.site import get_drop_rate

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise FxsdError("fxsd.integrations.transformers needs Hugging Face's transformers: pip install transformers accelerate") from error


class DropRateCallback(PlannedRates, TrainerCallback):
    """Moves the rate of a transformed model at each optimizer step of a Trainer, and logs it as `drop_rate`.

    A run that resumes from a checkpoint goes on at the rate of its step, which the checkpoint of the Trainer holds. The rate is in the
    `log_history` of the Trainer, and what reports after this callback reports it: progress bars do, and reporters that are given behind it
    (`report_to="none", callbacks=[DropRateCallback(...), TensorBoardCallback()]`).

    Args:
        schedule, drop_rate, warmup_steps: as for `fxsd.DropRateSchedule`.
        steps: as for `fxsd.DropRateSchedule`, in optimizer steps; all those of the run by default.

    Raises:
        FxsdError: an argument is out of range; or, when training begins, the model of the Trainer was not transformed.

    Example:
        >>> callback = DropRateCallback("cosine", 0.2, warmup_steps=500)
        >>> callback.plan is None  # until training begins, with `Trainer(model=gm, callbacks=[callback], ...).train()`
        True
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        assert model is not None
        if self.drop_rate is None and not callable(self.schedule):
            self.drop_rate = get_drop_rate(model)  # a second run of this Trainer finds the rate moved
        steps = state.max_steps if self.steps is None else self.steps
        self.plan = DropRateSchedule(model, self.schedule, self.drop_rate, steps=steps, warmup_steps=self.warmup_steps)
        self.plan.load_state_dict({**self.plan.state_dict(), "last_step": state.global_step})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.plan is not None:
            self.plan.step()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self.plan is not None and logs is not None and "loss" in logs:
            logs["drop_rate"] = state.log_history[-1]["drop_rate"] = self.plan.get_last_rate()
