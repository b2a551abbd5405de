"""The verbs: `transform` and `analyze`. Arguments are checked here, then capture -> find -> rate -> rewrite."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeVar

from torch import fx, nn

from fxsd import residual
from fxsd.batch import Region, find_regions, find_samples, no_gain
from fxsd.capture import Captured, Part, capture
from fxsd.capture.programs import within
from fxsd.capture.snapshot import unchanged
from fxsd.depth import depths, execution_order, prefixes
from fxsd.errors import CaptureError, FxsdError, told
from fxsd.options import Names, Options
from fxsd.rates import Distribution, weights
from fxsd.report import Analysis, stage
from fxsd.residual import Found, RejectedAdd, Residual
from fxsd.rewrite import Plan, rewrite
from fxsd.site import ResidualSite
from fxsd.values import kinds

T = TypeVar("T")


def transform(
    model: nn.Module,
    drop_rate: float = 0.1,
    *,
    drop_distribution: Distribution = "linear",
    stochastic_method: str = "sample",
    target_layer_name: Names = None,
    include: Names = None,
    exclude: Names = None,
    scaling: str = "inference",
    compute: str = "mask",
    depth_by: str = "block",
    existing: str = "replace",
    example_inputs: Any = None,
    subset_batch_norm: bool = False,
    sync_ranks: bool = False,
) -> nn.Module:
    """Adds stochastic depth to a model: every residual add `shortcut + branch` becomes `shortcut + drop(branch)`.

    The model is not changed. The result shares its parameters, buffers and leaf modules; `copy.deepcopy` the model first for independence.

    Args:
        model: any module. Where it cannot be one graph, its largest parts that can be are rewritten.
        drop_rate: probability that a branch is dropped, in [0, 1]; spread over depth by `drop_distribution`.
        drop_distribution: `"linear"`, `"uniform"`, `"huang"`, `"efficientnet"`, `"exponential"`; a callable `f(depth, depths)` that gives
            a factor of `drop_rate`; a sequence with one rate a depth; or a mapping from globs of site names to rates.
        stochastic_method: `"sample"`: each sample draws for itself; samples are dim 0 of the inputs, followed to where the add has them.
            `"block"`: one draw for the whole batch.
        target_layer_name: only sites inside these modules: class names, or globs of module paths.
        include: globs of module paths whose adds are taken even where the rules of `fxsd.residual` say no.
        exclude: globs of module paths whose sites are left out.
        scaling: `"inference"`: eval multiplies the branch by 1 - drop_rate. `"train"`: training divides by it, and eval is the
            original model bit for bit.
        compute: `"mask"`: the branch is computed and multiplied by 0 or 1. `"skip"`: it runs on the kept samples only, where that is
            legal. `"auto"`: where it also pays. Elsewhere the mask; `reason` of `fxsd.sites` says why. Both need `example_inputs`.
        depth_by: `"block"`: the adds of one block (the nearest numbered module around them) share a depth. `"add"`: each has its own.
        existing: stochastic depth already at a site: `"replace"` it, `"keep"` it and leave the site alone, or raise an `"error"`.
        example_inputs: a tuple of args or a dict of kwargs of the call to capture: says which optional arguments are given, and lets
            Python decide on sizes. Shapes are followed on fake tensors; only a model that cannot be one graph is run, once in each
            mode. Sizes stay live where nothing was decided on them; where something was, the result checks it and raises
            `FxsdError` for inputs that would decide otherwise.
        subset_batch_norm: skip branches with batch norm too, whose statistics are then those of the kept samples (two at least).
        sync_ranks: every rank draws the same, without communication; for `"block"` only. Ranks must be seeded alike (`torch.manual_seed`)
            when they transform, and make the same training forwards. A `DropRateSchedule` starts a run that is resumed where it was.

    Returns:
        A `torch.fx.GraphModule` that is an instance of the model's class too, with the same state-dict keys, parameters and signature, in
        the same mode. `train()` and `eval()` act on it as on the model; `torch.compile(gm, fullgraph=True)` takes it whole. Where
        the model cannot be one graph: a shallow copy of it whose parts are such GraphModules.

    Raises:
        FxsdError: an argument is out of range, the model cannot be captured, or it has no residual add.

    Warns:
        UserWarning: some residual adds lie in code that could not be captured, and stay as they are.

    References:
        Huang et al., "Deep Networks with Stochastic Depth", 2016, https://arxiv.org/abs/1603.09382

    Example:
        >>> import fxsd, torch, torchvision
        >>> gm = fxsd.transform(torchvision.models.resnet18(), drop_rate=0.2)
        >>> len(fxsd.sites(gm))
        8
        >>> gm.eval()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 1000])
    """
    options = Options.of(
        drop_rate=drop_rate,
        drop_distribution=drop_distribution,
        stochastic_method=stochastic_method,
        target_layer_name=target_layer_name,
        include=include,
        exclude=exclude,
        scaling=scaling,
        compute=compute,
        depth_by=depth_by,
        existing=existing,
        example_inputs=example_inputs,
        subset_batch_norm=subset_batch_norm,
        sync_ranks=sync_ranks,
    )
    with stage(f"transforming {type(model).__name__}"), _uncollected():
        planned = _plan(model, options)
        if not planned.plans:
            raise FxsdError(_no_sites(planned))
        hidden = planned.captured.hidden
        if hidden:
            lost = "; ".join(f"{adds} in {path or 'the model itself'}" for path, adds in hidden.items())
            warnings.warn(
                f"{len(planned.plans)} residual adds were rewritten, and {sum(hidden.values())} lie in code that could not be captured: "
                f"{lost}. fxsd.analyze(model, example_inputs=...).print() says why.",
                stacklevel=2,
            )
        return rewrite(planned.captured, planned.plans, planned.eval_residuals, stochastic_method, scaling, sync_ranks)


def analyze(model: nn.Module, drop_rate: float = 0.1, **options: Any) -> Analysis:
    """Shows what `transform` would do with the same arguments, and changes nothing.

    Args:
        model, drop_rate, **options: as for `fxsd.transform`.

    Returns:
        An `Analysis`: `sites`, `rejected` (every other tensor add, with the reason) and `notes` (what stayed a call or Python, and how
        many residual adds lie in it); `print()` shows them as tables. A model without residual adds has no sites.

    Raises:
        FxsdError: as `fxsd.transform`, but for models without sites.

    Example:
        >>> import fxsd, torchvision
        >>> found = fxsd.analyze(torchvision.models.vit_b_16(), drop_rate=0.1)
        >>> len(found.sites), found.rejected[0].reason
        (24, 'encoder_pos_embedding is a parameter or a constant, not the output of a branch')
    """
    checked = Options.of(drop_rate=drop_rate, **options)
    with stage(f"analyzing {type(model).__name__}"), _uncollected():
        planned = _plan(model, checked)
    found = tuple(
        ResidualSite(p.name, r.module, p.depth, p.drop_rate, r.kind, p.compute, r.add, r.branch, r.shortcut, r.fork, p.reason)
        for p in planned.plans
        for r in (p.residual,)
    )
    return Analysis(type(model).__name__, found, planned.rejected, planned.notes)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Inside, Python looks for no garbage: it would go over graphs that grow, and over the model, again and again, and find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class _Planned:
    captured: Captured
    plans: tuple[Plan, ...]
    eval_residuals: dict[str, Residual]
    rejected: tuple[RejectedAdd, ...]
    notes: tuple[str, ...]
    kept: tuple[str, ...]  # stochastic depth that existing="keep" leaves at its site


def _plan(model: nn.Module, options: Options) -> _Planned:
    def find(part: Part, graph: fx.Graph, holds: Callable[[fx.Node], int] = lambda node: 0) -> Found:
        modules = dict(part.module.named_modules(remove_duplicate=False))
        found_kinds = kinds(graph, modules.__getitem__, {part.to_local(path) for path in part.drop_paths})
        found = residual.find(graph, found_kinds, lambda module: _matches(module, options.include), holds)
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
    return _Planned(captured, plans, eval_residuals, rejected, _notes(captured, set(existing.values()), kept), kept)


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


def _no_sites(planned: _Planned) -> str:
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
