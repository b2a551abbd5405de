"""(captured model, sites of its code, rates) -> the tree of modules with ops in their code, and the same in the graph. Decides nothing.

before, in the class of layer1.0          after
    out += identity                           out = self.stochastic_depth(out)
    return self.relu(out)                     out += identity
                                              return self.relu(out)

before, in the graph                      after
    bn2 = self.layer1.0.bn2(conv2)            bn2 = self.layer1.0.bn2(conv2)
    add = bn2 + x                             drop = self.layer1.0.stochastic_depth(bn2)
                                              add = drop + x
"""

from __future__ import annotations

import copy
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import count
from typing import Any, cast

from torch import fx, nn

from fxsd.capture.parts import join
from fxsd.capture.programs import within
from fxsd.graph import SHOWN, Shown, complete, takes_graph, tree_class
from fxsd.in_code import CodeSite
from fxsd.plan import Plan, Planned
from fxsd.rewrite import device_of, insert_mask, lint, mark, new_op, take_out
from fxsd.run import StochasticDepth
from fxsd.run.runs import Runs
from fxsd.tree import CONSTANTS, PLACE, Drop, Home, Rewritten, Spot, Writing, ops_of, original_class, rebuilt
from fxsd.tree.once import once

_FAST_PATHS = ((nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0), (nn.TransformerEncoder, "use_nested_tensor", False))


def write(planned: Planned, stochastic_method: str, scaling: str, sync_ranks: bool) -> nn.Module:
    """Writes a `StochasticDepth` into the code at every planned site.

    Args:
        planned: owns the graphs, which are edited.
        stochastic_method, scaling, sync_ranks: as in `fxsd.transform`.

    Returns:
        A copy of the model, as far as modules have ops in their code or are around such, and shares all else. It is a
        `StochasticGraphModule` where one graph shows all of it.
    """
    model, plans, captured = planned.captured.model, planned.plans, planned.captured
    for part in captured.parts:
        for graph in part.graphs:
            _place_in_model(graph, part.path)
    ops: dict[str, StochasticDepth] = {}
    for order, plan in enumerate(plans):
        home = model.get_submodule(_code(plan).spot.home)
        op = new_op(plan, order, stochastic_method, scaling, sync_ranks, device_of(home, model))
        ops[plan.name] = op.train(home.training)
    residuals = [residual for plan in plans for residual in _code(plan).residuals]
    retired = take_out(residuals)
    gone = {str(node.target) for node in retired}
    places = _Places(model, plans, gone)
    graphs = [*(graph for part in captured.parts for graph in part.graphs), *(observed.graph for observed in captured.observed)]
    for plan in plans:
        for residual in _code(plan).residuals:
            insert_mask(residual, places.target(plan), retired)
    for residual in planned.carried:
        mark(cast(fx.Node, residual.existing), residual, retired)
    idle = {id(module): _idle(type(module)) for path in gone if not isinstance(module := model.get_submodule(path), StochasticDepth)}
    has_graph = planned.is_graph and takes_graph(model)
    homes = _homes(model, plans, places, ops, gone)
    if scaling == "inference":
        _leave_no_fast_path(model, homes)
    root = rebuilt(model, homes, idle, tree_class if has_graph else None)
    program = next((part for part in captured.parts if not part.path), None) if has_graph else None
    shown = [graph for graph in graphs if program is None or graph not in program.graphs]
    for graph in graphs:
        for node in graph.nodes:
            node.meta.pop(PLACE, None)
    root.__dict__.pop(SHOWN, None)
    if shown or program is None:
        root.__dict__[SHOWN] = tuple(Shown(graph) for graph in shown)
    if program is None:
        return root
    gm = complete(root, program.graph, program.eval_graph, program.constants)
    lint(program.graphs)
    return gm


def _code(plan: Plan) -> CodeSite:
    assert plan.code is not None
    return plan.code


