"""What a site that skips does: the rows it runs, how often, their gradients, and that nothing else changes.

All seeds are fixed. A tolerance of k sigma is k standard deviations of the estimate, from the binomial law.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from draws import at_random, forced
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import fxsd
from fxsd.run.rows import Rows, fork, merge, spread, take
from fxsd.run.sizes import Sizes
from fxsd.run.skip import SkipStochasticDepth
from fxsd.versions import SIZES_MOVE

RATES = (0.0, 0.05, 0.3, 0.5, 0.9, 1.0)
HALF = {"drop_rate": 0.5, "drop_distribution": "uniform", "compute": "skip"}
WIDTH = 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- the rows ---------------------------------------------------------------------------------------------------------------------


def kept(op: SkipStochasticDepth, batch: int) -> Tensor:
    """The factor that each row's branch gets in one call."""
    rows = op(torch.empty(batch, 0))
    weight = torch.ones(()) if rows.weight is None else rows.weight
    return weight.expand(batch) if rows.taken is None else torch.zeros(batch).index_copy(0, rows.taken, weight.expand(len(rows.taken)))


@pytest.mark.parametrize("rate", RATES)
def test_each_sample_is_dropped_as_often_as_the_rate_says_at_any_batch_size(rate: float):
    for batch, least_rows in ((1, 0), (3, 0), (3, 2), (8, 1), (33, 0)):
        calls = 20_000 // batch if 0 < rate < 1 else 50
        op = SkipStochasticDepth(rate, least_rows=least_rows)
        factors = torch.stack([kept(op, batch) for _ in range(calls)])
        assert set(factors.flatten().tolist()) <= {0.0, 1.0}
        sigma = math.sqrt(rate * (1 - rate))
        assert float(factors.mean()) == pytest.approx(1 - rate, abs=3 * sigma / math.sqrt(calls * batch))
        assert factors.mean(0).tolist() == pytest.approx([1 - rate] * batch, abs=4 * sigma / math.sqrt(calls))


@pytest.mark.parametrize(("batch", "rate"), [(8, 0.5), (8, 0.3), (7, 0.5), (33, 0.9), (12, 0.75), (16, 0.02), (1, 0.3)])
def test_the_number_of_rows_is_the_mean_rounded_down_or_up(batch: int, rate: float):
    op, mean = SkipStochasticDepth(rate), batch * (1 - rate)
    counts = {int(kept(op, batch).sum()) for _ in range(200)}
    assert counts == {math.floor(mean), math.ceil(mean)}


@pytest.mark.parametrize(("batch", "rate"), [(4, 0.5), (8, 0.25)])
def test_drops_of_a_site_are_correlated_by_minus_one_over_the_others_and_those_of_two_sites_are_not(batch: int, rate: float):
    """With K = B q rows kept, cov = K (K - 1) / (B (B - 1)) - q^2 = -q (1 - q) / (B - 1)."""
    first, second, calls = SkipStochasticDepth(rate), SkipStochasticDepth(rate), 2_500
    a, b = (torch.stack(found) for found in zip(*((kept(first, batch), kept(second, batch)) for _ in range(calls)), strict=True))
    within = torch.corrcoef(a.T)[~torch.eye(batch, dtype=torch.bool)]
    assert float(within.mean()) == pytest.approx(-1 / (batch - 1), abs=1e-3)
    assert within.tolist() == pytest.approx([-1 / (batch - 1)] * len(within), abs=4.5 / math.sqrt(calls))
    across = torch.corrcoef(torch.cat((a, b), 1).T)[:batch, batch:]
    assert across.flatten().tolist() == pytest.approx([0.0] * batch**2, abs=4.5 / math.sqrt(calls))


def test_each_pair_of_rows_is_as_likely_as_any_other():
    op, seen, calls = SkipStochasticDepth(0.5), torch.zeros(5, 5), 4_000
    for _ in range(calls):
        factors = kept(op, 5)
        seen += factors[:, None] * factors
    pairs = seen[~torch.eye(5, dtype=torch.bool)] / calls
    expected = 0.5 * (2 / 20 + 6 / 20)  # two or three of five
    assert pairs.tolist() == pytest.approx([expected] * 20, abs=4.5 * math.sqrt(expected * (1 - expected) / calls))


def test_draws_follow_the_seed_and_eval_draws_nothing():
    op = SkipStochasticDepth(0.5)
    torch.manual_seed(3)
    first = [kept(op, 6) for _ in range(3)]
    torch.manual_seed(3)
    assert all(torch.equal(a, kept(op, 6)) for a in first)
    state = torch.get_rng_state()
    assert op.eval()(torch.empty(6, 2)).taken is None
    op.train().set_drop_rate(0.0)
    assert op(torch.empty(6, 2)) == Rows(6)
    assert torch.equal(torch.get_rng_state(), state)


