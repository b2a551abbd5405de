"""What will be done: which sites, at which rates, how each runs, and why not otherwise. Pure reading of what was captured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeVar

from torch import fx, nn

from fxsd.capture import Captured, Part, capture
from fxsd.capture.observe import Observed
from fxsd.capture.programs import within
from fxsd.capture.snapshot import unchanged
from fxsd.errors import CaptureError, FxsdError, told
from fxsd.find import Found, RejectedAdd, Residual, depths, execution_order, find_residuals, kinds, prefixes
from fxsd.graph import runs_graph, without_ops
from fxsd.in_code import CodeSite, code_sites, with_samples
from fxsd.legal import Region, find_regions, find_samples, no_gain
from fxsd.options import Options
from fxsd.rates import weights
from fxsd.run import StochasticDepth

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
    code: CodeSite | None = None  # where its op is written, if code is what runs

    @property
    def compute(self) -> str:
        return "mask" if self.region is None else "skip"


@dataclass(frozen=True)
class Planned:
    """What will be done.

    Attributes:
        captured: the model as graphs.
        plans: the sites, in order.
        rejected: the other adds.
        notes: what stays a call or Python, and stochastic depth that stays.
        kept: stochastic depth that existing="keep" leaves at its site.
        eval_residuals: site name -> the same add in the evaluation program, where graphs are to run and it is another.
        in_code: will code run, with ops written into it, or graphs?
        lost: adds that are residual, and no op can be written at.
        carried: sites of an earlier transform, which keep their ops.
        is_graph: shows one graph the whole of the captured call?
    """

    captured: Captured
    plans: tuple[Plan, ...]
    rejected: tuple[RejectedAdd, ...]
    notes: tuple[str, ...]
    kept: tuple[str, ...]
    eval_residuals: Mapping[str, Residual] = field(default_factory=dict)
    in_code: bool = False
    lost: tuple[RejectedAdd, ...] = ()
    carried: tuple[Residual, ...] = ()
    is_graph: bool = True


def plan(model: nn.Module, options: Options) -> Planned:
    """What `options` ask for, of a model that stays as it is.

    Raises:
        FxsdError: an option names nothing of the model, or the model cannot be captured.
    """
    has_graphs = isinstance(model, nn.Module) and any(isinstance(m, fx.GraphModule) and runs_graph(m) for m in model.modules())
    in_code = options.compute == "mask" and not has_graphs
    if (
        in_code
        and isinstance(model, nn.Module)
        and options.existing == "replace"
        and not (options.target_layer_name or options.include or options.exclude)
    ):
        model = without_ops(model)  # all of them are made anew
    reading = _Reading(model, options, capture(model, options.example_inputs, partial(_owners, options), to_run=not in_code))
    return reading.in_code() if in_code else reading.in_graphs()


def _owners(options: Options, part: Part) -> set[str]:
    return {r.module for r in _find(options, part, part.graph).residuals}


def _find(options: Options, part: Part, graph: fx.Graph, holds: Callable[[fx.Node], int] = lambda node: 0) -> Found:
    modules = dict(part.module.named_modules(remove_duplicate=False))
    found_kinds = kinds(graph, modules.__getitem__, {part.to_local(path) for path in part.drop_paths})
    found = find_residuals(graph, found_kinds, lambda module: _matches(module, options.include), holds)
    # What enters the model has samples in dim 0, but not what enters a part of it.
    return replace(found, residuals=tuple(replace(r, placed=False) for r in found.residuals)) if part.places else found


class _Reading:
    """A captured model, and what is found in its graphs."""

    def __init__(self, model: nn.Module, options: Options, captured: Captured) -> None:
        self.model, self.options, self.captured = model, options, captured
        if options.existing == "error" and captured.drop_paths:
            raise FxsdError(
                f"existing='error', and the model has stochastic depth of its own: {_some(sorted(captured.drop_paths))}. "
                "Use existing='replace' or existing='keep'."
            )
        self.called = captured.inside()
        self.inside = {node: [part.graph for part in parts] for node, parts in self.called.items()}
        self.graphs = [part.graph for part in captured.parts if not any(part in parts for parts in self.called.values())]
        self.graphs += [graph for inner in self.inside.values() for graph in inner]
        self.order = {node: place for place, node in enumerate(execution_order(self.graphs, self.inside))}
        self.seen = [self._observed(observed) for observed in captured.observed]
        self.by_part: dict[str, Found] = {}
        for part in sorted(captured.parts, key=lambda part: len(part.path), reverse=True):  # inner ones first
            self.by_part[part.path] = self._in(part, part.graph)

    def _observed(self, observed: Observed) -> Found:
        part = Part("", self.model, (observed.graph,), self.captured.drop_paths)
        return _find(self.options, part, observed.graph)

    def _in(self, part: Part, graph: fx.Graph) -> Found:
        return _find(self.options, part, graph, self._holds)

    def _holds(self, node: fx.Node) -> int:
        """How many residual adds lie behind a call: those seen to run in it, sites of the parts in it, and those that are out of reach."""
        if self.seen:
            path = self.captured.path_of(node)
            return max(sum(within(r.module, path) for r in found.residuals) for found in self.seen)
        if node not in self.called and not self.captured.hidden:
            return 0
        unseen = sum(adds for path, adds in self.captured.hidden.items() if within(path, self.captured.path_of(node)))
        return unseen + sum(len(self.by_part[part.path].residuals) for part in self.called.get(node, ()))

    # --- graphs are to run --------------------------------------------------------------------------------------------

    def in_graphs(self) -> Planned:
        model, options, captured = self.model, self.options, self.captured
        found = _in_order(self.by_part.values(), self.order)
        _check_reach(captured, found, options)
        taken, left = _select(model, found, options)
        plans = self._plans(_site_names(taken), taken, depths(self.graphs, taken, options.depth_by, self.inside))
        if options.compute != "mask":
            plans = _with_regions(captured, plans, options)
        elif options.example_inputs is not None and not all(plan.residual.placed for plan in plans):
            plans = _placed(captured, plans)
        eval_residuals: dict[str, Residual] = {}
        for part in captured.parts:
            own = [plan.name for plan in plans if plan.residual.add.graph is part.graph]
            if own and part.eval_graph is not None:
                others, _ = _select(model, self._in(part, part.eval_graph), options, check=False)
                twins = dict(zip(_site_names(others), others, strict=True))
                eval_residuals |= {name: twins[name] for name in own if name in twins}
        rejected = tuple(sorted((*found.rejected, *left), key=lambda r: self.order[r.add]))
        return self._planned(taken, plans, rejected, eval_residuals=eval_residuals)

    # --- code is to run -----------------------------------------------------------------------------------------------

    def in_code(self) -> Planned:
        captured, options = self.captured, self.options
        traced = _in_order(self.by_part.values(), self.order)
        if not self.seen:
            _check_reach(captured, traced, options)
        if captured.run_error and not traced.residuals:
            why = next(iter((*captured.failed.values(), *captured.opaque.values())), "")
            raise CaptureError(f"{why} Nor does the model run on example_inputs: {told(captured.run_error)}.".lstrip())
        evaluated = [self._in(part, part.eval_graph) for part in captured.parts if part.eval_graph is not None]
        # What a run shows is all of it, of the two modes in the one that runs more; a layer may be left out at random in training.
        shown = sorted(self.seen, key=lambda found: -len(found.residuals)) or [traced]
        main = shown[0]
        everything = [r for found in (main, *shown[1:], traced, *evaluated) for r in found.residuals]
        graphs = [*(graph for part in captured.parts for graph in part.graphs), *(observed.graph for observed in captured.observed)]
        sites, refused = code_sites(self.model, list({id(r): r for r in everything}.values()), graphs)
        sites = self._with_samples(sites)
        programs = [part.graph for part in captured.parts]
        first = [*programs, *(observed.graph for observed in captured.observed), *(g for part in captured.parts for g in part.graphs)]
        representative = {id(site): site.seen_in(first) for site in sites}
        residuals = [r for r in representative.values() if r is not None]
        by_residual = {id(r): site for r, site in zip(residuals, sites, strict=True)}
        taken, left = _select(self.model, Found(tuple(residuals), ()), options)
        shared = self._called_elsewhere([by_residual[id(r)] for r in taken], graphs) if options.existing == "replace" else frozenset()
        stays = {id(r): path for r in taken if r.existing and (path := self._path_of(r.existing)) in shared}
        left += [
            RejectedAdd(r.add, r.module, f"its stochastic depth, {stays[id(r)]}, is called elsewhere too, and stays")
            for r in taken
            if id(r) in stays
        ]
        taken = [r for r in taken if id(r) not in stays]
        chosen = [by_residual[id(r)] for r in taken]
        plans = self._plans(_site_names(taken), taken, self._depths(chosen, taken, main))
        plans = tuple(replace(plan, code=by_residual[id(plan.residual)]) for plan in plans)
        rejected = list(main.rejected)
        graphs_of_main = {r.add.graph for r in main.residuals} | {r.add.graph for r in main.rejected}
        lost = [r for r in refused if r.add.graph in graphs_of_main and _is_wanted(self.model, r.module, options)]
        where = self.order or {}
        if self.seen and main.residuals:
            graph = main.residuals[0].add.graph
            where = {node: place for place, node in enumerate(graph.nodes)}
        rejected = sorted((*rejected, *left, *lost), key=lambda r: where.get(r.add, len(where)))
        in_training = {id(by_residual[id(r)]) for r in residuals if by_residual[id(r)].seen_in(programs)}
        in_evaluation = {id(site) for site in sites if site.seen_in([part.graphs[-1] for part in captured.parts])}
        whole = any(not part.path for part in captured.parts) and in_evaluation <= in_training
        carried = self._carried(sites, {id(plan.code) for plan in plans})
        return self._planned(taken, plans, tuple(rejected), in_code=True, lost=tuple(lost), is_graph=whole, carried=carried)

    def _carried(self, sites: Sequence[CodeSite], planned: Set[int]) -> tuple[Residual, ...]:
        """The residual adds whose op an earlier transform has made, and this one leaves alone; their branches are what enters it."""
        left = [(r, r.existing) for site in sites if id(site) not in planned for r in site.residuals if r.existing]
        ours = [(r, op) for r, op in left if isinstance(self.model.get_submodule(self._path_of(op)), StochasticDepth)]
        return tuple(replace(r, branch=op.all_input_nodes[0]) for r, op in ours)

    def _called_elsewhere(self, sites: Sequence[CodeSite], graphs: Sequence[fx.Graph]) -> Set[str]:
        """The stochastic depth of sites that graphs call for something else too: it cannot be taken out of the one place alone."""
        here = {r.existing for site in sites for r in site.residuals if r.existing}
        paths = {self._path_of(node) for node in here}
        others = (node for graph in graphs for node in graph.nodes if here and node.op == "call_module" and node not in here)
        return paths & {self._path_of(node) for node in others}

    def _depths(self, sites: Sequence[CodeSite], taken: Sequence[Residual], main: Found) -> list[int]:
        """By the graph that shows most of them."""
        if not self.seen:
            return depths(self.graphs, taken, self.options.depth_by, self.inside)
        graphs = [observed.graph for observed in self.captured.observed]
        graphs.sort(key=lambda graph: not any(r.add.graph is graph for r in main.residuals))
        graphs = [graph for graph in graphs if any(site.seen_in([graph]) for site in sites)][:1] or graphs[:1]
        return depths(
            [*graphs, *self.graphs],
            [site.seen_in([*graphs, *self.graphs]) or r for site, r in zip(sites, taken, strict=True)],
            self.options.depth_by,
        )

    def _with_samples(self, sites: list[CodeSite]) -> list[CodeSite]:
        """The sites with the samples where shapes show them."""
        if self.options.example_inputs is None or all(any(r.placed for r in site.residuals) for site in sites):
            return sites
        placed: dict[fx.Node, Residual] = {}
        with unchanged(self.captured.model) as snapshot:
            for part in self.captured.parts:
                own = [r for site in sites for r in site.residuals if r.add.graph is part.graph and not r.placed]
                placed |= {r.add: r for r in find_samples(part, own)} if own else {}
            snapshot.restore(self.captured.model)
        for dims in self.captured.batch_dims():
            for site in sites:
                placed |= {r.add: replace(r, batch_dim=dims[r.add], placed=True) for r in site.residuals if r.add in dims and not r.placed}
        return [with_samples(site, placed) for site in sites]

    # --- both ---------------------------------------------------------------------------------------------------------

    def _plans(self, names: Sequence[str], taken: Sequence[Residual], place: Sequence[int]) -> tuple[Plan, ...]:
        options = self.options
        base, factors = weights(options.drop_rate, names, place, options.drop_distribution) if taken else (options.drop_rate, [])
        return tuple(
            Plan(name, r, depth, factor, base * factor)
            for name, r, depth, factor in zip(names, taken, place, factors, strict=True)
            if not (options.existing == "keep" and r.existing)
        )

    def _planned(self, taken: Sequence[Residual], plans: tuple[Plan, ...], rejected: tuple[RejectedAdd, ...], **more: Any) -> Planned:
        existing = {r.existing: self._path_of(r.existing) for r in taken if r.existing}
        kept = tuple(existing.values()) if self.options.existing == "keep" else ()
        return Planned(self.captured, plans, rejected, _notes(self.captured, set(existing.values()), kept), kept, **more)

    def _path_of(self, node: fx.Node) -> str:
        return str(node.target) if any(node.graph is o.graph for o in self.captured.observed) else self.captured.path_of(node)


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


def _is_wanted(model: nn.Module, module: str, options: Options) -> bool:
    """Does nothing that the user asks for leave the adds of a module out?"""
    classes = {name: type(inner).__name__ for name, inner in model.named_modules()}
    inside = not options.target_layer_name or _matches(module, options.target_layer_name, classes)
    return inside and not _matches(module, options.exclude)


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
        notes.append(f"the model does not run on example_inputs in eval mode ({error}): what its graphs do not hold was not seen to run")
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
    if planned.lost:
        where = "; ".join(dict.fromkeys(r.reason for r in planned.lost))
        name, adds = type(planned.captured.model).__name__, len(planned.lost)
        return f"{name} has residual adds, {adds} of them, and none is where an op can be written: {where}."
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
