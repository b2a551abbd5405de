"""What will be done: which sites, at which rates, how each runs, and why not otherwise. Pure reading of what was captured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TypeVar

from torch import fx, nn

from fxsd.capture import Captured, Part, capture
from fxsd.capture.programs import within
from fxsd.capture.snapshot import unchanged
from fxsd.errors import CaptureError, FxsdError, told
from fxsd.find import Found, RejectedAdd, Residual, depths, execution_order, find_residuals, kinds, prefixes
from fxsd.legal import Region, find_regions, find_samples, no_gain
from fxsd.options import Options
from fxsd.rates import weights

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """One site to be: the add as found, and what its op shall be."""

    name: str
    residual: Residual
    depth: int
    weight: float
    drop_rate: float
    region: Region | None = None  # what is skipped, if anything is
    reason: str = ""  # why nothing is, where that was asked for

    @property
    def compute(self) -> str:
        return "mask" if self.region is None else "skip"


@dataclass(frozen=True)
class Planned:
    captured: Captured
    plans: tuple[Plan, ...]
    eval_residuals: dict[str, Residual]
    rejected: tuple[RejectedAdd, ...]
    notes: tuple[str, ...]
    kept: tuple[str, ...]  # stochastic depth that existing="keep" leaves at its site


def plan(model: nn.Module, options: Options) -> Planned:
    def find(part: Part, graph: fx.Graph, holds: Callable[[fx.Node], int] = lambda node: 0) -> Found:
        modules = dict(part.module.named_modules(remove_duplicate=False))
        found_kinds = kinds(graph, modules.__getitem__, {part.to_local(path) for path in part.drop_paths})
        found = find_residuals(graph, found_kinds, lambda module: _matches(module, options.include), holds)
        # What enters the model has samples in dim 0, but not what enters a part of it.
        return replace(found, residuals=tuple(replace(r, placed=False) for r in found.residuals)) if part.places else found

    captured = capture(model, options.example_inputs, lambda part: {r.module for r in find(part, part.graph).residuals})
    if options.existing == "error" and captured.drop_paths:
        raise FxsdError(
            f"existing='error', and the model has stochastic depth of its own: {_some(sorted(captured.drop_paths))}. "
            "Use existing='replace' or existing='keep'."
        )
    called = captured.inside()
    inside = {node: [part.graph for part in parts] for node, parts in called.items()}
    graphs = [part.graph for part in captured.parts if not any(part in parts for parts in called.values())]
    graphs += [graph for inner in inside.values() for graph in inner]
    order = {node: place for place, node in enumerate(execution_order(graphs, inside))}
    by_part: dict[str, Found] = {}

    def holds(node: fx.Node) -> int:
        """How many residual adds lie behind a call: sites of the parts in it, and those that are out of reach."""
        if node not in called and not captured.hidden:
            return 0
        unseen = sum(adds for path, adds in captured.hidden.items() if within(path, captured.path_of(node)))
        return unseen + sum(len(by_part[part.path].residuals) for part in called.get(node, ()))

    for part in sorted(captured.parts, key=lambda part: len(part.path), reverse=True):  # inner ones first
        by_part[part.path] = find(part, part.graph, holds)
    found = _in_order(by_part.values(), order)
    _check_reach(captured, found, options)
    taken, left = _select(model, found, options)
    names = _site_names(taken)
    place = depths(graphs, taken, options.depth_by, inside)
    base, factors = weights(options.drop_rate, names, place, options.drop_distribution) if taken else (options.drop_rate, [])
    plans = tuple(
        Plan(name, r, depth, factor, base * factor)
        for name, r, depth, factor in zip(names, taken, place, factors, strict=True)
        if not (options.existing == "keep" and r.existing)
    )
    if options.compute != "mask":
        plans = _with_regions(captured, plans, options)
    elif options.example_inputs is not None and not all(plan.residual.placed for plan in plans):
        plans = _placed(captured, plans)
    eval_residuals: dict[str, Residual] = {}
    for part in captured.parts:
        own = [plan.name for plan in plans if plan.residual.add.graph is part.graph]
        if own and part.eval_graph is not None:
            others, _ = _select(model, find(part, part.eval_graph, holds), options, check=False)
            twins = dict(zip(_site_names(others), others, strict=True))
            eval_residuals |= {name: twins[name] for name in own if name in twins}
    rejected = tuple(sorted((*found.rejected, *left), key=lambda r: order[r.add]))
    existing = {r.existing: captured.path_of(r.existing) for r in taken if r.existing}
    kept = tuple(existing.values()) if options.existing == "keep" else ()
    return Planned(captured, plans, eval_residuals, rejected, _notes(captured, set(existing.values()), kept), kept)


def _with_regions(captured: Captured, plans: Sequence[Plan], options: Options) -> tuple[Plan, ...]:
    """The plans with what is skipped at each, or why nothing is, and with the samples where shapes show them."""
    find = partial(find_regions, subset_batch_norm=options.subset_batch_norm, all_or_none=options.stochastic_method == "block")
    found = _by_part(captured, plans, find)
    return tuple(_with_region(replace(plan, residual=found[plan.name][0]), found[plan.name][1], options) for plan in plans)


def _placed(captured: Captured, plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """The plans with the samples where shapes show them."""
    found = _by_part(captured, [plan for plan in plans if not plan.residual.placed], find_samples)
    return tuple(replace(plan, residual=found.get(plan.name, plan.residual)) for plan in plans)


def _by_part(captured: Captured, plans: Sequence[Plan], find: Callable[[Part, list[Residual]], list[T]]) -> dict[str, T]:
    """What `find` says of the sites of each part, by their names. It may run the model."""
    found: dict[str, T] = {}
    with unchanged(captured.model) as snapshot:
        for part in captured.parts:
            own = [plan for plan in plans if plan.residual.add.graph is part.graph]
            if own:
                found |= dict(zip([plan.name for plan in own], find(part, [plan.residual for plan in own]), strict=True))
        snapshot.restore(captured.model)
    return found


def _with_region(plan: Plan, region: Region | str, options: Options) -> Plan:
    if options.compute == "auto" and isinstance(region, Region):
        region = no_gain(region, plan.drop_rate, options.stochastic_method == "block") or region
    if isinstance(region, str):
        return replace(plan, reason=region)
    stays = options.stochastic_method == "block" and region.stays
    return replace(plan, region=region, reason=f"compiled code takes the mask: {stays}" if stays else "")


def _check_reach(captured: Captured, found: Found, options: Options) -> None:
    """Not a site, or adds that only example inputs could bring into reach: the failure is the caller's to know.

    Raises:
        CaptureError: says why, where and how many adds are lost.
    """
    if options.example_inputs is None or not found.residuals:
        for path, why in captured.failed.items():
            if path in captured.hidden:
                raise CaptureError(why + _lost(captured.hidden[path]))
    if not captured.parts:
        raise CaptureError(
            next(iter(captured.failed.values()), f"{type(captured.model).__name__} has no code of its own, nor has a module in it.")
        )


def _in_order(found: Iterable[Found], order: Mapping[fx.Node, int]) -> Found:
    residuals = [r for part in found for r in part.residuals]
    rejected = [r for part in found for r in part.rejected]
    return Found(tuple(sorted(residuals, key=lambda r: order[r.add])), tuple(sorted(rejected, key=lambda r: order[r.add])))


def _select(model: nn.Module, found: Found, options: Options, check: bool = True) -> tuple[list[Residual], list[RejectedAdd]]:
    """Splits the residual adds into those that the user wants and those that he does not."""
    targets = options.target_layer_name
    if not (targets or options.include or options.exclude):
        return list(found.residuals), []
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    for argument, globs in (("include", options.include), ("exclude", options.exclude)):
        for glob in globs:
            if not any(fnmatchcase(path, glob) for path in classes):
                raise FxsdError(
                    f"{argument} must be globs of module paths, but {glob!r} matches no module. "
                    f"Paths with residual adds are {_some(sorted({r.module for r in found.residuals}))}."
                )
    taken, left = [], []
    for r in found.residuals:
        if _matches(r.module, options.exclude):
            left.append(RejectedAdd(r.add, r.module, "exclude names its module"))
        elif targets and not _matches(r.module, targets, classes):
            left.append(RejectedAdd(r.add, r.module, "target_layer_name names none of the modules around it"))
        else:
            taken.append(r)
    idle = [name for name in targets if not any(_matches(r.module, [name], classes) for r in found.residuals)]
    if check and idle and found.residuals:
        around = {classes[path] for r in found.residuals for path in ["", *prefixes(r.module)] if path in classes}
        raise FxsdError(
            f"target_layer_name must name a class or a module path around a residual add, but got {idle[0]!r}, which names none. "
            f"Classes around them are {_some(sorted(around))}."
        )
    return taken, left


def _site_names(residuals: Sequence[Residual]) -> list[str]:
    """The module of each add, with a number where the module executes several."""
    total, seen = Counter(r.module for r in residuals), Counter[str]()
    names: dict[str, None] = {}
    for r in residuals:
        number = str(seen[r.module])
        seen[r.module] += 1
        several = total[r.module] > 1 or not r.module
        name = ".".join(filter(None, (r.module, number))) if several else r.module
        while name in names or (several and name in total):
            name += "_"
        names[name] = None
    return list(names)


def _notes(captured: Captured, at_sites: Set[str], kept: Sequence[str]) -> tuple[str, ...]:
    notes = [f"kept as a call: {why}" for why in captured.opaque.values()]
    notes += [f"kept as Python, with graphs in it: {why}{_lost(captured.hidden.get(path))}" for path, why in captured.failed.items()]
    if captured.run_error:
        error = told(captured.run_error)
        notes.append(f"the model does not run on example_inputs in eval mode ({error}), so its parts were captured without examples")
    elsewhere = sorted(captured.drop_paths - at_sites)
    if elsewhere:
        notes.append(
            f"stochastic depth with no residual add behind it, or at an add that was not taken, stays as it is: {_some(elsewhere)}"
        )
    if kept:
        notes.append(f"sites that keep the stochastic depth they have: {_some(kept)}")
    return tuple(notes)


def _lost(adds: int | None) -> str:
    return f" It holds {adds} residual add{'s' * (adds > 1)}, which could not be rewritten." if adds else ""


def no_sites(planned: Planned) -> str:
    if planned.kept:
        return f"existing='keep', and every residual add has stochastic depth of its own: {_some(planned.kept)}. Nothing is left to do."
    reasons = Counter(rejected.reason for rejected in planned.rejected)
    text = f"{type(planned.captured.model).__name__} has no residual add to drop the branch of."
    if reasons:
        text += " Adds that were looked at: " + "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(3)) + "."
    if planned.notes:
        text += f" Also: {planned.notes[0]}"
    return text + " fxsd.analyze(model).print() shows all of them."


def _matches(path: str, names: Sequence[str], classes: dict[str, str] | None = None) -> bool:
    """Does a name match `path` or a module around it, as a glob or, where `classes` is given, as a class name?"""
    around = ["", *prefixes(path)]
    return any(
        (classes is not None and classes.get(part) == name) or ((part or not path) and fnmatchcase(part, name))
        for name in names
        for part in around
    )


def _some(items: Sequence[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
