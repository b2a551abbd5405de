"""Partial capture: models that are not one graph, and modules whose two modes are two programs."""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings
from typing import Any

import numpy
import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import fxsd


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.norm(self.fc1(x)).relu())


class Stage(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def first(self) -> nn.Module:
        return self.blocks[0]


class Detector(nn.Module):
    """Lists in, dicts out, and Python between that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Stage(1)  # registered first, runs last
        self.body = nn.Sequential(nn.Linear(8, 8), Stage(2))
        self.num_classes = 3

    def forward(self, images: list[Tensor], targets: list[Tensor] | None = None) -> list[dict[str, Tensor]]:
        x = self.body(torch.stack(images))
        keep = x.sum(1) > x.sum()
        if keep.any():
            x = torch.where(keep[:, None], x, x * 2)
        x = self.head(x)
        if self.training:
            assert targets is not None
            return [{"loss": (x - torch.stack(targets)).square().mean()}]
        return [{"out": row} for row in x]

    def describe(self) -> str:
        return f"{self.num_classes} classes"


def images(batch: int = 2) -> list[Tensor]:
    return list(torch.randn(batch, 8))


def state(model: nn.Module) -> dict[str, Any]:
    """Everything a failed or a successful capture could leave behind."""
    attributes = {(n, k): v for n, m in model.named_modules() for k, v in vars(m).items()}
    return attributes | {("state", k): v.clone() for k, v in model.state_dict().items()}


def same(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] is b[k] or a[k] == b[k] for k in a)


# --- a root that is no graph ----------------------------------------------------------------------------------------------


def test_the_parts_of_a_root_that_is_no_graph_are_rewritten():
    torch.manual_seed(0)
    model = Detector()
    before = state(model)
    gm = fxsd.transform(model, 0.6, scaling="train", example_inputs=(images(),))
    assert same(state(model), before)
    assert type(gm) is Detector
    assert gm.describe() == "3 classes"
    assert [(s.name, s.depth, round(s.drop_rate, 3)) for s in fxsd.sites(gm)] == [
        ("body.1.blocks.0", 0, 0.0),
        ("body.1.blocks.1", 1, 0.3),
        ("head.blocks.0", 2, 0.6),
    ]
    assert [p for p, _ in gm.named_children()] == ["head", "body"]
    assert type(gm.head) is Stage
    assert not isinstance(gm, fx.GraphModule)
    assert isinstance(gm.head.first(), Block)
    assert list(gm.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(gm.parameters(), model.parameters(), strict=True))
    for batch in (1, 2, 5):
        x = images(batch)
        expected, found = model.eval()(x), gm.eval()(x)
        assert all(torch.equal(a["out"], b["out"]) for a, b in zip(expected, found, strict=True))


def test_parts_drop_in_training_and_follow_modes():
    torch.manual_seed(0)
    gm = fxsd.transform(Detector(), 1.0, drop_distribution="uniform", example_inputs=(images(),))
    x = images()
    gm.train()
    found = gm(x, targets=x)[0]["loss"]
    with torch.no_grad():  # with every branch dropped the network is its first linear layer
        y = gm.body[0](torch.stack(x))
        keep = y.sum(1) > y.sum()
        y = torch.where(keep[:, None], y, y * 2) if keep.any() else y
    torch.testing.assert_close(found, (y - torch.stack(x)).square().mean())
    assert not gm.eval().head.training
    gm.train().body.eval()
    assert [m.training for m in gm.modules() if type(m).__name__ == "StochasticDepth"] == [True, False, False]


def test_rates_move_and_copies_are_whole():
    torch.manual_seed(0)
    x = images()
    gm = fxsd.transform(Detector(), 0.5, scaling="train", example_inputs=(x,)).eval()
    expected = gm(x)
    saved = io.BytesIO()
    torch.save(gm, saved)
    saved.seek(0)
    for other in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), torch.load(saved, weights_only=False)):
        assert type(other) is Detector
        assert all(torch.equal(a["out"], b["out"]) for a, b in zip(expected, other(x), strict=True))
        fxsd.set_drop_rate(other, 0.8)
        assert [s.drop_rate for s in fxsd.sites(other)] == [0.0, 0.4, 0.8]
        torch.manual_seed(1)
        a = other.train()(x, x)[0]["loss"]
        torch.manual_seed(1)
        assert torch.equal(a, other(x, x)[0]["loss"])
    assert [s.drop_rate for s in fxsd.sites(gm)] == [0.0, 0.25, 0.5]


def test_a_transformed_model_of_parts_can_be_transformed_again():
    gm = fxsd.transform(Detector(), 0.5, example_inputs=(images(),))
    again = fxsd.transform(gm, 0.8, scaling="train", example_inputs=(images(),))
    assert [s.drop_rate for s in fxsd.sites(again)] == [0.0, 0.4, 0.8]
    assert [s.drop_rate for s in fxsd.sites(gm)] == [0.0, 0.25, 0.5]
    assert sum(type(m).__name__ == "StochasticDepth" for m in again.modules()) == 3
    assert fxsd.analyze(gm, example_inputs=(images(),)).sites[0].name == "body.1.blocks.0"


def test_parts_inside_a_graph_are_transformed_again_too():
    gm = fxsd.transform(nn.Sequential(Block(), Moody(), Moody()), 0.5)
    again = fxsd.transform(gm, 0.8)
    assert [(s.name, s.drop_rate) for s in fxsd.sites(again)] == [("0", 0.0), ("1", 0.4), ("2", 0.8)]
    assert [(s.name, s.drop_rate) for s in fxsd.sites(gm)] == [("0", 0.0), ("1", 0.25), ("2", 0.5)]


def test_the_report_says_why_the_root_is_no_graph():
    found = fxsd.analyze(Detector(), example_inputs=(images(),))
    assert len(found.sites) == 3
    assert found.notes[0].startswith("kept as Python, with graphs in it: the model (Detector) stopped tracing at")
    assert "if keep.any():" in found.notes[0]


@pytest.mark.parametrize("builder", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large"])
def test_torchvision_detectors(builder: str):
    torch.manual_seed(0)
    model = torchvision.models.get_model(builder, weights=None, weights_backbone=None)
    x = [torch.rand(3, 64, 96), torch.rand(3, 96, 64)]
    if hasattr(model.transform, "min_size") and builder != "ssdlite320_mobilenet_v3_large":
        model.transform.min_size, model.transform.max_size = (64,), 96
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = fxsd.transform(model, scaling="train", example_inputs=(x,))
    assert isinstance(gm, type(model))
    assert len(fxsd.sites(gm)) == (10 if "ssdlite" in builder else 16)
    assert list(gm.state_dict()) == list(model.state_dict())
    for expected, found in zip(model.eval()(x), gm.eval()(x), strict=True):
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    targets = [{"boxes": torch.tensor([[1.0, 1.0, 50.0, 50.0]]), "labels": torch.tensor([1])} for _ in x]
    assert all(loss.isfinite() for loss in gm.train()(x, targets).values())


# --- code that is not reached ---------------------------------------------------------------------------------------------


class OnValues(nn.Module):
    """A residual add in code that no graph can hold, around a module that a graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.f = Stage(1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if x.sum() > 0:
            x = x + self.f(x).relu()
        return x


def test_adds_in_code_that_no_graph_holds_are_told_without_an_example_and_rewritten_with_one():
    torch.manual_seed(0)
    model = nn.Sequential(Stage(1), OnValues(), Stage(1))
    x = torch.randn(2, 8)
    with pytest.raises(fxsd.CaptureError, match=r"'1' \(OnValues\).*if x\.sum\(\) > 0.*It holds 1 residual add, which could not be"):
        fxsd.transform(model)
    for seed in range(9):  # an input on which it adds
        torch.manual_seed(seed)
        x = torch.randn(2, 8)
        if model[0](x).sum() > 0 and model[1].inner(model[0](x)).sum() > 0:
            break
    gm = fxsd.transform(model, 0.6, scaling="train", example_inputs=(x,))
    assert isinstance(gm, fx.GraphModule)
    expected = [("0.blocks.0", 0), ("1.inner.blocks.0", 1), ("1", 2), ("2.blocks.0", 3)]
    assert [(s.name, s.depth) for s in fxsd.sites(gm)] == expected
    assert any("'1' (OnValues) stopped tracing" in note for note in fxsd.analyze(model, example_inputs=(x,)).notes)
    assert torch.equal(gm.eval()(x), model.eval()(x))
    assert isinstance(gm.get_submodule("1"), OnValues)
    assert gm.get_submodule("1") is not model[1]
    assert type(model[1].inner) is Stage


class KeepsAList(OnValues):
    """Reaches its modules by other ways than the registered ones."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [self.inner]
        self.run = self.inner.forward

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e6:
            return self.run(x)
        for step in self.steps:
            x = step(x)
        return x


def test_plain_references_to_replaced_modules_follow():
    model = KeepsAList()
    gm = fxsd.transform(model, 1.0, example_inputs=(torch.randn(2, 8),))
    assert gm.steps[0] is gm.inner
    assert model.steps[0] is model.inner
    x = torch.randn(2, 8)
    assert torch.equal(gm.train()(x), x)  # its one branch is dropped


class PiecesOnly(nn.Module):
    """Calls the pieces of a module that has a forward of its own, which never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] == 2:
            raise ValueError("targets are missing")  # as detectors say in training: how modules are called is seen in eval mode
        for block in self.stage.blocks:
            x = block(x)
            if x.sum() > 0:
                x = -x
        return x


def test_a_module_that_is_not_called_is_not_what_is_replaced():
    gm = fxsd.transform(PiecesOnly(), 1.0, drop_distribution="uniform", example_inputs=(torch.randn(2, 8),))
    assert type(gm.stage) is Stage
    assert [s.name for s in fxsd.sites(gm)] == ["stage.blocks.0", "stage.blocks.1"]
    x = torch.randn(3, 8)
    assert torch.equal(gm.train()(x).abs(), x.abs())


class ManyWays(nn.Module):
    """Runs other code at other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.wide = Block(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.wide(x)) if x.shape[1] == 8 else self.block(x[:, :8])


class CallsTwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.many = ManyWays()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.maximum(self.many(x), self.many(torch.cat([x, x], 1)))
        return y if y.sum() > 0 else -y


def test_a_module_that_runs_different_code_in_different_calls_has_its_site_in_both():
    model = CallsTwoWays()
    x = torch.randn(3, 8)
    gm = fxsd.transform(model, scaling="train", example_inputs=(x,))
    assert [s.name for s in fxsd.sites(gm)] == ["many.block"]
    assert torch.equal(gm.eval()(x), model.eval()(x))


# --- modes ----------------------------------------------------------------------------------------------------------------


class Moody(nn.Module):
    """A residual block that is another program in training than in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.extra = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).relu()
        if self.training:
            y = y + self.extra(x).sigmoid() * y
        return x + y


