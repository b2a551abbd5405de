"""Code with ops in it and the graph beside it are each other's oracle: under one seed they give the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import fxsd


def tensors(value: Any) -> list[Tensor]:
    """The floats of an output of any class, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    elif hasattr(value, "__dict__") and not isinstance(value, Tensor):
        value = list(vars(value).values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors(item)]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def check_code_and_graph(model: nn.Module, given: Any, rtol: float = 0.0, atol: float = 0.0, **options: Any) -> None:
    """Outputs, gradients and buffers, in training and evaluation, by sample and by block."""
    for method in ("sample", "block"):
        arguments = {"drop_distribution": "uniform", "stochastic_method": method, "example_inputs": given, **options}
        code = fxsd.transform(copy.deepcopy(model), 0.5, **arguments)
        assert isinstance(code, fx.GraphModule)
        graph = copy.deepcopy(code)
        graph.recompile()
        assert type(graph) is not type(code)
        for training in (True, False):
            results = []
            for each in (code, graph):
                each.train(training).zero_grad()
                torch.manual_seed(0)
                with torch.set_grad_enabled(training):
                    found = tensors(each(**given) if isinstance(given, dict) else each(*given))
                assert found
                if training:
                    torch.stack([tensor.square().mean() for tensor in found if tensor.requires_grad]).sum().backward()
                gradients = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
                results.append((found, gradients, dict(each.named_buffers())))
            (a, a_gradients, a_buffers), (b, b_gradients, b_buffers) = results
            assert len(a) == len(b)
            assert a_gradients.keys() == b_gradients.keys()
            assert (len(a_gradients) > 0) or not training
            pairs = [*zip(a, b, strict=True), *((a_gradients[key], b_gradients[key]) for key in a_gradients)]
            pairs += [(a_buffers[key], b_buffers[key]) for key in a_buffers]
            for ours, theirs in pairs:
                torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
