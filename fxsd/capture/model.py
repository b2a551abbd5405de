"""nn.Module -> graphs whose train and eval modes stay live.

A model becomes one graph if it can. Where it cannot, the largest modules in it that can become one each (`Part`), and the Python
around them stays what runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxsd.capture.calls import Call, Place, Run, as_call, batch_of, observed, places, twice
from fxsd.capture.droppath import drop_paths
from fxsd.capture.hidden import hidden_residual_adds
from fxsd.capture.observe import Observed, observe
from fxsd.capture.parts import Captured, Part, join
from fxsd.capture.patches import KeepsState
from fxsd.capture.programs import trace_modes, within
from fxsd.capture.snapshot import Snapshot, unchanged
from fxsd.capture.tracer import Tracer, named, place_in_model
from fxsd.errors import CaptureError, FxsdError, told
from fxsd.graph.graphmodule import StochasticGraphModule, copy_graph, runs_graph
from fxsd.graph.unskip import unskip


def capture(model: nn.Module, example_inputs: Any, owners_of_sites: Callable[[Part], Set[str]], to_run: bool = False) -> Captured:
    """Captures `model`, which is left exactly as it was.

    Args:
        model: any module. A GraphModule brings its graph along.
        example_inputs: a tuple of args, a dict of kwargs, or None. The model is run on them, once in each mode, only where it, or a module
            in it, cannot be a graph: to see which adds run there, or, if graphs are to run, how the modules in it are called.
        owners_of_sites: the paths of the modules that execute a residual add of a part.
        to_run: graphs are what will run, so that a model which cannot be one graph is taken apart. Otherwise they show what runs.

    Raises:
        FxsdError: `model` is no module, or wraps one, or `example_inputs` do not fit its forward.
    """
    _check(model)
    call = None if example_inputs is None else as_call(example_inputs)
    with unchanged(model) as snapshot, _quiet_fakes():
        capturer = _Capturer(model, call, owners_of_sites, snapshot, to_run)
        if to_run or call is None:
            capturer.module("", model)
        else:
            capturer.whole()
        return capturer.captured()


@contextmanager
def _quiet_fakes() -> Iterator[None]:
    """Inside, fake tensors do not log what they cannot follow: it is asked again in another way, or told in an error."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


