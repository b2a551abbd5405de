"""What is taken again in backward: less memory, and nothing else changes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from memory import kept_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18

import fxsd
from fxsd.run.rows import fork, take
from fxsd.versions import HOOKS_NEST

pytestmark = pytest.mark.skipif(not HOOKS_NEST, reason=f"torch {torch.__version__}: hooks cannot call those around them")


class Block(nn.Module):
    """As in ResNets, what comes in is the result of a ReLU, which keeps it."""

    def __init__(self, width: int = 4, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.shortcut, self.relu = shortcut or nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.shortcut(x) + self.second(self.relu(self.first(x))))


def blocks() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Block(), Block(), Block(shortcut=nn.Conv2d(4, 4, 1)))


def images(batch: int = 6) -> Tensor:
    return torch.randn(batch, 3, 5, 5)


def skipping(model: nn.Module, drop_rate: float = 0.3) -> nn.Module:
    x = torch.randn(2, 3, 5, 5)
    return fxsd.transform(
        model, drop_rate, drop_distribution="uniform", compute="skip", subset_batch_norm=True, example_inputs=(x,)
    ).train()


def keeping(gm: nn.Module) -> nn.Module:
    """The same graph, but what is taken is kept."""
    gm = copy.deepcopy(gm)
    for node in gm.graph.nodes:
        if node.target in (fork, take):
            node.args = node.args[:2]
    gm.recompile()
    return gm


def taken_again(gm: nn.Module) -> list[bool]:
    """Of each value that rows are taken of: are they taken again?"""
    return [node.args[2:] == (True,) for node in gm.graph.nodes if node.target in (fork, take)]


def gradients(gm: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    torch.manual_seed(2)
    gm.zero_grad()
    x = images().requires_grad_()
    run(gm, x).square().sum().backward()
    return [tensor.grad for tensor in (x, *gm.parameters())]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_rows_of_what_a_relu_or_the_shortcut_keeps_are_not_kept_besides():
    gm = skipping(blocks())
    x, own = images(64), sum(tensor.nbytes for tensor in gm.parameters())
    value = 64 * 4 * 5 * 5 * 4  # bytes of a value of the stream
    torch.manual_seed(1)
    less = kept_bytes(lambda: gm(x))
    torch.manual_seed(1)
    more = kept_bytes(lambda: keeping(gm)(x))
    assert more - less == pytest.approx(3 * 0.7 * value, rel=0.03)
    # the image, the stream, and one value inside of each branch; 44 or 45 of 64 rows run
    assert less - own == pytest.approx(64 * 3 * 5 * 5 * 4 + 4 * value + 3 * 0.7 * value + 3 * 45 * 8, rel=0.03)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_a_resnet_needs_no_more_memory_than_without_at_any_rate(rate: float):
    model, x = resnet18().train(), torch.randn(24, 3, 32, 32)
    gm = fxsd.transform(model, rate, drop_distribution="uniform", compute="skip", subset_batch_norm=True, example_inputs=(x[:2],))
    weights = sum(module.weight.nbytes for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    assert kept_bytes(lambda: gm(x)) - weights <= 1.02 * (kept_bytes(lambda: model(x)) - weights)


@pytest.mark.parametrize(("shortcut", "kept"), [(None, False), (nn.Conv2d(4, 4, 1), True)])
def test_a_shortcut_that_keeps_what_comes_in_is_seen(shortcut: nn.Module | None, kept: bool):
    gm = skipping(nn.Sequential(nn.Conv2d(3, 4, 1), Block(shortcut=shortcut)))
    assert taken_again(gm) == [kept]


def test_where_all_rows_run_or_none_there_is_nothing_to_take_again():
    gm = fxsd.transform(blocks(), 0.3, stochastic_method="block", compute="skip", example_inputs=(images(),))
    assert taken_again(gm) == [False] * 3


def test_what_nobody_else_keeps_is_kept():
    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(self.norm(x))

    gm = skipping(nn.Sequential(PreNorm(), PreNorm()))
    assert taken_again(gm) == [False, False]


def test_what_lies_in_the_memory_of_rows_that_are_taken_again_is_found_in_it():
    class Shared(nn.Module):
        """Linear layers keep tokens as a matrix; others a part, in another order."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.randn(5, 1))

        def forward(self, x: Tensor) -> Tensor:
            turned = x.transpose(1, 2) @ self.scale  # [batch, 4, 1]
            part = x[:, 1:3, ::2] * self.scale[:2]
            return (x + (self.linear(x) * turned.transpose(1, 2) + nn.functional.pad(part, (0, 2, 1, 2)))).relu()

    gm = fxsd.transform(
        nn.Sequential(nn.ReLU(), Shared(), Shared()),
        0.4,
        drop_distribution="uniform",
        compute="skip",
        include="*",
        example_inputs=(torch.randn(2, 5, 4),),
    )
    assert taken_again(gm) == [True, True]
    results = []
    for module in (gm, keeping(gm)):
        torch.manual_seed(3)
        x = torch.randn(7, 5, 4).requires_grad_()
        module(x).square().sum().backward()
        results.append([tensor.grad for tensor in (x, *module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


RUNS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda gm, x: gm(x),
    "checkpoint": lambda gm, x: checkpoint(gm, x, use_reentrant=False),
    "reentrant": lambda gm, x: checkpoint(gm, x, use_reentrant=True),
    "functional_call": lambda gm, x: torch.func.functional_call(gm, dict(gm.named_parameters()), x),
}


@pytest.mark.parametrize("run", RUNS)
def test_gradients_are_the_same_bit_for_bit(run: str):
    gm = skipping(blocks())
    found = gradients(gm, RUNS[run])
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(keeping(gm), RUNS["plain"]), strict=True))


def test_gradients_of_gradients_too():
    def penalty(gm: nn.Module, x: Tensor) -> Tensor:
        return torch.autograd.grad(gm(x).square().sum(), x, create_graph=True)[0]

    gm = skipping(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softplus(), *(Block() for _ in range(2))))
    found = gradients(gm, penalty)
    for a, b in zip(found, gradients(keeping(gm), penalty), strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_of_the_caller_see_what_is_kept_and_give_it_back():
    packed, unpacked = [], []

    def halved(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor / 2

    def doubled(tensor: Tensor) -> Tensor:
        unpacked.append(tensor.shape)
        return tensor * 2

    def run(gm: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(halved, doubled):
            return gm(x)

    gm = skipping(blocks())
    found = gradients(gm, run)
    assert len(packed) == len(unpacked) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(keeping(gm), lambda gm, x: gm(x)), strict=True))


def test_weights_that_are_written_into_before_backward_are_an_error_as_without():
    gm = skipping(blocks())
    loss = gm(images()).sum()
    with torch.no_grad():
        gm.get_submodule("2.second").weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_is_held_once_a_step_is_over(backward: bool):
    gm = skipping(blocks())
    storages = []
    for module in gm.modules():
        if isinstance(module, nn.ReLU | nn.Conv2d):
            module.register_forward_hook(lambda module, args, out: storages.extend(weakref.ref(t.untyped_storage()) for t in (*args, out)))
    gc.disable()
    try:
        out = gm(images())
        if backward:
            out.sum().backward()
        del out
        assert len(storages) > 10
        assert not any(storage() for storage in storages)
    finally:
        gc.enable()


def test_where_hooks_are_not_allowed_all_is_kept():
    gm = skipping(blocks())
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        gm(images()).sum().backward()
    with torch.no_grad():
        gm(images())
    found = torch.func.grad(lambda x: gm(x).sum())(images())
    assert found.shape == images().shape
