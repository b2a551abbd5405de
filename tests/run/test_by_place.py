"""The operators that compiled code draws, takes and merges rows with: what they compute, and who may not see them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, library, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import fxsd
from fxsd.run.by_place import draw_rows, merge_rows, take_rows
from fxsd.versions import SIZES_MOVE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.norm(x))


@pytest.fixture
def gm() -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    gm = fxsd.transform(model, 0.5, drop_distribution="uniform", compute="skip", example_inputs=(torch.randn(2, 4),))
    assert [site.compute for site in fxsd.sites(gm)] == ["skip", "skip"]
    return gm


@pytest.mark.parametrize(("whole", "last", "run"), [(3, 0.0, 3), (3, 0.25, 4), (3, 0.25, 6), (0, 0.0, 1), (8, 0.0, 8)])
def test_rows_that_are_added_are_among_those_that_run(whole: int, last: float, run: int):
    calls, added = 2_000, torch.zeros(8)
    kept = torch.tensor([float(whole), last])
    torch.manual_seed(0)
    for _ in range(calls):
        taken, places = draw_rows(kept, 8, run)
        assert len(taken) == len(taken.unique()) == run
        assert places.ran.nonzero()[:, 0].tolist() == sorted(taken.tolist())
        assert torch.equal(taken[places.place[places.ran]], torch.arange(8)[places.ran])
        assert (places.ran | ~places.added).all()
        assert int(places.added.sum()) in {whole, math.ceil(whole + last)}
        added += places.added
    q = (whole + last) / 8
    assert (added / calls).tolist() == pytest.approx([q] * 8, abs=4.5 * math.sqrt(q * (1 - q) / calls))


def test_what_the_compiler_is_told_of_draws_is_so():
    library.opcheck(torch.ops.fxsd.draw_rows.default, (torch.tensor([3.0, 0.5]), 8, 4), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("whole", [3, 5])
@pytest.mark.parametrize("weight", [None, torch.tensor(2.0), torch.rand(5)], ids=["one", "number", "each"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_rows_are_taken_and_merged_as_by_index(dtypes: tuple[torch.dtype, torch.dtype], weight: Tensor | None, whole: int):
    """An oracle by `index_select` and `index_add`, gradients too."""
    torch.manual_seed(0)
    taken, places = draw_rows(torch.tensor([float(whole), 0.0]), 8, 5)
    x = torch.randn(8, 3, dtype=dtypes[0])
    first = torch.arange(5) < places.added.sum()  # of those that run, the first are added

    def ours(x: Tensor) -> Tensor:
        return merge_rows(x, take_rows(x, taken, places).sin().to(dtypes[1]), taken, places, weight)

    def by_index(x: Tensor) -> Tensor:
        branch = x.index_select(0, taken).sin().to(dtypes[1])
        if weight is not None:
            branch = branch * (weight.view(-1, 1) if weight.dim() else weight).to(branch.dtype)
        wide = torch.promote_types(*dtypes)
        return x.to(wide).index_add(0, taken[first], branch[first].to(wide))

    values, gradients = [], []
    for function in (ours, by_index):
        own = x.clone().requires_grad_()
        values.append(function(own))
        values[-1].square().sum().backward()
        gradients.append(own.grad)
    assert values[0].dtype is values[1].dtype
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


_OLD = pytest.mark.skipif(not SIZES_MOVE, reason=f"torch {torch.__version__}: strict export fails to follow numbers of rows")


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=_OLD)])
def test_what_is_exported_runs_without_this_library(gm: nn.Module, strict: bool):
    x = torch.randn(8, 4)
    program = torch.export.export(gm, (x,), strict=strict)
    assert not [node for node in program.graph.nodes if "fxsd" in str(node.target)]
    assert len({tuple((program.module()(x) == x).all(1).tolist()) for _ in range(20)}) > 1


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_each_of_many_models_draws_as_vmap_says(gm: nn.Module, randomness: str, outer: bool):
    def run(x: Tensor) -> Tensor:
        return torch.vmap(lambda y: gm(y), randomness=randomness)(x)

    x = torch.randn(8, 4).expand(16, 8, 4)
    if outer:
        y = torch.vmap(torch.compile(gm, backend="aot_eager"), randomness=randomness)(x)
    else:
        y = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    dropped = (y == x).all(-1)
    assert (len(dropped.unique(dim=0)) > 1) == (randomness == "different")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_checkpoint_in_compiled_code_draws_the_same_again(gm: nn.Module, backend: str):
    compiled = torch.compile(lambda x: checkpoint(gm, x, use_reentrant=False), fullgraph=True, backend=backend)
    for _ in range(5):
        x = torch.randn(8, 4, requires_grad=True)
        y = compiled(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        dropped = (y == x).all(1)
        assert torch.equal((grad == 2 * x).all(1), dropped)


def test_two_sites_of_compiled_code_draw_each_for_itself(gm: nn.Module):
    compiled, x, calls = torch.compile(gm, fullgraph=True), torch.randn(8, 4), 100
    dropped = sum(int((compiled(x) == x).all(1).sum()) for _ in range(calls))
    # Both sites drop a row in one of four cases: 2 of 8. Were their draws equal, it would be 4.
    assert dropped / calls == pytest.approx(2, abs=4.5 * math.sqrt(8 * 3 / 16 / calls))


@pytest.mark.skipif(not SIZES_MOVE, reason=f"torch {torch.__version__} has no cache of what autograd needs")
def test_compiled_code_is_found_again_in_the_cache(gm: nn.Module):
    from torch._inductor.utils import fresh_cache

    x = torch.randn(8, 4)
    with fresh_cache(), torch._functorch.config.patch(enable_autograd_cache=True):
        hits = []
        for _ in range(2):
            torch._dynamo.reset()
            counters.clear()
            torch.compile(gm, fullgraph=True)(x.requires_grad_()).sum().backward()
            hits.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert hits == [0, 1]