class _Capturer:
    """Takes a model apart as far as it must, from the root down."""

    def __init__(
        self, model: nn.Module, call: Call | None, owners_of_sites: Callable[[Part], Set[str]], snapshot: Snapshot, to_run: bool
    ) -> None:
        self.model, self.call, self.owners_of_sites, self.snapshot, self.to_run = model, call, owners_of_sites, snapshot, to_run
        self.modules = dict(model.named_modules())
        # What is seen in a run needs no reader of sources.
        self.hides_sites = hidden_residual_adds if to_run or call is None else _nothing_hidden
        self.observed: tuple[Observed, ...] = ()
        self.observed_error: Exception | None = None
        drops = drop_paths(model, snapshot.restore)
        self.drop_paths = frozenset(path for path, module in model.named_modules() if module in drops) if drops else frozenset()
        self.fakes = None if call is None else FakeTensorMode(allow_non_fake_inputs=True)  # its first use imports much of torch
        self.parts: list[Part] = []
        self.opaque: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.reached: set[int] = set()  # ids of modules whose own code is in a graph
        self.tried: set[int] = set()
        self._runs: dict[bool, Run] = {}  # by mode
        self._doubled: Run | None = None

    def captured(self) -> Captured:
        order = {path: place for place, path in enumerate(self.run(False).calls)} if len(self.parts) > 1 else {}
        parts = sorted(self.parts, key=lambda part: order.get(part.path, len(order)))
        parts = [replace(part, places=self.places(part)) for part in parts]
        hidden: dict[str, int] = {}
        for path in sorted(self.failed, key=lambda path: -path.count(".") - bool(path)):  # inner ones first
            module = self.model.get_submodule(path)
            hidden[path] = self.hides_sites(module, self.reached)
            self.reached.update(map(id, module.modules()))
        hidden = {path: adds for path, adds in hidden.items() if adds}
        error = self._runs[False].error if False in self._runs else self.observed_error
        return Captured(self.model, tuple(parts), self.drop_paths, self.opaque, self.failed, hidden, error, self.observed)

    def whole(self) -> None:
        """Captures the model as one part if it can be one, and looks at a run for what is not in its graph."""
        apart: Set[str] = frozenset()
        try:
            apart = self.part("", self.model)
        except CaptureError as error:
            self.snapshot.restore(self.model)
            self.failed[""] = str(error)
        if self.failed or self.opaque or apart:
            assert self.call is not None
            runs = [self.run_of(self.call, training) for training in (True, False)]
            ended = [run for run in runs if run.error is None]
            if not ended and self.parts:  # its graph shows what it shows
                self.observed_error = runs[1].error
                return
            if not ended:
                raise CaptureError(
                    f"{self.failed.get('', '')} Nor does the model run on example_inputs: {told(runs[1].error or Exception())}.".lstrip()
                )
            doubled = self.run_of(twice(self.call), ended[-1].training)
            if doubled.error is None:
                ended[-1] = replace(ended[-1], doubled=doubled.graph)
            self.observed = tuple(ended)

    def run_of(self, call: Call, training: bool) -> Observed:
        seen = observe(self.model, call, training, sorted(self.drop_paths))
        self.snapshot.restore(self.model)
        return seen

    def module(self, path: str, module: nn.Module) -> None:
        """Captures `module` as one part, or else the modules in it."""
        if id(module) in self.tried or id(module) in self.reached:
            return
        self.tried.add(id(module))
        if not self.is_called(path, module):
            self.children(path, module)
            return
        try:
            inside = self.part(path, module)
        except FxsdError as error:
            if not path and not isinstance(error, CaptureError):
                raise
            self.snapshot.restore(module)
            self.failed[path] = str(error)
            self.children(path, module)
            return
        for inner in sorted(inside):
            self.module(inner, self.model.get_submodule(inner))

    def is_called(self, path: str, module: nn.Module) -> bool:
        """A container is not, nor is a module of which others call the pieces only."""
        if type(module).forward is nn.Module.forward and "forward" not in vars(module):
            return False
        calls = {**self.run(False).calls, **self.run(True).calls} if path else {}
        return not path or path in calls or not any(within(called, path) for called in calls)

    def children(self, path: str, module: nn.Module) -> None:
        for name, child in module._modules.items():
            if child is not None:
                self.module(join(path, name), child)

    def part(self, path: str, module: nn.Module) -> Set[str]:
        """Captures `module` as one part. Returns the paths of modules in it that stay calls and yet hold residual adds."""
        known = frozenset(name for name in self.drop_paths if within(name, path))
        if isinstance(module, fx.GraphModule) and runs_graph(module):
            eval_graph = getattr(module, "eval_graph", None)
            graphs = tuple(copy_graph(graph) for graph in (module.graph, eval_graph) if graph is not None)
            if isinstance(module, StochasticGraphModule):
                for graph in graphs:
                    unskip(graph, module)
            else:
                place_in_model(graphs[0], path, type(module))
            inner = frozenset(_graph_modules(path, module, graphs))
            self._add(Part(path, module, graphs, known, call=_any(self.calls(path, True))), inner)
            return inner
        in_training, in_evaluation = (self.calls(path, training) for training in (True, False))
        constants: dict[str, torch.Tensor] = {}

        def traced(call: Call | None, leaves: Set[str], training: bool, kept: Mapping[nn.Module, Mapping[str, Any]]) -> Tracer:
            tracer = Tracer(self.snapshot, path, known | leaves, training, self.hides_sites, constants, self.fakes, self.modules)
            for inner, values in kept.items():
                inner.__dict__.update(values)
            try:
                tracer.trace_model(module, call)
                # What stays a call keeps what it keeps; here it ran to see what it gives.
                own = (inner for name, inner in module.named_modules(prefix=path) if not any(within(name, leaf) for leaf in tracer.leaves))
                tracer.kept = {inner: written for inner in own if (written := self.snapshot.written(inner))}
            finally:  # the next trace must not see the values of this one
                changed = self.snapshot.restore(module)
                tracer.close()
            if changed and tracer.branched:
                tracer.changed = {name for name, inner in module.named_modules(prefix=path) if id(inner) in changed}
            return tracer

        def trace(leaves: Set[str], training: bool) -> Tracer:
            tracers = []
            for call in (in_training if training else in_evaluation).values():
                tracer = traced(call, leaves, training, {})
                if tracer.kept and (_buffers(tracer.kept) or str(traced(call, leaves, training, tracer.kept).graph) != str(tracer.graph)):
                    keeps = KeepsState(name for written in tracer.kept.values() for name in written)
                    raise CaptureError(
                        f"{named(path, module)} {keeps}, and computes with it. To have it captured, keep it in a buffer that is written to "
                        "in place, or keep the module out of the forward."
                    )
                tracers.append(tracer)
            if any(str(tracer.graph) != str(tracers[0].graph) for tracer in tracers[1:]):
                raise CaptureError(f"{named(path, module)} is called in ways that make it run different code.")
            return tracers[0]

        train, evaluated, apart = trace_modes(
            path,
            trace,
            lambda graph: self.owners_of_sites(Part(path, module, (graph,), known)),
            in_training.keys() != in_evaluation.keys(),
        )
        programs = [train] if evaluated is None else [train, evaluated]
        graphs = tuple(program.graph for program in programs)
        used = {str(node.target).rpartition(".")[2] for graph in graphs for node in graph.nodes if node.op == "get_attr"}
        constants = {name: tensor for name, tensor in constants.items() if name in used}
        for program in programs:
            self.opaque |= program.opaque
            self.failed |= program.broken
        apart |= {name for program in programs for name in (*program.broken, *program.apart)}
        self._add(Part(path, module, graphs, known, constants, _any(in_training)), apart)
        return apart

    def _add(self, part: Part, apart: Set[str]) -> None:
        self.parts.append(part)
        self.failed.pop(part.path, None)
        outside = {id(self.model.get_submodule(path)) for path in apart}
        stack = [part.module]
        while stack:
            module = stack.pop()
            self.reached.add(id(module))
            children = (child for child in module._modules.values() if child is not None)
            stack.extend(child for child in children if id(child) not in self.reached and id(child) not in outside)

    def calls(self, path: str, training: bool) -> Mapping[Any, Call | None]:
        """How the module at `path` is called, by what tells the calls apart; {None: None} where it is not known."""
        unknown: dict[Any, Call | None] = {None: self.call if not path else None}
        return unknown if not path else self.run(training).calls.get(path) or self.run(not training).calls.get(path) or unknown

    def places(self, part: Part) -> list[Place | None] | None:
        """Where the tensors in the call of a part have samples: what differs in another run, where there are twice as many."""
        if not part.path or part.call is None or self.call is None or not (batch := batch_of(self.call)):
            return None
        if self._doubled is None:
            assert self.fakes is not None
            self._doubled = observed(self.model, twice(self.call), self.fakes, True)
            self.snapshot.restore(self.model)
        calls = self._doubled.calls.get(part.path)
        return None if not calls else places(part.call, next(iter(calls.values())), batch)

    def run(self, training: bool) -> Run:
        if training not in self._runs:
            self._runs[training] = observed(self.model, self.call, self.fakes, training) if self.call and self.fakes else Run({})
            self.snapshot.restore(self.model)
        return self._runs[training]