# --- one site -----------------------------------------------------------------------------------------------------------------------


class Elementwise(nn.Module):
    """A branch whose bits do not depend on how many rows run with it."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 3 + 1).cos()


class OneSite(nn.Module):
    def __init__(self, branch_first: bool = False, branch: nn.Module | None = None) -> None:
        super().__init__()
        self.branch_first, self.f = branch_first, Elementwise() if branch is None else branch

    def forward(self, x: Tensor) -> Tensor:
        if self.branch_first:
            r = self.f(x)
            r += x
            return r
        return x + self.f(x)


LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "rows": lambda batch: torch.randn(batch, WIDTH),
    "tokens": lambda batch: torch.randn(batch, 5, WIDTH),
    "images": lambda batch: torch.randn(batch, WIDTH, 3, 2),
    "channels last": lambda batch: torch.randn(batch, WIDTH, 3, 2).to(memory_format=torch.channels_last),
    "transposed": lambda batch: torch.randn(batch, WIDTH, 5).transpose(1, 2),
    "strided": lambda batch: torch.randn(2 * batch, 5, 2 * WIDTH)[::2, :, ::2],
    "batch innermost": lambda batch: torch.randn(5, WIDTH, batch).permute(2, 0, 1),
    "expanded": lambda batch: torch.randn(batch, 1, WIDTH).expand(batch, 5, WIDTH),
    "one pixel": lambda batch: torch.randn(batch, WIDTH, 1, 1).to(memory_format=torch.channels_last),
}


def skipping(model: nn.Module, example: Any, **options: Any) -> nn.Module:
    gm = fxsd.transform(model, **(HALF | {"example_inputs": (example,), "include": "*"} | options))
    assert {site.compute for site in fxsd.sites(gm)} == {"skip"}, fxsd.sites(gm)
    return gm


@pytest.mark.parametrize("scaling", ["inference", "train"])
@pytest.mark.parametrize("branch_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_is_the_shortcut_or_the_shortcut_and_the_branch_bit_for_bit(layout: str, branch_first: bool, scaling: str):
    model = OneSite(branch_first)
    gm = skipping(model, LAYOUTS[layout](2), scaling=scaling)
    for rate in RATES:
        fxsd.set_drop_rate(gm, rate)
        scale = 1.0 if scaling == "inference" or rate == 1.0 else float(1.0 / (1.0 - torch.tensor(rate)))
        for batch in (1, 2, 5):
            x = LAYOUTS[layout](batch)
            out, original = gm(x), model(x)
            assert layout == "batch innermost" or out.stride() == original.stride()
            added = (out == x + Elementwise()(x) * scale).flatten(1).all(1)
            assert (added | (out == x).flatten(1).all(1)).all()
            assert 0 < rate < 1 or set(added.tolist()) == {rate == 0.0}
        assert gm(LAYOUTS[layout](0)).shape == LAYOUTS[layout](0).shape


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # of torch's own forward mode
@pytest.mark.parametrize("rate", [0.5, 1.0])
@pytest.mark.parametrize("layout", ["tokens", "channels last", "transposed"])
def test_derivatives_of_any_kind(layout: str, rate: float):
    """Of derivatives too, forward and backward, and many at once."""
    torch.manual_seed(0)
    model, x = nn.Sequential(OneSite(), OneSite(branch_first=True)), LAYOUTS[layout](5).double().requires_grad_()
    gm = skipping(model, x.detach(), scaling="train")
    fxsd.set_drop_rate(gm, rate)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return gm(x)

    assert torch.autograd.gradcheck(run, (x,), fast_mode=True, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, (x,), fast_mode=True, check_fwd_over_rev=True)
    assert torch.autograd.grad(run(x).square().sum(), x, create_graph=True)[0].requires_grad
    tangents = torch.randn_like(x)
    _, found = torch.func.jvp(torch.func.grad(lambda x: run(x).square().sum()), (x.detach(),), (tangents,))
    _, expected = torch.autograd.functional.hvp(lambda x: run(x).square().sum(), x, tangents)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.func.jacrev(run)(x.detach()), torch.autograd.functional.jacobian(run, x))


@pytest.mark.parametrize("method", ["sample", "block"])
@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("batch", [4, 5])
def test_many_models_at_once(batch: int, randomness: str, method: str):
    model, x = OneSite(), torch.randn(300, batch, WIDTH)
    gm = skipping(model, x[0], stochastic_method=method)
    out = torch.vmap(gm, randomness=randomness)(x)
    added = (out == model(x)).all(-1)
    assert (added | (out == x).all(-1)).all()
    each = added.unique(dim=0)
    if randomness == "same":
        assert len(each) == 1
    elif method == "block":
        assert sorted(each.sum(1).tolist()) == [0, batch]
    else:
        assert len(each) == math.comb(4, 2) if batch == 4 else len(each) > 20
    if randomness == "different":  # 4 standard deviations of 300 draws
        assert added.float().mean(0).tolist() == pytest.approx([0.5] * batch, abs=4 * 0.5 / math.sqrt(300))


def test_derivatives_forward_for_many_tangents():
    gm, x = skipping(nn.Sequential(OneSite(), OneSite()), torch.randn(3, WIDTH)), torch.randn(3, WIDTH)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return gm(x)

    torch.testing.assert_close(torch.func.jacfwd(run, randomness="same")(x), torch.autograd.functional.jacobian(run, x))


def test_rows_stay_in_one_piece_behind_a_branch_that_has_them_in_pieces():
    class Turned(nn.Module):
        """As what attention gives: the batch is not the outermost dim in memory."""

        def forward(self, x: Tensor) -> Tensor:
            return x.cos().transpose(0, 1).contiguous().transpose(0, 1)

    x = torch.randn(6, 5, WIDTH)
    model = OneSite(branch_first=True, branch=Turned())
    assert not model(x).is_contiguous()
    assert skipping(model, x)(x).is_contiguous()


def test_a_stream_in_pieces_becomes_whole_where_a_branch_is():
    stream, rows = torch.randn(5, 6, WIDTH).transpose(0, 1), Rows(6, torch.tensor([4, 0]))
    whole, pieces = torch.randn(2, 5, WIDTH), torch.randn(5, 2, WIDTH).transpose(0, 1)
    assert merge(stream, whole, rows).is_contiguous()
    assert merge(stream, pieces, rows).stride() == stream.stride()
    assert torch.equal(merge(stream, whole, rows), stream.index_add(0, rows.taken, whole))


@pytest.mark.parametrize("scaling", ["inference", "train"])
@pytest.mark.parametrize("layout", ["tokens", "channels last"])
def test_evaluation_is_that_of_the_mask(layout: str, scaling: str):
    x = LAYOUTS[layout](3)
    made = [
        fxsd.transform(OneSite(), **(HALF | {"example_inputs": (x,), "include": "*", "scaling": scaling, "compute": c}))
        for c in ("mask", "skip")
    ]
    masked, skipped = (gm.eval()(x) for gm in made)
    assert torch.equal(masked, skipped)
    assert torch.equal(skipped, OneSite()(x)) == (scaling == "train")


@pytest.mark.parametrize("branch_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropped_samples_have_no_gradient_through_the_branch_and_kept_ones_the_original(layout: str, branch_first: bool):
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(()))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).cos()

    gm = skipping(OneSite(branch_first, Weighted()), LAYOUTS[layout](2), scaling="train")
    table = at_random(1, 0.5)
    x, weight = LAYOUTS[layout](7).double().requires_grad_(), gm.double().f.weight
    grad = torch.randn_like(x)
    with forced(table):
        out = gm(x)
    keep = table("0", 7).double().view([-1] + [1] * (x.dim() - 1))
    expected = x + keep * (x * weight).cos()
    assert torch.equal(out, expected)
    for a, b in zip(torch.autograd.grad(out, (x, weight), grad), torch.autograd.grad(expected, (x, weight), grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["tokens", "images", "channels last", "transposed"])
def test_gradients_are_those_of_finite_differences_twice(layout: str):
    gm = skipping(OneSite(), LAYOUTS[layout](2)).double()
    x = LAYOUTS[layout](4).double().requires_grad_()
    with forced(at_random(3, 0.5)):
        assert torch.autograd.gradcheck(gm, (x,), fast_mode=True)
        assert torch.autograd.gradgradcheck(gm, (x,), fast_mode=True)


@pytest.mark.parametrize("weight", [None, torch.tensor(1.7), torch.tensor([1.7, 0.0])])
@pytest.mark.parametrize("branch_first", [False, True])
def test_the_gradient_of_a_row_is_weighted_as_the_row_is(weight: Tensor | None, branch_first: bool):
    rows = Rows(4, torch.tensor([3, 1]), None, weight)

    def block(x: Tensor) -> Tensor:
        shortcut, part = fork(x, rows)
        return merge(shortcut, part.cos(), rows, branch_first)

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))
    assert torch.autograd.gradgradcheck(block, (x,))


def test_the_very_input_may_be_written_into_afterwards():
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.act = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            return self.act(x + self.f(x)) + 1

    gm = skipping(Reused(), torch.randn(2, 3, WIDTH), include=None).double()
    x = torch.randn(6, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    with forced(at_random(2)):
        assert torch.autograd.gradcheck(gm, (x,), fast_mode=True)


@pytest.mark.parametrize("order", ["shortcut first", "branch first", "branch first, in a format of its own"])
@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "float64", "half shortcut"])
def test_dtypes_are_those_of_the_mask(kind: str, order: str):
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x.float() if kind == "half shortcut" else x)
            if order.endswith("own"):
                y = y.transpose(1, 2).contiguous().transpose(1, 2)
            return x + y if order == "shortcut first" else y + x

    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64, "half shortcut": torch.float16}.get(kind, torch.float32)
    model = Mlp() if kind == "half shortcut" else Mlp().to(dtype)
    x = torch.randn(6, 3, WIDTH).to(dtype).requires_grad_()
    results = []
    for compute in ("mask", "skip"):
        gm = fxsd.transform(model, **(HALF | {"example_inputs": (x,), "compute": compute}))
        assert fxsd.sites(gm)[0].compute == compute
        with forced(at_random(0, 0.5)), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            out = gm(x)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), [x, *model.parameters()])))
    for masked, skipped in zip(*results, strict=True):
        assert masked.dtype == skipped.dtype
        assert masked.stride() == skipped.stride()
        torch.testing.assert_close(masked, skipped, rtol=2e-2, atol=2e-2)


# --- the model around it --------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int = 8, sequence_first: bool = False) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, width), nn.GELU(), nn.Linear(width, WIDTH))
        self.sequence_first = sequence_first

    def forward(self, x: Tensor) -> Tensor:
        if self.sequence_first:
            return x + self.f(self.norm(x.transpose(0, 1))).transpose(0, 1)
        return x + self.f(self.norm(x))


def mlps(blocks: int = 3) -> nn.Module:
    return nn.Sequential(*[Block() for _ in range(blocks)])


X = (9, 5, WIDTH)


def seeded(model: Callable[..., Tensor], x: Tensor, seed: int = 4) -> Tensor:
    torch.manual_seed(seed)
    return model(x)


def test_with_scaling_in_training_evaluation_is_the_original_and_the_state_dict_too():
    model, x = mlps(), torch.randn(X)
    gm = skipping(copy.deepcopy(model), x[:2], scaling="train", include=None)
    assert list(gm.state_dict()) == list(model.state_dict())
    for batch in (9, 1, 0):
        assert torch.equal(gm.eval()(x[:batch]), model.eval()(x[:batch]))
    assert not torch.equal(seeded(gm.train(), x), model(x))
    assert torch.equal(seeded(gm, x), seeded(gm.eval().train(), x))


def test_copies_draw_alike_and_keep_their_rate():
    x = torch.randn(X)
    gm = skipping(mlps(), x[:2], include=None)
    fxsd.set_drop_rate(gm, 0.3)
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    for again in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), torch.load(file, weights_only=False), copy.copy(gm)):
        assert [(s.drop_rate, s.compute) for s in fxsd.sites(again)] == [(pytest.approx(0.3), "skip")] * 3
        assert torch.equal(seeded(again, x), seeded(gm, x))
        fxsd.set_drop_rate(again, 0.0)
        assert torch.equal(again(x), seeded(again, x))
        fxsd.set_drop_rate(again, 0.3)


def test_rates_and_batch_sizes_move():
    x = torch.randn(X)
    model = mlps(1)
    gm = skipping(model, x[:2], include=None)
    rows: list[int] = []
    model.get_submodule("0.f").register_forward_hook(lambda module, args, out: rows.append(len(out)))
    for rate, batch, expected in ((0.0, 9, {9}), (1.0, 9, {0, 1}), (0.5, 8, {4}), (0.5, 3, {1, 2}), (0.75, 8, {2}), (0.5, 0, {0})):
        rows.clear()
        fxsd.set_drop_rate(gm, rate)
        for _ in range(10):
            assert gm(x[:batch]).shape == x[:batch].shape
        assert set(rows) <= expected


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_rows(reentrant: bool):
    gm = skipping(mlps(), torch.randn(2, 5, WIDTH), include=None, scaling="train")
    x = torch.randn(X, requires_grad=True)
    found = []
    for run in (gm, lambda x: checkpoint(gm, x, use_reentrant=reentrant)):
        gm.zero_grad()
        x.grad = None
        seeded(run, x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in gm.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_functional_calls_and_functional_gradients():
    gm = skipping(mlps(), torch.randn(2, 5, WIDTH), include=None)
    x, state = torch.randn(X), {name: p.detach().clone() for name, p in gm.named_parameters()}

    def loss(state: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(gm, state, (x,)).square().sum()

    with forced(at_random(5)):
        gm(x).square().sum().backward()
        gradients = torch.func.grad(loss)(state)
        assert float(loss({name: torch.zeros_like(p) for name, p in state.items()})) == pytest.approx(float(x.square().sum()))
    for name, parameter in gm.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_a_row_that_stands_for_all_is_taken_as_it_is():
    rows, one = Rows(4, torch.tensor([0, 2])), torch.ones(1, 3)
    assert take(one, rows) is one
    assert take(torch.arange(4.0), rows).tolist() == [0, 2]
    shortcut, part = fork(torch.arange(4.0), rows)
    assert merge(shortcut, 10 * part, rows).tolist() == [0, 1, 22, 3]
    assert spread(part, rows).tolist() == [0, 0, 2, 0]


# --- compiled -------------------------------------------------------------------------------------------------------------------------

compiled_code = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
where_sizes_move = pytest.mark.skipif(not SIZES_MOVE, reason=f"torch {torch.__version__}: compiled code takes the mask while rates move")


@compiled_code
def test_compiled_rates_and_batch_sizes_move_without_compiling_each():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gm = skipping(mlps(2), torch.randn(2, 5, WIDTH), include=None, scaling="train")
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    for step in range(10):
        fxsd.set_drop_rate(gm, step / 18)
        for batch in (8, 12):
            compiled(torch.randn(batch, 5, WIDTH)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def variables(seen: list[int]) -> Callable[..., Any]:
    """A backend that notes of each graph how many sizes are variables of it."""

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(sum(isinstance(value, torch.SymInt) for value in inputs))
        return graph

    return backend


def rows_run(op: SkipStochasticDepth, batch: int = 8) -> int:
    """How many rows compiled code runs of a batch that it has met."""
    size = getattr(op, f"size_{batch}")
    return size.shape[0] if isinstance(size, Tensor) else size


class Named(nn.Module):
    """Torch's own container inside a class of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = mlps(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@compiled_code
