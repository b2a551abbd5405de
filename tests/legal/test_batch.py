"""Which branches may run on some rows: every trap is seen and falls back to the mask, and what is skipped gives what the mask gives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import pytest
import timm
import torch
import transformers as hf
from draws import check_rows, left_out
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models as vision

import fxsd
from fxsd.legal.batch import Region, no_gain

WIDTH, TOKENS = 4, 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mlp(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))


def tokens(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, TOKENS, WIDTH, dtype=torch.float64),)


def images(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, WIDTH, 4, 4, dtype=torch.float64),)


class Planted(nn.Module):
    """Blocks of which the second has something in its branch."""

    def __init__(self, planted: Callable[..., Tensor], channels_first: bool = False) -> None:
        super().__init__()
        self.planted, self.channels_first = planted, channels_first
        self.f, self.g, self.h = (nn.Conv2d(WIDTH, WIDTH, 3, 1, 1) if channels_first else mlp() for _ in range(3))
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        x = x + self.f(x).relu()
        x = x + self.h(self.planted(self.g(x).tanh()))
        return x + self.f(x).relu()


def reasons(model: nn.Module, example: Any, **options: Any) -> list[str]:
    found = fxsd.analyze(model.double(), 0.5, compute="skip", example_inputs=example, **options).sites
    assert found
    assert [site.compute for site in found] == ["mask" if site.reason else "skip" for site in found]
    return [site.reason for site in found]


# --- what must not be skipped -------------------------------------------------------------------------------------------------------

MIXED, OTHER = "mixes samples", "gives other results for a sample when fewer samples run with it"
TRAPS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "the mean over the batch": (lambda x: x - x.mean(0), f"{MIXED}|{OTHER}"),
    "batch statistics by hand": (lambda x: (x - x.mean((0, 1))) / (x.var((0, 1)) + 1).sqrt(), f"{MIXED}|{OTHER}"),
    "a flipped batch": (lambda x: x.flip(0), f"{MIXED}|{OTHER}"),
    "a rolled batch": (lambda x: x.roll(1, 0), f"{MIXED}|{OTHER}"),
    "softmax over the batch": (lambda x: x.softmax(0), f"{MIXED}|{OTHER}"),
    "a running sum": (lambda x: x.cumsum(0), f"{MIXED}|{OTHER}"),
    "the largest of the batch": (lambda x: x / x.abs().amax(), f"{MIXED}|{OTHER}"),
    "the first sample": (lambda x: x + x[:1], f"{MIXED}|{OTHER}"),
    "mixup": (lambda x: 0.5 * x + 0.5 * x[torch.randperm(x.shape[0])], f"{MIXED}|{OTHER}|does not run"),
    "attention over the batch": (lambda x: F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3).transpose(0, 1), f"{MIXED}|{OTHER}"),
    "a place from the end": (lambda x: x * torch.arange(x.shape[0]).flip(0)[:, None, None], OTHER),
    "a value that depends on the batch": (lambda x: x / x.shape[0], OTHER),
    "a value that depends on the number of elements": (lambda x: x / math.sqrt(x.numel()), f"{OTHER}|depends on the batch|does not run"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAPS)
def test_a_branch_whose_samples_depend_on_each_other_runs_on_all(name: str):
    trap, reason = TRAPS[name]
    first, second, third = reasons(Planted(trap), tokens(2))
    assert (first, third) == ("", "")
    assert second
    assert any(part in second for part in reason.split("|")), second
    check_rows(Planted(trap), tokens)


def test_a_view_of_a_parameter_may_enter_a_module():
    class ClassToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.norm, self.f = nn.Parameter(torch.rand(1, WIDTH)), nn.LayerNorm(WIDTH), mlp()

        def forward(self, x: Tensor) -> Tensor:
            token = self.token.reshape(1, WIDTH).unsqueeze(0).expand(x.shape[0], -1, -1)
            return x + self.f(x + self.norm(token))

    assert reasons(ClassToken(), tokens(2)) == [""]
    check_rows(ClassToken(), tokens)


class Indexed(nn.Module):
    """A branch that reads places in the batch, or classes, which were computed before it."""

    def __init__(self, classes: int | None) -> None:
        super().__init__()
        self.f, self.classes = mlp(), classes

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        places = torch.arange(x.shape[0])
        x = x * 2
        if self.classes is None:
            return x + self.f(x)[places]
        return x + self.f(x)[:, : self.classes].gather(1, y[:, None, None].expand(-1, TOKENS, WIDTH))


def test_places_in_the_batch_that_come_from_outside_are_a_reason():
    inputs = lambda batch: (*tokens(batch), torch.zeros(batch, dtype=torch.long))  # noqa: E731
    (reason,) = reasons(Indexed(None), inputs(2))
    assert "does not run on some of the samples" in reason
    check_rows(Indexed(None), inputs)


@pytest.mark.parametrize("classes", [1, 2, TOKENS])
def test_classes_are_none(classes: int):
    inputs = lambda batch: (*tokens(batch), torch.randint(0, classes, (batch,)))  # noqa: E731
    assert reasons(Indexed(classes), inputs(2)) == [""]
    check_rows(Indexed(classes), inputs)


def test_a_literal_batch_in_a_reshape_is_a_reason():
    before, *found = reasons(Planted(lambda x: x.reshape(2, -1).reshape(2, TOKENS, WIDTH)), tokens(2))
    assert before == ""
    assert len(found) == 2
    assert all("does not run with" in reason for reason in found)


def test_what_comes_later_and_decides_on_values_is_no_matter():
    class Loss(Planted):
        def forward(self, x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return y, y[known].square().sum() + self.f(y[known]).sum()

    def inputs(batch: int) -> tuple[Tensor, ...]:
        return (*tokens(batch), torch.arange(TOKENS) < 1 + torch.arange(batch)[:, None] % 3)

    assert reasons(Loss(torch.sin), inputs(2)) == ["", "", ""]
    check_rows(Loss(torch.sin), inputs)


def test_what_comes_earlier_and_does_not_run_is_a_reason():
    class Early(Planted):
        def forward(self, x: Tensor, known: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x + x[known].mean())

    found = reasons(Early(torch.sin), (*tokens(2), torch.ones(2, TOKENS, dtype=torch.bool)))
    assert len(found) == 3
    assert all("does not run with" in reason for reason in found)


class Elsewhere(nn.Module):
    """A stream with its batch in dim 1, which nobody can tell without shapes, or in two dims."""

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        self.pairs, self.f = pairs, mlp()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        pairs = (flat @ flat.T)[..., None].expand(-1, -1, WIDTH)
        x = pairs if self.pairs else x.transpose(0, 1).reshape(TOKENS, -1, WIDTH)
        return x + self.f(x)


def test_a_batch_in_another_dim_is_found_by_shapes():
    assert reasons(Elsewhere(False), tokens(2)) == [""]
    check_rows(Elsewhere(False), tokens)


def test_a_batch_in_no_dim_of_its_own_is_a_reason():
    (reason,) = reasons(Elsewhere(True), tokens(2))
    assert "has the batch in no dim of its own: [4, 4, 4]" in reason
    check_rows(Elsewhere(True), tokens)


def test_batch_norm_is_a_reason_unless_it_is_allowed():
    def functional(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)

    for planted in (nn.BatchNorm2d(WIDTH), functional):
        assert "subset_batch_norm=True allows that" in reasons(Planted(planted, True), images(2))[1]
        assert reasons(Planted(planted, True), images(2), subset_batch_norm=True) == ["", "", ""]
    mixed = Planted(lambda x: functional(x).flip(0), True)
    assert reasons(mixed, images(2), subset_batch_norm=True)[1] in (
        f"its branch {OTHER}",
        f"its branch {MIXED}: what it gives for one depends on others",
    )
    by_hand = Planted(lambda x: x - x.mean((0, 2, 3), keepdim=True), True)
    assert "batch norm" not in reasons(by_hand, images(2), subset_batch_norm=True)[1]
    check_rows(by_hand, images, subset_batch_norm=True)


def test_batch_norm_behind_noise_is_still_seen():
    noisy = Planted(lambda x: F.rrelu(F.batch_norm(x, None, None, training=True), training=True), True)
    assert reasons(noisy, images(2))[1]
    drawn = Planted(lambda x: x * torch.bernoulli(F.batch_norm(x, None, None, training=True).sigmoid()), True)
    assert reasons(drawn, images(2))[1]


class WritesIntoItsInput(nn.Module):
    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.write, self.f = write, mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        return x + self.f(self.write(x))


@pytest.mark.parametrize(
    "write",
    [
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Identity(), nn.SiLU(inplace=True)),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.hardtanh(x, -99, 99, inplace=True),
    ],
)
def test_a_write_into_the_input_is_a_reason(write: Callable[[Tensor], Any]):
    (reason,) = reasons(WritesIntoItsInput(write), tokens(2))
    assert "writes into" in reason or "is written into" in reason
    check_rows(WritesIntoItsInput(write), tokens)


@pytest.mark.parametrize(
    "write", [lambda x: x.relu_(), lambda x: x.mul_(2), lambda x: x[:, 0].zero_() is None or x, lambda x: x.clone().relu_()]
)
def test_a_write_that_both_sides_see_or_none_is_none(write: Callable[[Tensor], Any]):
    check_rows(WritesIntoItsInput(write), tokens)


class UsedElsewhere(nn.Module):
    """A branch whose first part others read too; with `most` of its work."""

    def __init__(self, where: str, most: bool = False) -> None:
        super().__init__()
        self.where, self.g, self.h = where, mlp(), mlp()
        self.f = nn.Sequential(mlp(), mlp()) if most else mlp()

    def forward(self, x: Tensor) -> Any:
        inner = self.f(x).tanh()
        r = self.g(inner)
        y = x + r
        if self.where == "returned":
            return y, inner
        if self.where == "kept":
            return y, (inner.sum(-1), x)
        if self.where == "in the next block":
            return y + self.h(y * inner)
        return y + self.h(y), r.sum()


@pytest.mark.parametrize(
    ("where", "most"), [("returned", True), ("kept", True), ("in the next block", True), ("its result", False), ("its result", True)]
)
def test_a_value_of_the_branch_that_is_used_elsewhere_is_a_reason(where: str, most: bool):
    first, second = (*reasons(UsedElsewhere(where, most), tokens(2)), "")[:2]
    assert "is also used outside of it" in first
    assert second == ""
    check_rows(UsedElsewhere(where, most), tokens)


@pytest.mark.parametrize("where", ["returned", "kept", "in the next block"])
def test_what_others_read_runs_on_all_rows_and_what_comes_after_on_some(where: str):
    sites = check_rows(UsedElsewhere(where), tokens)
    assert {site.compute for site in sites} == {"skip"}
    gm = fxsd.transform(UsedElsewhere(where).double(), 0.5, drop_distribution="uniform", compute="skip", example_inputs=tokens(4))
    seen = {}
    gm.f[0].register_forward_hook(lambda m, args, out: seen.update(f=len(out)))
    gm.g[0].register_forward_hook(lambda m, args, out: seen.update(g=len(out)))
    gm(*tokens(4))
    assert seen == {"f": 4, "g": 2}


class SharedNorm(nn.Module):
    """Two branches of one norm, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f, self.g = nn.LayerNorm(WIDTH), mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.f(normed) + self.g(normed)