def test_a_module_with_two_programs_follows_its_own_flag():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Moody(), Moody())
    gm = fxsd.transform(model, 0.0)
    assert [s.name for s in fxsd.sites(gm)] == ["0", "1", "2"]
    assert [s.depth for s in fxsd.sites(gm)] == [0, 1, 2]
    x = torch.randn(4, 8)
    for frozen in ([], ["0"], ["1"], ["1", "2"]):
        model.train(), gm.train()
        for path in frozen:
            model.get_submodule(path).eval(), gm.get_submodule(path).eval()
        assert torch.equal(gm(x), model(x)), frozen
    model.eval(), fxsd.set_drop_rate(gm, 0.7), gm.eval()
    assert not torch.equal(gm(x), model(x))  # the branch is scaled
    assert torch.equal(pickle.loads(pickle.dumps(gm))(x), gm(x))


def test_two_programs_inside_a_graph_compile_whole():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Moody())
    gm = fxsd.transform(model, 0.0, scaling="train")
    compiled = torch.compile(gm, fullgraph=True, backend="eager")
    x = torch.randn(4, 8)
    for mode in (True, False):
        assert torch.equal(compiled.train(mode)(x), model.train(mode)(x))


class NoGradStem(nn.Module):
    """Enters a context that a graph cannot hold, around a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = Stage(1), Stage(1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x)
        return self.head(x)


def test_no_grad_survives():
    torch.manual_seed(0)
    model = NoGradStem()
    gm = fxsd.transform(model, 0.0, example_inputs=(torch.randn(2, 8),))
    assert len(fxsd.sites(gm)) == 2
    gm.train()(torch.randn(2, 8)).sum().backward()
    assert all(p.grad is None for p in gm.stem.parameters())
    assert all(p.grad is not None for p in gm.head.parameters())


class Draws(nn.Module):
    """Skips blocks at random, as `draw` decides."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.blocks, self.draw = nn.ModuleList(Block() for _ in range(3)), draw

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if not (self.training and self.draw() < 0.5):
                x = block(x)
        return x


