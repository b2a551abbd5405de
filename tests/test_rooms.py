"""The rooms of the package: imports go down only, and never round. `fxsd/ROOM/__init__.py` says what is above and what below."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx
import pytest

import fxsd

PACKAGE = Path(fxsd.__file__).parent
FILES = {
    ".".join(("fxsd", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file for file in PACKAGE.rglob("*.py")
}
# From the lowest to the highest. Files at the top of the package are a room, but for what every room may use.
ROOMS = ("for all", "run", "tree", "find", "graph", "capture", "legal", "verbs", "integrations", "public")
FOR_ALL = ("errors", "versions")


def room(module: str) -> str:
    parts = module.split(".")
    if len(parts) == 1:
        return "public"
    if len(parts) == 2 and parts[1] not in ROOMS:
        return "for all" if parts[1] in FOR_ALL else "verbs"
    return parts[1]


def imports(module: str) -> set[str]:
    """The files of the package that a file imports, wherever it does: at its top, for types only, or inside of a function."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "fxsd"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fxsd":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else str(node.module))
        assert not (isinstance(node, ast.ImportFrom) and node.level), "imports are absolute here"
    return found


def test_the_rooms_are_those_that_are_listed():
    assert {room(module) for module in FILES} == set(ROOMS)


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_down(module: str):
    own = ROOMS.index(room(module))
    up = {other for other in imports(module) if ROOMS.index(room(other)) > own}
    assert up == set(), f"{module} is in the room {ROOMS[own]!r}"


def test_imports_never_go_round():
    graph = nx.DiGraph((module, other) for module in FILES for other in imports(module))
    assert graph.number_of_edges() > len(FILES)
    assert list(nx.simple_cycles(graph)) == []


@pytest.mark.parametrize("name", sorted({room(module) for module in FILES} - {"for all", "verbs", "public", "integrations"}))
def test_a_room_says_what_it_is_for_and_holds_no_code_but_what_it_exports(name: str):
    tree = ast.parse(FILES[f"fxsd.{name}"].read_text())
    doc = ast.get_docstring(tree) or ""
    assert [word for word in ("In:", "Out:", "Above:", "Below:") if word not in doc] == []
    assert len(doc.splitlines()) <= 8
    assert {type(node) for node in tree.body[1:]} <= {ast.ImportFrom, ast.Assign}
