"""The verbs: `transform` and `analyze`. Arguments are checked here, then capture -> find -> rate -> rewrite."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fxsd.errors import FxsdError
from fxsd.options import Names, Options
from fxsd.plan import Planned, no_sites, plan
from fxsd.rates import Distribution
from fxsd.report import Analysis, stage
from fxsd.rewrite import rewrite
from fxsd.site import ResidualSite
from fxsd.write import write


def transform(
    model: nn.Module,
    drop_rate: float = 0.1,
    *,
    drop_distribution: Distribution = "linear",
    stochastic_method: str = "sample",
    target_layer_name: Names = None,
    include: Names = None,
    exclude: Names = None,
    scaling: str = "inference",
    compute: str = "mask",
    depth_by: str = "block",
    existing: str = "replace",
    example_inputs: Any = None,
    subset_batch_norm: bool = False,
    sync_ranks: bool = False,
) -> nn.Module:
    """Adds stochastic depth to a model: every residual add `shortcut + branch` becomes `shortcut + drop(branch)`.

    The model is not changed. The result shares its parameters, buffers and the modules below those that execute an add; `copy.deepcopy` the
    model first for independence. What runs is the model's own Python with the op written into it (`fxsd.source` shows it), in every call
    and method; with `compute="skip"` the captured graph.

    Args:
        model: any module.
        drop_rate: probability that a branch is dropped, in [0, 1]; spread over depth by `drop_distribution`.
        drop_distribution: `"linear"`, `"uniform"`, `"huang"`, `"efficientnet"`, `"exponential"`; a callable `f(depth, depths)` that gives
            a factor of `drop_rate`; a sequence with one rate a depth; or a mapping from globs of site names to rates.
        stochastic_method: `"sample"`: each sample draws for itself; samples are dim 0 of the inputs, followed to where the add has them.
            `"block"`: one draw for the whole batch.
        target_layer_name: only sites inside these modules: class names, or globs of module paths.
        include: globs of module paths whose adds are taken even where the rules of `fxsd.find.residual` say no.
        exclude: globs of module paths whose sites are left out.
        scaling: `"inference"`: eval multiplies the branch by 1 - drop_rate. `"train"`: training divides by it, and eval is the
            original model bit for bit.
        compute: `"mask"`: the branch is computed and multiplied by 0 or 1. `"skip"`: it runs on the kept samples only, where that is
            legal. `"auto"`: where it also pays. Elsewhere the mask; `reason` of `fxsd.sites` says why. Both need `example_inputs`.
        depth_by: `"block"`: the adds of one block (the nearest numbered module around them) share a depth. `"add"`: each has its own.
        existing: stochastic depth already at a site: `"replace"` it, `"keep"` it and leave the site alone, or raise an `"error"`.
        example_inputs: a tuple of args or a dict of kwargs of the call to capture: says which optional arguments are given, and lets
            Python decide on sizes. Shapes are followed on fake tensors; the model is run, once in each mode and once more with twice
            the samples, only where something of it is in no graph. Other calls work as well; a graph that runs keeps what was decided,
            and raises `FxsdError` for inputs that would decide otherwise.
        subset_batch_norm: skip branches with batch norm too, whose statistics are then those of the kept samples (two at least).
        sync_ranks: every rank draws the same, without communication; for `"block"` only. Ranks must be seeded alike (`torch.manual_seed`)
            when they transform, and make the same training forwards. A `DropRateSchedule` starts a run that is resumed where it was.

    Returns:
        A `torch.fx.GraphModule` that is an instance of the model's class too, with the same state-dict keys, parameters and signature, in
        the same mode. `train()` and `eval()` act on it as on the model; `torch.compile(gm, fullgraph=True)` takes it whole where it
        takes the model so. Where the model cannot be one graph: an instance of its class alone.

    Raises:
        FxsdError: an argument is out of range, the model cannot be captured, it has no residual add, or none at which an op can be
            written.

    Warns:
        UserWarning: some residual adds lie in code that could not be captured, or written to, and stay as they are.

    References:
        Huang et al., "Deep Networks with Stochastic Depth", 2016, https://arxiv.org/abs/1603.09382

    Example:
        >>> import fxsd, torch, torchvision
        >>> gm = fxsd.transform(torchvision.models.resnet18(), drop_rate=0.2)
        >>> len(fxsd.sites(gm))
        8
        >>> gm.eval()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 1000])
    """
    options = Options.of(
        drop_rate=drop_rate,
        drop_distribution=drop_distribution,
        stochastic_method=stochastic_method,
        target_layer_name=target_layer_name,
        include=include,
        exclude=exclude,
        scaling=scaling,
        compute=compute,
        depth_by=depth_by,
        existing=existing,
        example_inputs=example_inputs,
        subset_batch_norm=subset_batch_norm,
        sync_ranks=sync_ranks,
    )
    with stage(f"transforming {type(model).__name__}"), _uncollected():
        planned = plan(model, options)
        if not planned.plans:
            raise FxsdError(no_sites(planned))
        _warn(planned)
        if planned.in_code:
            return write(planned, stochastic_method, scaling, sync_ranks)
        return rewrite(planned.captured, planned.plans, planned.eval_residuals, stochastic_method, scaling, sync_ranks)


def _warn(planned: Planned) -> None:
    """Says that residual adds stay as they are, though nobody asked for that."""
    hidden = planned.captured.hidden
    done = f"{len(planned.plans)} residual adds were rewritten, and "
    if hidden:
        lost = "; ".join(f"{adds} in {path or 'the model itself'}" for path, adds in hidden.items())
        warnings.warn(
            f"{done}{sum(hidden.values())} lie in code that could not be captured: "
            f"{lost}. fxsd.analyze(model, example_inputs=...).print() says why.",
            stacklevel=3,
        )
    if planned.lost:
        why = "; ".join(dict.fromkeys(each.reason for each in planned.lost))
        warnings.warn(f"{done}{len(planned.lost)} stay as they are: {why}.", stacklevel=3)


def analyze(model: nn.Module, drop_rate: float = 0.1, **options: Any) -> Analysis:
    """Shows what `transform` would do with the same arguments, and changes nothing.

    Args:
        model, drop_rate, **options: as for `fxsd.transform`.

    Returns:
        An `Analysis`: `sites`, `rejected` (every other tensor add, with the reason) and `notes` (what stayed a call or Python, and how
        many residual adds lie in it); `print()` shows them as tables. A model without residual adds has no sites.

    Raises:
        FxsdError: as `fxsd.transform`, but for models without sites.

    Example:
        >>> import fxsd, torchvision
        >>> found = fxsd.analyze(torchvision.models.vit_b_16(), drop_rate=0.1)
        >>> len(found.sites), found.rejected[0].reason
        (24, 'encoder_pos_embedding is a parameter or a constant, not the output of a branch')
    """
    checked = Options.of(drop_rate=drop_rate, **options)
    with stage(f"analyzing {type(model).__name__}"), _uncollected():
        planned = plan(model, checked)
    found = tuple(
        ResidualSite(p.name, r.module, p.depth, p.drop_rate, r.kind, p.compute, r.add, r.branch, r.shortcut, r.fork, p.reason)
        for p in planned.plans
        for r in (p.residual,)
    )
    return Analysis(type(model).__name__, found, planned.rejected, planned.notes)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Inside, Python looks for no garbage: it would go over graphs that grow, and over the model, again and again, and find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
