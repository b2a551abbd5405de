"""Runs one branch alone, on a few rows of random numbers: what do its rows have to do with each other?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxsd.capture.calls import Place
from fxsd.capture.examples import computed
from fxsd.capture.modes import in_mode
from fxsd.errors import told
from fxsd.find.residual import Residual
from fxsd.run.rows import Times, counted, empty_in_format, put_back
from fxsd.versions import NO_COND

ROWS = 3  # of random numbers


class Illegal(Exception):
    """The branch cannot run on some rows; says why."""


class Probe:
    """One branch, to be run alone.

    Attributes:
        stays: why `torch.cond` cannot leave it out, "" if it can; known once it has run.
        strided: do strides of what it computes depend on how many rows there are? Known once `least_rows` is.
    """

    def __init__(
        self,
        module: nn.Module,
        residual: Residual,
        nodes: Sequence[fx.Node],
        given: Mapping[fx.Node, Any],
        entries: Mapping[fx.Node, Place],
        counts: Mapping[fx.Node, Times],
    ) -> None:
        self.module, self.residual, self.nodes, self.outside, self.entries, self.counts = module, residual, nodes, given, entries, counts
        self.stays, self.strided = NO_COND, False
        self.called = {name: module.get_submodule(name) for name in (str(node.target) for node in nodes if node.op == "call_module")}
        self.parameters = {
            name: {key: awake(parameter.detach()).clone() for key, parameter in called.named_parameters()}
            for name, called in self.called.items()
        }

    def least_rows(self, subset_batch_norm: bool) -> int:
        """How many rows the branch needs.

        Raises:
            Illegal: its rows depend on each other, or it writes into what is not its own.
        """
        with torch.no_grad(), in_mode(self.module, True):
            draws = _NoDraws()
            why = self._mixes(draws)
            if why and draws.batch_norm:
                if not subset_batch_norm:
                    raise Illegal("its branch has batch norm, which would see the kept samples only; subset_batch_norm=True allows that")
                why = self._mixes(_NoDraws(fixed_statistics=True)) or ("" if self._runs(2) else "its branch does not run on two samples")
                if not why:
                    return 2
            if why:
                raise Illegal(why)
            rows = next((rows for rows in (0, 1, 2) if self._runs(rows)), None)
        if rows is None:
            raise Illegal("its branch does not run on one sample or two")
        return rows

    def runs(self) -> bool:
        """Does the branch run on what it was given, and give finite numbers?"""
        with torch.no_grad(), in_mode(self.module, True):
            result = self._result(_copied(self._given(ROWS, lambda value: value)))
        return result is not None and result.shape[:1] == (ROWS,) and bool(result.isfinite().all())

    def on_none(self) -> int:
        """Zero, which is how many rows the branch needs.

        Raises:
            Illegal: it needs more.
        """
        with torch.no_grad(), in_mode(self.module, True):
            if not self._runs(0):
                raise Illegal("its branch does not run on a batch of no samples")
        return 0

    def _mixes(self, draws: _NoDraws) -> str:
        """Says how its rows depend on each other, if they do: the last two, swapped, against all of which the first is not a number."""
        swapped = [2, 1]
        with draws:
            try:
                given = self._given(2, lambda value: value[swapped])
                before = {node: _copied(value) for node, value in given.items()}
                part, strides = draws.watched(self._run, given)
                changed = [node.name for node, value in given.items() if not _equal(value, before[node])]
                if changed:
                    return f"its branch writes into {changed[0]}, which comes from outside"
                whole, others = draws.watched(self._run, self._given(ROWS, _tainted))
                self.strided = strides != others
            except Exception as error:
                return f"its branch does not run on some of the samples ({told(error)})"
        if not isinstance(part, Tensor) or part.shape[:1] != (2,) or not part.isfinite().all():
            return "its branch gives no finite numbers, one row a sample, for random input"
        if not isinstance(whole, Tensor) or whole.shape[:1] != (ROWS,) or whole[1:].isnan().any():
            return "its branch mixes samples: what it gives for one depends on others"
        if not _close(whole[swapped], part):
            return "its branch gives other results for a sample when fewer samples run with it"
        return ""

    def _runs(self, rows: int) -> bool:
        result = self._result(self._given(rows, lambda value: value[:rows]))
        return result is not None and result.shape[:1] == (rows,)

    def _result(self, given: Mapping[fx.Node, Any]) -> Tensor | None:
        """What the branch gives, if that is a tensor."""
        try:
            result = self._run(given)
        except Exception:
            return None
        return result if isinstance(result, Tensor) else None

    def _given(self, rows: int, entry: Callable[[Tensor], Tensor]) -> dict[fx.Node, Any]:
        """What enters the branch where so many rows run."""
        given: dict[fx.Node, Any] = {}
        for node, value in self.outside.items():
            if node in self.counts:
                given[node] = counted(rows, self.counts[node], value)
            else:
                given[node] = _changed(entry, value, self.entries[node]) if node in self.entries else value
        return given

    def _run(self, given: Mapping[fx.Node, Any]) -> Any:
        known = dict(given)
        for node in self.nodes:
            if node is self.residual.existing:
                known[node] = known[node.all_input_nodes[0]]
                continue
            known[node] = computed(node, known, self._call)
        found = known[self.residual.branch]
        return found.transpose(0, self.residual.batch_dim) if isinstance(found, Tensor) else found

    def _call(self, path: str, args: Any, kwargs: Any) -> Any:
        buffers = {key: tensor.clone() for key, tensor in self.called[path].named_buffers()}
        result = torch.func.functional_call(self.called[path], self.parameters[path] | buffers, args, kwargs)
        if any(tensor._version for tensor in buffers.values()):
            self.stays = f"its branch writes into the buffers of {path}"
        return result


class _NoDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, whatever is drawn at random is the same for each row: dropout keeps all, noise is one.

    Args:
        fixed_statistics: batch norm does not look at the batch.

    Attributes:
        batch_norm: has there been one that does?
    """

    def __init__(self, fixed_statistics: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fixed_statistics, self.batch_norm = fixed_statistics, False
        self._strides: list[list[int]] = []

    def watched(self, run: Callable[[Any], Any], given: Any) -> tuple[Any, list[list[int]]]:
        """What `run(given)` gives, and the strides of all that is computed for it."""
        self._strides = []
        result, strides = run(given), self._strides
        self._strides = []
        return result, strides

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._without_draws(func, args, kwargs or {})
        if isinstance(result, Tensor):
            self._strides.append([stride for stride, size in zip(result.stride(), result.shape, strict=True) if size > 1])
        return result

    def _without_draws(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        arguments = func._schema.arguments
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if "batch_norm" in name and "backward" not in name and any(a.name in ("training", "train") for a in arguments):
            given = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
            if given.get("training", given.get("train")):
                self.batch_norm = True
                if self.fixed_statistics:
                    zeros = args[0].new_zeros(args[0].shape[1], dtype=torch.promote_types(args[0].dtype, torch.float32))
                    ones = torch.ones_like(zeros)
                    weight, bias, eps = given.get("weight"), given.get("bias"), given.get("eps", given.get("epsilon"))
                    found = torch.ops.aten.native_batch_norm(args[0], weight, bias, zeros, ones, False, 0.0, eps)
                    return *found, *(zeros for _ in func._schema.returns[len(found) :])
        if name.startswith("_scaled_dot_product") or "attention_forward" in name:
            place = next((i for i, a in enumerate(arguments) if a.name == "dropout_p"), None)
            if place is not None and place < len(args):
                args = (*args[:place], 0.0, *args[place + 1 :])
            return func(*args, **{k: v for k, v in kwargs.items() if k != "dropout_p"})
        if name == "bernoulli":
            return args[0].clone()  # what the probabilities depend on
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(result, Tensor):
            drawn = result is args[0] if args and isinstance(args[0], Tensor) else not any(isinstance(arg, Tensor) for arg in args)
            if drawn or name in ("rand_like", "randn_like"):
                result.fill_(int(result.dtype.is_floating_point))  # of places, the first: it is tainted
        return result


def _changed(change: Callable[[Tensor], Tensor], value: Tensor, place: Place) -> Tensor:
    """A value whose rows are changed."""
    rows = value.transpose(0, place.dim)
    rows = change(rows) if place.each == 1 else change(rows.view(-1, place.each, *rows.shape[1:])).flatten(0, 1)
    return put_back(rows, place.dim, value)


def awake(tensor: Tensor) -> Tensor:
    """A parameter, or random numbers where it is nought: what it multiplies shall be seen."""
    if tensor.dtype.is_floating_point and tensor.numel() and tensor.abs().max() < 1e-3:
        return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(tensor.device, tensor.dtype)
    return tensor


class Likeness(NamedTuple):
    """What stands for numbers that are not real.

    Attributes:
        places: whole numbers are those of their rows, since they may be places in the batch; else zeros.
        mask: where masks are true: everywhere, nowhere, or here and there, which is None.
    """

    places: bool = False
    mask: bool | None = True

    def differs(self, dtype: torch.dtype) -> bool:
        """Does what stands for a tensor of this dtype differ from row to row?"""
        return is_drawn(dtype) or (self.mask is None if dtype is torch.bool else self.places)


PLAIN, MASKS = Likeness(), (True, False, None)


def random_like(like: Tensor, place: Place | None, generator: torch.Generator, likeness: Likeness = PLAIN) -> Tensor:
    """Numbers like those of `like`, in its memory format.

    Args:
        place: where it has samples, of which a few are made.
    """
    shape = list(like.shape)
    if place is not None:
        shape[place.dim] = ROWS * place.each
    made, _ = empty_in_format(like, shape)
    if is_drawn(made.dtype):
        drawn = torch.complex64 if made.dtype.is_complex else torch.float32
        return made.copy_(torch.randn(made.shape, generator=generator, dtype=drawn, device="cpu"))
    if made.dtype is torch.bool:
        return made.copy_(_some(made.shape, generator)) if likeness.mask is None else made.fill_(likeness.mask)
    if likeness.places and place is not None:
        return made.copy_(torch.arange(shape[place.dim]).view([-1] + [1] * (made.dim() - 1 - place.dim)))
    return made.fill_(0)


def _some(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A mask that is true here and there, and not, in each line of the last dim that has some places."""
    dim = next((dim for dim in reversed(range(len(shape))) if shape[dim] > 1), None)
    drawn = torch.rand(shape, generator=generator)
    if dim is None:
        return drawn < 0.5
    first = torch.rand(drawn.narrow(dim, 0, 1).shape, generator=generator) * (shape[dim] - 1)
    return drawn.argsort(dim) <= first.long()


def is_drawn(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _tainted(value: Tensor) -> Tensor:
    """Without numbers in the first row."""
    value = value.clone()
    if value.dtype.is_floating_point or value.dtype.is_complex:
        value[0] = torch.nan
    return value


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    limit = min(1e4 * max(torch.finfo(a.dtype).eps, torch.finfo(torch.float32).eps), 0.1)  # some of it may be in float32
    return bool((a - b).abs().max() <= limit * a.abs().max())


def _copied(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, torch.clone, value)


def _equal(a: Any, b: Any) -> bool:
    pairs = zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor))
