"""A self-contained page around a picture: the sites, the rejected adds, the notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from fxsd import RejectedAdd, ResidualSite
from picture.drawing import ink_on, node_id, rate_colour
from picture.view import View

_COLUMNS = ("site", "module", "depth", "kind", "drop rate", "shortcut", "branch")
_STYLE = """
body { font: 14px/1.45 Helvetica, Arial, sans-serif; margin: 1.5em auto; padding: 0 1.5em; max-width: 1500px; color: #222; }
h1 { font-size: 1.5em; margin: 0; } h2 { font-size: 1.1em; margin: 1.6em 0 .4em; }
.picture { overflow: auto; max-height: 90vh; border: 1px solid #ccc; margin-top: .5em; }
#fit:checked ~ .picture { max-height: none; } #fit:checked ~ .picture svg { width: 100%; height: auto; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2em .8em; border-bottom: 1px solid #ddd; vertical-align: top; }
thead { position: sticky; top: 0; background: #fff; } .rate { text-align: right; }
g.node:target > * > * > polygon, g.node:target > * > * > path, g.node:target > * > * > ellipse { stroke: #D55E00; stroke-width: 5; }
"""


def page(title: str, svg: str, view: View, sites: Sequence[ResidualSite], rejected: Sequence[RejectedAdd], notes: Sequence[str]) -> str:
    """HTML with the picture inlined; names of sites and adds lead to their boxes. Nothing is loaded from anywhere."""
    boxes = {node: node_id(box) for box in view.boxes for node in box.nodes}
    top = max((site.drop_rate for site in sites), default=0.0)
    picture = svg[svg.index("<svg") :]
    plural = "" if len(rejected) == 1 else "s"
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><p>{len(sites)} sites, {len(rejected)} rejected add{plural}, {len(view.boxes)} boxes.</p>",
        '<section><input type="checkbox" id="fit" checked><label for="fit"> fit to the width of the page</label>',
        f'<div class="picture">{picture}</div></section>',
        "<h2>Sites</h2>",
        _table(
            ["site", "module", "depth", "kind", "rate", "shortcut", "branch"], (_site_row(site, boxes.get(site.add), top) for site in sites)
        )
        if sites
        else "<p>no sites</p>",
    ]
    if rejected:
        rows = ([_link(r.add.name, boxes.get(r.add)), _cell(r.module), _cell(r.reason)] for r in rejected)
        parts += ["<h2>Rejected adds</h2>", _table(["add", "module", "reason"], rows)]
    if notes:
        parts += ["<h2>Notes</h2><ul>", *(f"<li>{escape(note)}</li>" for note in notes), "</ul>"]
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _site_row(site: ResidualSite, box: str | None, top: float) -> list[str]:
    fill = rate_colour(site.drop_rate, top)
    rate = f'<td class="rate" style="background:{fill};color:{ink_on(fill)}">{site.drop_rate:.4g}</td>'
    return [
        _link(site.name, box),
        *map(_cell, (site.module, site.depth, site.kind)),
        rate,
        *map(_cell, (site.shortcut.name, site.branch.name)),
    ]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _cell(value: object) -> str:
    return f"<td>{escape(str(value))}</td>"


def _link(text: str, box: str | None) -> str:
    return f'<td><a href="#{escape(box)}">{escape(text)}</a></td>' if box else _cell(text)