def test_sizes_in_containers_move_without_compiling_each():
    torch._dynamo.reset()
    counter = CompileCounter()
    gm = skipping(Named(), torch.randn(2, 5, WIDTH), include=None)
    compiled, x = torch.compile(gm, fullgraph=True, backend=counter), torch.randn(8, 5, WIDTH)
    for rate in (0.5, 0.4, 0.3, 0.45, 0.35, 0.5):
        fxsd.set_drop_rate(gm, rate)
        compiled(x)
    assert counter.frame_count == 2


@where_sizes_move
@compiled_code
def test_sizes_are_constants_until_a_rate_moves():
    torch._dynamo.reset()
    seen: list[int] = []
    gm = skipping(mlps(2), torch.randn(2, 5, WIDTH), include=None)
    compiled, x = torch.compile(gm, fullgraph=True, backend=variables(seen)), torch.randn(8, 5, WIDTH)
    for rate in (0.5, 0.5):
        fxsd.set_drop_rate(gm, rate)
        compiled(x)
    assert seen == [0]
    for rate in (0.4, 0.3, 0.0, 0.5):
        fxsd.set_drop_rate(gm, rate)
        compiled(x)
    assert seen == [0, 1]


def fewest(kept: list[float], groups: int) -> float:
    """The least that runs in all where each group of sites runs the most that one of it keeps; by trying all groups."""
    kept = sorted(kept, reverse=True)
    edges = ((0, *starts, len(kept)) for starts in itertools.combinations(range(1, len(kept)), groups - 1))
    return min(sum(kept[start] * (end - start) for start, end in itertools.pairwise(tried)) for tried in edges)


