"""Residual nets to train: convolutional ones over signals and images, and a causal transformer over characters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("batch", "group")


@dataclass(frozen=True)
class Size:
    """How large a net is.

    Attributes:
        blocks: residual blocks; a transformer's have two adds each.
        width: channels.
        stages: of a convolutional net; each halves the sides and has as many blocks as the others, or one more.
        norm: of a convolutional net, `"batch"` or `"group"`, which is one group here.
        dropout: inside the branches.
    """

    blocks: int
    width: int
    stages: int = 1
    norm: str = "batch"
    dropout: float = 0.0


class Residual(nn.Module):
    """y = x + F(x)."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.branch(x)
        return out


class ConvNet(nn.Module):
    """A ResNet of pre-activation blocks of equal width over `[batch, channels, *sides]`, for one or two dimensions.

    References:
        He et al., "Identity Mappings in Deep Residual Networks", 2016, https://arxiv.org/abs/1603.05027
    """

    def __init__(self, channels: int, dims: int, classes: int, size: Size) -> None:
        super().__init__()
        self.dims = dims
        conv = (nn.Conv1d, nn.Conv2d)[dims - 1]
        self.stem = conv(channels, size.width, 3, padding=1)
        self.stages = nn.ModuleList()
        for stage in range(size.stages):
            count = size.blocks // size.stages + (stage < size.blocks % size.stages)
            layers: list[nn.Module] = [] if stage == 0 else [conv(size.width, size.width, 2, stride=2)]
            for _ in range(count):
                first, second = (conv(size.width, size.width, 3, padding=1) for _ in range(2))
                norms = (self._norm(size) for _ in range(2))
                layers.append(Residual(next(norms), nn.ReLU(), first, next(norms), nn.ReLU(), nn.Dropout(size.dropout), second))
            self.stages.append(nn.Sequential(*layers))
        self.norm = self._norm(size)
        self.head = nn.Linear(size.width, classes)

    def _norm(self, size: Size) -> nn.Module:
        if size.norm == "group":
            return nn.GroupNorm(1, size.width)
        return (nn.BatchNorm1d, nn.BatchNorm2d)[self.dims - 1](size.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        out: Tensor = self.head(F.relu(self.norm(x)).flatten(2).mean(-1))
        return out


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.dropout(self.project(mixed.transpose(1, 2).flatten(2)))
        return out


class CharTransformer(nn.Module):
    """A pre-norm transformer that predicts the next character: `[batch, length]` -> `[batch, length, characters]`."""

    def __init__(self, characters: int, length: int, size: Size) -> None:
        super().__init__()
        width = size.width
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, length, width))
        self.blocks = nn.Sequential()
        for _ in range(size.blocks):
            self.blocks.append(Residual(nn.LayerNorm(width), Attention(width, max(width // 32, 1), size.dropout)))
            mlp = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(size.dropout)
            self.blocks.append(Residual(nn.LayerNorm(width), *mlp))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.characters(x) + self.positions)
        out: Tensor = self.head(self.norm(x))
        return out
