"""Small hand-written models with what fxsd should find in them.

Every model that holds sites has, beside its `forward`, a method `dropped(drop, *inputs)`: the same forward as a person would
write it with stochastic depth, where `drop(branch)` stands on the branch of every site and is called in the order of the adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Drop = Callable[[Tensor], Tensor]
WIDTH = 4


@dataclass(frozen=True)
class Case:
    """A model and what should be found in it.

    Attributes:
        factory: makes the model.
        inputs: makes inputs for a batch of the given size.
        sites: (module, kind) of every site, in graph order.
        rejected: for every rejected add, in graph order, a part of the reason.
        known_failure: why fxsd finds something else today, or ''.
    """

    factory: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    sites: tuple[tuple[str, str], ...] = ()
    rejected: tuple[str, ...] = ()
    known_failure: str = ""

    @property
    def name(self) -> str:
        return self.factory.__name__


def rows(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, WIDTH),)


def tokens(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 5, WIDTH),)


def images(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, WIDTH, 8, 8),)


def mlp(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def convs(stride: int = 1, width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(WIDTH, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)
    )


class WithBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()


class WithTwoBranches(WithBranch):
    def __init__(self) -> None:
        super().__init__()
        self.g = mlp()


# --- one add, written in every way --------------------------------------------------------------------------------------------


class BranchRight(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return x + drop(self.f(x))


class BranchLeft(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + x

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return drop(self.f(x)) + x


class AugmentedBranch(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        y += x
        return y

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return drop(self.f(x)) + x


class AugmentedShortcut(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        x += self.f(x.clone())
        return x.relu()

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        x = x * 2
        return (x + drop(self.f(x))).relu()


class AugmentedInLoop(WithTwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        for f in (self.f, self.g):
            y = f(x)
            y += x
            x = y
        return x

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        x = drop(self.f(x)) + x
        return drop(self.g(x)) + x


class AlphaOnBranch(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.f(x), alpha=2)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return x + 2 * drop(self.f(x))


class AlphaOnShortcut(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.f(x), x, alpha=2)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return drop(self.f(x)) + 2 * x


class AddByKeyword(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.add(input=x, other=self.f(x))
        return y.add(other=self.f(y), alpha=0.5)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        y = x + drop(self.f(x))
        return y + 0.5 * drop(self.f(y))


class PythonSum(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return sum([x, self.f(x)])

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return x + drop(self.f(x))


class AddIntoBranch(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x).add_(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return drop(self.f(x)) + x


class AddIntoShortcut(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh().mul(2)
        return x.add_(self.f(x.clone()))

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        x = x.tanh().mul(2)
        return x + drop(self.f(x))


class AddIntoShortcutReadLater(WithBranch):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.tanh().mul(2)
        y = x.add_(self.f(x.clone()))
        return y, x.sin()

    def dropped(self, drop: Drop, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.tanh().mul(2)
        y = x + drop(self.f(x))
        return y, y.sin()


class AddIntoBranchReadLater(WithBranch):
    """The branch's tensor is the sum by the time it is read again."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.f(x)
        y = r.add_(x)
        return y, r.sin()

    def dropped(self, drop: Drop, x: Tensor) -> tuple[Tensor, Tensor]:
        y = drop(self.f(x)) + x
        return y, y.sin()


class AddIntoBranchReadThroughItsBase(WithBranch):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.f(x)
        y = r.view(-1, 2, 2).add_(x.view(-1, 2, 2))
        return y, r.sin()


class AddIntoBranchReadThroughAView(WithBranch):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.f(x)
        view = r.view(-1, 2, 2)
        y = r.add_(x)
        return y, view.sin()