class TwoBranches(SharedNorm):
    """The same, added to each other first."""

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return self.f(normed) + self.g(normed) + x


class Cached(nn.Module):
    """Attention whose keys and values are returned too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v, self.out = nn.LayerNorm(WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        return x + self.out(F.scaled_dot_product_attention(q, k, v)), {"k": k, "v": v}


class CachedHeads(Cached):
    """The same with heads, whose number of rows is read from a size that keys and values need too."""

    def __init__(self, kind: Callable[[Any], Any]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = self.norm(x)
        shape = self.kind(h.shape[:-1])
        heads = (*shape, -1, 2)
        q, k, v = (project(h).view(heads).transpose(1, 2) for project in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        mixed = mixed.reshape([*shape, WIDTH]) if self.kind is tuple else mixed.flatten(2).view(*shape, -1)
        return x + self.out(mixed.view(self.kind(h.shape))), {"k": k, "v": v}


KINDS = [SharedNorm, TwoBranches, Cached, partial(CachedHeads, lambda size: size), partial(CachedHeads, tuple), partial(CachedHeads, list)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [False, True])
def test_a_shared_norm_and_a_cache_are_no_obstacle(kind: Callable[[], nn.Module], again: bool):
    assert {site.compute for site in check_rows(kind(), tokens)} == {"skip"}
    torch.manual_seed(0)
    gm = fxsd.transform(kind().double(), 0.5, drop_distribution="uniform", scaling="train", compute="skip", example_inputs=tokens(4))
    gm = fxsd.transform(gm, 0.4, drop_distribution="uniform", scaling="train", compute="skip", example_inputs=tokens(4)) if again else gm
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    for run in (gm, compiled):
        (x,) = tokens(4)
        torch.utils._pytree.tree_leaves(run(x))[0].square().sum().backward()
    plain = copy.deepcopy(gm).eval()
    torch.testing.assert_close(compiled.eval()(x), plain(x), rtol=0, atol=0)
    assert len(fxsd.sites(gm)) == (2 if kind in KINDS[:2] else 1)


class CachedParts(Cached):
    """The same with queries, keys and values of one projection."""

    def __init__(self, split: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.qkv, self.split, self.out = nn.Linear(WIDTH, 3 * WIDTH), split, mlp(WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self.split(self.qkv(self.norm(x)))
        return x + self.out(F.scaled_dot_product_attention(q, k, v)), {"k": k, "v": v}


@pytest.mark.parametrize(
    "split", [lambda x: x.chunk(3, -1), lambda x: x.split(WIDTH, dim=-1), lambda x: x.view(*x.shape[:-1], 3, -1).unbind(-2)]
)
def test_parts_that_go_to_a_cache_are_taken_from_its_rows(split: Callable[[Tensor], Any]):
    assert {site.compute for site in check_rows(CachedParts(split), tokens)} == {"skip"}


class Modulated(nn.Module):
    """Scales and shifts of two branches in one tensor, in the dtype of the stream, as in a DiT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.modulation, self.f, self.g = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), mlp(), mlp()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift, next_scale, next_shift = self.modulation(c.to(x.dtype))[:, None].chunk(4, -1)
        x = x + self.f(self.norm(x) * scale + shift)
        return x + self.g(self.norm(x) * next_scale + next_shift)


