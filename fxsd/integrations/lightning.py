"""The drop rate in a run of Lightning's Trainer. Needs `lightning`, or `pytorch_lightning`."""

from __future__ import annotations

from typing import Any

from fxsd.errors import FxsdError
from fxsd.integrations.rates import PlannedRates
from fxsd.schedule import DropRateSchedule

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]
    except ImportError as error:
        raise FxsdError("fxsd.integrations.lightning needs Lightning: pip install lightning") from error


class DropRateCallback(PlannedRates, Callback):
    """Moves the rate of the transformed models in a LightningModule at each optimizer step, and logs it as `drop_rate`.

    The module holds a transformed model, `self.model = fxsd.transform(...)` in its `__init__` or `configure_model`. Checkpoints of the
    Trainer hold the schedule; a run that resumes from one goes on exactly.

    Args:
        schedule, drop_rate, warmup_steps: as for `fxsd.DropRateSchedule`.
        steps: as for `fxsd.DropRateSchedule`, in optimizer steps; all those of the run by default. A training batch in which several
            optimizers step counts as one.

    Raises:
        FxsdError: an argument is out of range; or, when a fit begins, no transformed model is in the module.

    Example:
        >>> callback = DropRateCallback("cosine", 0.2, warmup_steps=500)
        >>> callback.state_dict()  # until a fit begins, with `Trainer(callbacks=[callback]).fit(module)`
        {}
    """

    _restored: dict[str, Any] | None = None  # what a checkpoint held
    _done = 0  # optimizer steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = self.state_dict()
        steps = self.steps
        if steps is None and not callable(self.schedule) and self.schedule != "constant":
            steps = int(trainer.estimated_stepping_batches)
        self.plan = DropRateSchedule(pl_module, self.schedule, self.drop_rate, steps=steps, warmup_steps=self.warmup_steps)
        if state:
            self.plan.load_state_dict(state)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.plan is not None:
            pl_module.log("drop_rate", self.plan.get_last_rate(), on_step=True, on_epoch=False, batch_size=1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.plan is not None and trainer.global_step != self._done:
            self._done = trainer.global_step
            self.plan.step()

    def state_dict(self) -> dict[str, Any]:
        return self._restored or {} if self.plan is None else self.plan.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored, self.plan = state_dict, None