@pytest.mark.skipif(not SIZES_MOVE, reason=f"torch {torch.__version__}: sizes in modules are constants")
@compiled_code
@pytest.mark.parametrize(("batch", "sequence_first", "varies"), [(16, False, True), (16, True, False), (4, False, False)])
def test_sizes_are_variables_from_the_start_where_they_are_many_and_in_no_stride(batch: int, sequence_first: bool, varies: bool):
    torch._dynamo.reset()
    seen: list[int] = []
    model = nn.Sequential(*[Block(sequence_first=sequence_first) for _ in range(9)])
    gm = skipping(model, torch.randn(2, 5, WIDTH), drop_rate=0.8, drop_distribution="huang", include=None)
    compiled, x = torch.compile(gm, fullgraph=True, backend=variables(seen)), torch.randn(batch, 5, WIDTH)
    for _ in range(2):
        compiled(x)
    assert seen == [6 if varies else 0]
    ops = [op for op in gm.modules() if isinstance(op, SkipStochasticDepth)]
    run = [rows_run(op, batch) for op in ops]
    needed = [math.ceil(batch * (1 - op.rate)) for op in ops]
    assert all(rows >= least for rows, least in zip(run, needed, strict=True))
    if varies:
        assert sum(run) == fewest(needed, 6)
    elif sequence_first:
        assert len(set(run)) == 7
    else:
        assert run == needed
    for rate in (0.7, 0.6):
        fxsd.set_drop_rate(gm, rate)
        compiled(x)
    assert len(seen) == (1 if varies else 2)