def test_parts_that_another_branch_reads_are_no_obstacle():
    def inputs(batch: int) -> tuple[Tensor, ...]:
        return (*tokens(batch), torch.randn(batch, WIDTH))

    assert reasons(Modulated(), inputs(2)) == ["", ""]
    check_rows(Modulated(), inputs)


class Weighs(Cached):
    """Attention that computes weights, and does not use them."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late, self.norm2, self.mlp = late, nn.LayerNorm(WIDTH), mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        if not self.late:
            (q.clamp(-1, 1) @ k.mT).softmax(-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        if self.late:
            (q.clamp(-1, 1) @ k.mT).softmax(-1)
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("method", ["sample", pytest.param("block", marks=left_out)])
@pytest.mark.parametrize("late", [True, False])
def test_what_is_computed_and_not_used_is_no_obstacle(late: bool, method: str):
    assert (reasons(Weighs(late), tokens(2), stochastic_method=method) == ["", ""]) is (not late or method == "sample")
    check_rows(Weighs(late), tokens)
    gm = fxsd.transform(Weighs(late).double(), 0.5, stochastic_method=method, compute="skip", example_inputs=tokens(2))
    for run in (gm, torch.compile(gm, fullgraph=True, backend="aot_eager")):
        run(*tokens(4)).sum().backward()


class MakesBias(Cached):
    """The first attention makes a bias of the lengths of its keys, which the second reads too; may be written into."""

    def __init__(self, write: bool) -> None:
        super().__init__()
        self.write, self.bias = write, nn.Embedding(TOKENS, TOKENS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        bias = None
        for _ in range(2):
            h = self.norm(x)
            q, k, v = self.q(h), self.k(h), self.v(h)
            if bias is None:
                bias = self.bias(torch.arange(k.shape[1], device=k.device))[None].to(k.dtype)
            if self.write:
                bias[0, 0].mul_((q @ k.mT).mean((0, 1)))
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, bias))
        return x, bias


@pytest.mark.parametrize("method", ["sample", pytest.param("block", marks=left_out)])
@pytest.mark.parametrize("write", [True, False])
def test_what_does_not_go_with_the_rows_may_be_read_outside(write: bool, method: str):
    first, second = reasons(MakesBias(write), tokens(2), stochastic_method=method)
    assert (first == "") is not write
    assert second == "" or write
    check_rows(MakesBias(write), tokens)
    gm = fxsd.transform(MakesBias(write).double(), 0.5, stochastic_method=method, compute="skip", example_inputs=tokens(2))
    for run in (gm, torch.compile(gm, fullgraph=True, backend="aot_eager")):
        run(*tokens(4))[0].sum().backward()


HEADS = 2


class Biased(nn.Module):
    """Attention with heads in dim 0, and what is added to its scores, or masks them, from before: a [T, T] for each sample and head."""

    def __init__(self, mine: bool, mask: str) -> None:
        super().__init__()
        self.mine, self.mask, self.qkv, self.out = mine, mask, nn.Linear(WIDTH, 3 * WIDTH), mlp()

    def to_heads(self, x: Tensor) -> Tensor:
        x = x.view(x.shape[0], TOKENS, HEADS, -1).transpose(1, 2)
        return (x if self.mine else x.transpose(0, 1)).flatten(0, 1)

    def from_heads(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, HEADS)) if self.mine else x.unflatten(0, (HEADS, -1)).transpose(0, 1)
        return x.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        bias = bias if self.mine else bias.unflatten(0, (-1, HEADS)).transpose(0, 1).flatten(0, 1)
        bias = bias * 2 if self.mask == "added" else bias > 0.5
        q, k, v = (self.to_heads(part) for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(1, 2)
        if self.mask == "added":
            scores = scores + bias
        else:
            scores = torch.where(bias, scores, float("-inf")) if self.mask == "in" else scores.masked_fill(bias, float("-inf"))
        return x + self.out(self.from_heads(scores.softmax(-1).nan_to_num() @ v))


@pytest.mark.parametrize("mask", ["added", "out", "in"])
@pytest.mark.parametrize("mine", [True, False])
def test_several_rows_for_each_sample_are_no_obstacle_if_they_are_side_by_side(mine: bool, mask: str):
    def inputs(batch: int) -> tuple[Tensor, ...]:
        return (*tokens(batch), torch.rand(batch * HEADS, TOKENS, TOKENS, dtype=torch.float64))

    (reason,) = reasons(Biased(mine, mask), inputs(2))
    assert (reason == "") is mine
    check_rows(Biased(mine, mask), inputs)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_attention_with_a_mask_for_each_head_skips(dtype: torch.dtype):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, 0.0, batch_first=True, norm_first=True)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.layer(x, src_mask=mask)

    def inputs(batch: int) -> tuple[Tensor, ...]:
        mask = torch.rand(batch * HEADS, TOKENS, TOKENS, dtype=torch.float64)
        return (*tokens(batch), (mask > 0.5) & ~torch.eye(TOKENS, dtype=torch.bool) if dtype is torch.bool else mask)

    assert reasons(Masked(), inputs(3)) == ["", ""]
    check_rows(Masked(), inputs)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("each", [True, False])
def test_a_mask_may_say_what_is_kept_or_what_is_not(keeps: bool, each: bool):
    class Padded(Biased):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            mask = (mask if each else mask[:1]) > 0
            q, k, v = self.qkv(x).chunk(3, -1)
            scores, mask, lost = q @ k.mT, mask[:, None], float("-inf")
            scores = torch.where(mask, scores, lost) if keeps else scores.masked_fill(mask, lost)
            return x + self.out(scores.softmax(-1) @ v)

    def inputs(batch: int) -> tuple[Tensor, ...]:
        return (*tokens(batch), torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 0]])[torch.arange(batch) % 3])

    assert reasons(Padded(True, ""), inputs(2)) == [""]
    check_rows(Padded(True, ""), inputs)


class Masks(Biased):
    """Attention under masks that leave nothing where random ones meet; one row of them for a sample, or for a sample and head."""

    def __init__(self, keep: bool, each: int, mine: bool = True) -> None:
        super().__init__(mine, "")
        self.keep, self.each = keep, each

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        if not self.mine:
            bias = bias.unflatten(0, (-1, HEADS)).transpose(0, 1).flatten(0, 1)
        masks = [bias > number / 100 if self.keep else bias < number / 100 for number in range(4)]
        q, k, v = (self.to_heads(part) if self.each > 1 else part for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT
        for mask in masks:
            scores = torch.where(mask, scores, float("-inf")) if self.keep else scores.masked_fill(mask, float("-inf"))
        found = scores.softmax(-1) @ v
        return x + self.out(self.from_heads(found) if self.each > 1 else found)


@pytest.mark.parametrize("keep", [True, False])
def test_masks_that_leave_nothing_where_they_meet_are_no_obstacle(keep: bool):
    def inputs(batch: int, each: int = 1) -> tuple[Tensor, ...]:
        return (*tokens(batch), torch.rand(batch * each, TOKENS, TOKENS, dtype=torch.float64) + 0.1)

    assert reasons(Masks(keep, 1), inputs(2)) == [""]
    check_rows(Masks(keep, 1), inputs)
    # Which row of such a mask is whose cannot be seen where they are all the same.
    assert reasons(Masks(keep, HEADS, mine=False), inputs(2, HEADS)) != [""]


def test_what_comes_before_the_batch_is_known_is_a_reason():
    class MaskFirst(TwoBranches):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            length = x.shape[1]
            bias = mask[:, :, None].expand(-1, length, WIDTH)
            normed = self.norm(x)
            return x + self.f(normed) * bias + self.g(normed) * length

    def inputs(batch: int) -> tuple[Tensor, ...]:
        return (*tokens(batch), torch.rand(batch, 1, dtype=torch.float64))

    first, second = reasons(MaskFirst(), inputs(2))
    assert "comes before norm, which tells how many rows there are" in first
    assert second == ""
    check_rows(MaskFirst(), inputs)


def test_a_value_that_others_read_may_not_be_written_into_on_some_rows():
    class Writes(UsedElsewhere):
        def forward(self, x: Tensor) -> Any:
            inner = self.f(x)
            first = inner[:, :1]  # a view, which sees the write
            return x + self.g(inner.relu_()), first.sum(-1)

    check_rows(Writes("returned"), tokens)


def test_an_input_that_is_written_into_before_the_branch_reads_it_is_a_reason():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = mlp(), mlp()

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            c = c * 2
            h = self.f(x)
            c.add_(1)
            return x + self.g(h * c[:, None])

    def inputs(batch: int) -> tuple[Tensor, ...]:
        return (*tokens(batch), torch.randn(batch, WIDTH, dtype=torch.float64))

    check_rows(Late(), inputs)


def test_a_branch_that_is_broadcast_is_a_reason():
    class Context(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x.mean(1, keepdim=True))

    (reason,) = reasons(Context(), tokens(2))
    assert "has the shape [4, 1, 4] and its shortcut [4, 3, 4]" in reason
    check_rows(Context(), tokens)


# --- what is skipped ----------------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Sizes counted once at the top, heads folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlp(2), mlp(2)

    def forward(self, x: Tensor) -> Tensor:
        batch, n, width = x.shape
        folded = batch * 2
        for f in (self.f, self.g):
            h = x.view(batch, n, 2, width // 2).transpose(1, 2).reshape(folded, n, width // 2)
            x = x + f(h).view(batch, 2, n, width // 2).transpose(1, 2).reshape(batch, n, width)
        return x


class Conditioned(nn.Module):
    """Adaptive layer norm; the modulation is computed before the block, or inside of its branch's expression."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late, self.norm, self.f, self.ada = late, nn.LayerNorm(WIDTH, elementwise_affine=False), mlp(), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if self.late:
            return x + self.f(self.norm(x) * self.ada(c).unsqueeze(1)[..., :WIDTH])
        shift, scale, gate = self.ada(c).unsqueeze(1).chunk(3, dim=-1)
        return x + gate * self.f(self.norm(x) * (1 + scale) + shift)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None, rotary: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        if rotary is not None:
            q, k = q * rotary, k * rotary
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None, rotary: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = x + block(x, mask, rotary)
        return x


