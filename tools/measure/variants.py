"""One model with stochastic depth in several ways: fxsd's, and the ops of other libraries put on the same sites."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.ops import StochasticDepth as TorchvisionStochasticDepth

import fxsd
from fxsd.run.ops import StochasticDepth
from fxsd.tree import ops_of
from measure.measuring import line, quiet

BASE, MASK, SKIP, AUTO = "base", "fxsd mask", "fxsd skip", "fxsd auto"
TIMM, TORCHVISION, DINOV2 = "timm DropPath", "torchvision", "DINOv2"
LABELS = (BASE, MASK, SKIP, AUTO, TIMM, TORCHVISION, DINOV2)
SUBSETS = (SKIP, AUTO, DINOV2)  # those that compute less


class Missing(Exception):
    """A variant that there is not; says why."""


def variants(
    model: nn.Module, labels: Sequence[str], rate: float, distribution: str, scaling: str, example: Tensor
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Builds the variants of `model`, which share its parameters, but for DINOv2's, which has copies.

    Batch norm in a branch is allowed to see the kept samples only.

    Returns:
        label -> module, and label -> why there is none.
    """

    def transformed(compute: str, **options: Any) -> nn.Module:
        return fxsd.transform(
            model,
            rate,
            drop_distribution=distribution,
            scaling=scaling,
            compute=compute,
            example_inputs=(example,),
            **options,
        )

    makers: dict[str, Callable[[], nn.Module]] = {
        BASE: lambda: model,
        MASK: lambda: transformed("mask"),
        SKIP: lambda: transformed("skip", subset_batch_norm=True),
        AUTO: lambda: transformed("auto", subset_batch_norm=True),
        TIMM: lambda: _swapped(transformed("mask"), timm_drop_path),
        TORCHVISION: lambda: _swapped(transformed("mask"), lambda p: TorchvisionStochasticDepth(p, "row")),
        DINOV2: lambda: _dinov2(model, transformed("mask")),
    }
    found: dict[str, nn.Module] = {}
    missing: dict[str, str] = {}
    for label in labels:
        with quiet():
            try:
                found[label] = makers[label]()
            except Missing as error:
                missing[label] = str(error)
            except fxsd.FxsdError as error:
                missing[label] = line(error)
    return found, missing


def _swapped(gm: nn.Module, op: Callable[[float], nn.Module]) -> nn.Module:
    """`gm` with another op at each site, of the site's rate; none where that is 0, as in those libraries' own models."""
    for parent in list(gm.modules()):
        for name, child in [*parent.named_children(), *ops_of(parent).items()]:
            if isinstance(child, StochasticDepth):
                setattr(parent, name, op(child.rate).train() if child.rate else nn.Identity())
    return gm


def timm_drop_path(rate: float) -> nn.Module:
    try:
        drop_path = import_module("timm.layers").DropPath
    except ImportError as error:
        raise Missing("timm is not installed") from error
    drop: nn.Module = drop_path(rate)
    return drop


def _dinov2(model: nn.Module, gm: nn.Module) -> nn.Module:
    """A copy of a vision transformer whose blocks use the published function, at rates over 0.1 as the published block does."""
    logging.getLogger("dinov2").setLevel(logging.ERROR)  # it warns that xFormers is not there
    try:
        subset = import_module("dinov2.layers.block").drop_add_residual_stochastic_depth
        drop_path = import_module("dinov2.layers.drop_path").DropPath
    except ImportError as error:
        raise Missing("dinov2 is not installed (pip install --no-deps dinov2)") from error
    blocks = {name: block for name, block in model.named_modules() if _branches(block)}
    if not blocks:
        raise Missing("it has no transformer blocks of torchvision or timm, for which DINOv2's function is")
    rates: dict[str, list[float]] = {name: [] for name in blocks}
    for site in fxsd.sites(gm):
        rates.setdefault(site.module, []).append(site.drop_rate)
    copied = copy.deepcopy(model)
    for name in blocks:
        parent, _, leaf = name.rpartition(".")
        block = copied.get_submodule(name)
        setattr(copied.get_submodule(parent), leaf, Dinov2Block(block, rates[name], subset, drop_path))
    return copied.train()


class Dinov2Block(nn.Module):
    """The two residual branches of a block, each on a part of the samples."""

    def __init__(
        self, block: nn.Module, rates: Sequence[float], subset: Callable[..., Tensor], drop_path: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        self.block, self.rates, self.subset = block, tuple(rates), subset
        self.drops = nn.ModuleList(drop_path(rate) if rate else nn.Identity() for rate in rates)
        self.branches = _branches(block)

    def forward(self, x: Tensor) -> Tensor:
        for branch, rate, drop in zip(self.branches, self.rates, self.drops, strict=True):
            x = self.subset(x, branch, rate) if rate > 0.1 else x + drop(branch(x))
        return x


def _branches(block: Any) -> tuple[Callable[[Tensor], Tensor], ...]:
    """The branches of a pre-norm transformer block of torchvision or timm; none of any other module."""
    if isinstance(block, EncoderBlock):

        def attention(x: Tensor) -> Tensor:
            y = block.ln_1(x)
            out: Tensor = block.dropout(block.self_attention(y, y, y, need_weights=False)[0])
            return out

        return attention, lambda x: block.mlp(block.ln_2(x))
    if type(block).__module__ == "timm.models.vision_transformer" and type(block).__name__ == "Block":
        return lambda x: block.ls1(block.attn(block.norm1(x))), lambda x: block.ls2(block.mlp(block.norm2(x)))
    return ()