@where_sizes_move
@compiled_code
def test_branches_that_turn_the_batch_run_all_rows_once_rates_move():
    torch._dynamo.reset()
    seen: list[int] = []
    model = nn.Sequential(Block(sequence_first=True), Block())
    gm = skipping(model, torch.randn(2, 5, WIDTH), include=None)
    turning, other = (op for op in gm.modules() if isinstance(op, SkipStochasticDepth))
    compiled, x, calls = torch.compile(gm, fullgraph=True, backend=variables(seen)), torch.randn(8, 5, WIDTH), 400
    compiled(x)
    assert (rows_run(turning), rows_run(other)) == (4, 4)
    for rate in (0.25, 0.75, 0.5):
        fxsd.set_drop_rate(gm, rate)
        same = torch.stack([(compiled(x) == x).flatten(1).all(1) for _ in range(calls)]).float()
        assert (rows_run(turning), rows_run(other)) == (8, 8 * (1 - rate))
        both = rate**2  # sites drop a row independently
        assert same.mean(0).tolist() == pytest.approx([both] * 8, abs=4.5 * math.sqrt(both * (1 - both) / calls))
    assert seen == [0, 1]


@where_sizes_move
@compiled_code
@pytest.mark.parametrize(("start", "graphs"), [(0.0, [0, 1, 0]), (0.5, [0, 1])])  # what was compiled for .5 runs again
def test_sizes_are_constants_again_once_a_schedule_is_over(start: float, graphs: list[int]):
    torch._dynamo.reset()
    seen: list[int] = []
    model = nn.Sequential(Block(sequence_first=True), Block())
    gm = skipping(model, torch.randn(2, 5, WIDTH), drop_rate=start, include=None)
    turning, other = (op for op in gm.modules() if isinstance(op, SkipStochasticDepth))
    compiled, x = torch.compile(gm, fullgraph=True, backend=variables(seen)), torch.randn(8, 5, WIDTH)
    compiled(x)
    schedule = fxsd.DropRateSchedule(gm, drop_rate=0.5, warmup_steps=10)
    for step in range(1, 14):
        schedule.step()
        compiled(x)
        over = step >= 10
        assert (rows_run(turning), isinstance(other.size_8, int)) == ((4, True) if over else (8, False))
    assert (rows_run(other), seen) == (4, graphs)
    fxsd.set_drop_rate(gm, 0.25)
    compiled(x)
    assert (rows_run(turning), rows_run(other), seen) == (8, 6, graphs)  # what was compiled for rates that move runs again
    fxsd.set_drop_rate(gm, 0.5)
    fxsd.DropRateSchedule(gm)  # nothing moves any more
    compiled(x)
    assert (rows_run(turning), rows_run(other), seen) == (4, 4, graphs)


