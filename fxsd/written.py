"""The code of a transformed model, to be read: its author's text with the ops in it."""

from __future__ import annotations

from torch import nn

from fxsd.errors import FxsdError
from fxsd.tree.reading import diffs, functions


def source(gm: nn.Module, path: str = "", diff: bool = False) -> str:
    """Shows the functions of a module as they run: its author's text, comments and layout kept, with the ops written in.

    Args:
        gm: what `fxsd.transform` returned.
        path: of a module that executes a residual add, as `ResidualSite.module` says; '' is the model itself.
        diff: gives a unified diff of the author's file instead: the change that one would make by hand.

    Raises:
        FxsdError: there is no such module, or no op is in its code.

    Example:
        >>> import fxsd, torchvision
        >>> gm = fxsd.transform(torchvision.models.resnet18())
        >>> print(fxsd.source(gm, "layer1.0", diff=True).split("@@")[-1])
        <BLANKLINE>
                if self.downsample is not None:
                    identity = self.downsample(x)
        <BLANKLINE>
        +        out = self.stochastic_depth(out)
                 out += identity
                 out = self.relu(out)
        <BLANKLINE>
        <BLANKLINE>
    """
    if not isinstance(gm, nn.Module):
        raise FxsdError(f"gm must be a transformed model, but got {type(gm).__name__}.")
    modules = dict(gm.named_modules())
    if path not in modules:
        raise FxsdError(f"path must be that of a module of the model, but got {path!r}.")
    found = diffs(modules[path]) if diff else functions(modules[path])
    if not found:
        known = [name or "''" for name, module in modules.items() if functions(module)]
        where = (
            f"Modules with ops in their code are {', '.join(known[:8])}."
            if known
            else "A graph is what runs: gm.print_readable() shows it."
        )
        raise FxsdError(f"module {path!r} ({type(modules[path]).__name__}) has no op in its code. {where}")
    return "\n".join(found)
