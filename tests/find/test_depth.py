"""The depth of a site: blocks by number, order by the longest path."""

from __future__ import annotations

from collections import OrderedDict

import networkx as nx
import pytest
import torch
from models import WIDTH, BranchRight, CalledTwice, LongSkip, ParallelSum, PreNorm, Stack, ThreeBlocks, mlp
from torch import Tensor, nn

import fxsd


def depths(model: nn.Module, depth_by: str = "block") -> dict[str, int]:
    found = fxsd.analyze(model, depth_by=depth_by).sites
    assert found
    assert len({site.name for site in found}) == len(found)
    return {site.name: site.depth for site in found}


def chain(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


# --- blocks ---------------------------------------------------------------------------------------------------------------------


def test_the_adds_of_one_numbered_block_share_a_depth():
    model = Stack(PreNorm(), BranchRight(), PreNorm())
    assert depths(model) == {"blocks.0.0": 0, "blocks.0.1": 0, "blocks.1": 1, "blocks.2.0": 2, "blocks.2.1": 2}
    assert depths(model, "add") == {"blocks.0.0": 0, "blocks.0.1": 1, "blocks.1": 2, "blocks.2.0": 3, "blocks.2.1": 4}


def test_the_block_is_the_nearest_numbered_module_around_the_add():
    model = chain(
        stages=nn.Sequential(nn.Sequential(BranchRight(), chain(mixer=BranchRight(), ffn=BranchRight())), nn.Sequential(PreNorm()))
    )
    assert depths(model) == {"stages.0.0": 0, "stages.0.1.mixer": 1, "stages.0.1.ffn": 1, "stages.1.0.0": 2, "stages.1.0.1": 2}


@pytest.mark.parametrize("name", ["encoder_layer_{}", "block{}", "layer-{}"])
def test_a_name_that_ends_in_a_number_is_a_block(name: str):
    model = chain(**{name.format(i): chain(attention=BranchRight(), mlp=BranchRight()) for i in range(3)})
    assert list(depths(model).values()) == [0, 0, 1, 1, 2, 2]
    assert list(depths(model, "add").values()) == [0, 1, 2, 3, 4, 5]


def test_a_numbered_module_comes_before_a_name_that_ends_in_a_number():
    model = nn.Sequential(*[chain(norm1=nn.LayerNorm(WIDTH), part1=BranchRight(), part2=BranchRight()) for _ in range(2)])
    assert list(depths(model).values()) == [0, 0, 1, 1]


def test_adds_without_a_number_around_them_are_blocks_of_their_own():
    model = chain(attention=BranchRight(), mlp=ParallelSum())
    assert depths(model) == {"attention": 0, "mlp.0": 1, "mlp.1": 2}


@pytest.mark.parametrize("inner", [ThreeBlocks(), chain(a=BranchRight(), b=BranchRight(), c=BranchRight()), LongSkip(3)])
def test_a_number_around_all_sites_tells_none_of_them_apart(inner: nn.Module):
    assert list(depths(inner).values()) == [0, 1, 2]
    assert list(depths(nn.Sequential(nn.LayerNorm(WIDTH), inner)).values()) == [0, 1, 2]


def test_blocks_without_a_site_are_not_counted():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), BranchRight(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), BranchRight())
    assert depths(model) == {"1": 0, "4": 1}
    assert [site.drop_rate for site in fxsd.analyze(model, 0.2).sites] == [0.0, 0.2]


def test_sites_that_are_left_out_are_not_counted():
    assert {s.name: s.depth for s in fxsd.analyze(ThreeBlocks(), exclude="blocks.1").sites} == {"blocks.0": 0, "blocks.2": 1}


@pytest.mark.parametrize("depth_by", ["block", "add"])
def test_a_block_that_is_called_twice_has_one_op_and_the_depth_of_its_first_call(depth_by: str):
    assert depths(CalledTwice(), depth_by) == {"block": 0}
    x = torch.randn(2, WIDTH)
    skipped = fxsd.analyze(CalledTwice(), depth_by=depth_by, compute="skip", example_inputs=(x,))
    assert [site.depth for site in skipped.sites] == [0, 1], "graphs have an op a call"


