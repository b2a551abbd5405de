"""tools/bench.py: what is measured, and the command line. No test looks at how long anything took."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import networkx as nx
import pytest
import torch
from torch import Tensor, fx, nn

import fxsd


class Net(nn.Module):
    """Two sites, and an add of two streams that is none: 11 nodes with the input and the output."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x).relu()
        x = x + self.b(x).relu()
        return self.c(x) + self.d(x)


class Untraceable(nn.Module):
    """symbolic_trace stops at the branch on values; fxsd keeps the part as a call, and the site beside it."""

    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    def __init__(self):
        super().__init__()
        self.part, self.branch = self.Part(), nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x)
        return x + self.branch(x)


def no_sites() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


@pytest.fixture
def fast(tool: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Without the collections of garbage, which take most of the time where little is measured."""
    monkeypatch.setattr(tool.measuring.gc, "collect", lambda: 0)


def run(tool: ModuleType, *argv: object) -> int:
    return int(tool.main([str(part) for part in argv]))


def captured(model: nn.Module) -> tuple[tuple[fxsd.ResidualSite, ...], nx.DiGraph, dict[fx.Node, int]]:
    """The sites, the graph that holds them, and the place of each node in its order."""
    sites = fxsd.analyze(model).sites
    nodes = list(sites[0].add.graph.nodes)
    graph = nx.DiGraph((arg, node) for node in nodes for arg in node.all_input_nodes)
    return sites, graph, {node: i for i, node in enumerate(nodes)}


@pytest.mark.parametrize("n", [1, 7, 40])
def test_a_chain_has_a_site_for_every_block(tool: ModuleType, n: int):
    sites, graph, _ = captured(tool.growing.chain(n))
    assert [site.module for site in sites] == [str(i) for i in range(n)]
    assert len(graph) == 3 * n + 2
    assert [(a, b) for a, b in pairwise(sites) if b.shortcut is not a.add] == []


def test_the_sites_of_a_fan_add_an_early_value_to_a_late_one(tool: ModuleType):
    n = 20
    sites, graph, place = captured(tool.growing.Fan(n))
    assert len(graph) == 6 * n + 2
    assert [site.shortcut.target for site in sites] == [f"early.{i}.1" for i in range(n)]
    assert [site.branch.target for site in sites] == [f"late.{i}.1" for i in range(n)]
    assert min(place[site.branch] - place[site.shortcut] for site in sites) >= n
    hops = [nx.shortest_path_length(graph, site.shortcut, site.branch) for site in sites]
    assert hops == [n + 1] + [n - i + 2 for i in range(1, n)], "the paths grow with n"
    above = nx.immediate_dominators(graph, next(iter(place)))
    assert [site for site in sites if above[site.branch.args[0]] is site.shortcut] == []
    assert above[sites[0].branch.args[0].args[0]] is next(iter(place)), "all values meet below the input, and none dominates the product"


def test_each_branch_of_a_cross_has_a_merge_of_its_own(tool: ModuleType):
    n = 20
    sites, graph, place = captured(tool.growing.Cross(n))
    assert len(graph) == 7 * n + 2
    assert [site.shortcut.target for site in sites] == [f"early.{i}.1" for i in range(n)]
    assert [[arg.target for arg in site.branch.args] for site in sites] == [[f"late.{i}.1", f"early.{n - 1 - i}.1"] for i in range(n)]
    above = nx.immediate_dominators(graph, next(iter(place)))
    assert {above[site.branch] for site in sites} == {next(iter(place))}, "below the input, and no two the same"


def test_the_sites_of_a_nest_join_first_and_last(tool: ModuleType):
    n = 20
    sites, graph, place = captured(tool.growing.Nest(n))
    assert len(graph) == 7 * n + 3
    assert [site.shortcut.target for site in sites] == [f"early.{i}.1" for i in range(n)]
    hops = [nx.shortest_path_length(graph, site.shortcut, site.branch) for site in sites]
    assert hops == [2 * (2 * n - 1 - 2 * i) + 2 for i in range(n)]
    assert [site.fork for site in sites] == [site.shortcut for site in sites]
    assert min(place[site.add] - place[site.shortcut] for site in sites) > 2 * n


def test_building_a_graph_takes_no_part_in_its_time(tool: ModuleType, monkeypatch: pytest.MonkeyPatch):
    ran: list[str] = []

    def built(n: int) -> nn.Module:
        ran.append(f"build {n}")
        return tool.growing.Fan(n)

    def timed(work: Callable[[], object]) -> float:
        ran.append("time")
        work()
        ran.append("stop")
        return 1.0

    monkeypatch.setitem(tool.growing.GRAPHS, "fan", built)
    monkeypatch.setattr(tool.measuring, "milliseconds", timed)
    row = tool.measure_growth("fan", 5, 2, lambda text: None)
    assert ran == ["build 8", "build 5", *["time", "stop"] * 4]
    assert (row.graph, row.size, row.nodes, row.sites, row.ratio) == ("fan", 5, 32, 5, 1.0)


def test_calls_take_turns_and_the_first_round_does_not_count(tool: ModuleType, monkeypatch: pytest.MonkeyPatch):
    ran: list[str] = []
    clock = iter([10.0, 500.0, 3.0, 1.0, 2.0, 4.0, 20.0, 4.0])
    monkeypatch.setattr(tool.measuring, "milliseconds", lambda work: (work(), next(clock))[1])
    times, failures = tool.measuring.in_turns({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 3, 1, lambda text: None)
    assert ran == ["a", "b", "b", "a"] * 2, "another one is first in each round"
    assert times == {"a": [1.0, 2.0, 4.0], "b": [3.0, 4.0, 20.0]}
    assert failures == ()
    assert tool.measuring.ratio(times["b"], times["a"]) == 3.0, "the median of 3, 2 and 5"


@pytest.mark.usefixtures("fast")
def test_work_that_fails_is_named_and_leaves_the_others_alone(tool: ModuleType):
    ran: list[str] = []

    def stop() -> None:
        ran.append("a")
        if len(ran) == 3:
            raise ValueError("no\nway")

    times, failures = tool.measuring.in_turns({"a": stop, "b": list}, 4, 1, lambda text: None)
    assert failures == ("a: ValueError: no way",)
    assert len(ran) == 3, "it is not tried again"
    assert times["a"] == [], "nor do its earlier rounds count"
    assert len(times["b"]) == 4


@pytest.mark.usefixtures("fast")
def test_the_json_has_a_row_for_each_model_and_each_graph(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "bench.json"
    models = [f"{__name__}:{name}" for name in ("Net", "Untraceable", "no_sites")]
    argv = [part for name in models for part in ("--model", name)]
    sizes = ("--chain", 3, 6, "--merges", 4, "--repeats", 2, "--shape", "2x4")
    assert run(tool, "transform", *argv, *sizes, "--json", target) == 0
    figures = json.loads(target.read_text())
    assert figures["machine"]["torch"] == torch.__version__
    assert figures["machine"]["cpu"]
    assert figures["machine"]["cores"] >= 1
    assert figures["settings"]["repeats"] == 2
    assert figures["settings"]["models"] == models

    rows = {row["model"].rpartition(":")[2]: row for row in figures["models"]}
    assert list(rows) == ["Net", "Untraceable", "no_sites"]
    assert [(row["nodes"], row["sites"]) for row in rows.values()] == [(11, 2), (6, 1), (4, 0)]
    for name in ("Net", "no_sites"):
        assert min(rows[name][key] for key in ("trace_ms", "fxsd_ms", "fxsd_example_ms", "ratio", "ratio_example")) > 0
        assert rows[name]["failures"] == []
    untraced = rows["Untraceable"]
    assert (untraced["trace_ms"], untraced["ratio"], untraced["ratio_example"]) == (None, None, None)
    assert untraced["fxsd_ms"] > 0
    assert len(untraced["failures"]) >= 1
    assert untraced["failures"][0].startswith("symbolic_trace: TraceError: ")

    assert [(row["graph"], row["size"], row["sites"]) for row in figures["growth"]] == [
        ("chain", 3, 3),
        ("chain", 6, 6),
        ("fan", 4, 4),
        ("cross", 4, 4),
        ("nest", 4, 4),
    ]
    for row in figures["growth"]:
        assert min(row["ratio"], row["fxsd_ms"], row["trace_ms"]) > 0
        assert row["fxsd_ms_per_node"] == pytest.approx(row["fxsd_ms"] / row["nodes"])

    shown = capsys.readouterr()
    line = next(line for line in shown.out.splitlines() if f"{__name__}:Untraceable" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")][3:6:2] == ["-", "-"]
    assert "A model without sites is analyzed" in shown.out
    assert shown.err == "", "no progress bar where there is no terminal"


@pytest.mark.usefixtures("fast")
def test_without_a_shape_a_model_of_ones_own_has_no_example(tool: ModuleType, tmp_path: Path):
    target = tmp_path / "bench.json"
    assert run(tool, "transform", "--model", f"{__name__}:Net", "--repeats", 1, "--chain", "--merges", "--json", target) == 0
    figures = json.loads(target.read_text())
    assert figures["growth"] == []
    assert len(figures["models"]) == 1
    assert figures["models"][0]["fxsd_example_ms"] is None
    assert figures["models"][0]["ratio"] > 0


@pytest.mark.parametrize(("name", "shape"), [("torchvision:resnet18", (2, 3, 224, 224)), ("mine:Net", (5, 4))])
def test_a_given_shape_is_for_models_whose_name_does_not_tell(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, ...]
):
    timed: list[tuple[object, ...]] = []
    monkeypatch.setattr(tool.measuring, "milliseconds", lambda work: timed.append((work.func, work.keywords.get("example_inputs"))) or 1.0)
    tool.measure_model(name, Net(), 1, [5, 4], lambda text: None)
    calls = [(fx.symbolic_trace, None), (fxsd.transform, None), (fxsd.transform, shape)]
    assert [(call, given and given[0].shape) for call, given in timed] == [*calls, *calls[1:], calls[0]]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("torchvision:resnet50", (2, 3, 224, 224)),
        ("torchvision:inception_v3", (2, 3, 299, 299)),
        ("torchvision:mvit_v2_s", (2, 3, 16, 224, 224)),
        ("torchvision:swin3d_t", (2, 3, 16, 112, 112)),
        ("torchvision:fasterrcnn_resnet50_fpn", None),
        (f"{__name__}:Net", None),
    ],
)
def test_the_name_tells_the_shape_of_an_example(tool: ModuleType, name: str, shape: tuple[int, ...] | None):
    assert tool.example_shape(name, nn.Identity()) == shape


def test_the_zoo_is_all_of_torchvision_s_classification_models(tool: ModuleType):
    from torchvision import models

    names = tool._names(tool._parser().parse_args(["transform", "--model", "torchvision:vgg11", "--zoo"]))
    assert names[0] == "torchvision:vgg11"
    assert sorted(names) == [f"torchvision:{name}" for name in sorted(models.list_models(models))]


@pytest.mark.parametrize("names", ["MODELS", "QUICK_MODELS"])
def test_the_models_that_are_measured_by_default_exist(tool: ModuleType, names: str):
    from torchvision import models

    assert len(getattr(tool, names)) >= 3
    assert set(getattr(tool, names)) <= set(models.list_models())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "torchvision:resnet51"], "bench: torchvision has no model 'resnet51'; close to it: resnet50"),
        (["--model", f"{__name__}:Net", "--model", "resnet50"], "MODEL must be torchvision:NAME, timm:NAME or package.module:factory"),
        (["--json", "no/such/folder/x.json"], "--json must be a file in a folder that exists, but got 'no/such/folder/x.json'"),
    ],
)
def test_errors_are_one_line_with_exit_code_2_before_anything_is_timed(
    tool: ModuleType,
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool.measuring, "milliseconds", lambda work: pytest.fail("it measured"))
    assert run(tool, "transform", *argv) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [[], ["transform", "--repeats", "0"], ["transform", "--shape", "2x-1"], ["train"]])
def test_a_command_line_that_makes_no_sense_ends_with_exit_code_2(tool: ModuleType, argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        tool.main(argv)
    assert "bench" in capsys.readouterr().err


def test_garbage_is_collected_before_the_clock_starts(tool: ModuleType, monkeypatch: pytest.MonkeyPatch):
    ran: list[str] = []
    monkeypatch.setattr(tool.measuring.gc, "collect", lambda: ran.append("collect"))
    monkeypatch.setattr(tool.measuring.time, "perf_counter", lambda: ran.append("clock") or 0.0)
    assert tool.measuring.milliseconds(lambda: ran.append("work")) == 0.0
    assert ran == ["collect", "clock", "work", "clock"]


def test_what_is_timed_sees_no_terminal(tool: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    seen: list[bool] = []
    assert tool.measuring.milliseconds(lambda: seen.append(sys.stderr.isatty())) >= 0
    assert seen == [False]


@pytest.mark.usefixtures("fast")
def test_step_writes_its_rows_and_a_picture(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    target, picture = tmp_path / "step.json", tmp_path / "step.png"
    threads = torch.get_num_threads()
    options = ("--shape", 4, "--batch", 6, "--rounds", 2, "--draws", 1, "--threads", threads, "--json", target, "--plot", picture)
    name = f"{__name__}:Net"
    rates = ("--rate", "uniform:.5", "--rate", "linear:.4", "--break-even", 0.2, 0.7)
    assert run(tool, "step", "--model", name, *rates, "--variant", "fxsd skip", "--variant", "torchvision", *options) == 0
    figures = json.loads(target.read_text())
    assert figures["machine"]["torch"] == torch.__version__
    assert figures["settings"]["rate"] == ["uniform:0.5", "linear:0.4"]
    labels = ["base", "fxsd skip", "torchvision"]
    assert [(row["rate"], row["variant"]) for row in figures["rows"]] == [(r, v) for r in ("uniform:0.5", "linear:0.4") for v in labels]
    assert {row["failure"] for row in figures["rows"]} == {None}
    assert {(row["model"], row["batch"], row["mode"]) for row in figures["rows"]} == {(name, 6, "eager")}
    assert [crossing["rates"] for crossing in figures["break_even"]] == [[0.2, 0.7]]
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr()
    assert "fxsd skip" in shown.out
    assert "Break-even" in shown.out
    assert shown.err == ""


@pytest.mark.usefixtures("fast")
def test_op_has_a_row_for_each_op_and_layout(tool: ModuleType, tmp_path: Path):
    target = tmp_path / "op.json"
    threads = torch.get_num_threads()
    assert run(tool, "op", "--rounds", 1, "--times", 1, "--threads", threads, "--json", target) == 0
    found = json.loads(target.read_text())["rows"]
    layouts = ["[B, C, H, W]", "[B, C, H, W] channels_last", "[B, N, C]"]
    assert [(row["shape"], row["op"]) for row in found] == [
        (layout, op) for layout in layouts for op in ("base", "fxsd mask", "timm DropPath", "torchvision")
    ]
    assert min(row["ratio"] for row in found) > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", f"{__name__}:Net"], "--shape must say the shape of a sample"),
        (["--model", "vti"], "MODEL must be torchvision:NAME"),
        (["--plot", "no/such/folder/x.png"], "--plot must be a file in a folder that exists"),
    ],
)
def test_step_says_in_one_line_what_it_needs(tool: ModuleType, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert run(tool, "step", "--threads", torch.get_num_threads(), *argv) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("rate", ["uniform", "uniform:2", "unifrom:.5"])
def test_a_rate_is_a_distribution_and_a_number(tool: ModuleType, rate: str):
    with pytest.raises(SystemExit, match="2"):
        tool.main(["step", "--rate", rate])
