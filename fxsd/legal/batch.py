"""Which branches may run on some rows of the batch, or what part of them: F(x)[rows] == F(x[rows]) in training, read by nobody else.

Pure analysis. The graph is followed on tensors without data at two batch sizes, which shows where the batch is; then each branch is run
on a few rows of random numbers, alone (`fxsd.legal.probe`), which shows whether its rows depend on each other. The model is left as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from math import inf
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxsd.capture import Part
from fxsd.capture.calls import Call, Place, batch_of, differing, without_values
from fxsd.capture.examples import Examples, computed
from fxsd.capture.modes import in_mode
from fxsd.capture.signature import bind
from fxsd.errors import told
from fxsd.find.residual import Residual
from fxsd.find.values import bases, is_plain_add, written
from fxsd.graph.checkpoints import MARK
from fxsd.legal.flops import flop_counter
from fxsd.legal.probe import MASKS, PLAIN, Illegal, Likeness, Probe, awake, is_drawn, random_like
from fxsd.run.rows import Times

SIZES = (4, 6)  # of the batch, to see what goes with it
# FLOPs saved for each value of the residual stream from which on skipping beat the mask, on a CPU, for branches of 16 to 1024 FLOPs a
# value and rates from .07 to .5. A row out and in again is some passes over memory, whatever the branch does.
_LEAST_GAIN = 32
# On a GPU the time for a value hardly falls with its FLOPs. At this rate steps of a ViT-B with CUDA graphs took as long as with a mask
# (H200, autocast); eager steps took less from .02 on.
_LEAST_RATE_ON_GPU = 0.05


@dataclass(frozen=True)
class Region:
    """A branch that may run on some rows.

    Attributes:
        nodes: those of the branch that come from the fork and that nobody else reads, in graph order; they run on the kept rows.
        entries: tensors from outside, of which the kept rows are taken, and where they have them; the first, which has them as the add
            has, is the fork, or comes from it.
        counts: whole numbers from outside that are so many times the number of rows; of several in one value, how many times each is,
            0 for one that does not go with the rows.
        work: FLOPs of the branch for each value that it adds.
        least_rows: how many rows it needs: 0, 1, or 2 for batch statistics.
        merges: its add is the sum of two values and no more.
        kept: somebody else keeps the fork for backward, so that the rows taken from it need not be kept.
        stays: why compiled code cannot leave it out as a whole, "" if it can.
        strided: strides in it depend on how many rows there are, as where attention has the sequence in dim 0.
        device: the type of what it runs on.
    """

    nodes: tuple[fx.Node, ...]
    entries: Mapping[fx.Node, Place]
    counts: Mapping[fx.Node, Times]
    work: float
    least_rows: int
    merges: bool
    kept: bool = False
    stays: str = ""
    strided: bool = False
    device: str = "cpu"


def find_regions(
    part: Part, residuals: Sequence[Residual], subset_batch_norm: bool = False, all_or_none: bool = False
) -> list[tuple[Residual, Region | str]]:
    """Each residual add of a part, with its samples where shapes show them, and its region, or a sentence why it has to run on all rows.

    Runs the branches; the caller restores the model and the random states.
    """
    try:
        batch = Batch(part)
    except Illegal as error:
        return [(residual, str(error)) for residual in residuals]
    adds = Counter(residual.add for residual in residuals)
    found: list[tuple[Residual, Region | str]] = []
    for residual in map(batch.placed, residuals):
        try:
            region = batch.region(residual, subset_batch_norm, all_or_none)
            inner = adds.keys() & set(region.nodes)
            if adds[residual.add] > 1:  # a sum of two branches
                region = replace(region, merges=False, stays="its add is the sum of two branches")
            found.append((residual, f"its branch holds another site, {next(iter(inner)).name}" if inner else region))
        except Illegal as error:
            found.append((residual, str(error)))
    return found


def find_samples(part: Part, residuals: Sequence[Residual]) -> list[Residual]:
    """The residual adds of a part with their samples where shapes show them, if they do."""
    try:
        return list(map(Batch(part).placed, residuals))
    except Illegal:
        return list(residuals)


def no_gain(region: Region, drop_rate: float, all_or_none: bool = False) -> str:
    """Says why skipping `region` would not pay, if it would not."""
    if drop_rate == 0.0:
        return "it never drops anything"
    if region.work * drop_rate < _LEAST_GAIN:
        return f"its branch has {region.work:.3g} FLOPs a value, too few for taking rows out and back in to pay at rate {drop_rate:.2g}"
    if region.device != "cpu" and not all_or_none and drop_rate < _LEAST_RATE_ON_GPU:
        return f"its rate is {drop_rate:.2g}, and on a GPU taking rows out and back in pays from {_LEAST_RATE_ON_GPU} on"
    return ""


@dataclass
class _Followed:
    """A graph at one batch size.

    Attributes:
        values: of the nodes up to the first that fails.
        flops: of each, counted at the first size.
        versions: (user, value) -> how often the value had been written into.
        why: that node fails, "" if none does.
    """

    values: dict[fx.Node, Any] = field(default_factory=dict)
    flops: dict[fx.Node, int] = field(default_factory=dict)
    versions: dict[tuple[fx.Node, fx.Node], int] = field(default_factory=dict)
    why: str = ""


class Batch:
    """How the values of a graph go with the batch.

    Args:
        part: whose training program is followed. If it is not known where its call has samples, dim 0 of the first tensor has them.

    Raises:
        Illegal: it is not known how it is called, nothing tells what the batch is, or the module has no data.
    """

    def __init__(self, part: Part) -> None:
        if part.call is None:
            raise Illegal("it is not known how the part of the model that it is in is called")
        if any(tensor.is_meta for tensor in chain(part.module.parameters(), part.module.buffers())):
            raise Illegal("the model is on the meta device, where no branch can be run to see what its samples have to do with each other")
        self.module, self.constants, graph = part.module, part.constants, part.graph
        self.index = {node: place for place, node in enumerate(graph.nodes)}
        self.bases, self.unused = bases(graph), _unused(graph)
        guesses = [part.places] if part.places else [_likely(part.call, 1), _likely(part.call, inf)]
        followed: list[list[_Followed]] = []
        with torch.no_grad(), in_mode(part.module, True):
            for guess in guesses if guesses[0] != guesses[-1] else guesses[:1]:
                followed.append([self._follow(graph, part.call, guess, size) for size in SIZES])
                if not any(run.why for run in followed[-1]):
                    break
        # As far as it runs: what comes later, a loss that decides on values, is no matter to what comes before.
        runs = max(followed, key=lambda runs: min(len(run.values) for run in runs))
        shorter = min(runs, key=lambda run: len(run.values))
        self.end, self.why = len(shorter.values), shorter.why  # how many nodes ran at both sizes
        self.flops, self.versions = runs[0].flops, runs[0].versions
        unseen = dict.fromkeys((node for node, place in self.index.items() if place >= self.end), torch.empty(0))
        self.values = [run.values | unseen for run in runs]

    def _follow(self, graph: fx.Graph, call: Call, places: Sequence[Place | None], size: int) -> _Followed:
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        call = _resized(without_values(call, fakes), places, size, fakes)
        binding = bind(self.module.__dict__.get("forward") or self.module.forward, call)
        examples = Examples(self.module, binding.fixed | binding.example, self.constants, True, nullcontext, fakes)
        self.attribute = examples.attribute
        found = _Followed()
        counter = flop_counter()
        try:
            with counter if size == SIZES[0] else nullcontext():
                for node in graph.nodes:
                    if node.op == "output":
                        break
                    for arg in node.all_input_nodes:
                        if isinstance(found.values[arg], Tensor):
                            found.versions[node, arg] = found.values[arg]._version
                    before = counter.get_total_flops()
                    try:
                        found.values[node] = examples.value(node)
                    except Exception as error:
                        found.why = f"the model does not run with {size} samples: {node.name} fails ({told(error)})"
                        break
                    found.flops[node] = counter.get_total_flops() - before
        finally:
            examples.close()
        return found

    def placed(self, residual: Residual) -> Residual:
        """The residual add with its samples where shapes show them, if they do."""
        values = [value[residual.add] for value in self.values]
        if not all(isinstance(value, Tensor) for value in values):
            return residual
        dims = differing(*(value.shape for value in values))
        return replace(residual, batch_dim=dims[0], placed=True) if len(dims) == 1 else residual

    def region(self, residual: Residual, subset_batch_norm: bool = False, all_or_none: bool = False) -> Region:
        """The region of a branch.

        Args:
            residual: whose branch.
            subset_batch_norm: batch norm may see some of the rows.
            all_or_none: the branch will run on all rows or on none, so that it does not matter what they have to do with each other.

        Raises:
            Illegal: it has to run on all rows.
        """
        if self.index[residual.add] >= self.end:
            raise Illegal(self.why)
        nodes = self._between(residual)
        fixed = self._fixed(nodes)
        self._check_rows(residual)
        checkpointed = any(MARK in node.meta for node in (residual.add, *nodes))
        if not (all_or_none or checkpointed):
            nodes = self._for_itself(residual, nodes, fixed)
        inside = set(nodes)
        outside = list(dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if arg not in inside))
        entries, counts = self._entries(residual, outside)
        own = Place(residual.batch_dim)
        if not entries or (all_or_none and entries.get(residual.fork) != own):
            raise Illegal(f"{residual.fork.name}, which its branch comes from, has not the batch in dim {own.dim} as the branch has")
        # The first tells the batch, and how many rows there are: what comes from the fork, for a mask may have one row for all.
        data = {residual.fork} if entries.get(residual.fork) == own else self._data_of(residual.fork)
        order = sorted(entries, key=lambda entry: (entry not in data or entries[entry] != own, self.index[entry]))
        entries, first = {entry: entries[entry] for entry in order}, order[0]
        if first not in data or entries[first] != own:
            raise Illegal(f"nothing that enters its branch comes from {residual.fork.name}, with a row for each of its own")
        if self.index[nodes[0]] < self.index[first]:
            raise Illegal(f"{nodes[0].name} in the branch comes before {first.name}, which tells how many rows there are")
        self._check_users(residual, inside, fixed)
        self._check_writes(residual, nodes, entries)
        generator = torch.Generator().manual_seed(0)
        probes: list[Probe] = []
        likenesses = self._likenesses(outside, entries)
        for choices in likenesses:
            for like in choices:
                given = {node: self._real(node, entries.get(node), generator, like) for node in outside}
                probe = Probe(self.module, residual, nodes, given, entries, counts)
                if likenesses == [[PLAIN]] or probe.runs():
                    probes.append(probe)
                    break
        probes = probes or [probe]  # which says why it does not run
        least_rows = max(probe.on_none() if all_or_none else probe.least_rows(subset_batch_norm) for probe in probes)
        branch = self.values[0][residual.branch]
        work = sum(self.flops[node] for node in nodes) / max(branch.numel(), 1)
        merges = is_plain_add(residual.add) and [arg is residual.branch for arg in residual.add.args].count(False) == 1
        stays = "" if merges else "its add is more than the sum of two values"
        if checkpointed:
            stays = "its activations are checkpointed, where torch.cond does not run"
        others = self._back(residual.shortcut, residual.fork).intersection(residual.fork.users)
        kept = (
            not all_or_none
            and entries.get(residual.fork) == Place()
            and any(self._keeps(node, residual.fork, generator) for node in (residual.fork, *others))
        )
        stays = next((why for why in (stays, *(probe.stays for probe in probes)) if why), "")
        strided = any(probe.strided for probe in probes)
        return Region(tuple(nodes), entries, counts, work, least_rows, merges, kept, stays, strided, branch.device.type)

    def _keeps(self, node: fx.Node, value: fx.Node, generator: torch.Generator) -> bool:
        """Does an op that makes or uses a value keep it for backward?"""
        if not node.op.startswith("call_"):
            return False
        kept: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.enable_grad(), in_mode(self.module, True), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            known = {arg: self._real(arg, None, generator) for arg in node.all_input_nodes}
            for arg, real in known.items():
                if isinstance(real, Tensor) and real.dtype.is_floating_point:
                    known[arg] = real.requires_grad_().clone()  # no leaf, which an op may not write into
            try:
                known[node] = computed(node, known, lambda path, args, kwargs: self.module.get_submodule(path)(*args, **kwargs))
            except Exception:
                return False
        return any(tensor.untyped_storage() is known[value].untyped_storage() for tensor in kept)

    def _between(self, residual: Residual) -> list[fx.Node]:
        """What is computed from the fork for the branch alone, and the checks on it, in graph order."""
        for_branch, for_shortcut = (self._back(side, residual.fork) for side in (residual.branch, residual.shortcut))
        seen = {residual.fork}
        for node in sorted(for_branch | for_shortcut, key=self.index.__getitem__):
            if not seen.isdisjoint(node.all_input_nodes):
                seen.add(node)
        own = [node for node in sorted(for_branch - for_shortcut, key=self.index.__getitem__) if node in seen]
        if residual.branch not in own:
            raise Illegal("its branch and its shortcut are computed together")
        # Sizes of what is in the branch, and checks on them, go along, and what nobody needs.
        found, stack = set(own), list(own)
        while stack:
            for user in stack.pop().users:
                unused = user in self.unused and self.index[user] < self.index[residual.add]
                along = user.op != "output" and (unused or not isinstance(self.values[0][user], Tensor))
                if along and user not in found and found.issuperset(user.all_input_nodes):
                    found.add(user)
                    stack.append(user)
        nodes = sorted(found, key=self.index.__getitem__)
        return self._without(residual, nodes, self._shared(seen, nodes))

    def _without(self, residual: Residual, nodes: Sequence[fx.Node], others: Container[fx.Node]) -> list[fx.Node]:
        """Those of `nodes` that are not among `others`, and do not only tell sizes of those, check them, or go into nothing."""
        kept = {residual.fork}
        for node in nodes:
            aside = self._is_plain(node) or node in self.unused
            if node not in others and not (aside and kept.isdisjoint(node.all_input_nodes)):
                kept.add(node)
        return [node for node in nodes if node in kept]

    def _shared(self, behind: set[fx.Node], nodes: Sequence[fx.Node]) -> set[fx.Node]:
        """Those of `nodes` that are used outside and come from the fork by its sizes or dtype alone: masks that later blocks read.

        Args:
            behind: all that comes from the fork, and itself.
        """
        inside, apart = set(nodes), set[fx.Node]()
        values = {node for node in behind - inside if not self._is_plain(node)}
        for node in nodes:
            if (self._is_plain(node) or values.isdisjoint(node.all_input_nodes)) and apart.issuperset(
                inside.intersection(node.all_input_nodes)
            ):
                apart.add(node)
        found = {node for node in apart if any(user not in inside for user in node.users)}
        for node in reversed(nodes):
            if node in apart and not found.isdisjoint(node.users):
                found.add(node)
        for node in nodes:
            if node in apart and any(arg in found and self._holds_tensors(arg) for arg in node.all_input_nodes):
                found.add(node)
        return found

    def _likenesses(self, outside: Iterable[fx.Node], entries: Mapping[fx.Node, Place]) -> list[list[Likeness]]:
        """What to give a branch, each in turn, and of each the first choice with which it runs.

        Nothing may come through a mask that is the same everywhere, and nothing be left where two meet; there may be fewer classes than
        rows. What has several rows for one of the batch must differ from row to row: only the numbers show whether those are in a row.
        """
        kinds = {node: value.dtype for node in outside if isinstance(value := self.values[0][node], Tensor)}
        many = {kinds[node] for node, place in entries.items() if place.each > 1}
        masks, whole = torch.bool in kinds.values(), any(not is_drawn(kind) and kind is not torch.bool for kind in kinds.values())
        found = [[Likeness(places, mask) for places in ((True, False) if whole else (False,))] for mask in (MASKS if masks else MASKS[:1])]
        return [[like for like in choices if all(like.differs(kind) for kind in many)] for choices in found]

    def _real(self, node: fx.Node, place: Place | None, generator: torch.Generator, like: Likeness = PLAIN) -> Any:
        """Stands for a value that enters a branch: the model's own, or random numbers like it, with a few rows in a place."""
        if node.op == "get_attr":
            found = self.attribute(str(node.target))
            return awake(found.detach()).clone() if isinstance(found, Tensor) else found
        value = self.values[0][node]
        if not isinstance(value, Tensor):
            return torch.utils._pytree.tree_map_only(Tensor, lambda leaf: random_like(leaf, None, generator, like), value)
        return random_like(value, place, generator, like)

    def _back(self, end: fx.Node, start: fx.Node) -> set[fx.Node]:
        """`end` and what it comes from, as far as it lies behind `start` in the graph."""
        found: set[fx.Node] = set()
        stack = [end]
        while stack:
            node = stack.pop()
            if node not in found and self.index[node] > self.index[start]:
                found.add(node)
                stack.extend(node.all_input_nodes)
        return found

    def _check_rows(self, residual: Residual) -> None:
        for values in self.values:
            branch, shortcut = values[residual.branch], values[residual.shortcut]
            if not isinstance(branch, Tensor) or not isinstance(shortcut, Tensor) or branch.dim() <= residual.batch_dim:
                raise Illegal("its operands are no tensors with a batch")
            if branch.shape != shortcut.shape:
                raise Illegal(f"its branch has the shape {list(branch.shape)} and its shortcut {list(shortcut.shape)}")
        if self._rows(residual) == (0, 0):
            raise Illegal(f"the batch is not in dim {residual.batch_dim} of its branch")

    def _data_of(self, start: fx.Node) -> set[fx.Node]:
        """`start` and what is computed from it, but for its sizes alone."""
        found = {start}
        for node in start.graph.nodes:
            if node.op != "output" and not found.isdisjoint(node.all_input_nodes) and not self._is_plain(node):
                found.add(node)
        return found

    def _is_plain(self, node: fx.Node) -> bool:
        """Is there no tensor in its value?"""
        return not any(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves(self.values[0][node]))

    def _holds_tensors(self, node: fx.Node) -> bool:
        """Is its value several tensors, of which others read one?"""
        return not isinstance(self.values[0][node], Tensor) and not self._is_plain(node)

    def _rows(self, residual: Residual) -> tuple[int, int]:
        first, second = (values[residual.branch].shape[residual.batch_dim] for values in self.values)
        return (first, second) if first * SIZES[1] == second * SIZES[0] else (0, 0)

    def _entries(self, residual: Residual, outside: Iterable[fx.Node]) -> tuple[dict[fx.Node, Place], dict[fx.Node, Times]]:
        rows = self._rows(residual)
        entries: dict[fx.Node, Place] = {}
        counts: dict[fx.Node, Times] = {}
        for node in outside:
            first, second = (values[node] for values in self.values)
            if isinstance(first, Tensor):
                if first.shape == second.shape:
                    continue
                dims = differing(first.shape, second.shape)
                each = _times(first.shape[dims[0]], second.shape[dims[0]], rows) if len(dims) == 1 else None
                if not isinstance(each, int) or first.dim() != second.dim():
                    raise Illegal(f"{node.name}, which enters the branch, has the batch in no dim of its own: {list(first.shape)}")
                entries[node] = Place(dims[0], each)
            elif not _same(first, second):
                times = _times(first, second, rows)
                if times is None:
                    raise Illegal(f"{node.name}, which enters the branch, depends on the batch and is of type {type(first).__name__}")
                counts[node] = times
        return entries, counts

    def _fixed(self, nodes: Sequence[fx.Node]) -> set[fx.Node]:
        """Those of `nodes` that are the same whichever rows run: sizes but for the batch, dtypes, and what is computed from such alone."""
        varying = set[fx.Node]()
        filled = {self.bases[target] for node in nodes if (target := written(node)) is not None}
        for node in nodes:
            from_rows = any(arg in varying or not self._same(arg) for arg in node.all_input_nodes) or self.bases[node] in filled
            if not self._same(node) or (from_rows and not self._is_plain(node)):
                varying.add(node)
        return set(nodes) - varying

    def _same(self, node: fx.Node) -> bool:
        """Does its value go without the batch, as far as can be seen without numbers?"""
        return _same(*(values[node] for values in self.values))

    def _for_itself(self, residual: Residual, nodes: list[fx.Node], fixed: Container[fx.Node]) -> list[fx.Node]:
        """Those of `nodes` that run for the branch alone, if they are most of it.

        Keys and values that also go to a cache, or a norm that two branches share, run on all rows, and their rows are taken.
        """
        inside, others, before = set(nodes), set[fx.Node](), -1
        vary = [node for node in nodes if node not in fixed]
        while len(others) > before:
            before = len(others)
            for node in reversed(vary):
                part = any(arg in others and self._holds_tensors(arg) for arg in node.all_input_nodes)
                if part or node in others or _users_outside(residual, node, inside):
                    others.update(arg for arg in (node, *node.all_input_nodes) if arg in inside and arg not in fixed)
        own = self._without(residual, nodes, others)
        most = 2 * sum(self.flops[node] for node in own) >= sum(self.flops[node] for node in nodes)
        return own if residual.branch in own and most else nodes

    def _check_users(self, residual: Residual, inside: set[fx.Node], fixed: set[fx.Node]) -> None:
        for node in sorted(inside - fixed, key=self.index.__getitem__):
            for user in _users_outside(residual, node, inside):
                raise Illegal(f"{node.name} in the branch is also used outside of it, by {user.name}")

    def _check_writes(self, residual: Residual, nodes: list[fx.Node], entries: Iterable[fx.Node]) -> None:
        """Rows are taken once, before the first node; nobody may write into the whole between that and the last use."""
        for entry in entries:
            seen = {self.versions[node, entry] for node in nodes if (node, entry) in self.versions}
            if (residual.add, entry) in self.versions:
                seen.add(self.versions[residual.add, entry])
            if len(seen) > 1:
                raise Illegal(f"{entry.name}, which enters the branch, is written into in between")
        target = written(residual.add)
        if target is not None and any(user is not residual.add and self.index[user] > self.index[residual.add] for user in target.users):
            raise Illegal(f"it adds in place into {target.name}, which is read afterwards")