def test_a_numbered_block_that_is_called_twice_keeps_its_adds_together():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([PreNorm(), PreNorm()])

        def forward(self, x: Tensor) -> Tensor:
            for block in (self.blocks[0], self.blocks[1], self.blocks[0]):
                x = block(x)
            return x

    assert [site.depth for site in fxsd.analyze(Twice()).sites] == [0, 0, 1, 1]
    skipped = fxsd.analyze(Twice(), compute="skip", example_inputs=(torch.randn(2, 4, WIDTH),))
    assert [site.depth for site in skipped.sites] == [0, 0, 1, 1, 2, 2], "graphs have an op a call"


# --- order ----------------------------------------------------------------------------------------------------------------------


class TwoPaths(nn.Module):
    """Two stacks of blocks side by side, then one more block."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.left = nn.Sequential(*[BranchRight() for _ in range(left)])
        self.right = nn.Sequential(*[BranchRight() for _ in range(right)])
        self.merge = nn.Linear(2 * WIDTH, WIDTH)
        self.last = nn.Sequential(BranchRight())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.merge(torch.cat([self.left(x), self.right(x)], dim=-1)))


@pytest.mark.parametrize(("left", "right"), [(1, 1), (2, 3), (4, 1)])
def test_depth_is_the_longest_path_to_a_block(left: int, right: int):
    order = nx.DiGraph()
    for side, count in (("left", left), ("right", right)):
        nx.add_path(order, [*(f"{side}.{i}" for i in range(count)), "last.0"])
    expected = {block: depth for depth, blocks in enumerate(nx.topological_generations(order)) for block in blocks}
    assert depths(TwoPaths(left, right)) == expected
    assert depths(TwoPaths(left, right), "add") == expected


def test_depth_follows_the_data_and_not_the_order_of_definition():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([BranchRight() for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for block in reversed(self.blocks):
                x = block(x)
            return x

    assert depths(Backwards()) == {"blocks.2": 0, "blocks.1": 1, "blocks.0": 2}


def test_a_numbered_container_that_is_never_called_is_a_block():
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"attention": BranchRight(), "mlp": BranchRight()}) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer["mlp"](layer["attention"](x))
            return x

    assert depths(Layers()) == {"layers.0.attention": 0, "layers.0.mlp": 0, "layers.1.attention": 1, "layers.1.mlp": 1}


def test_blocks_that_lead_to_each_other_in_both_directions_share_a_depth():
    class Streams(nn.Module):
        """Two numbered blocks, each of which has a turn before and after the other."""

        def __init__(self) -> None:
            super().__init__()
            self.streams = nn.ModuleList([nn.ModuleDict({"a": BranchRight(), "b": BranchRight()}) for _ in range(2)])
            self.tail = nn.ModuleList([BranchRight()])

        def forward(self, x: Tensor) -> Tensor:
            for part in ("a", "b"):
                for stream in self.streams:
                    x = stream[part](x)
            return self.tail[0](x)

    assert depths(Streams()) == {"streams.0.a": 0, "streams.1.a": 0, "streams.0.b": 0, "streams.1.b": 0, "tail.0": 1}
    assert list(depths(Streams(), "add").values()) == [0, 1, 2, 3, 4]


def test_depths_are_those_of_the_transformed_model_and_set_its_rates():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.f = TwoPaths(1, 2), mlp()

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return x + self.f(x)

    found = fxsd.sites(fxsd.transform(Net(), 0.3))
    assert [(s.name, s.depth) for s in found] == [
        ("body.left.0", 0),
        ("body.right.0", 0),
        ("body.right.1", 1),
        ("body.last.0", 2),
        ("0", 3),
    ]
    assert [round(s.drop_rate, 6) for s in found] == [0.0, 0.0, 0.1, 0.2, 0.3]
