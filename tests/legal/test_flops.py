"""FLOPs are those of torch's counter, and of attention on a CPU those of its formulas for other devices."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fxsd.legal.flops import flop_counter


@pytest.mark.parametrize("value_width", [4, 16])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_on_a_cpu_counts_as_elsewhere(causal: bool, value_width: int):
    q, k, v = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 7, 16), torch.randn(2, 3, 7, value_width)
    shapes = q.shape, k.shape, v.shape
    for tensor in (q, k, v):
        tensor.requires_grad_()
    with flop_counter() as counter:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert counter.get_total_flops() == sdpa_flop_count(*shapes)
    with flop_counter() as counter:
        y.sum().backward()
    if value_width == 16:  # else it is made of products, none of which is made again
        assert counter.get_total_flops() == sdpa_backward_flop_count(y.shape, *shapes)


def test_all_else_counts_as_torch_counts_it():
    x, model = torch.randn(2, 3, 8, 8), torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    counted = []
    for counter in (flop_counter(), FlopCounterMode(display=False)):
        with counter:
            model(x).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0