class AugmentedBranchReadLater(WithBranch):
    """`+=` writes in place, so `r` is the sum as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.f(x)
        y = r
        y += x
        return y, r.sin()

    def dropped(self, drop: Drop, x: Tensor) -> tuple[Tensor, Tensor]:
        y = drop(self.f(x)) + x
        return y, y.sin()


# --- shortcuts ------------------------------------------------------------------------------------------------------------------


class Projected(nn.Module):
    def __init__(self, shortcut: nn.Module, branch: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut = branch or convs(2, 6), shortcut

    def forward(self, x: Tensor) -> Tensor:
        return (self.branch(x) + self.shortcut(x)).relu()

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        branch = self.branch(x)
        shortcut = self.shortcut(x)
        return (drop(branch) + shortcut).relu()


def ConvBnShortcut() -> Projected:
    return Projected(nn.Sequential(nn.Conv2d(WIDTH, 6, 1, 2), nn.BatchNorm2d(6)))


def PooledConvShortcut() -> Projected:
    return Projected(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(WIDTH, 6, 1), nn.BatchNorm2d(6)))


def ActivatedShortcut() -> Projected:
    return Projected(nn.Sequential(nn.Conv2d(WIDTH, 6, 1, 2), nn.BatchNorm2d(6), nn.ReLU()))


def PooledShortcut() -> Projected:
    return Projected(nn.MaxPool2d(2), convs(2))


class PaddedShortcut(nn.Module):
    """Option A of He et al.: every second pixel, and zeros for the new channels."""

    def __init__(self) -> None:
        super().__init__()
        self.f = convs(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)) + self.f(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)) + drop(self.f(x))


class PreActivation(nn.Module):
    """The projection starts from the activated input (He et al., Identity Mappings, 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f, self.down = nn.BatchNorm2d(WIDTH), convs(2, 6), nn.Conv2d(WIDTH, 6, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).relu()
        return self.down(x) + self.f(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        x = self.norm(x).relu()
        return self.down(x) + drop(self.f(x))


class ScaledAndSlicedShortcut(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x[:, 1:] + self.f(x)[:, 1:]

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return 0.5 * x[:, 1:] + drop(self.f(x)[:, 1:])


# --- branches ---------------------------------------------------------------------------------------------------------------


class Broadcast(nn.Module):
    """A global context, [batch, channels, 1, 1], is added to every position."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(WIDTH, 2, 1), nn.ReLU(), nn.Conv2d(2, WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return x + drop(self.f(x))


class LayerScale(WithTwoBranches):
    def __init__(self) -> None:
        super().__init__()
        self.gamma1, self.gamma2 = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.f(x)
        return self.g(x).mul(self.gamma2) + x

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        x = x + drop(self.gamma1 * self.f(x))
        return drop(self.g(x) * self.gamma2) + x


class TokenMixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(WIDTH), mlp(5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.norm(x).transpose(1, 2)).transpose(1, 2)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return x + drop(self.f(self.norm(x).transpose(1, 2)).transpose(1, 2))


class ScaledInPlace(WithBranch):
    """NFNet: the branch is scaled by a statement whose value nobody takes."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        r = self.f(x)
        r.mul_(self.gain)
        return r * 0.2 + x

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return drop(self.f(x) * self.gain * 0.2) + x


class BranchUsedElsewhere(WithTwoBranches):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.f(x)
        y = x + r
        return y, self.g(r)

    def dropped(self, drop: Drop, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.f(x)
        return x + drop(r), self.g(r)


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def f(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(self.fc1(x).relu(), 0.3, training=self.training))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return x + drop(self.f(x))


class Sized(nn.Module):
    """Decides on a size, which no symbolic trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] % 2:
            return self.fc(x)
        return self.fc(-x)


class OpaqueBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.act = Sized(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.f(x))

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return x + drop(self.act(self.f(x)))


# --- what is no site ----------------------------------------------------------------------------------------------------------


class PositionEmbedding(WithBranch):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.position = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.register_buffer("fixed", torch.randn(5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        x = x + self.fixed[: x.shape[1]].relu()
        return x + self.f(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position + self.fixed.relu()
        return x + drop(self.f(x))


class BiasAdd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight + self.bias).relu() + 1


class Gate(WithBranch):
    """Squeeze and excitation: products, and a sum with a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (F.relu6(self.f(x) + 3) / 6)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x).softmax(-1)


class Doubled(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


class BareLinear(nn.Module):
    """A conditional position encoding."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Reparametrised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 1))
        self.b = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + self.b(x)).relu()


class NoWork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(x).tanh()


class TwoStreams(WithBranch):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.f(x) + y


def two_rows(batch: int) -> tuple[Tensor, ...]:
    return (*rows(batch), *rows(batch))


class MaskedAttention(nn.Module):
    """The mask is another input, so that the sum of scores and mask has no shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = q @ k.transpose(-2, -1) + mask
        return self.out(scores.softmax(-1) @ v)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.attend(x, mask)

    def dropped(self, drop: Drop, x: Tensor, mask: Tensor) -> Tensor:
        return x + drop(self.attend(x, mask))


def masked_tokens(batch: int) -> tuple[Tensor, ...]:
    mask = torch.zeros(batch, 5, 5)
    mask[:, :, 3:] = -torch.inf
    return (*tokens(batch), mask)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.memory = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        keys = self.memory(memory)
        return (self.query(x) @ keys.transpose(-2, -1) + mask).softmax(-1) @ keys


class MaskedCrossAttention(nn.Module):
    """The second sum of scores and mask looks like a skip over the first layer, and is no part of the second one's branch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlps = nn.ModuleList(CrossAttention() for _ in range(2)), nn.ModuleList(mlp() for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        return self.dropped(lambda branch: branch, x, memory, mask)

    def dropped(self, drop: Drop, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        for attention, feed_forward in zip(self.attention, self.mlps, strict=True):
            x = x + drop(attention(x, memory, mask))
            x = x + drop(feed_forward(x))
        return x


class FourierMixing(nn.Module):
    """Mixes tokens without a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + torch.fft.fftn(x, dim=(1, 2)).real)
        return x + self.mlp(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        x = self.norm(x + drop(torch.fft.fftn(x, dim=(1, 2)).real))
        return x + drop(self.mlp(x))


class PaddingMask(MaskedAttention):
    """The mask is computed from the token numbers, as the tokens are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids == 0).unsqueeze(1) * -1e4
        x = self.embedding(ids)
        return x + self.attend(x, mask)

    def dropped(self, drop: Drop, ids: Tensor) -> Tensor:
        mask = (ids == 0).unsqueeze(1) * -1e4
        x = self.embedding(ids)
        return x + drop(self.attend(x, mask))


class TokensAsGiven(MaskedAttention):
    """The token numbers come as any type of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids.view(ids.shape).long())
        return x + self.attend(x, x.new_zeros(()))

    def dropped(self, drop: Drop, ids: Tensor) -> Tensor:
        x = self.embedding(ids.long())
        return x + drop(self.attend(x, x.new_zeros(())))


def token_numbers(batch: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 7, (batch, 5)),)


class AttentionPooling(nn.Module):
    """Scores of tokens, and a mask that is computed from the token numbers: no residual add in sight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.score = nn.Embedding(7, WIDTH), nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        scores = self.score(x) + (ids == 0).unsqueeze(-1) * -1e4
        return (x * scores.softmax(1)).sum(1)


class PlainUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.leave = convs(), convs(), convs()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        down = self.inner(F.max_pool2d(x, 2))
        return self.leave(x + F.interpolate(down, scale_factor=2))


class LateralUNet(PlainUNet):
    """The merge of LinkNet and FPN: a projection on one side, a round trip in resolution on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        down = self.inner(F.max_pool2d(x, 2))
        return self.leave(self.lateral(x) + F.interpolate(down, scale_factor=2))


class LateralUNetOverPython(LateralUNet):
    """The lower level is a call whose inside is not in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Sized(), nn.ReLU(), Sized())


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = convs()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return x + drop(self.f(x))


class Level(nn.Module):
    """A level of a residual U-Net, with the levels under it inside: a block on the way down, one on the way up, and a merge."""

    def __init__(self, under: nn.Module, residual: bool = True, transposed: bool = True) -> None:
        super().__init__()
        self.enter, self.leave = (ConvBlock() if residual else convs() for _ in range(2))
        self.down, self.under = nn.Conv2d(WIDTH, WIDTH, 2, 2), under
        self.up = nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2) if transposed else nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(x + self.up(self.under(self.down(x))))

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        x = self.enter.dropped(drop, x)
        return self.leave.dropped(drop, x + self.up(self.under.dropped(drop, self.down(x))))


def ResidualUNet() -> Level:
    return Level(Level(ConvBlock()))


def UNet() -> Level:
    return Level(Level(convs(), residual=False), residual=False)


class NumberedUNet(nn.Module):
    """Every level is a numbered module that runs the levels under it."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList([Level(Level(ConvBlock(), transposed=False), transposed=False)])

    def forward(self, x: Tensor) -> Tensor:
        return self.levels[0](x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return self.levels[0].dropped(drop, x)


class Decoder(nn.Module):
    """A numbered block of a U-Net's way up, which gets the other side of its merge from outside."""

    def __init__(self, residual: bool, lateral: bool) -> None:
        super().__init__()
        self.up, self.block = nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2), ConvBlock() if residual else convs()
        self.lateral = nn.Conv2d(WIDTH, WIDTH, 1) if lateral else nn.Identity()

    def forward(self, x: Tensor, across: Tensor) -> Tensor:
        return self.block(self.up(x) + self.lateral(across))

    def dropped(self, drop: Drop, x: Tensor, across: Tensor) -> Tensor:
        return self.block.dropped(drop, self.up(x) + self.lateral(across))


class UpAndDown(nn.Module):
    def __init__(self, residual: bool, lateral: bool = False) -> None:
        super().__init__()
        self.downs = nn.ModuleList([ConvBlock() if residual else convs() for _ in range(3)])
        self.ups = nn.ModuleList([Decoder(residual, lateral) for _ in range(2)])
        self.middle = ConvBlock() if residual else convs()

    def forward(self, x: Tensor) -> Tensor:
        across = []
        for down in self.downs:
            x = down(x)
            across.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        x = F.interpolate(x, scale_factor=2.0) + across.pop()
        for up in self.ups:
            x = up(x, across.pop())
        return x

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        across = []
        for down in self.downs:
            x = down.dropped(drop, x)
            across.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle.dropped(drop, x)
        x = F.interpolate(x, scale_factor=2.0) + across.pop()
        for up in self.ups:
            x = up.dropped(drop, x, across.pop())
        return x


def LinkNet() -> UpAndDown:
    return UpAndDown(residual=False)


def LinkNetWithLaterals() -> UpAndDown:
    return UpAndDown(residual=False, lateral=True)


def LinkNetOfBlocks() -> UpAndDown:
    return UpAndDown(residual=True)


def LinkNetOfBlocksWithLaterals() -> UpAndDown:
    return UpAndDown(residual=True, lateral=True)


class PyramidAttention(nn.Module):
    """PAN: a gated pyramid and a pooled context, both back at the size of their input, are added."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(WIDTH, WIDTH, 1), nn.ReLU(), nn.Upsample((8, 8)))
        self.gate, self.middle = nn.Sequential(nn.MaxPool2d(2), convs(), nn.Upsample(scale_factor=2)), convs()

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return self.gate(x) * self.middle(x) + self.context(x)


class GatedMerge(nn.Module):
    """PAN: a higher level gates the lower one and is added to it; it gets both from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = convs()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.Sigmoid())

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return F.interpolate(high, scale_factor=2) + self.lower(low) * self.gate(high)


class GatedPyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.attention, self.merge = convs(2), convs(), GatedMerge()

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(x, self.down(x))


class GrowingBlock(nn.Module):
    """A block of a generator: both sides go up."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.up, self.shortcut = convs(), nn.Upsample(scale_factor=2), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.up(x.relu())) + self.shortcut(self.up(x))

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return drop(self.f(self.up(x.relu()))) + self.shortcut(self.up(x))


class ConditionedBlock(nn.Module):
    """A block of a diffusion model: the branch takes a second input besides x, and the shortcut is a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.time, self.shortcut = convs(1, 6), nn.Conv2d(6, 6, 3, 1, 1), nn.Linear(8, 6), nn.Conv2d(WIDTH, 6, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.f(x) * self.time(t)[..., None, None]
        return self.g(y.relu()) + self.shortcut(x)

    def dropped(self, drop: Drop, x: Tensor, t: Tensor) -> Tensor:
        y = self.f(x) * self.time(t)[..., None, None]
        return drop(self.g(y.relu())) + self.shortcut(x)


class ConditionedUNet(nn.Module):
    """One level of a U-Net, whose merge takes a projection of what the level is given."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.time, self.lateral = ConditionedBlock(), nn.Linear(5, 8), nn.Conv2d(6, 6, 1)
        self.down, self.up = nn.Conv2d(6, 6, 2, 2), nn.ConvTranspose2d(6, 6, 2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = self.time(t).relu()
        x = self.block(x, t)
        y = self.down(x) * t[:, :6, None, None]
        return self.up(y.relu()) + self.lateral(x)

    def dropped(self, drop: Drop, x: Tensor, t: Tensor) -> Tensor:
        t = self.time(t).relu()
        x = self.block.dropped(drop, x, t)
        y = self.down(x) * t[:, :6, None, None]
        return self.up(y.relu()) + self.lateral(x)


def timed_images(batch: int) -> tuple[Tensor, ...]:
    return (*images(batch), torch.randn(batch, 5))


class ConvolvedPosition(nn.Module):
    """wav2vec 2.0: a position encoding that is a convolution and an activation, ahead of the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Sequential(nn.Conv1d(5, 5, 3, 1, 1, groups=5), nn.GELU())
        self.layers = nn.ModuleList([BranchRight(), BranchLeft()])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(x)
        for layer in self.layers:
            x = layer(x)
        return x

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        x = x + self.position(x)
        for layer in self.layers:
            x = layer.dropped(drop, x)
        return x


class SmallBranchBetweenBlocks(ConvolvedPosition):
    """The same add, but not ahead of all blocks."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        return self.layers[1](x + self.position(x))

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        x = self.layers[0].dropped(drop, x)
        return self.layers[1].dropped(drop, x + drop(self.position(x)))


class Subtraction(WithBranch):
    """DnCNN predicts the noise; `shortcut - branch` is no residual add."""

    def forward(self, x: Tensor) -> Tensor:
        return x - self.f(x)


# --- several adds -----------------------------------------------------------------------------------------------------------


class ParallelSum(WithTwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) + self.g(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        f = self.f(x)
        x1 = x + drop(f)
        return x1 + drop(self.g(x))


class ParallelSumShortcutLast(WithTwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + self.g(x) + x

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        f, g = self.f(x), self.g(x)
        return drop(f) + drop(g) + x


class ThreeTermsShortcutLast(WithTwoBranches):
    def __init__(self) -> None:
        super().__init__()
        self.h = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + self.g(x) + self.h(x) + x

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        f, g, h = self.f(x), self.g(x), self.h(x)
        return drop(f) + drop(g) + drop(h) + x


class ParallelSumShortcutBetween(WithTwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + x + self.g(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        y = drop(self.f(x)) + x
        return y + drop(self.g(x))


class ParallelSumShortcutLastInPlace(WithTwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        y += self.g(x)
        y += x
        return y

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        f, g = self.f(x), self.g(x)
        return drop(f) + drop(g) + x


class ParallelSumWithSmallBranch(WithTwoBranches):
    """One branch is so light that it could be the projection of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + self.g(x) + x

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        f, g = self.f(x), self.g(x)
        return drop(f) + drop(g) + x


class SumInParentheses(WithTwoBranches):
    """The author makes one branch of two."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.f(x) + self.g(x))

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return x + drop(self.f(x) + self.g(x))


class SumOfAnotherModule(nn.Module):
    """The sum of branches is computed by another module than the one that adds the shortcut: one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Both()

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) + x

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return drop(self.both(x)) + x


class Both(WithTwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + self.g(x)


class LinearTerm(WithBranch):
    """A sum of which one term is linear stays one branch: that term is the other's shortcut or its bias, and no branch."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = convs(), nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.BatchNorm2d(WIDTH))
        self.h = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.g(x) + self.h(x) + x

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return drop(self.g(x) + self.h(x)) + x


class ParallelProjections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.down = convs(2, 6), convs(2, 6), nn.Conv2d(WIDTH, 6, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x) + self.f(x) + self.g(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        x1 = self.down(x) + drop(self.f(x))
        return x1 + drop(self.g(x))


class Outer(nn.Module):
    """A residual block whose branch holds another one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(WIDTH, WIDTH), BranchRight(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(self.inner(self.enter(x)))

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return x + drop(self.leave(self.inner(self.enter(x))))


class OuterInOneForward(WithTwoBranches):
    """Both adds are executed by one call: the authors see them as equals."""

    def forward(self, x: Tensor) -> Tensor:
        inner = x.tanh()
        inner = inner + self.f(inner)
        return x + self.g(inner)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        inner = x.tanh()
        inner = inner + drop(self.f(inner))
        return x + drop(self.g(inner))


class ParallelSumInBranch(WithTwoBranches):
    """The inner sum has two branches, and one call executes all adds."""

    def __init__(self) -> None:
        super().__init__()
        self.h = mlp()

    def forward(self, x: Tensor) -> Tensor:
        inner = x.tanh()
        inner = inner + self.f(inner) + self.g(inner)
        return x + self.h(inner)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        inner = x.tanh()
        f = drop(self.f(inner))
        inner = inner + f + drop(self.g(inner))
        return x + drop(self.h(inner))


class LongSkip(nn.Module):
    """EDSR: blocks, and a skip over all of them."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)
        self.body = nn.Sequential(*[BranchRight() for _ in range(blocks)], nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return x + self.body(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        x = y = self.head(x)
        *blocks, tail = self.body
        for block in blocks:
            y = block.dropped(drop, y)
        return x + tail(y)


def LongSkipOverOneBlock() -> LongSkip:
    return LongSkip(1)


class LocalAttention(nn.Module):
    """Attention that adds its values, convolved or as they are, to what it gives."""

    def __init__(self, project: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.local = nn.Linear(WIDTH, WIDTH) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        found = torch.softmax(q @ k.transpose(1, 2), -1) @ v
        return self.out(found + self.local(v))


class ValuesBesideAttention(nn.Module):
    """The model adds what its layers give; in one of them is a sum of two parts of a value."""

    def __init__(self, project: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([LocalAttention(project), mlp()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + x
        return x

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = drop(layer(x)) + x
        return x


def ValuesAddedToAttention() -> ValuesBesideAttention:
    return ValuesBesideAttention(project=False)


class NumberedOuter(nn.Module):
    """The outer add belongs to a numbered block, so that it is the block, whatever its branch is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(LongSkip(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        (block,) = self.blocks
        x = block.head(x)
        return x + drop(block.body(x))


class AroundOneBlock(nn.Module):
    """The branch is one numbered block and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(BranchRight())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return x + drop(self.body(x))


class DenseLongSkip(nn.Module):
    """RDN: blocks in series, all of whose values are fused, and a skip over that."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.fuse = nn.Sequential(BranchRight(), BranchLeft(), BranchRight()), mlp(4 * WIDTH)
        self.last = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        values = [x.tanh()]
        for block in self.blocks:
            values.append(block(values[-1]))
        return x + self.last(self.fuse(torch.cat(values, -1)))

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        values = [x.tanh()]
        for block in self.blocks:
            values.append(block.dropped(drop, values[-1]))
        return x + self.last(self.fuse(torch.cat(values, -1)))


def NumberedDenseLongSkip() -> Stack:
    return Stack(DenseLongSkip())


class NestedLongSkips(nn.Module):
    """RCAN: groups of blocks, each with its skip, and a skip over all groups."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.Sequential(LongSkip(2), LongSkip(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.groups(x) + x

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        y = x
        for group in self.groups:
            y = group.dropped(drop, y)
        return y + x


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block.dropped(drop, x)
        return x


def ThreeBlocks() -> Stack:
    return Stack(BranchRight(), BranchLeft(), BranchRight())


class CalledTwice(nn.Module):
    """One module, so one op, which draws in each of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.block = BranchRight()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return self.block.dropped(drop, self.block.dropped(drop, x))


# --- transformers ---------------------------------------------------------------------------------------------------------------


class PreNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True), mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        x = x + y
        return x + self.mlp(self.norm2(x))

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        x = x + drop(y)
        return x + drop(self.mlp(self.norm2(x)))


class PostNorm(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, x, x, need_weights=False)[0])
        return self.norm2(x + self.mlp(x))

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        x = self.norm1(x + drop(self.attention(x, x, x, need_weights=False)[0]))
        return self.norm2(x + drop(self.mlp(x)))


class Sdpa(nn.Module):
    """Attention whose Python decides on the mode; holds no add."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=0.2 if self.training else 0.0))


class SdpaBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Sdpa()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return x + drop(self.attention(x))


class SdpaInBlock(Sdpa):
    """The module that decides on the mode executes the add, too: two programs."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return x + drop(super().forward(x))


class ClassToken(WithTwoBranches):
    """CaiT: a learned token reads from the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.patches = nn.Parameter(torch.randn(1, 1, WIDTH)), BranchRight()
        self.attention = nn.MultiheadAttention(WIDTH, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        token = self.token.expand(x.shape[0], -1, -1)
        both = torch.cat([token, x], dim=1)
        token = token + self.attention(token, both, both, need_weights=False)[0]
        token = token + self.f(token)
        return torch.cat([token, x], dim=1)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        x = self.patches.dropped(drop, x)
        token = self.token.expand(x.shape[0], -1, -1)
        both = torch.cat([token, x], dim=1)
        token = token + drop(self.attention(token, both, both, need_weights=False)[0])
        token = token + drop(self.f(token))
        return torch.cat([token, x], dim=1)


class Modulated(WithBranch):
    """Adaptive norms: a condition gives a shift, a scale and a gate to each block."""

    def __init__(self, chunked: bool = True) -> None:
        super().__init__()
        self.norm, self.condition, self.chunked = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), chunked
        self.table = nn.Parameter(torch.randn(3, WIDTH))

    def parts(self, condition: Tensor) -> tuple[Tensor, ...]:
        parts = self.table + condition.reshape(-1, 3, WIDTH)
        if self.chunked:
            shift, scale, gate = parts.chunk(3, dim=1)
            return shift.squeeze(1), scale.squeeze(1), gate.squeeze(1)
        return parts[:, 0], parts[:, 1], parts[:, 2]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = self.condition(t)
        for _ in range(2):
            shift, scale, gate = self.parts(t)
            x = x + gate * self.f(self.norm(x) * (1 + scale) + shift)
        return x

    def dropped(self, drop: Drop, x: Tensor, t: Tensor) -> Tensor:
        t = self.condition(t)
        for _ in range(2):
            shift, scale, gate = self.parts(t)
            x = x + drop(gate * self.f(self.norm(x) * (1 + scale) + shift))
        return x


def ModulatedBySlices() -> Modulated:
    return Modulated(chunked=False)


class FirstToken(WithBranch):
    """The shortcut is a part of what the branch reads as a whole."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0] + self.f(x.mean(1))

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return x[:, 0] + drop(self.f(x.mean(1)))


class PartOfItself(WithTwoBranches):
    """A part gets a branch that reads all parts, then one that reads nothing but the same part by another name."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.unbind(1)[0], x[:, 1]
        first = first + self.f(torch.stack([first, second], 1)).sum(1)
        both = torch.stack([first, second], 1).unbind(1)
        return both[0] + self.g(both[0].tanh())

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        first, second = x[:, 0], x[:, 1]
        first = first + drop(self.f(torch.stack([first, second], 1)).sum(1))
        return first + drop(self.g(first.tanh()))


class TwoStreamBlock(nn.Module):
    """Evoformer: each stream has branches of its own and one that reads from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.to_m, self.m, self.to_z, self.z = mlp(), mlp(), mlp(), mlp()

    def forward(self, m: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        m = m + self.to_m(m * z)
        m = m + self.m(m)
        z = z + self.to_z(m)
        return m, z + self.z(z)

    def dropped(self, drop: Drop, m: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        m = m + drop(self.to_m(m * z))
        m = m + drop(self.m(m))
        z = z + drop(self.to_z(m))
        return m, z + drop(self.z(z))


class TwoStreamBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TwoStreamBlock() for _ in range(3)])

    def forward(self, m: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            m, z = block(m, z)
        return m, z

    def dropped(self, drop: Drop, m: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            m, z = block.dropped(drop, m, z)
        return m, z


class LongSkipWithATap(nn.Module):
    """The blocks under a long skip are no other stream, though their last value is returned as well."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h = mlp(), mlp(), mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + self.f(x)
        y = y + self.g(y)
        return x + self.h(y), y

    def dropped(self, drop: Drop, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + drop(self.f(x))
        y = y + drop(self.g(y))
        return x + self.h(y), y


# --- values of other kinds -------------------------------------------------------------------------------------------------------


class Unused(WithTwoBranches):
    """Runs everything and returns a part, as an encoder does that is cut off at some level."""

    def forward(self, x: Tensor) -> Tensor:
        levels = [x]
        for f in (self.f, self.g):
            y = f(levels[-1])
            y += levels[-1]
            levels.append(y.relu())
        return levels[1]

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        return (drop(self.f(x)) + x).relu()


class ReadByAnotherName(WithBranch):
    """Nobody takes the value of the add, but its tensor is read."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        y = x.mul(2)
        view = y.view(-1, 2, 2)
        view.add_(self.f(x * 2).view(-1, 2, 2))
        return y

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        x = x.tanh()
        return x.mul(2) + drop(self.f(x * 2))


class PaddedBatch(WithBranch):
    """A new tensor into a part of which the input is copied, as a detector makes a batch of images."""

    def forward(self, x: Tensor) -> Tensor:
        padded = x.new_zeros(x.shape[0], WIDTH)
        part = padded[:, 1:]
        part.copy_(x[:, 1:])
        return padded + self.f(padded)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        padded = F.pad(x[:, 1:], (1, 0))
        return padded + drop(self.f(padded))


class TokenBesideAnInternal(WithTwoBranches):
    """The branch of a learned token reads a value from inside of a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.inner = nn.Parameter(torch.randn(1, WIDTH)), BranchRight()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inner(x * self.token)
        return x + self.f(y), self.token + self.g(y)

    def dropped(self, drop: Drop, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inner(x * self.token)
        return x + drop(self.f(y)), self.token + drop(self.g(y))


# --- calls and modes ------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
        y = self.f(x) * scale
        return y if mask is None else y * mask


class KeywordCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = Scaled()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.f(x=x, scale=2.0)
        return x + self.f(x, mask=mask)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor:
        x = x + drop(self.f(x=x, scale=2.0))
        return x + drop(self.f(x))


class AuxiliaryHead(nn.Module):
    """Another type of output in training."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.f, self.auxiliary = BranchRight(), mlp(), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.block(x)
        auxiliary = self.auxiliary(x) if self.training else None
        x = x + self.f(x)
        return x if auxiliary is None else (x, auxiliary)

    def dropped(self, drop: Drop, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.block.dropped(drop, x)
        auxiliary = self.auxiliary(x)
        x = x + drop(self.f(x))
        return (x, auxiliary) if self.training else x


def outputs(model: Callable[..., object], inputs: tuple[Tensor, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """The tensors that a model gives under a seed, on copies of the inputs."""
    torch.manual_seed(seed)
    result = model(*[tensor.clone() for tensor in inputs])
    found = result if isinstance(result, tuple) else (result,)
    assert found
    assert all(isinstance(tensor, Tensor) for tensor in found)
    return found


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Bit for bit, dtype and shape included."""
    assert len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), f"largest difference {(a - b).abs().max()}"


def gradients(model: nn.Module, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of all parameters that `result` depends on, from a loss that weighs every output differently."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    loss = torch.stack([(t * torch.rand(t.shape, generator=generator, dtype=t.dtype)).sum() for t in result]).sum()
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    used = tuple(g for g in found if g is not None)
    assert used
    return used


class Hand(nn.Module):
    """The hand-written rewrite of a model, drawing as the op of a site is documented to."""

    def __init__(self, model: nn.Module, drop_rate: float, method: str = "sample", scaling: str = "inference") -> None:
        super().__init__()
        self.model, self.rate, self.method, self.scaling = model, drop_rate, method, scaling

    def drop(self, branch: Tensor) -> Tensor:
        keep_prob = 1 - self.rate
        if not self.training:
            return keep_prob * branch if self.scaling == "inference" else branch
        draws = branch.shape[0] if self.method == "sample" else 1
        mask = (torch.rand(draws, *[1] * (branch.dim() - 1)) >= self.rate).to(branch.dtype)
        return mask * branch if self.scaling == "inference" else mask / keep_prob * branch

    def forward(self, *inputs: Tensor) -> object:
        return self.model.dropped(self.drop, *inputs)


IDENTITY, PROJECTION = ("", "identity"), ("", "projection")
CONSTANT, NO_SHORTCUT, LONG_SKIP = "is a parameter or a constant", "neither side is a shortcut", "it is a long skip over residual blocks"

CASES = (
    Case(BranchRight, rows, (IDENTITY,)),
    Case(BranchLeft, rows, (IDENTITY,)),
    Case(AugmentedBranch, rows, (IDENTITY,)),
    Case(AugmentedShortcut, rows, (IDENTITY,)),
    Case(AugmentedInLoop, rows, (IDENTITY, IDENTITY)),
    Case(AlphaOnBranch, rows, (IDENTITY,)),
    Case(AlphaOnShortcut, rows, (IDENTITY,)),
    Case(AddByKeyword, rows, (IDENTITY, IDENTITY)),
    Case(PythonSum, rows, (IDENTITY,)),
    Case(AddIntoBranch, rows, (IDENTITY,)),
    Case(AddIntoShortcut, rows, (IDENTITY,)),
    Case(AddIntoShortcutReadLater, rows, (IDENTITY,)),
    Case(AddIntoBranchReadLater, rows, (IDENTITY,)),
    Case(AddIntoBranchReadThroughItsBase, rows, (), ("in place",)),
    Case(AddIntoBranchReadThroughAView, rows, (), ("in place",)),
    Case(AugmentedBranchReadLater, rows, (IDENTITY,)),
    Case(ConvBnShortcut, images, (PROJECTION,)),
    Case(PooledConvShortcut, images, (PROJECTION,)),
    Case(ActivatedShortcut, images, (PROJECTION,)),
    Case(PooledShortcut, images, (PROJECTION,)),
    Case(PaddedShortcut, images, (PROJECTION,)),
    Case(PreActivation, images, (PROJECTION,)),
    Case(ScaledAndSlicedShortcut, rows, (IDENTITY,)),
    Case(Broadcast, images, (IDENTITY,)),
    Case(LayerScale, rows, (IDENTITY, IDENTITY)),
    Case(TokenMixing, tokens, (IDENTITY,)),
    Case(ScaledInPlace, rows, (IDENTITY,)),
    Case(BranchUsedElsewhere, rows, (IDENTITY,)),
    Case(FunctionalDropout, rows, (IDENTITY,)),
    Case(OpaqueBranch, rows, (IDENTITY,)),
    Case(PositionEmbedding, tokens, (IDENTITY,), (CONSTANT, CONSTANT)),
    Case(BiasAdd, rows, (), (CONSTANT,)),
    Case(Gate, rows),
    Case(Plain, rows),
    Case(Doubled, rows, (), (NO_SHORTCUT,)),
    Case(BareLinear, images, (), ("its branch is a single linear op",)),
    Case(Reparametrised, images, (), ("both sides are linear",)),
    Case(NoWork, rows, (), ("there is nothing to drop",)),
    Case(TwoStreams, two_rows, (), (NO_SHORTCUT,)),
    Case(MaskedAttention, masked_tokens, (IDENTITY,), (NO_SHORTCUT,)),
    Case(PaddingMask, token_numbers, (IDENTITY,), (CONSTANT,)),
    Case(TokensAsGiven, token_numbers, (IDENTITY,), (CONSTANT,)),
    Case(
        MaskedCrossAttention,
        lambda batch: (*tokens(batch), *masked_tokens(batch)),
        (IDENTITY, IDENTITY, IDENTITY, IDENTITY),
        ("neither side is a shortcut", "long skip"),
    ),
    Case(FourierMixing, tokens, (IDENTITY, IDENTITY)),
    Case(AttentionPooling, token_numbers, (), (CONSTANT,)),
    Case(PlainUNet, images, (), ("as a U-Net does",)),
    Case(LateralUNet, images, (), ("as a U-Net does",)),
    Case(LateralUNetOverPython, images, (), ("as a U-Net does",)),
    Case(
        ResidualUNet,
        images,
        tuple((path, "identity") for path in ("enter", "under.enter", "under.under", "under.leave", "leave")),
        ("as a U-Net does", "as a U-Net does"),
    ),
    Case(
        NumberedUNet,
        images,
        tuple((f"levels.0.{path}", "identity") for path in ("enter", "under.enter", "under.under", "under.leave", "leave")),
        ("as a U-Net does", LONG_SKIP),
    ),
    Case(UNet, images, (), ("as a U-Net does", "as a U-Net does")),
    Case(LinkNet, images, (), ("as a U-Net does",) * 3),
    Case(LinkNetWithLaterals, images, (), ("as a U-Net does",) * 3),
    Case(PyramidAttention, images, (), ("as a U-Net does",)),
    Case(GatedPyramid, images, (), ("as a U-Net does",)),
    Case(GrowingBlock, images, (PROJECTION,)),
    Case(ConditionedUNet, timed_images, (("block", "projection"),), ("neither side is a shortcut",)),
    *(
        Case(
            factory,
            images,
            tuple((path, "identity") for path in ("downs.0", "downs.1", "downs.2", "middle", "ups.0.block", "ups.1.block")),
            ("as a U-Net does",) * 3,
        )
        for factory in (LinkNetOfBlocks, LinkNetOfBlocksWithLaterals)
    ),
    Case(
        ConvolvedPosition,
        tokens,
        (("layers.0", "identity"), ("layers.1", "identity")),
        ("its branch is a single linear op and an activation",),
    ),
    Case(SmallBranchBetweenBlocks, tokens, (("layers.0", "identity"), IDENTITY, ("layers.1", "identity"))),
    Case(Subtraction, rows),
    Case(ParallelSum, rows, (IDENTITY, IDENTITY)),
    Case(ParallelSumShortcutLast, rows, (IDENTITY, IDENTITY)),
    Case(ThreeTermsShortcutLast, rows, (IDENTITY, IDENTITY, IDENTITY)),
    Case(ParallelSumShortcutBetween, rows, (IDENTITY, IDENTITY)),
    Case(ParallelSumShortcutLastInPlace, rows, (IDENTITY, IDENTITY)),
    Case(ParallelSumWithSmallBranch, rows, (IDENTITY, IDENTITY)),
    Case(SumInParentheses, rows, (IDENTITY,), (NO_SHORTCUT,)),
    Case(SumOfAnotherModule, rows, (IDENTITY,), (NO_SHORTCUT,)),
    Case(LinearTerm, images, (IDENTITY,), (NO_SHORTCUT,)),
    Case(ParallelProjections, images, (PROJECTION, PROJECTION)),
    Case(Outer, rows, (IDENTITY,), ("it lies inside the branch of the residual add",)),
    Case(OuterInOneForward, rows, (IDENTITY, IDENTITY)),
    Case(ParallelSumInBranch, rows, (IDENTITY, IDENTITY, IDENTITY)),
    Case(LongSkipOverOneBlock, rows, (("body.0", "identity"),), ("it is a long skip over the residual block",)),
    Case(ValuesBesideAttention, tokens, (IDENTITY, IDENTITY), ("inside the branch",)),
    Case(ValuesAddedToAttention, tokens, (IDENTITY, IDENTITY), ("inside the branch",)),
    Case(NumberedOuter, rows, (("blocks.0", "identity"),), ("it lies inside the branch of the residual add",)),
    Case(AroundOneBlock, rows, (IDENTITY,), ("it lies inside the branch of the residual add",)),
    Case(LongSkip, rows, tuple((f"body.{i}", "identity") for i in range(3)), (LONG_SKIP,)),
    Case(NumberedDenseLongSkip, rows, tuple((f"blocks.0.blocks.{i}", "identity") for i in range(3)), (LONG_SKIP,)),
    Case(
        NestedLongSkips,
        rows,
        tuple((f"groups.{i}.body.{j}", "identity") for i in range(2) for j in range(2)),
        (LONG_SKIP, LONG_SKIP, LONG_SKIP),
    ),
    Case(ThreeBlocks, rows, tuple((f"blocks.{i}", "identity") for i in range(3))),
    Case(CalledTwice, rows, (("block", "identity"),)),
    Case(PreNorm, tokens, (IDENTITY, IDENTITY)),
    Case(PostNorm, tokens, (IDENTITY, IDENTITY)),
    Case(SdpaBlock, tokens, (IDENTITY,)),
    Case(SdpaInBlock, tokens, (IDENTITY,)),
    Case(ClassToken, tokens, (("patches", "identity"), IDENTITY, IDENTITY)),
    *(Case(factory, two_rows, (IDENTITY, IDENTITY), (CONSTANT, "one part of a value") * 2) for factory in (Modulated, ModulatedBySlices)),
    Case(FirstToken, tokens, (IDENTITY,)),
    Case(PartOfItself, tokens, (IDENTITY, IDENTITY)),
    Case(TwoStreamBlocks, two_rows, tuple((f"blocks.{i}", "identity") for i in range(3) for _ in range(4))),
    Case(LongSkipWithATap, rows, (IDENTITY, IDENTITY), (LONG_SKIP,)),
    Case(TokenBesideAnInternal, rows, (IDENTITY, IDENTITY), ("it lies inside the branch of the residual add",)),
    Case(Unused, rows, (IDENTITY,), ("its result is not used",)),
    Case(ReadByAnotherName, rows, (IDENTITY,)),
    Case(PaddedBatch, rows, (IDENTITY,)),
    Case(KeywordCalls, rows, (IDENTITY, IDENTITY)),
    Case(AuxiliaryHead, rows, (("block", "identity"), IDENTITY)),
)
