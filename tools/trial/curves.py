"""A picture of what was trained: learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from trial.training import Run
from trial.trials import learning_curves


def curves(runs: Sequence[Run], metric: str, target: Path) -> None:
    """Writes a PNG: the validation metric of each arm over epochs and over time, the mean of its seeds with its 95 % confidence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_epoch, by_time = figure.subplots(1, 2, sharey=True)
    for arm, epochs, points in learning_curves(runs):
        # An epoch takes as long as where it took turns with those of the other arms.
        alike = [run for run in runs if run.arm.compute == arm.compute and run.arm.epochs_of == 1.0]
        seconds = median(second for run in alike for second in run.seconds)
        means = [point.mean for point in points]
        for axes, scale in ((by_epoch, 1.0), (by_time, seconds)):
            at = [scale * epoch for epoch in epochs]
            (line,) = axes.plot(at, means, label=arm.label if axes is by_epoch else None)
            low, high = ([point.mean + sign * (point.half or 0.0) for point in points] for sign in (-1, 1))
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    by_epoch.set_ylabel(f"validation {metric}")
    by_epoch.set_xlabel("epoch")
    by_time.set_xlabel("seconds of training")
    figure.legend(loc="outside right upper")
    figure.savefig(target, dpi=150)