class MaskMadeInside(nn.Module):
    """The first block makes a mask for each sample out of sizes and a dtype, and all blocks read it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.vector = nn.ModuleList(Attention() for _ in range(2)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        mask = torch.ones(TOKENS, TOKENS, dtype=x.dtype).tril().expand(x.shape[0], 1, TOKENS, TOKENS)
        gate = self.vector(c.to(x.dtype)).unsqueeze(1)
        for block in self.blocks:
            x = x + block(x * gate, mask)
        return x


class Padded(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return x + self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop = mlp(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(F.dropout(self.f(x), 0.2, self.training))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.InstanceNorm2d(WIDTH, affine=True), nn.ReLU(), nn.GroupNorm(2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.f(x)).relu_()


def with_vector(batch: int) -> tuple[Tensor, ...]:
    return (*tokens(batch), torch.randn(batch, WIDTH, dtype=torch.float64))


def with_mask(rows: int | None) -> Callable[[int], dict[str, Tensor]]:
    def inputs(batch: int) -> dict[str, Tensor]:
        mask = torch.rand(rows or batch, 1, TOKENS, TOKENS) < 0.7
        return {"x": tokens(batch)[0], "mask": mask | torch.eye(TOKENS, dtype=torch.bool)}

    return inputs


def with_rotary(batch: int) -> dict[str, Tensor]:
    return {"x": tokens(batch)[0], "rotary": torch.rand(TOKENS, WIDTH // 2, dtype=torch.float64)}


def with_padding(batch: int) -> tuple[Tensor, ...]:
    return (*tokens(batch), torch.arange(TOKENS) >= torch.randint(1, TOKENS + 1, (batch, 1)))


LEGAL: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "sizes counted at the top": (Heads, tokens),
    "a vector that modulates": (lambda: Conditioned(False), with_vector),
    "a vector that is computed in between": (lambda: Conditioned(True), with_vector),
    "a mask for each sample": (Attends, with_mask(None)),
    "a mask for all samples": (Attends, with_mask(1)),
    "a rotary table": (Attends, with_rotary),
    "a mask made of sizes": (MaskMadeInside, with_vector),
    "a padding mask": (Padded, with_padding),
    "an encoder layer": (lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.0, batch_first=True), tokens),
    "norms of one sample": (Normed, images),
}


@pytest.mark.parametrize("name", LEGAL)
def test_what_goes_with_the_samples_is_skipped_and_gives_what_the_mask_gives(name: str):
    factory, inputs = LEGAL[name]
    sites = check_rows(factory(), inputs)
    assert [(site.compute, site.reason) for site in sites] == [("skip", "")] * len(sites) != []


def test_dropout_in_a_branch_is_no_reason():
    assert reasons(Dropped(), tokens(2)) == [""]


def test_an_encoder_layer_with_padding_is_skipped():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.0, batch_first=True)

    def inputs(batch: int) -> dict[str, Tensor]:
        x, padding = with_padding(batch)
        return {"src": x, "src_key_padding_mask": padding}

    assert {site.compute for site in check_rows(layer, inputs)} == {"skip"}


def test_noise_that_each_element_draws_for_itself_is_no_reason():
    assert reasons(Planted(lambda x: x * torch.bernoulli(x.sigmoid())), tokens(2)) == ["", "", ""]
    assert reasons(Planted(lambda x: x * torch.rand_like(x) + torch.randn(x.shape)), tokens(2)) == ["", "", ""]


def test_the_batch_is_told_by_the_fork_and_not_by_a_mask_that_comes_first():
    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = mlp()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x + self.f(torch.where(mask, x, 0.0))

    example = (*tokens(1), torch.ones(1, 1, 1) > 0)
    gm = fxsd.transform(Filled().double(), 0.5, drop_distribution="uniform", compute="skip", example_inputs=example)
    assert [site.compute for site in fxsd.sites(gm)] == ["skip"]
    (x,) = tokens(7)
    for rows in (1, 7):
        kept = {int((gm(x, torch.ones(rows, 1, 1) > 0) != x).flatten(1).any(1).sum()) for _ in range(20)}
        assert kept == {3, 4}


def test_a_mask_for_all_samples_may_stand_where_one_for_each_was_an_example():
    model = Attends().double()
    gm = fxsd.transform(model, 0.5, drop_distribution="uniform", compute="skip", example_inputs=with_mask(1)(1))
    assert {site.compute for site in fxsd.sites(gm)} == {"skip"}
    for batch in (1, 2, 7):
        for rows in {1, batch}:
            assert gm(**with_mask(rows)(batch)).shape[0] == batch


def test_attention_over_dim_0_is_not_skipped():
    sites = check_rows(Padded(batch_first=False), tokens)
    assert [site.compute for site in sites] == ["mask"]


# --- whole models ---------------------------------------------------------------------------------------------------------------------


def pixels(size: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, 3, size, size, dtype=torch.float64),)


def text(batch: int) -> dict[str, Tensor]:
    lengths = torch.randint(3, 8, (batch, 1))
    return {"input_ids": torch.randint(0, 50, (batch, 7)), "attention_mask": (torch.arange(7) < lengths).long()}


def latents(batch: int) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, dtype=torch.float64),
        "timestep": torch.randint(0, 9, (batch,)),
        "class_labels": torch.randint(0, 9, (batch,)),
    }


def convnext() -> nn.Module:
    setting = [vision.convnext.CNBlockConfig(8, 16, 2), vision.convnext.CNBlockConfig(16, None, 2)]
    return vision.ConvNeXt(setting, num_classes=5)


def timm_swin() -> nn.Module:
    return timm.models.SwinTransformer(48, 4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=3, num_classes=5)


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return hf.BertModel(hf.BertConfig(vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes))


def gpt2() -> nn.Module:
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
    return hf.GPT2Model(hf.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, **options))


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return hf.LlamaModel(hf.LlamaConfig(vocab_size=50, use_cache=False, **sizes))


def t5() -> nn.Module:
    return hf.T5EncoderModel(hf.T5Config(vocab_size=50, d_model=16, d_kv=8, num_layers=2, num_heads=2, d_ff=32, dropout_rate=0.0))


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(2, 8, 4, num_layers=2, sample_size=8, norm_num_groups=1, num_embeds_ada_norm=10)


WHOLE: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], int, int]] = {  # ..., sites, skipped
    "torchvision swin": (lambda: vision.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [3, 3], num_classes=5), pixels(48), 8, 8),
    "torchvision vit": (lambda: vision.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=5), pixels(32), 4, 4),
    "convnext": (convnext, pixels(32), 4, 4),
    "timm swin": (timm_swin, pixels(48), 8, 8),
    "bert": (bert, text, 4, 4),
    "gpt2": (gpt2, text, 4, 4),
    "llama": (llama, text, 4, 4),
    "t5": (t5, text, 4, 4),
    "dit": (dit, latents, 4, 4),
    "resnet18": (lambda: vision.resnet18(num_classes=5), pixels(32), 8, 0),
}  # fmt: skip


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_that_skips_gives_what_the_mask_gives(name: str):
    factory, inputs, total, skipped = WHOLE[name]
    sites = check_rows(factory(), inputs, batches=(5,))
    assert (len(sites), sum(site.compute == "skip" for site in sites)) == (total, skipped)


def test_a_resnet_skips_where_batch_norm_may_see_the_kept_samples_only():
    model = vision.resnet18(num_classes=5)
    options = {"drop_distribution": "uniform", "compute": "skip", "subset_batch_norm": True}
    gm = fxsd.transform(model, 0.9, example_inputs=(torch.randn(2, 3, 32, 32),), **options)
    assert [site.compute for site in fxsd.sites(gm)] == ["skip"] * 8
    rows: list[int] = []
    for block in (model.layer1[0], model.layer4[1]):
        block.bn1.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    for _ in range(3):
        gm(torch.randn(6, 3, 32, 32))
    assert set(rows) == {2}
    assert all(buffer.isfinite().all() for buffer in gm.buffers())
    fxsd.set_drop_rate(gm, 1.0)
    assert gm(torch.randn(1, 3, 64, 64)).isfinite().all()


# --- the model is left as it was ------------------------------------------------------------------------------------------------------


class Counts(nn.Module):
    """Keeps statistics of its own, in a module and in the open, and a step count; may fail at other batch sizes."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails, self.calls, self.f, self.norm = fails, 0, nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.BatchNorm2d(WIDTH)
        self.register_buffer("mean", torch.full((WIDTH,), 0.5))
        self.register_buffer("var", torch.ones(WIDTH))
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = F.batch_norm(self.norm(self.f(x)), self.mean, self.var, training=True).relu()
        return x + (h @ h.new_ones(4, 4) if not self.fails else h.view(2, WIDTH, 4, 4))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("subset", [False, True])