@pytest.mark.parametrize("draw", [random.random, numpy.random.rand, lambda: random.uniform(0, 1), lambda: torch.rand([])])
def test_layers_that_are_skipped_at_random_stay_so(draw: Any):
    torch.manual_seed(0)
    model = Draws(draw)
    given = (torch.randn(2, 8),)
    before = random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()
    gm = fxsd.transform(model, 0.0, example_inputs=given)
    assert (random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()) == before
    assert len(fxsd.sites(gm)) == 3
    x = torch.randn(4, 8)
    found = []
    for _ in range(10):
        outputs = []
        for each in (model, gm):
            random.seed(len(found)), numpy.random.seed(len(found)), torch.manual_seed(len(found))
            outputs.append(each.train()(x))
        assert torch.equal(*outputs)
        found.append(outputs[0].sum().item())
    assert len(set(found)) > 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_stays(reentrant: bool):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.calls = nn.ModuleList(Block() for _ in range(2)), [0]

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    gm = fxsd.transform(Checkpointed(), 0.5, example_inputs=(torch.randn(2, 8, requires_grad=True),))
    assert len(fxsd.sites(gm)) == 2
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    gm.blocks[0].fc1.register_forward_hook(count)
    gm.train()(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert calls == 2  # forward, and again for backward


def test_a_hooked_module_with_sites_is_a_part_and_its_hook_runs():
    model = nn.Sequential(Stage(1), Stage(2))
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    gm = fxsd.transform(model, scaling="train")
    assert [s.name for s in fxsd.sites(gm)] == ["0.blocks.0", "1.blocks.0", "1.blocks.1"]
    x = torch.randn(2, 8)
    y = gm.eval()(x)
    assert len(seen) == 1
    assert seen[0] is y


def test_values_that_a_failed_module_has_changed_are_as_before_it():
    class Fails(nn.Module):
        def forward(self, x: Tensor, shape: Any) -> Tensor:
            x += len(shape)  # both mean something else from here on, in a module that then fails
            return x if x.sum() > 0 else x * 2

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.fails = Block(), Fails()

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(x)
            shape = y.shape
            return self.fails(y, shape) + y + shape[0]

    torch.manual_seed(0)
    model = Calls()
    x = torch.randn(2, 8)
    gm = fxsd.transform(model, scaling="train", example_inputs=(x,))
    assert isinstance(gm, fx.GraphModule)
    assert torch.equal(gm.eval()(x), model.eval()(x))


class Cache:
    """What a decoder hands on: no tensor, no container."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.kind = Cache

    def update(self, key: Tensor) -> None:
        self.keys.append(key)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Any]:
        cache = Cache()
        for block in self.blocks:
            x = block(x)
            cache.update(x)
        return {"out": x, "cache": cache}


def test_objects_that_a_forward_makes_are_made_each_time():
    model = Decoder()
    gm = pickle.loads(pickle.dumps(fxsd.transform(model, scaling="train")))
    for batch in (2, 3):
        x = torch.randn(batch, 8)
        found, expected = gm.eval()(x), model.eval()(x)
        assert type(found["cache"]) is Cache
        assert found["cache"].kind is Cache
        assert all(torch.equal(a, b) for a, b in zip(found["cache"].keys, expected["cache"].keys, strict=True))


class Attends(nn.Module):
    """Writes into an object that it is given, in code that no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        y = self.fc(x) if x.sum() > 0 else self.fc(-x)
        cache.update(y)
        return y.relu()


class AttendingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attends()

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return x + self.attention(x, cache)


class CachingDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AttendingBlock() for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        cache = Cache()
        for block in self.blocks:
            x = block(x, cache)
        return x, cache.keys


def test_an_object_that_a_call_writes_into_is_the_same_one_outside():
    torch.manual_seed(0)
    model, x = CachingDecoder(), torch.randn(2, 8)
    gm = fxsd.transform(model, scaling="train", example_inputs=(x,))
    assert [s.name for s in fxsd.sites(gm)] == ["blocks.0", "blocks.1"]
    (expected, keys), (found, found_keys) = model.eval()(x), gm.eval()(x)
    assert torch.equal(expected, found)
    assert len(found_keys) == 2
    assert all(torch.equal(a, b) for a, b in zip(keys, found_keys, strict=True))


class Numbers(nn.Module):
    """A residual block whose two modes differ in numbers alone, one of them in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        low, high = (-0.5, 0.5) if self.training else (-1.0, 1.0)
        y = self.fc(x).clamp(low, high) * (2.0 if self.training else 3.0)
        return x + y.roll((1, 0) if self.training else (2, 0), (1, 0))


class Counts(Numbers):
    """Its two modes are the same ops, but one of them counts."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return self.fc(x).relu()


def test_numbers_that_depend_on_the_mode_are_picked_in_one_graph():
    torch._dynamo.reset()  # other tests have compiled models of these classes
    torch.manual_seed(0)
    model = nn.Sequential(Numbers(), Numbers())
    gm = fxsd.transform(model, 0.0, scaling="train")
    assert isinstance(gm, fx.GraphModule)
    assert gm.eval_graph is None
    assert not any(isinstance(module, fx.GraphModule) for path, module in gm.named_modules() if path)
    x = torch.randn(4, 8)
    compiled = torch.compile(gm, fullgraph=True, backend="eager")
    for frozen in ([], ["0"], ["1"], ["0", "1"]):
        model.train(), gm.train()
        for path in frozen:
            model.get_submodule(path).eval(), gm.get_submodule(path).eval()
        assert torch.equal(gm(x), model(x)), frozen
        assert torch.equal(compiled(x), model(x)), frozen


def test_python_that_counts_in_training_goes_on_counting():
    model = nn.Sequential(Block(), Counts())
    gm = fxsd.transform(model, 0.0)
    x = torch.randn(4, 8)
    gm.train()(x), gm(x), gm.eval()(x)
    assert gm.get_submodule("1").steps == 2


def test_a_failure_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    for model, options in (
        (nn.Sequential(Stage(1), OnValues()), {}),  # hidden adds
        (OnValues(), {"exclude": "*", "example_inputs": (torch.randn(2, 8),)}),  # no site left
        (Detector(), {"example_inputs": (3, 4, 5)}),  # inputs that do not fit
    ):
        before, mode = state(model), [module.training for module in model.modules()]
        with pytest.raises(fxsd.FxsdError):
            fxsd.transform(model, **options)
        assert same(state(model), before)
        assert [module.training for module in model.modules()] == mode


def test_example_inputs_that_do_not_run_are_told():
    model = Detector()
    before = state(model)
    with pytest.raises(fxsd.CaptureError, match=r"Nor does the model run on example_inputs: RuntimeError: "):
        fxsd.analyze(model, example_inputs=([torch.randn(3)],))
    assert same(state(model), before)


class CachesInEvaluation(nn.Module):
    """Calls its blocks with a cache in evaluation, and without one in training."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CachingBlock() for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        cache = None if self.training else Cache()
        for block in self.blocks:
            x = block(x if x.sum() > 0 else -x, cache)
        return x, cache.keys if cache else []


class CachingBlock(Block):
    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        y = super().forward(x)
        if cache is not None:
            cache.update(y)
        return y


def test_a_part_that_is_called_in_other_ways_in_training_has_two_programs():
    torch.manual_seed(0)
    model, x = CachesInEvaluation(), torch.randn(4, 8)
    gm = fxsd.transform(model, 0.0, scaling="train", example_inputs=(x,))
    assert [s.name for s in fxsd.sites(gm)] == ["blocks.0", "blocks.1"]
    for mode in (True, False, True):
        (expected, keys), (found, found_keys) = model.train(mode)(x), gm.train(mode)(x)
        assert torch.equal(expected, found)
        assert len(keys) == len(found_keys) == (0 if mode else 2)
        assert all(torch.equal(a, b) for a, b in zip(keys, found_keys, strict=True))
