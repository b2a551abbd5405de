"""What runs: the module that stands in the rewritten graph, on the branch side of a residual add.

    y = shortcut + branch      becomes      y = shortcut + drop(branch)

The add itself stays, so operand order, `alpha`, type promotion and in-place writes are the model's own. For
branch r, rate p and q = 1 - p, `drop(r)` is

| | scaling="inference" (Huang 2016) | scaling="train" (timm, torchvision) |
|---|---|---|
| training, "sample" | m * r, m ~ Bernoulli(q), one draw per sample | (m / q) * r |
| training, "block"  | the same, one draw for the whole batch | the same |
| eval               | q * r | r, the very same tensor |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsd.run.rank_draws import RankDraws

METHODS = ("sample", "block")
SCALINGS = ("inference", "train")

_TINY = 1e-30  # stands for q where nothing is kept, so that 0 / q is 0


class StochasticDepth(nn.Module):
    """Drops the branch of a residual add at random: the op of one site.

    Args:
        drop_rate: probability that the branch is dropped, in [0, 1].
        stochastic_method: `"sample"` draws for each sample, `"block"` once for the whole batch.
        scaling: `"inference"` multiplies by 1 - drop_rate in eval, `"train"` divides by it in training.
        site, module, depth, order, kind, reason: what the op stands for, shown in its repr; they decide nothing.
        weight: `drop_rate` over the model-wide rate, for `fxsd.set_drop_rate`.
        batch_dim: which dim of the branch holds the samples.
        sync_ranks: draws what all ranks draw; only for `"block"`.
        device: of the rate.

    Shape:
        - Input: `[batch, ...]`, or with the batch in `batch_dim`; any floating dtype and memory format.
        - Output: the same.

    The rate lives in a non-persistent float32 buffer: it moves with the module, is absent from the state
    dict, keeps its precision when the model is cast, and can change without recompiling. Draws are made in float32 and
    follow `torch.manual_seed`, with `sync_ranks` that of when the op was made. A dropped row is exactly zero, and so is its gradient.

    References:
        Huang et al., "Deep Networks with Stochastic Depth", 2016, https://arxiv.org/abs/1603.09382

    Example:
        >>> drop = StochasticDepth(0.5, scaling="train")
        >>> rows = drop(torch.ones(1000, 3))
        >>> sorted(set(rows.flatten().tolist()))
        [0.0, 2.0]
        >>> drop.eval()(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    drop_rate: Tensor
    compute = "mask"

    def __init__(
        self,
        drop_rate: float,
        stochastic_method: str = "sample",
        scaling: str = "inference",
        *,
        site: str = "",
        module: str = "",
        depth: int = 0,
        order: int = 0,
        kind: str = "identity",
        reason: str = "",
        weight: float = 1.0,
        batch_dim: int = 0,
        sync_ranks: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("drop_rate", torch.tensor(drop_rate, dtype=torch.float32, device=device), persistent=False)
        self._follow(_in_float32(drop_rate))
        self.stochastic_method = stochastic_method
        self.scaling = scaling
        self.site, self.module, self.depth, self.order, self.kind = site, module, depth, order, kind
        self.reason, self.weight = reason, weight
        self.batch_dim = batch_dim
        self.rank_draws = RankDraws(site) if sync_ranks else None

    def forward(self, branch: Tensor) -> Tensor:
        if isinstance(branch, fx.Proxy):  # whatever traces the model, the op is one call in its graph, with live modes and rates
            return branch.tracer.create_proxy("call_module", branch.tracer.path_of_module(self), (branch,), {})
        if self.training:
            if not torch.compiler.is_compiling() and self._never_drops:
                # No draw, so that eager training at rate 0 is the original under one seed. Compiled code must not read the
                # flag: it would compile again when a warm-up leaves 0.
                return branch
            shape = [1] * branch.dim()
            if self.stochastic_method == "sample" and shape:
                shape[self.batch_dim] = branch.shape[self.batch_dim]
            return branch * self.draw_mask(shape, branch.device).to(branch.dtype)
        return branch * (1.0 - self._rate_on(branch.device)).to(branch.dtype) if self.scaling == "inference" else branch

    def among(self, values: Iterable[Any], place: int) -> list[Any]:
        """`values` that are about to be summed up, with the branch at `place` dropped."""
        return [self(value) if i == place else value for i, value in enumerate(values)]

    def draw_mask(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Draws what branches are multiplied by in training, of a small shape that broadcasts, so that they are read and written once."""
        # u >= p, not floor(q + u): exact at p = 0 and 1, unbiased at small p whatever the branch's dtype.
        rate = self._rate_on(device)
        keep = self._uniform(shape, device) >= rate
        return keep if self.scaling == "inference" else keep / (1.0 - rate).clamp(min=_TINY)

    def _rate_on(self, device: torch.device) -> Tensor:
        """The rate where a branch is: replicas of a module on several devices share one op."""
        return self.drop_rate if self.drop_rate.device == device else self.drop_rate.to(device)

    def _uniform(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return torch.rand(shape, device=device, dtype=torch.float32) if self.rank_draws is None else self.rank_draws()

    def training_scale(self) -> Tensor | None:
        """What a branch that is kept is multiplied by in training; None for one."""
        return None if self.scaling == "inference" else 1.0 / self._keep_prob()

    def _keep_prob(self) -> Tensor:
        return (1.0 - self.drop_rate).clamp(min=_TINY)

    def set_drop_rate(self, drop_rate: float) -> None:
        """Sets the rate in place, so that compiled code sees it without recompiling."""
        with torch.no_grad():
            self.drop_rate.fill_(drop_rate)
        self._follow(_in_float32(drop_rate))

    def settle(self) -> None:
        """All sites of the model have the rate that they are to have."""

    def rest(self) -> None:
        """They keep it."""

    def train(self, mode: bool = True) -> StochasticDepth:
        super().train(mode)
        if mode and not self.drop_rate.is_meta:
            self._follow(self.rate)  # who averages models, or copies them, writes into the buffer
        return self

    def _follow(self, drop_rate: float) -> None:
        """Keeps what Python has to know of the rate, which on another device takes long to read."""
        self._never_drops = drop_rate == 0.0

    def start_step(self, step: int) -> None:
        """Draws as a run does that has taken so many training steps, where all ranks draw the same."""
        if self.rank_draws is not None:
            self.rank_draws.start_step(step)

    @property
    def rate(self) -> float:
        """The rate as a float, to the 7 digits that float32 holds."""
        return _read(self.drop_rate)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> StochasticDepth:
        rate = self.drop_rate
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # `model.half()` casts every floating buffer; a rate in bf16 would be off by up to 0.4 %.
        self.drop_rate = rate.to(self.drop_rate.device) if not rate.is_meta else self.drop_rate.float()
        return self

    def extra_repr(self) -> str:
        rate = "meta" if self.drop_rate.is_meta else f"{self.rate:.4g}"
        place = f", batch_dim={self.batch_dim}" if self.batch_dim else ""
        return f"{rate}, {self.stochastic_method!r}, {self.scaling!r}, site={self.site!r}, depth={self.depth}, kind={self.kind!r}{place}"


def _read(rate: Tensor) -> float:
    return float(f"{rate.item():.7g}")


def _in_float32(rate: float) -> float:
    """What is read once a rate is set. To read it would wait for a GPU."""
    return _read(torch.tensor(rate, dtype=torch.float32, device="cpu"))
