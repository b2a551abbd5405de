"""The draws of a transformed model as a table: the same samples kept at each site, whether it masks or skips.

with forced(table):
    skipped = skip_model(x)      # the branches run on the rows that the table keeps
    masked = mask_model(x)       # the branches run on all rows, and are multiplied by 0 or 1
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsd
from fxsd.run.ops import StochasticDepth
from fxsd.run.rows import Rows
from fxsd.run.skip import SkipStochasticDepth
from fxsd.versions import NO_COND

# Where compiled code cannot leave a branch out as a whole.
left_out = pytest.mark.skipif(bool(NO_COND), reason=f"torch {torch.__version__}: {NO_COND}")
Table = Callable[[str, int], Tensor]  # site, batch -> which rows are kept


def at_random(seed: int, keep_prob: float = 0.6) -> Table:
    def table(site: str, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(site.encode()) + seed)
        return torch.rand(batch, generator=generator) < keep_prob

    return table


@contextmanager
def forced(table: Table) -> Iterator[None]:
    """Inside, the ops of every transformed model in training keep the rows of `table`, unscaled; at least one is computed."""

    def mask(self: StochasticDepth, branch: Tensor) -> Tensor:
        kept = table(self.site, branch.shape[self.batch_dim]).to(branch.dtype)
        return branch * kept.view([-1] + [1] * (branch.dim() - 1 - self.batch_dim))

    def rows(self: SkipStochasticDepth, batch: int, device: torch.device) -> Rows:
        keep = table(self.site, batch)
        index = keep.nonzero()[:, 0]
        if len(index) >= self.least_rows:
            return Rows(batch, index)
        index = torch.cat((index, (~keep).nonzero()[: self.least_rows - len(index), 0]))
        return Rows(batch, index, None, keep[index].float())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StochasticDepth, "forward", mask)
        patch.setattr(SkipStochasticDepth, "_draw", rows)
        yield


def tensors(value: Any) -> list[Tensor]:
    """The floating tensors in an output of any class, in order."""
    if isinstance(value, Tensor):
        return [value] if value.dtype.is_floating_point else []
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors(part)]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in tensors(part)]
    return tensors(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, type) else []


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    return tensors(model(**inputs) if isinstance(inputs, dict) else model(*inputs))


def results(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Outputs, and the gradients of the parameters."""
    torch.manual_seed(0)
    outputs = call(model, inputs)
    assert outputs
    generator = torch.Generator().manual_seed(1)
    loss = torch.stack([(t * torch.rand(t.shape, generator=generator, dtype=t.dtype)).sum() for t in outputs]).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return outputs
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [*outputs, *(torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True))]


def check_rows(
    model: nn.Module, inputs: Callable[[int], Any], batches: tuple[int, ...] = (2, 5), **options: Any
) -> tuple[fxsd.ResidualSite, ...]:
    """Transforms `model` both ways: under the same draws, outputs and gradients are the same. Returns the sites of the one that skips.

    In float64, where what a kernel does at another batch size is far below what a wrong row does.
    """
    model = model.double()
    made = {
        compute: fxsd.transform(model, 0.5, drop_distribution="uniform", compute=compute, example_inputs=inputs(2), **options)
        for compute in ("skip", "mask")
    }
    for batch in batches:
        for seed in (0, 1):
            given = inputs(batch)
            with forced(at_random(10 * batch + seed)):
                skipped, masked = (results(made[compute].train(), given) for compute in ("skip", "mask"))
            for a, b in zip(skipped, masked, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    return fxsd.sites(made["skip"])