@compiled_code
def test_compiled_code_skips_once_a_schedule_is_over():
    torch._dynamo.reset()
    skipped: list[bool] = []

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        skipped.append(any("draw_rows" in str(node.target) or "randperm" in str(node.target) for node in graph.graph.nodes))
        return graph

    gm = skipping(mlps(2), torch.randn(2, 5, WIDTH), include=None)
    compiled, x = torch.compile(gm, fullgraph=True, backend=backend), torch.randn(8, 5, WIDTH)
    schedule = fxsd.DropRateSchedule(gm, warmup_steps=3)
    for _ in range(5):
        compiled(x)
        schedule.step()
    assert skipped == [SIZES_MOVE, True]


@where_sizes_move
@compiled_code
def test_sites_share_a_variable_while_little_is_lost():
    torch._dynamo.reset()
    seen: list[int] = []
    gm = skipping(mlps(3), torch.randn(2, 5, WIDTH), include=None)
    compiled, x = torch.compile(gm, fullgraph=True, backend=variables(seen)), torch.randn(8, 5, WIDTH)
    ops = [op for op in gm.modules() if isinstance(op, SkipStochasticDepth)]

    def run(*rates: float) -> list[int]:
        for op, rate in zip(ops, rates, strict=True):
            op.set_drop_rate(rate)
            if seen:
                assert [op.site for op in ops if rows_run(op) < 8 * (1 - op.rate)] == []
        for op in ops:
            op.settle()
        compiled(x)
        return [rows_run(op) for op in ops]

    assert (run(0.5, 0.5, 0.5), seen) == ([4, 4, 4], [0])
    assert (run(0.25, 0.25, 0.25), seen) == ([6, 6, 6], [0, 1])
    assert (run(0.75, 0.75, 0.75), seen) == ([2, 2, 2], [0, 1])
    assert (run(0.75, 0.76, 0.77), seen) == ([2, 2, 2], [0, 1])
    copied = copy.deepcopy(gm)
    assert (run(0.75, 0.5, 0.5), seen) == ([2, 4, 4], [0, 1, 2])
    assert (run(0.5, 0.25, 0.25), seen) == ([4, 6, 6], [0, 1, 2])
    assert (run(0.5, 0.25, 0.5), seen) == ([4, 6, 4], [0, 1, 2, 3])
    for rates, expected in (((0.5, 0.5, 0.5), [4, 4, 4]), ((0.25, 0.5, 0.75), [6, 4, 2])):
        assert (run(*rates), seen) == (expected, [0, 1, 2, 3])
    fxsd.set_drop_rate(copied, 0.25)
    assert len({id(op.size_8) for op in copied.modules() if isinstance(op, SkipStochasticDepth)}) == 1


