"""Pictures of what was measured: bars of step time over the base, and learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from stepping import StepRow
from training import Run
from trials import learning_curves
from variants import BASE, LABELS


def bars(rows: Sequence[StepRow], target: Path) -> None:
    """Writes a PNG: a group of bars for each model and rate, a bar for each variant."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((row.model, row.rate, row.mode) for row in rows))
    labels = [label for label in LABELS if label != BASE and any(row.variant == label and row.ratio for row in rows)]
    width = 0.8 / max(len(labels), 1)
    figure = Figure(figsize=(2 + 0.35 * len(groups) * (len(labels) + 1), 4), layout="constrained")
    axes = figure.add_subplot()
    for i, label in enumerate(labels):
        known = {(row.model, row.rate, row.mode): row for row in rows if row.variant == label and row.ratio}
        at = [place - 0.4 + (i + 0.5) * width for place, group in enumerate(groups) if group in known]
        shown = [known[group] for group in groups if group in known]
        axes.bar(at, [row.ratio or 0.0 for row in shown], 0.9 * width, label=label)
        for x, row in zip(at, shown, strict=True):
            if row.flops is not None:
                axes.hlines(row.flops, x - 0.45 * width, x + 0.45 * width, color="black", linewidth=2)
    axes.hlines([], 0, 0, color="black", linewidth=2, label="ceiling (FLOPs)")
    axes.axhline(1.0, color="gray", linewidth=1, linestyle="dashed")
    axes.set_xticks(range(len(groups)), ["\n".join(group) for group in groups])
    axes.set_ylabel("step time / without stochastic depth")
    figure.legend(loc="outside right upper")
    figure.savefig(target, dpi=150)


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
