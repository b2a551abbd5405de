"""A picture of what was measured: bars of step time over the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from measure.stepping import StepRow
from measure.variants import BASE, LABELS


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