def test_analysis_leaves_the_model_as_it_was(fails: bool, subset: bool):
    model = Counts(fails)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    versions = [tensor._version for tensor in model.state_dict().values()]
    example, state = torch.randn(2, WIDTH, 4, 4), torch.get_rng_state()
    fxsd.analyze(model, compute="skip", example_inputs=(example,), subset_batch_norm=subset)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.calls == 0
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name
    assert [tensor._version for tensor in after.values()] == versions


# --- random branches ------------------------------------------------------------------------------------------------------------------

STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "activation": lambda x: F.gelu(x),
    "softmax": lambda x: x.softmax(-1),
    "transposed": lambda x: x.transpose(1, 2).softmax(-1).transpose(1, 2),
    "token mean": lambda x: x - x.mean(1, keepdim=True),
    "sizes": lambda x: x.reshape(x.shape[0] * x.shape[1], -1).tanh().view(x.shape[0], -1, x.shape[2]),
    "flat": lambda x: x.flatten(0, 1).sin().unflatten(0, (-1, TOKENS)),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "in place": lambda x: x.clone().add_(0.1).relu_(),
    "joined": lambda x: torch.cat((x[:, 1:], x[:, :1]), 1),
    "padded": lambda x: F.pad(x, (1, 0))[..., :WIDTH],
    "masked": lambda x: torch.where(torch.arange(TOKENS)[:, None] < 2, x, x.new_zeros(())),
    "no noise": lambda x: F.dropout(x, 0.0),
}
MIXERS = {name: trap for name, (trap, _) in TRAPS.items() if name != "mixup"} | {
    "batch norm": lambda x: F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2),
    "batch last": lambda x: x.transpose(0, 2).cumsum(-1).transpose(0, 2),
    "similarity": lambda x: ((x.flatten(1) @ x.flatten(1).T).tanh() @ x.flatten(1)).view_as(x),
}


