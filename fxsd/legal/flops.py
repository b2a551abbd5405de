"""Counting FLOPs as torch does, and those of attention on a CPU too, which torch leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def flop_counter() -> FlopCounterMode:
    """A `FlopCounterMode` that prints nothing.

    Example:
        >>> q = torch.randn(2, 4, 8, 16)
        >>> with flop_counter() as counter:
        ...     y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        >>> counter.get_total_flops() == 2 * (2 * 2 * 4 * 8 * 8 * 16)
        True
    """
    return FlopCounterMode(display=False, custom_mapping=_ON_CPU)


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return _products(query, key, query[-1] + value[-1])


def _attention_backward(grad: Any, query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Scores are computed again."""
    return _products(query, key, 3 * query[-1] + 2 * value[-1])


def _products(query: Sequence[int], key: Sequence[int], widths: int) -> int:
    *batch, length, _ = query
    return 2 * torch.Size(batch).numel() * length * key[-2] * widths


_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
