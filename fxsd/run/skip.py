"""Which rows of a batch a branch runs on.

Of B rows, K run through the branch: B q of them, rounded down or up at random so that their mean is B q, and each row
is as likely as any other to be among them. So every row is dropped with probability exactly 1 - q, whatever B is.

Compiled code always runs B q rounded up, or a few rows more (`fxsd.run.sizes`), and may leave the last ones out of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from fxsd.errors import FxsdError
from fxsd.run.by_place import draw_rows
from fxsd.run.ops import StochasticDepth
from fxsd.run.rows import Rows
from fxsd.run.sizes import PARTS, SLACK, Sizes, at_least, rows_kept
from fxsd.versions import SIZES_MOVE, has_static_value


class SkipStochasticDepth(StochasticDepth):
    """Draws the rows that a branch runs on: the op of a site that skips the compute of dropped samples.

    Args:
        drop_rate, stochastic_method, scaling, ...: as for `StochasticDepth`. With `"block"` all rows run, or none.
        least_rows: how many rows the branch must get, those of weight 0 included; it may need one, or two for batch statistics.
        conditional: compiled code may leave the branch out by `torch.cond`; only for `"block"`.
        sizes: shared by all sites of a graph that skip.
        work: of the branch; those of as much work are alike.
        turns: the branch puts other dims before that of the rows, and back.

    Shape:
        - Input: any tensor with the batch in `batch_dim`, of which only the size and the device matter.
        - Output: `Rows`. With `mask=True` the input is a branch, and the output is that of `StochasticDepth`.

    Example:
        >>> draw = SkipStochasticDepth(0.5)
        >>> rows = draw(torch.zeros(8, 3))
        >>> len(rows.taken)
        4
        >>> draw.eval()(torch.zeros(8, 3)).taken is None
        True
    """

    compute = "skip"

    def __init__(
        self,
        drop_rate: float,
        *args: Any,
        least_rows: int = 1,
        conditional: bool = False,
        sizes: Sizes | None = None,
        work: object = None,
        turns: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(drop_rate, *args, **kwargs)
        self.least_rows, self.conditional = least_rows, conditional
        self.sizes = sizes or Sizes()
        self.sizes.add(self.site, work, least_rows, self._keep_parts, turns)
        self.met: dict[int, torch.device] = {}  # the batches of compiled code
        self._settled = self.sizes.changes

    def forward(self, like: Tensor, mask: bool = False) -> Rows | Tensor:  # type: ignore[override]
        if isinstance(like, fx.Proxy):
            raise FxsdError(
                "torch.fx traces a model that skips branches, in whose graph rows are taken and put back; "
                "give it the model as compute='mask' makes it: fxsd.transform(gm, ...) makes one of the other."
            )
        if mask:
            return super().forward(like)
        batch = like.shape[self.batch_dim]
        if not self.training:
            return Rows(batch, weight=None if self.scaling == "train" else 1.0 - self.drop_rate)
        if torch.compiler.is_compiling():
            return self._draw_compiled(batch, like.device)
        return self._draw(batch, like.device)

    def _draw(self, batch: int, device: torch.device) -> Rows:
        if self._never_drops or batch == 0:
            return Rows(batch)
        if self.stochastic_method == "block":
            drawn = self._uniform([], torch.device("cpu"))
            if _is_many(drawn):
                return self._masked(batch, [], device)
            return Rows(batch, weight=self.training_scale(), none=drawn.item() < 1.0 - self._keep_parts / PARTS)
        kept, rest = _whole_rows(batch, self._keep_parts)
        if rest > SLACK:
            drawn = torch.rand((), device="cpu")
            if _is_many(drawn):
                return self._masked(batch, [batch], device)
            kept += int(drawn.item() < rest / PARTS)
        if kept == batch:
            return Rows(batch, weight=self.training_scale())
        run = max(kept, min(self.least_rows, batch))
        # On the CPU, which does not wait, and launches one copy in place of ten kernels.
        order = torch.randperm(batch, device="cpu").to(device, non_blocking=True)
        weight = self.training_scale() if run == kept else self._weights(torch.arange(run, device=device) < kept)
        return Rows(batch, order[:run], weight=weight, order=order)

    def _draw_compiled(self, batch: int, device: torch.device) -> Rows:
        if self.stochastic_method == "block":
            # A mask. Where compiled code can do better it calls `draw_whole`.
            return self._masked(batch, [], device)
        if not SIZES_MOVE and self.sizes.moved:
            return self._masked(batch, [batch], device)
        if has_static_value(batch):
            self._meet(batch, device)
            kept, size = getattr(self, f"kept_{batch}"), getattr(self, f"size_{batch}")
            varies = isinstance(size, Tensor)
            run = size.shape[0] if varies else size
        else:
            kept, run = self._for_variable(batch, device)
            varies = self.sizes.moved
        all_run = not varies and run == batch  # of a rate that moves, the answer would be compiled in
        taken, places = draw_rows(kept, batch, run)
        if all_run:
            return Rows(batch, weight=self._weights(places.added))
        return Rows(batch, taken, places, self.training_scale())

    @torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
    def _meet(self, batch: int, device: torch.device) -> None:
        """Compiled code met a batch: this runs in Python, once, while it is compiled."""
        self.met[batch] = device
        with _disable_current_modes():
            self._prepare(batch)

    def _prepare(self, batch: int) -> None:
        """Computes how many rows are kept for certain, the probability of one more, and how many run.

        How many run is a number, or the *size* of an input, which compiled code can take for a variable. Attributes, since it would watch
        all of a dictionary.
        """
        whole, rest = _whole_rows(batch, self._keep_parts)
        kept = torch.tensor([whole, max(rest, 0) / PARTS], device="cpu")
        kept = kept.to(self.met[batch], non_blocking=True)  # a schedule comes here at each step
        setattr(self, f"kept_{batch}", kept)
        self._find_size(batch)

    def _find_size(self, batch: int) -> None:
        setattr(self, f"size_{batch}", self.sizes.of(self.site, batch, self.met[batch]))

    def settle(self) -> None:
        self.sizes.settle()
        if self._settled != self.sizes.changes:  # a schedule comes here at each step, and most often nothing has
            self._settled = self.sizes.changes
            for batch in self.met:
                self._find_size(batch)

    def rest(self) -> None:
        self.sizes.rest()
        self.settle()

    def _for_variable(self, batch: int, device: torch.device) -> tuple[Tensor, int]:
        """What `_prepare` computes of a batch, where it is a variable itself."""
        parts = self._size.shape[0]
        whole, rest = _whole_rows(batch, parts)
        run = rows_kept(batch, parts)
        if self.least_rows > 1:
            run = at_least(self.least_rows, run, batch)
        kept = torch.stack([torch.full((), number, device=device) for number in (float(whole), rest / PARTS)])
        return kept * (self.drop_rate < 1.0), run

    def draw_whole(self, like: Tensor) -> Rows:
        """Draws in training whether the branch runs, for `torch.cond`."""
        return Rows(like.shape[self.batch_dim], weight=self.training_scale(), keep=self.draw_mask([], like.device).bool())

    def _masked(self, batch: int, shape: Sequence[int], device: torch.device) -> Rows:
        """All rows, under a mask of a shape."""
        return Rows(batch, weight=self.draw_mask(shape, device).float())

    def _weights(self, added: Tensor) -> Tensor:
        """Those of rows that run, some of which are added."""
        weights, scale = added.float(), self.training_scale()
        return weights if scale is None else weights * scale

    def _follow(self, drop_rate: float) -> None:
        super()._follow(drop_rate)
        before, self._keep_parts = self.__dict__.get("_keep_parts"), _parts(drop_rate)
        if before == self._keep_parts:
            return
        # No buffer: the rate is its size, as in `_prepare`, for batches that are variables themselves. The sizes 0 and 1 are constants
        # to compiled code, of itself and of the rows that run, so that one row has to.
        self._size = torch.empty(max(self._keep_parts, 2 * SLACK), 0, device="cpu")
        if before is not None:
            self.sizes.follow(self.site, self._keep_parts)
            torch._dynamo.maybe_mark_dynamic(self._size, 0)
            for batch in self.met:
                self._prepare(batch)


def _is_many(drawn: Tensor) -> bool:
    """Has each model under `torch.vmap` a draw of its own? They cannot run different numbers of rows."""
    while torch._C._functorch.is_functorch_wrapped_tensor(drawn):
        if torch._C._functorch.is_batchedtensor(drawn):
            return True
        drawn = torch._C._functorch.get_unwrapped(drawn)
    return False


def _whole_rows(batch: int, keep_parts: int) -> tuple[int, int]:
    """How many rows are kept for certain, and the probability of one more, in parts."""
    parts = batch * keep_parts
    whole = (parts + SLACK) // PARTS
    return whole, parts - whole * PARTS


def _parts(drop_rate: float) -> int:
    return round((1.0 - drop_rate) * PARTS)
