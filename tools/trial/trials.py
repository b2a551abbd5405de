"""Many training runs: a search on validation data, then seeds for each arm, and what they say."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from statistics import fmean, median, stdev

import torch
from measure.variants import BASE

from trial.tasks import LOSS
from trial.training import Arm, Run, Setting, train

Say = Callable[..., None]
SEARCH_SEEDS = 1000  # the first seed of the search; those of the results start at 0


@dataclass(frozen=True)
class Interval:
    """A mean, and half of its 95 % confidence interval by Student's t; None of one value."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        from scipy.stats import t

        count = len(values)
        half = float(t.ppf(0.975, count - 1)) * stdev(values) / count**0.5 if count > 1 else None
        return cls(fmean(values), half)

    def __str__(self) -> str:
        digits = 3 if abs(self.mean) < 10 and (self.half or 0) < 0.1 else 2
        return f"{self.mean:.{digits}f}" + ("" if self.half is None else f" ± {self.half:.{digits}f}")


@dataclass(frozen=True)
class Candidate:
    """What a search saw of one arm: the validation metric at the end, the mean over seeds."""

    arm: Arm
    validation: float


@dataclass(frozen=True)
class Summary:
    """What the runs of one arm say; differences and ratios are to the base under the same seed."""

    arm: Arm
    epochs: int
    seeds: int
    train: Interval
    test: Interval
    difference: Interval | None
    time_ratio: float | None  # the median over seeds; of runs that took turns with the base


def run_all(
    jobs: Sequence[tuple[int, Sequence[Arm]]], setting: Setting, processes: int, say: Say, final: bool = True
) -> Iterator[list[Run]]:
    """Trains the arms of each job under its seed, one after the other in one process, so that their times can be compared.

    Args:
        final: are test data used?

    Yields:
        The runs of a job, as soon as they are there.
    """
    if processes == 1:
        for job in jobs:
            yield _run(job, setting, final, say)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _one_thread) as pool:
        futures = [pool.submit(_run, job, setting, final) for job in jobs]
        try:
            for future in as_completed(futures):
                runs = future.result()
                say(f"seed {runs[0].seed}", done=len(runs))
                yield runs
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error or an interrupt, those that have not begun never do


def _run(job: tuple[int, Sequence[Arm]], setting: Setting, final: bool, say: Say = lambda text, done=0: None) -> list[Run]:
    seed, arms = job
    runs = []
    turn = seed % len(arms)  # what runs first changes
    for arm in [*arms[turn:], *arms[:turn]]:
        runs.append(train(arm, seed, setting, final, say))
        say(f"{arm.label}, seed {seed}", done=1)
    return runs


def _one_thread() -> None:
    torch.set_num_threads(1)


def best(candidates: Sequence[Arm], runs: Sequence[Run]) -> list[Candidate]:
    """Candidates from the best to the worst."""
    seen = [Candidate(arm, fmean(run.validation[-1] for run in runs if run.arm == arm)) for arm in candidates]
    return sorted(seen, key=lambda candidate: candidate.validation, reverse=runs[0].metric != LOSS)


def for_equal_time(arm: Arm, runs: Sequence[Run]) -> Arm:
    """The arm with as many epochs as take the time of the base, by the median of what `runs` took."""
    own, base = ([run for run in runs if (run.arm.compute == compute)] for compute in (arm.compute, BASE))
    ratio = median(second for run in own for second in run.seconds) / median(second for run in base for second in run.seconds)
    return replace(arm, label=f"{arm.label}, equal time", epochs_of=1.0 / ratio)


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """A summary of each arm, the base first."""
    arms = sorted(dict.fromkeys(run.arm for run in runs), key=lambda arm: arm.compute != BASE)
    base = {run.seed: run for run in runs if run.arm.compute == BASE}
    return [_summary(arm, sorted((run for run in runs if run.arm == arm), key=lambda run: run.seed), base) for arm in arms]


def _summary(arm: Arm, own: Sequence[Run], base: dict[int, Run]) -> Summary:
    difference, ratio = None, None
    if base and arm.compute != BASE:
        difference = Interval.of([run.test - base[run.seed].test for run in own])
        if arm.epochs_of == 1.0:  # others ran at another time
            ratio = median(run.total_seconds / base[run.seed].total_seconds for run in own)
    test, fitted = (Interval.of([getattr(run, part) for run in own]) for part in ("test", "train"))
    return Summary(arm, len(own[0].seconds), len(own), fitted, test, difference, ratio)


def learning_curves(runs: Sequence[Run]) -> Iterator[tuple[Arm, list[int], list[Interval]]]:
    """For each arm the epochs after which it was evaluated, and its validation metric then."""
    for arm in dict.fromkeys(run.arm for run in runs):
        own = [run for run in runs if run.arm == arm]
        columns = zip(*(run.validation for run in own), strict=True)
        yield arm, own[0].validated, [Interval.of(column) for column in columns]