@where_sizes_move
@compiled_code
@pytest.mark.parametrize(("start", "compiles"), [(0.0, 2), (0.4, 1)])
def test_a_warm_up_of_many_rates_compiles_twice_at_most(start: float, compiles: int):
    torch._dynamo.reset()
    seen: list[int] = []
    gm = skipping(mlps(9), torch.randn(2, 5, WIDTH), drop_rate=start, drop_distribution="linear", include=None)
    compiled, x = torch.compile(gm, fullgraph=True, backend=variables(seen)), torch.randn(64, 5, WIDTH)
    ops = [op for op in gm.modules() if isinstance(op, SkipStochasticDepth)]
    for step in range(21):
        compiled(x)
        run, needed = [rows_run(op, 64) for op in ops], [64 * (1 - op.rate) for op in ops]
        assert all(rows >= least - 1e-4 for rows, least in zip(run, needed, strict=True))
        assert -1e-4 < sum(run) - fewest(needed, 6) < len(ops)
        fxsd.set_drop_rate(gm, (step + 1) / 50)
    assert seen == [0, 6][-compiles:]


@where_sizes_move
@compiled_code
@pytest.mark.parametrize(("dynamic", "rates", "batches"), [(None, (0.5, 0.4, 0.3), (8,)), (True, (0.5, 0.0, 0.25), (8, 12))])
def test_a_rate_that_has_moved_before_compiles_once(dynamic: bool | None, rates: tuple[float, ...], batches: tuple[int, ...]):
    torch._dynamo.reset()
    counter = CompileCounter()
    gm = skipping(mlps(2), torch.randn(2, 5, WIDTH), include=None)
    compiled = torch.compile(gm, fullgraph=True, backend=counter, dynamic=dynamic)
    fxsd.set_drop_rate(gm, 0.2)
    for rate in rates:
        fxsd.set_drop_rate(gm, rate)
        for batch in batches:
            compiled(torch.randn(batch, 5, WIDTH))
    assert counter.frame_count == 1


@where_sizes_move
@compiled_code
def test_rates_move_in_inference_mode_and_outside():
    torch._dynamo.reset()
    gm = skipping(mlps(2), torch.randn(2, 5, WIDTH), include=None)
    compiled, x = torch.compile(gm, fullgraph=True, backend="eager"), torch.randn(8, 5, WIDTH)
    for rate, inference in ((0.5, True), (0.25, True), (0.75, False), (0.5, True)):
        with torch.inference_mode(inference):
            fxsd.set_drop_rate(gm, rate)
            assert compiled(x).shape == x.shape
        assert {rows_run(op) for op in gm.modules() if isinstance(op, SkipStochasticDepth)} == {8 * (1 - rate)}


@compiled_code
def test_compiled_code_takes_a_mask_of_its_own_where_less_than_a_row_is_dropped():
    torch._dynamo.reset()
    for scaling, scale in (("inference", 1.0), ("train", 1 / 0.9)):
        op = SkipStochasticDepth(0.1, scaling=scaling)

        def draw(x: Tensor, op: SkipStochasticDepth = op) -> tuple[bool, Tensor]:
            rows = op(x)
            return rows.taken is None, rows.weight

        compiled = torch.compile(draw, backend="eager", fullgraph=True)
        whole, weights = zip(*(compiled(torch.randn(8, 2)) for _ in range(1_000)), strict=True)
        assert all(whole)
        kept = torch.stack(weights) / scale
        assert set(kept.round(decimals=5).flatten().tolist()) == {0.0, 1.0}
        assert set(kept.sum(1).round().tolist()) == {7.0, 8.0}
        assert kept.mean(0).tolist() == pytest.approx([0.9] * 8, abs=4 * math.sqrt(0.09 / len(kept)))
    op = SkipStochasticDepth(0.4)
    assert torch.compile(lambda x: op(x).taken, backend="eager", fullgraph=True)(torch.randn(8, 2)) is not None


def among(rates: Sequence[float], sizes: Sizes | None = None) -> list[SkipStochasticDepth]:
    """The ops of sites of one graph, whose branches are alike."""
    sizes = sizes or Sizes()
    return [SkipStochasticDepth(rate, site=f"site {place}", sizes=sizes) for place, rate in enumerate(rates)]


def test_sites_round_up_with_those_of_like_branches_only():
    model = nn.Sequential(Block(), Block(12), Block(), Block(12))
    gm = skipping(model, torch.randn(X), drop_rate=0.4, drop_distribution="linear", include=None)
    kinds = [site.kind for op in gm.modules() if isinstance(op, SkipStochasticDepth) for site in [op.sizes._sites[op.site]]]
    assert kinds[0] == kinds[2] != kinds[1] == kinds[3]


