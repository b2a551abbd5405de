"""(captured graph, sites, rates) -> the rewritten GraphModule. Decides nothing.

before                                    after, for a site with a mask
    conv3 = self.layer1.0.conv3(relu)         conv3 = self.layer1.0.conv3(relu)
    add = conv3 + x                           drop = self.layer1.0.stochastic_depth(conv3)
                                              add = drop + x

before                                    after, for a site that skips
    norm = self.blocks.0.norm(x)              rows = self.blocks.0.stochastic_depth(x)
    mlp = self.blocks.0.mlp(norm)             shortcut, kept = fork(x, rows)
    add = x + mlp                             norm = self.blocks.0.norm(kept)
                                              mlp = self.blocks.0.mlp(norm)
                                              add = merge(shortcut, mlp, rows)
"""

from __future__ import annotations

import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, count
from typing import Any

import torch
from torch import fx, nn

from fxsd.capture import Captured, Part
from fxsd.capture.calls import Place
from fxsd.find.residual import Residual
from fxsd.graph.checkpoints import MARK
from fxsd.graph.graphmodule import META, StochasticGraphModule, build, replace_inside, shallow_tree
from fxsd.legal.batch import Region
from fxsd.plan import Plan
from fxsd.run.ops import StochasticDepth
from fxsd.run.rows import counted, fork, merge, spread, take
from fxsd.run.sizes import Sizes
from fxsd.run.skip import SkipStochasticDepth


def rewrite(
    captured: Captured,
    plans: Sequence[Plan],
    eval_residuals: Mapping[str, Residual],
    stochastic_method: str,
    scaling: str,
    sync_ranks: bool,
) -> nn.Module:
    """Puts a `StochasticDepth` on the branch of every planned site.

    Args:
        captured: owns the graphs, which are edited.
        plans: the sites of `captured`.
        eval_residuals: site name -> the same add in the evaluation program, where there is one.
        stochastic_method, scaling, sync_ranks: as in `fxsd.transform`.

    Returns:
        The model as one `StochasticGraphModule`, or a copy of it with such modules inside where it is not one graph.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for part in sorted(captured.parts, key=lambda part: len(part.path), reverse=True):  # inner ones first
        own = [plan for plan in plans if plan.residual.add.graph is part.graph]
        if own or not part.path:
            replaced[part.module] = _rewrite_part(part, own, eval_residuals, replaced, stochastic_method, scaling, sync_ranks)
    return replaced[captured.model] if captured.model in replaced else replace_inside(captured.model, replaced)


def _rewrite_part(
    part: Part,
    plans: Sequence[Plan],
    eval_residuals: Mapping[str, Residual],
    replaced: Mapping[nn.Module, nn.Module],
    stochastic_method: str,
    scaling: str,
    sync_ranks: bool,
) -> StochasticGraphModule:
    # The tree is made while native drop paths are still called: they stay the user's own modules.
    root = shallow_tree(part.module, part.graphs, part.constants, replaced)
    twins = {plan.name: eval_residuals[plan.name] for plan in plans if plan.name in eval_residuals}
    retired = _retire(root, [*(plan.residual for plan in plans), *twins.values()])
    numbers: dict[nn.Module, Iterator[int]] = defaultdict(count)  # of the ops in one module
    sizes = Sizes(vary=not any(plan.region.strided for plan in plans if plan.region is not None))
    for order, plan in enumerate(plans):
        path = part.to_local(plan.residual.module)
        home = root.get_submodule(path)
        make: Callable[..., StochasticDepth] = StochasticDepth
        if plan.region is not None:
            whole = stochastic_method == "block" and not plan.region.stays
            make = partial(
                SkipStochasticDepth,
                least_rows=plan.region.least_rows,
                conditional=whole,
                sizes=sizes,
                work=plan.region.work,
                turns=plan.region.strided and not plan.residual.batch_dim,
            )
        op = new_op(plan, order, stochastic_method, scaling, sync_ranks, device_of(home, root), make).train(home.training)
        target = _attach(home, path, op, numbers[home])
        if plan.region is None:
            insert_mask(plan.residual, target, retired)
        else:
            _insert_skip(plan.residual, plan.region, target, retired)
        if plan.name in twins:
            (insert_mask if plan.region is None else _insert_scale)(twins[plan.name], target, retired)
    gm = build(root, *part.graphs)
    lint(part.graphs)
    return gm


def new_op(
    plan: Plan,
    order: int,
    stochastic_method: str,
    scaling: str,
    sync_ranks: bool,
    device: torch.device,
    make: Callable[..., StochasticDepth] = StochasticDepth,
) -> StochasticDepth:
    """The op of a site. `order` is its place among all."""
    return make(
        plan.drop_rate,
        stochastic_method,
        scaling,
        site=plan.name,
        module=plan.residual.module,
        depth=plan.depth,
        order=order,
        kind=plan.residual.kind,
        reason=plan.reason,
        weight=plan.weight,
        batch_dim=plan.residual.batch_dim,
        sync_ranks=sync_ranks,
        device=device,
    )


def lint(graphs: Iterable[fx.Graph]) -> None:
    """Raises where a graph is not sound."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.7 warns of attributes that are no tensors; `training` is read on purpose
        for graph in graphs:
            graph.lint()