class Composed(nn.Module):
    def __init__(self, steps: list[Callable[[Tensor], Tensor]], at: int) -> None:
        super().__init__()
        self.steps, self.at, self.f, self.g = steps, at, nn.Linear(WIDTH, WIDTH), mlp()

    def forward(self, x: Tensor) -> Tensor:
        r = x
        for number, step in enumerate(self.steps):
            r = self.f(r) if number == self.at else r
            r = step(r)
        x = x + self.g(r)
        return x + self.g(x)


@given(
    steps=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4),
    mixer=st.none() | st.sampled_from(sorted(MIXERS)),
    data=st.data(),
)
@settings(derandomize=True, deadline=None, max_examples=12, database=None, suppress_health_check=list(HealthCheck))
def test_a_random_branch_is_skipped_unless_something_in_it_mixes_samples(steps: list[str], mixer: str | None, data: st.DataObject):
    chain = [STEPS[step] for step in steps]
    if mixer:
        chain.insert(data.draw(st.integers(0, len(chain))), MIXERS[mixer])
    torch.manual_seed(0)
    sites = check_rows(Composed(chain, data.draw(st.integers(0, len(chain) - 1))), tokens, batches=(3,))
    assert [site.compute for site in sites] == ["mask" if mixer else "skip", "skip"]