def _nothing_hidden(module: nn.Module, reached: Set[int] = frozenset()) -> int:
    return 0


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise FxsdError(f"model must be a torch.nn.Module, but got {type(model).__name__}.")
    inner = _wrapped(model)
    if inner is not None:
        raise FxsdError(
            f"the model is wrapped in {type(model).__name__}; transform the model inside it first "
            f"({type(inner).__name__}), and compile or distribute the result."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise FxsdError("a ScriptModule has no Python left to trace; transform the model before torch.jit.script.")
    for path, module in model.named_modules():
        adds = 0 if _wrapped(module) is None else hidden_residual_adds(module)
        if adds:
            raise FxsdError(
                f"module {path!r} is wrapped in {type(module).__name__} and holds {adds} residual adds; transform the model before "
                "parts of it are compiled or distributed, or compile and distribute the result."
            )


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper which runs it in its own way is around: compiled, data parallel, sharded."""
    distributed = type(module).__module__.startswith(("torch.nn.parallel", "torch.distributed"))
    name = "module" if distributed else "_orig_mod"
    # A module answers slowly that it has no such attribute, and every one is asked.
    inner = getattr(module, name, None) if distributed or name in module._modules else None
    return inner if isinstance(inner, nn.Module) else None


def _graph_modules(path: str, module: nn.Module, graphs: Sequence[fx.Graph]) -> Iterator[str]:
    """The GraphModules that graphs call, directly or through a module around them."""
    for target in {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_module"}:
        found = [name for name, inner in module.get_submodule(target).named_modules() if isinstance(inner, fx.GraphModule)]
        yield from (join(path, join(target, name)) for name in found if not any(other != name and within(name, other) for other in found))


def _buffers(kept: Mapping[nn.Module, Mapping[str, Any]]) -> bool:
    return any(name in module._buffers for module, written in kept.items() for name in written)


def _any(calls: Mapping[Any, Call | None]) -> Call | None:
    return next(iter(calls.values()), None)
