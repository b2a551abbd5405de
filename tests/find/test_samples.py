"""Samples are dropped as a whole wherever a model keeps them: the dim is told by the graph, and shapes at two batch sizes say the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from draws import check_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxsd
from fxsd.find.samples import sample_dims
from fxsd.find.values import kinds
from fxsd.run.ops import StochasticDepth

WIDTH = 8
INPUT = (2, 3, 4, 5)
MOVES: dict[str, Callable[[Tensor], Any]] = {
    "transpose": lambda x: x.transpose(0, 1),
    "transpose to the end": lambda x: x.transpose(0, 3),
    "transpose by name": lambda x: torch.transpose(x, dim0=1, dim1=2),
    "transpose the last": lambda x: x.transpose(-1, -2),
    "swapaxes": lambda x: x.swapaxes(axis0=2, axis1=0),
    "permute": lambda x: x.permute(1, 2, 0, 3),
    "permute a list": lambda x: torch.permute(x, [3, 0, -2, 1]),
    "mT": lambda x: x.mT,
    "movedim": lambda x: x.movedim(0, 2),
    "movedim back": lambda x: torch.movedim(x, 3, 0),
    "unsqueeze and squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "unsqueeze first": lambda x: x.unsqueeze(0).squeeze(0),
    "none": lambda x: x[:, None, ..., 0],
    "none first": lambda x: x[None].mean(2),
    "stack": lambda x: torch.stack((x, x)).sum(0),
    "unbind": lambda x: torch.stack((x, 2 * x), 1).unbind(1)[1],
    "select": lambda x: torch.stack((x, x), dim=3).select(3, 0),
    "chunk": lambda x: torch.cat((x.chunk(2, 3)[1], x.chunk(2, 3)[0]), 3),
    "index": lambda x: torch.stack((x, x), 0)[0],
    "slice": lambda x: x[:, :, 1:].repeat_interleave(2, 2),
    "mean": lambda x: x.mean(2, keepdim=True),
    "sum": lambda x: x.sum((-1, 2)),
    "max": lambda x: x.max(1)[0],
    "larger": lambda x: torch.max(x, -x),
    "norm": lambda x: x / x.norm(2, 1, keepdim=True),
    "flatten": lambda x: x.flatten(2),
    "view": lambda x: x.reshape(x.shape[0], -1, x.shape[-1]),
    "unflatten": lambda x: x.unflatten(1, (1, -1)),
    "einsum": lambda x: torch.einsum("abcd,abed->bace", x, x),
    "elementwise": lambda x: (x * 2).relu() + 1,
    "softmax": lambda x: x.softmax(-1),
}  # fmt: skip


class Moves(nn.Module):
    def __init__(self, moves: list[str]) -> None:
        super().__init__()
        self.moves = moves

    def forward(self, x: Tensor) -> Tensor:
        for move in self.moves:
            x = MOVES[move](x)
        return x


def shape_dim(moves: list[str]) -> int | None:
    """Where shapes at two batch sizes show the batch; None if the moves do not run, or it is in no one dim."""
    try:
        small, large = (Moves(moves)(torch.empty(batch, *INPUT[1:], device="meta")).shape for batch in (14, 22))
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None
    dims = [dim for dim, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    return dims[0] if len(dims) == 1 else None


@given(st.lists(st.sampled_from(sorted(MOVES)), min_size=1, max_size=3))
@settings(derandomize=True, deadline=None, max_examples=600, database=None)
def test_what_is_said_of_the_samples_is_what_shapes_say(moves: list[str]):
    expected = shape_dim(moves)
    graph = fx.symbolic_trace(Moves(moves)).graph
    (result,) = next(node for node in graph.nodes if node.op == "output").all_input_nodes
    found = sample_dims(graph, kinds(graph, lambda path: nn.Identity(), set())).get(result)
    assert expected is None or found in (expected, None), (moves, expected, found)


@pytest.mark.parametrize("move", MOVES)
def test_each_move_is_followed(move: str):
    graph = fx.symbolic_trace(Moves([move])).graph
    (result,) = next(node for node in graph.nodes if node.op == "output").all_input_nodes
    found = sample_dims(graph, kinds(graph, lambda path: nn.Identity(), set()))
    assert found[result] == shape_dim([move])


class Encoder(nn.Module):
    """`[batch, sequence, channels]` goes in, and `[sequence, batch, channels]` through the blocks, as in CLIP, ESM and DETR."""

    def __init__(self, before: bool = True, blocks: int = 2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, norm_first=before)
        self.blocks = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        return self.blocks(x.permute(1, 0, 2), src_key_padding_mask=pad).permute(1, 0, 2)


class Bare(nn.Module):
    """One site, in which a channel is a number for each token of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return (x + self.f(x)).transpose(0, 1)


def tokens(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 5, WIDTH, dtype=torch.float64),)