@pytest.mark.skipif(not SIZES_MOVE, reason=f"torch {torch.__version__}: compiled code cannot tell whether the batch is a constant")
@compiled_code
def test_compiled_code_that_runs_some_more_rows_drops_as_often():
    torch._dynamo.reset()
    # Of 9 rows 7 have to run, at nine sites 8, and at two each 6, 5, 4, 3, 2 and 1.
    rates = (0.3, *[0.2] * 9, *[0.4, 0.5, 0.6, 0.7, 0.8, 0.9] * 2)
    op, *_ = among(rates)
    compiled = torch.compile(op, backend="eager", fullgraph=True)
    calls, counts = 600, torch.zeros(9)
    for _ in range(calls):
        rows = compiled(torch.randn(9, 2))
        assert len(rows.taken) == 8
        assert set(rows.places.added.nonzero()[:, 0].tolist()) < set(rows.taken.tolist())
        assert torch.equal(rows.taken[rows.places.place[rows.places.added]], rows.places.added.nonzero()[:, 0])
        counts += rows.places.added
    assert (counts / calls).tolist() == pytest.approx([0.7] * 9, abs=4 * math.sqrt(0.21 / calls))
    assert counts.sum() / calls == pytest.approx(6.3, abs=4 * math.sqrt(0.21 / calls))  # 6 or 7
    op.set_drop_rate(0.4)  # once rates move it is a variable, shared with sites of a rate of .2
    assert len(compiled(torch.randn(9, 2)).taken) == 8


@compiled_code
@pytest.mark.parametrize(("moves", "varies"), [(False, False), (False, True), (True, False)])
def test_compiled_code_drops_as_often_and_has_the_gradients_of_the_rows_that_ran(moves: bool, varies: bool):
    torch._dynamo.reset()
    model = mlps(1)
    gm = skipping(model, torch.randn(2, 5, WIDTH), include=None, scaling="train")
    compiled = torch.compile(gm, fullgraph=True)
    x, parameters, calls, counts = torch.randn(9, 5, WIDTH), list(gm.parameters()), 200, torch.zeros(9)
    full = model.get_submodule("0.f")(model.get_submodule("0.norm")(x)).detach()
    fxsd.set_drop_rate(gm, 0.3)
    for op in gm.modules():
        if isinstance(op, SkipStochasticDepth):
            op.sizes.moved = moves
            if varies:
                op.sizes.vary = SIZES_MOVE
                among([tenth / 10 for tenth in range(1, 10)], op.sizes)
            op.set_drop_rate(op.rate)
    masked = moves and not SIZES_MOVE  # a mask draws for each row
    for call in range(calls):
        out = compiled(x)
        keep = ((out - x).abs().amax((1, 2)) > 0).detach()
        assert int(keep.sum()) in (6, 7) or masked
        torch.testing.assert_close(out, x + keep[:, None, None] * full / 0.7)
        counts += keep
        if call < 3:
            gradients = torch.autograd.grad(out.square().sum(), parameters)
            branch = model.get_submodule("0.f")(model.get_submodule("0.norm")(x)) / 0.7
            expected = torch.autograd.grad((x + keep[:, None, None] * branch).square().sum(), parameters)
            for a, b in zip(gradients, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (counts / calls).tolist() == pytest.approx([0.7] * 9, abs=4 * math.sqrt(0.21 / calls))
    assert counts.sum() / calls == pytest.approx(6.3, abs=4 * math.sqrt((9 if masked else 1) * 0.21 / calls))
    for rate, expected in ((0.0, x + full), (1.0, x)):
        fxsd.set_drop_rate(gm, rate)
        torch.testing.assert_close(compiled(x), expected)


@compiled_code
def test_compiled_code_runs_as_many_rows_as_batch_statistics_need():
    torch._dynamo.reset()
    model = OneSite(branch=nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)))
    gm = skipping(model, torch.randn(2, WIDTH), include=None, subset_batch_norm=True)
    compiled, x = torch.compile(gm, fullgraph=True, backend="aot_eager"), torch.randn(8, WIDTH)
    for rate in (0.9, 1.0, 0.95):
        fxsd.set_drop_rate(gm, rate)
        assert compiled(x).isfinite().all()


@pytest.mark.parametrize("branch_first", [False, True])
def test_the_sum_has_one_dtype_whether_rows_ran_or_not(branch_first: bool):
    shortcut = torch.randn(3, 4).bfloat16()
    for rows, ran in ((Rows(3, none=True), 0), (Rows(3, torch.tensor([1])), 1), (Rows(3), 3)):
        assert merge(shortcut, torch.randn(ran, 4), rows, branch_first).dtype is torch.float32