def _users_outside(residual: Residual, node: fx.Node, inside: Container[fx.Node]) -> list[fx.Node]:
    """Those who use `node` outside of the branch, and would see that some rows are missing."""
    return [user for user in node.users if user not in inside and user is not residual.add]


def _unused(graph: fx.Graph) -> set[fx.Node]:
    """What is computed and not needed, as weights of attention where an operator computes them again."""
    found = set[fx.Node]()
    for node in reversed(graph.nodes):
        if node.op in ("call_function", "call_method") and not node.is_impure() and found.issuperset(node.users):
            found.add(node)
    return found


def _resized(call: Call, places: Sequence[Place | None], size: int, fakes: FakeTensorMode) -> Call:
    """The call with another number of samples."""

    def resized(leaf: Any, place: Place | None) -> Any:
        if place is None:
            return leaf
        shape = list(leaf.shape)
        shape[place.dim] = size * place.each
        with fakes:
            return torch.empty(shape, dtype=leaf.dtype, device=leaf.device)

    leaves, spec = torch.utils._pytree.tree_flatten(call)
    found: Call = torch.utils._pytree.tree_unflatten(list(map(resized, leaves, places)), spec)
    return found


def _likely(call: Call, most: float) -> list[Place | None]:
    """Where each leaf of a call seems to have samples: in dim 0, if there are rows for each.

    Args:
        most: how many rows there may be for one, as in a mask for each head of attention.
    """
    batch = batch_of(call)
    if batch is None:
        raise Illegal("no tensor among the example inputs tells what the batch is")

    def place(leaf: Any) -> Place | None:
        rows = leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() else None
        if rows is None or rows == batch:
            return None if rows is None else Place()
        each = 0 if rows % max(batch, 1) else rows // max(batch, 1)
        return Place(0, each) if 0 < each <= most else None

    return list(map(place, torch.utils._pytree.tree_leaves(call)))


def _times(first: Any, second: Any, rows: tuple[int, int]) -> Times | None:
    """How many times the number of rows a whole number is, or each of several; None if that is not what they are."""
    if isinstance(first, int):
        times = first // rows[0]
        return times if (first, second) == (times * rows[0], times * rows[1]) else None
    if type(first) not in (torch.Size, tuple) or len(first) != len(second):
        return None
    each = [0 if _same(a, b) else _times(a, b, rows) for a, b in zip(first, second, strict=True)]
    return [times for times in each if isinstance(times, int)] if all(isinstance(times, int) for times in each) else None


def _same(a: Any, b: Any) -> bool:
    leaves_a, spec_a = torch.utils._pytree.tree_flatten(a)
    leaves_b, spec_b = torch.utils._pytree.tree_flatten(b)
    return spec_a == spec_b and all(
        x.shape == y.shape if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y
        for x, y in zip(leaves_a, leaves_b, strict=True)
    )