@pytest.mark.parametrize("compute", ["mask", "skip"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("examples", [False, True])
def test_a_sample_is_dropped_as_a_whole(compute: str, compiled: bool, examples: bool):
    torch.manual_seed(0)
    if compute == "skip" and not examples:
        pytest.skip("needs example inputs")
    given = {"example_inputs": tokens(2)} if examples else {}
    gm = fxsd.transform(Bare().double(), 0.4, drop_distribution="uniform", compute=compute, **given).train()
    run = torch.compile(gm, fullgraph=True, backend="aot_eager") if compiled else gm
    kept = []
    for batch in (5, 6) if compiled else (1, 2, 3, 7):
        (x,) = tokens(batch)
        full = x + gm.f(x)
        for _ in range(300):
            y = run(x)
            whole, none = (y - full).abs().amax((1, 2)) < 1e-12, (y - x).abs().amax((1, 2)) < 1e-12
            assert (whole ^ none).all()
            kept += whole.tolist()
    assert abs(sum(kept) / len(kept) - 0.6) < 3 * (0.24 / len(kept)) ** 0.5


@pytest.mark.parametrize("before", [True, False])
def test_a_sequence_first_encoder_skips_as_the_mask_drops(before: bool):
    torch.manual_seed(0)
    assert [site.compute for site in check_rows(Encoder(before), tokens)] == ["skip"] * 4

    def padded(batch: int) -> tuple[Tensor, ...]:
        return (*tokens(batch), torch.arange(5)[None] >= 2 + torch.arange(batch)[:, None] % 3)

    assert [site.compute for site in check_rows(Encoder(before), padded)] == ["skip"] * 4


@pytest.mark.parametrize("method", ["sample", "block"])
def test_a_sequence_first_encoder_compiles_and_is_the_original_in_evaluation(method: str):
    torch.manual_seed(0)
    model, (x,) = Encoder().double(), tokens(4)
    gm = fxsd.transform(model, 0.5, stochastic_method=method, scaling="train", compute="skip", example_inputs=tokens(2))
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    for run in (gm, compiled):
        run(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    fxsd.set_drop_rate(compiled, 0.25)
    compiled(x)
    for run in (gm.eval(), compiled.eval()):
        torch.testing.assert_close(run(x), model.eval()(x), rtol=0, atol=0)
    again = fxsd.transform(gm.train(), 0.3, compute="mask")
    assert {op.batch_dim for op in again.modules() if isinstance(op, StochasticDepth)} == {1}


def test_rows_that_run_keep_the_layout_that_views_rely_on():
    class Views(Bare):
        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1).contiguous()
            for _ in range(2):
                flat = x.view(-1, WIDTH)
                x = x + self.f(flat).view(x.shape[0], -1, WIDTH)
            return x.view(-1, WIDTH)

    sites = check_rows(Views(), tokens)
    assert [site.compute for site in sites] == ["skip"] * 2
    gm = fxsd.transform(Views().double(), 0.5, drop_distribution="uniform", compute="skip", example_inputs=tokens(2))
    torch.compile(gm, fullgraph=True, backend="aot_eager")(*tokens(4)).sum().backward()


class Decides(nn.Module):
    """Stays Python, since it decides on values; its blocks, which are captured each by itself, get the sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, norm_first=True) for _ in range(2))

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        mask = pad.repeat_interleave(2, 0)[:, None].expand(-1, x.shape[1], -1) if pad.any() else None
        x = x.transpose(0, 1)
        for block in self.blocks:
            x = block(x, src_mask=mask)
        return x.transpose(0, 1)


@pytest.mark.parametrize("masked", [False, True])
def test_samples_are_found_in_parts_of_a_model(masked: bool):
    def inputs(batch: int) -> tuple[Tensor, ...]:
        return (*tokens(batch), (torch.arange(5) >= 3).expand(batch, -1) & masked)

    torch.manual_seed(0)
    assert [site.compute for site in check_rows(Decides(), inputs)] == ["skip"] * 4
    gm = fxsd.transform(Decides().double(), 0.5, example_inputs=inputs(2))
    assert {op.batch_dim for op in gm.modules() if isinstance(op, StochasticDepth)} == {1}


class Queries(nn.Module):
    """Learned queries, the same for every sample, read a memory with the sequence first, as in DETR."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.read = nn.Parameter(torch.randn(3, WIDTH)), nn.MultiheadAttention(WIDTH, 2)
        self.norm, self.f = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, memory = self.queries.unsqueeze(1).repeat(1, x.shape[0], 1), x.transpose(0, 1)
        q = q + self.read(self.norm(q), memory, memory)[0]
        return (q + self.f(self.norm(q))).transpose(0, 1)


def test_samples_come_in_by_the_branch_where_the_shortcut_has_none():
    ops = [op for op in fxsd.transform(Queries(), 0.5).modules() if isinstance(op, StochasticDepth)]
    assert [op.batch_dim for op in ops] == [1, 1]
    assert len(check_rows(Queries(), tokens)) == 2