SCALE = torch.linspace(0.5, 2.0, WIDTH, dtype=torch.float64)


def test_a_tensor_that_is_no_attribute_enters_as_it_is():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x * SCALE)

    assert {site.compute for site in check_rows(Scaled(), tokens)} == {"skip"}


def test_a_model_without_data_has_masks():
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)), torch.empty(2, 3, 4)
    found = fxsd.analyze(model, 0.5, compute="skip", example_inputs=(x,)).sites
    assert len(found) == 2
    assert {"meta device" in site.reason for site in found} == {True}


def test_the_work_of_a_branch_is_its_flops_for_each_value_that_it_adds():
    class Wide(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 64))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    for width, reason in ((16, r"64 FLOPs a value"), (32, "")):  # 4 * width FLOPs, and 32 / 0.25 at least
        (site,) = fxsd.analyze(Wide(width), 0.25, compute="auto", example_inputs=(torch.zeros(2, 64),)).sites
        assert reason in site.reason
        assert bool(site.reason) is bool(reason)


@pytest.mark.parametrize(("device", "drop_rate", "pays"), [("cpu", 0.02, True), ("cuda", 0.02, False), ("cuda", 0.05, True)])
def test_taking_few_rows_out_pays_on_a_cpu_only(device: str, drop_rate: float, pays: bool):
    region = Region((), (), {}, work=1e4, least_rows=0, merges=True, device=device)
    assert bool(no_gain(region, drop_rate)) is not pays
    assert not no_gain(region, drop_rate, all_or_none=True)  # no rows are taken
