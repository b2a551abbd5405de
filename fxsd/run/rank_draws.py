"""Random numbers that are the same on every rank, without a word between them.

The number of a site is a hash of its key and of how many it drew before, which all ranks count alike. What torch's own generator gives,
which differs between ranks, only tells a forward from its recomputation: `torch.utils.checkpoint` puts that generator back, so that a
number that was seen before means the draw of then. A rank that seeds its generator again draws again what it drew, so that all of them
have to, or none.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MEMORY = 64  # how many draws back one can be asked for again: forwards whose backward is yet to come
_NONCES = 1 << 62
_FORWARDS = 1 << 24  # in a step, at most
# SplitMix64, on signed numbers that wrap: its increment and the factors of its two rounds.
_INCREMENT, _FACTORS = -0x61C8864680B583EB, (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


class RankDraws:
    """Draws uniform numbers in [0, 1) that are the same on all ranks that were seeded alike when this was made.

    Args:
        name: of the site; two names have independent draws.

    Everything is kept on the CPU, where a branch is decided upon, and in tensors, so that compiled code draws the same.

    References:
        Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014, https://doi.org/10.1145/2714064.2660195

    Example:
        >>> import torch
        >>> one_rank, other_rank = RankDraws("layer1.0"), RankDraws("layer1.0")
        >>> [one_rank().item() for _ in range(3)] == [other_rank().item() for _ in range(3)]
        True
    """

    def __init__(self, name: str) -> None:
        digest = hashlib.sha256(f"{torch.initial_seed()} {name}".encode()).digest()
        self._key = torch.tensor(int.from_bytes(digest[:8], "little", signed=True), device="cpu")
        self._next = torch.zeros((), dtype=torch.int64, device="cpu")
        self._nonces = torch.zeros(_MEMORY, dtype=torch.int64, device="cpu")
        self._counts = torch.zeros(_MEMORY, dtype=torch.int64, device="cpu")

    def __call__(self) -> Tensor:
        nonce = torch.randint(1, _NONCES, (), device="cpu")
        seen = self._nonces == nonce
        count = torch.where(seen.any(), (self._counts * seen).amax(), self._next)
        place = torch.arange(_MEMORY, device="cpu") == count % _MEMORY
        self._nonces.copy_(torch.where(place, nonce, self._nonces))
        self._counts.copy_(torch.where(place, count, self._counts))
        self._next.copy_(torch.maximum(self._next, count + 1))
        return _uniform(self._key + count * _INCREMENT)

    def start_step(self, step: int) -> None:
        """Goes on as a run does that has taken so many training steps."""
        self._next.fill_(step * _FORWARDS)


def _uniform(state: Tensor) -> Tensor:
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        state = (state ^ (state >> shift & (1 << 64 - shift) - 1)) * factor  # a shift that brings in zeros
    return (state >> 40).float() * 2.0**-24 + 0.5  # the 24 highest bits, signed; the last step of the hash would leave them as they are
