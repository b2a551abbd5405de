"""Where the kernels of `fxsd.run.kernels` read and write rows: on a GPU, if Triton works there, in tensors laid out as they expect."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

_BATCHED = torch._C._dispatch_key_parse("Batched")


def kernels_for(value: Tensor) -> ModuleType | None:
    """The kernels, or None: operators of PyTorch have to do, as in compiled code, which has kernels of its own."""
    if torch.compiler.is_compiling() or not value.is_cuda or not is_fit(value):
        return None
    return _kernels(value.device)


def is_fit(value: Tensor) -> bool:
    """Are these rows for kernels? Not where something looks on at operators, as autograd does in a backward that has a gradient itself."""
    seen = torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() > 0
    return not seen and is_plain(value) and _is_by_rows(value)


def is_transformed(value: Tensor) -> bool:
    """Does this stand for other tensors, as in functions of `torch.func` and in gradients of many outputs at once?

    Operators know how, but not those that write into a tensor that does not.
    """
    return torch._C._are_functorch_transforms_active() or torch._C._dispatch_keys(value).has(_BATCHED)


def is_plain(value: Tensor) -> bool:
    """Are these floats, in a tensor of no class of its own that stands for itself?"""
    return type(value) is Tensor and value.is_floating_point() and value.element_size() > 1 and not is_transformed(value)


def _is_by_rows(value: Tensor) -> bool:
    """Is one row after the other in memory, without gaps?"""
    if value.stride(0) * value.shape[0] != value.numel() or not value.numel():
        return False
    size = 1
    for stride, length in sorted(zip(value.stride(), value.shape, strict=True)):
        if stride != size:
            return value.is_contiguous()  # strides of one element say nothing
        size *= length
    return True


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    try:
        from fxsd.run import kernels

        row, first = torch.zeros(1, 1, device=device), torch.zeros(1, dtype=torch.long, device=device)
        kernels.take_rows(row, row, first, None)  # Triton needs a C compiler, and may not know the GPU
    except Exception:  # of any kind: the operators of PyTorch give the same
        return None
    return kernels