class _Places:
    """What the ops are called."""

    def __init__(self, model: nn.Module, plans: Sequence[Plan], gone: Set[str]) -> None:
        self.runs: dict[Spot, dict[int, Plan]] = {}
        self.names: dict[Spot, str] = {}
        numbers: dict[str, Iterator[int]] = defaultdict(count)
        for plan in plans:
            code = _code(plan)
            if code.spot not in self.names:
                home = model.get_submodule(code.spot.home)
                free = {name for name in ops_of(home) if _is_gone(code.spot.home, name, gone)}
                names = (f"stochastic_depth_{number}" if number else "stochastic_depth" for number in numbers[code.spot.home])
                self.names[code.spot] = next(name for name in names if name in free or not hasattr(home, name))
            self.runs.setdefault(code.spot, {})[code.run or 0] = plan

    def target(self, plan: Plan) -> str:
        """The path of the op of a site."""
        code = _code(plan)
        run = "" if code.run is None else f".{code.run}"
        return ".".join(filter(None, (code.spot.home, self.names[code.spot]))) + run


def _homes(model: nn.Module, plans: Sequence[Plan], places: _Places, ops: Mapping[str, StochasticDepth], gone: Set[str]) -> dict[int, Home]:
    """What becomes of the modules that have ops, or had some."""
    by_home: dict[str, list[Spot]] = defaultdict(list)
    for found in places.names:
        by_home[found.home].append(found)
    for path, module in model.named_modules():
        if isinstance(module, Rewritten) and ops_of(module):
            by_home.setdefault(path, [])
    homes: dict[int, Home] = {}
    for path, spots in by_home.items():
        module = model.get_submodule(path)
        own: dict[str, nn.Module] = {}
        writings: dict[tuple[str, type | None, str, int], list[Drop]] = defaultdict(list)
        if isinstance(module, Rewritten):
            kept = {name: op for name, op in ops_of(module).items() if name != CONSTANTS and not _is_gone(path, name, gone)}
            own |= {name: copy.deepcopy(op, {}) for name, op in kept.items()}  # the rates of two transformed models move apart
            for writing in module.writings:
                drops = [drop for drop in writing.drops if drop.op in own]
                writings["", writing.holder, writing.name, writing.behind] += drops
        for spot in spots:
            runs = places.runs[spot]
            loop = _code(next(iter(runs.values()))).run is not None
            name = places.names[spot]
            if loop:
                in_order = [ops[runs[run].name] if run in runs else None for run in range(_code(runs[max(runs)]).runs)]
                own[name] = Runs(in_order, path)
            else:
                own[name] = ops[runs[0].name]
            drop = Drop(spot.path, spot.operand, name, spot.owner, spot.text, loop, spot.several)
            writings[spot.thing, spot.holder, spot.name, spot.behind].append(drop)
        made: dict[str, list[Writing]] = defaultdict(list)
        for (thing, holder, function, behind), drops in writings.items():
            if drops:
                made[thing].append(Writing(holder, function, behind, tuple(drops)))
        things = {thing: tuple(each) for thing, each in made.items() if thing}
        homes[id(module)] = Home(original_class(module), tuple(made[""]), own, things)
    return homes


def _leave_no_fast_path(model: nn.Module, homes: dict[int, Home]) -> None:
    """In evaluation torch's own layers may leave Python for C++, where nothing would be scaled: what they ask first says no."""
    for module in model.modules():
        for cls, attribute, value in _FAST_PATHS:
            if not isinstance(module, cls) or attribute not in vars(module):
                continue
            if any(id(inner) in homes and isinstance(inner, nn.TransformerEncoderLayer) for inner in module.modules()):
                home = homes.setdefault(id(module), Home(original_class(module), (), {}))
                homes[id(module)] = replace(home, attributes={**home.attributes, attribute: value})


def _is_gone(home: str, name: str, gone: Set[str]) -> bool:
    path = f"{home}.{name}" if home else name
    return any(within(each, path) for each in gone)


@once
def _idle(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of stochastic depth that an op stands for from now on: it returns what it gets."""

    def forward(self: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x

    def reduced(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = super(type(self), self).__reduce_ex__(protocol)
        make, args, *rest = reduced
        return (_idle_again, (cls, make, tuple(cls if arg is type(self) else arg for arg in args)), *rest)

    about = {"forward": forward, "__reduce_ex__": reduced, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return types.new_class(cls.__name__, (cls,), {}, lambda namespace: namespace.update(about))


def _idle_again(cls: type[nn.Module], make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    module = make(*args)
    module.__class__ = _idle(cls)
    return module


def _place_in_model(graph: fx.Graph, path: str) -> None:
    """Makes the targets of a graph, which are paths in the module at `path`, paths in the model."""
    if path:
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                node.target = join(path, str(node.target))
