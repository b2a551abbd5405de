"""Which branches may run on some rows: every trap is seen and falls back to the mask, and what is skipped gives what the mask gives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from draws import check_rows
from torch import Tensor, nn
from torch.nn import functional as F

import fxsd

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


def test_a_literal_batch_in_a_reshape_is_a_reason():
    found = reasons(Planted(lambda x: x.reshape(2, -1).reshape(2, TOKENS, WIDTH)), tokens(2))
    assert all("does not run with" in reason for reason in found)


def test_a_batch_elsewhere_than_in_dim_0_is_a_reason():
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = mlp()

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1)
            return (x + self.f(x)).transpose(0, 1)

    assert reasons(Sequence(), tokens(2)) == ["the batch is not in dim 0 of its branch"]
    check_rows(Sequence(), tokens)


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
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.f, self.g, self.h = where, mlp(), mlp(), mlp()

    def forward(self, x: Tensor) -> Any:
        inner = self.f(x).tanh()
        r = self.g(inner)
        y = x + r
        if self.where == "returned":
            return y, inner
        if self.where == "in the next block":
            return y + self.h(y * inner)
        return y + self.h(y), r.sum()


@pytest.mark.parametrize("where", ["returned", "in the next block", "its result"])
def test_a_value_of_the_branch_that_is_used_elsewhere_is_a_reason(where: str):
    first, second = (*reasons(UsedElsewhere(where), tokens(2)), "")[:2]
    assert "is also used outside of it" in first
    assert second == ""
    check_rows(UsedElsewhere(where), tokens)


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