def device_of(home: nn.Module, root: nn.Module) -> torch.device:
    """Where the site's rate must live: with the parameters around it. A model on the meta device has no such place yet."""
    tensors = chain(home.parameters(), home.buffers(), root.parameters(), root.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def _attach(home: nn.Module, path: str, op: StochasticDepth, numbers: Iterator[int]) -> str:
    names = (f"stochastic_depth_{number}" if number else "stochastic_depth" for number in numbers)
    name = next(name for name in names if not hasattr(home, name))
    home.add_module(name, op)
    return f"{path}.{name}" if path else name


def _retire(root: nn.Module, residuals: Sequence[Residual]) -> dict[fx.Node, fx.Node]:
    """Takes out the stochastic depth that branches already end in. Returns each node taken out -> what stands for it now."""
    retired = take_out(residuals)
    for native in retired:
        home, _, name = str(native.target).rpartition(".")
        siblings = root.get_submodule(home)._modules
        if isinstance(siblings.get(name), StochasticDepth):
            del siblings[name]
    return retired


def take_out(residuals: Iterable[Residual]) -> dict[fx.Node, fx.Node]:
    """Takes the calls of stochastic depth that branches already end in out of their graphs. Returns each -> what stands for it now."""
    retired: dict[fx.Node, fx.Node] = {}
    for native in dict.fromkeys(residual.existing for residual in residuals):
        if native is not None:
            retired[native] = native.all_input_nodes[0]
            native.replace_all_uses_with(retired[native])
            native.graph.erase_node(native)
    return retired


def insert_mask(residual: Residual, target: str, retired: Mapping[fx.Node, fx.Node]) -> None:
    """Calls the op at `target` on a branch."""
    add = residual.add
    branch = retired.get(residual.branch, residual.branch)
    with add.graph.inserting_before(add):
        drop = add.graph.call_module(target, (branch,))
    mark(drop, residual, retired)
    add.replace_input_with(branch, drop)


def _insert_skip(residual: Residual, region: Region, target: str, retired: Mapping[fx.Node, fx.Node]) -> None:
    add, graph = residual.add, residual.add.graph
    branch = retired.get(residual.branch, residual.branch)
    nodes = [node for node in region.nodes if node not in retired]
    sides = [arg for arg in add.args if arg is not branch]
    first = next(iter(region.entries))
    with graph.inserting_before(nodes[0]):
        rows = graph.call_module(target, (retired.get(first, first),))
    taken: list[fx.Node] = []
    dim = _told(Place(residual.batch_dim))
    for entry, place in {retired.get(entry, entry): place for entry, place in region.entries.items()}.items():
        needs = {entry} if taken else {entry, *region.counts}
        with graph.inserting_before(next(node for node in nodes if not needs.isdisjoint(node.all_input_nodes))):  # after `rows`, perhaps
            args = (entry, rows, True) if region.kept and not taken else (entry, rows)
            if region.merges and entry is sides[0]:
                both = graph.call_function(fork, args, dim)
                sides = [graph.call_function(operator.getitem, (both, 0))]
                taken.append(graph.call_function(operator.getitem, (both, 1)))
            else:
                taken.append(graph.call_function(take, args, _told(place)))
        for node in nodes:
            node.replace_input_with(entry, taken[-1])
    for number, times in region.counts.items():
        users = [node for node in nodes if number in node.all_input_nodes]
        with graph.inserting_before(users[0]):
            size = graph.call_method("size", (taken[0], residual.batch_dim))
            one = isinstance(times, int)
            count = graph.call_function(operator.mul, (size, times)) if one else graph.call_function(counted, (size, times, number))
        for node in users:
            node.replace_input_with(number, count)
    mark(rows, residual, retired)
    if any(node.meta.get(MARK) != add.meta.get(MARK) for node in nodes):  # a checkpoint holds some of the branch
        rows.meta.pop(MARK, None)
    if region.merges:
        add.op, add.target, add.args, add.kwargs = "call_function", merge, (sides[0], branch, rows, add.args[0] is branch), dim
        return
    with graph.inserting_before(add):
        add.replace_input_with(branch, graph.call_function(spread, (branch, rows), dim))


def _told(place: Place) -> dict[str, Any]:
    """What functions of rows have to be told of a place: what is not as usual."""
    return {name: value for name, value in place._asdict().items() if value != getattr(Place(), name)}


def _insert_scale(residual: Residual, target: str, retired: Mapping[fx.Node, fx.Node]) -> None:
    """What a site that skips does in an evaluation program of its own."""
    add = residual.add
    branch = retired.get(residual.branch, residual.branch)
    with add.graph.inserting_before(add):
        rows = add.graph.call_module(target, (branch,))
        scaled = add.graph.call_function(spread, (branch, rows))
    add.replace_input_with(branch, scaled)


def mark(node: fx.Node, residual: Residual, retired: Mapping[fx.Node, fx.Node]) -> None:
    """Makes the call of an op say which add it stands for."""
    roles = {"add": residual.add, "branch": residual.branch, "shortcut": residual.shortcut, "fork": residual.fork}
    node.meta.update(residual.add.meta)
    node.meta[META] = {role: retired.get(found, found).name for role, found in roles.items()}
