"""Activation checkpointing: what is computed again is what was drawn first, and a model's own checkpoints survive the rewrite."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from draws import left_out
from memory import kept_bytes
from ranks import Block
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

import fxsd
from fxsd.run.ops import StochasticDepth
from fxsd.run.skip import SkipStochasticDepth

MODES = list(itertools.product(("sample", "block"), ("mask", "skip")))
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


class Net(nn.Module):
    """Runs its blocks under `checkpoint` where it is told to, with a dropout of its own inside."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Dropout(0.1), Block()) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def transformed(net: nn.Module, method: str, compute: str, x: Tensor, **options: Any) -> Any:
    options = {"drop_distribution": "uniform", "scaling": "train", "example_inputs": (x.detach(),)} | options
    return fxsd.transform(net, 0.5, stochastic_method=method, compute=compute, **options)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, seed: int = 0) -> list[Tensor]:
    """The output, and what backward gives for the input and each parameter; the last parameter's is followed by a draw."""
    model.zero_grad()
    x.grad = None
    torch.manual_seed(seed)
    output = run(x)
    output.square().sum().backward()
    found = [output.detach(), x.grad, *(p.grad for p in model.parameters()), torch.rand(3)]
    assert all(isinstance(grad, Tensor) for grad in found)
    return found  # type: ignore[return-value]


def check_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@contextmanager
def recorded() -> Iterator[list[tuple[str, Any]]]:
    """Inside, what each site draws in training is noted, as (site, draw)."""
    draws: list[tuple[str, Any]] = []
    masks, rows = StochasticDepth.draw_mask, SkipStochasticDepth._draw

    def draw_mask(self: StochasticDepth, *args: Any) -> Tensor:
        mask = masks(self, *args)
        draws.append((self.site, mask.flatten().tolist()))
        return mask

    def draw(self: SkipStochasticDepth, *args: Any) -> Any:
        found = rows(self, *args)
        draws.append((self.site, (found.none, None if found.taken is None else found.taken.tolist())))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StochasticDepth, "draw_mask", draw_mask)
        patch.setattr(SkipStochasticDepth, "_draw", draw)
        yield draws


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("method", "compute"), MODES)
def test_what_is_computed_again_is_what_was_drawn_first(method: str, compute: str, reentrant: bool) -> None:
    x = inputs(8, 6)
    net = Net()
    plain = transformed(net, method, compute, x)
    own = transformed(Net(reentrant), method, compute, x)
    own.load_state_dict(net.state_dict())
    for seed in range(4):
        with recorded() as once:
            expected = gradients(plain, plain, x, seed)
        for run, model in ((lambda x: checkpoint(plain, x, use_reentrant=reentrant), plain), (own, own)):
            with recorded() as twice:
                check_equal(gradients(run, model, x, seed), expected)
            assert sorted(map(repr, twice)) == sorted(2 * list(map(repr, once)))


@pytest.mark.parametrize(("method", "compute"), MODES)
def test_compiled_code_computes_the_same_again(method: str, compute: str) -> None:
    x = inputs(8, 6)
    net = Net(False)
    own = transformed(net, method, compute, x)
    net.reentrant = None
    plain = transformed(net, method, compute, x)
    if (method, compute) == ("block", "skip"):  # compiled code takes the mask there, and draws no dropout for what it leaves out
        plain = transformed(net, method, "mask", x)
        assert {site.reason for site in fxsd.sites(own)} == {
            "compiled code takes the mask: its activations are checkpointed, where torch.cond does not run"
        }
    expected = None
    runs = [(own, own), (plain, plain)]
    if (method, compute) == ("sample", "skip"):
        runs.append((lambda x: checkpoint(plain, x, use_reentrant=False), plain))
    for run, gm in runs:
        torch._dynamo.reset()
        found = gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), gm, x)
        expected = expected or found
        check_equal(found, expected)


@left_out
def test_compiled_code_checkpoints_some_blocks_and_leaves_out_others() -> None:
    class Some(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[2](checkpoint(self.blocks[1], self.blocks[0](x), use_reentrant=False))

    x, net = inputs(8, 6), Some()
    for block in net.blocks:
        block[0].p = 0.0
    gm, mask = (transformed(net, "block", compute, x) for compute in ("skip", "mask"))
    assert [bool(site.reason) for site in fxsd.sites(gm)] == [False, True, False]
    found = []
    for each in (gm, mask):
        torch._dynamo.reset()
        found.append(gradients(torch.compile(each, fullgraph=True, backend="aot_eager"), each, x))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_programs_of_two_modes_keep_their_checkpoints() -> None:
    class Scores(Net):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                x = super().forward(x)
            else:
                for block in self.blocks:
                    x = block(x)
            return x if self.training else x.softmax(-1).cumsum(-1)

    x = inputs(8, 6)
    with torch.no_grad():  # says nothing about how the model will be used
        gm = transformed(Scores(False), "sample", "mask", x)
    assert gm.eval_graph is not None
    plain = Scores()
    plain.load_state_dict(gm.state_dict())
    plain = transformed(plain, "sample", "mask", x)
    for training in (True, False):
        check_equal(gradients(gm.train(training), gm, x), gradients(plain.train(training), plain, x))
        assert kept_bytes(lambda: gm(x)) < 0.6 * kept_bytes(lambda: plain(x))


class Split(nn.Module):
    """Checkpoints that do not begin and end where a residual block does."""

    def __init__(self, how: str, reentrant: bool | None) -> None:
        super().__init__()
        self.stem, self.f, self.g = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 12), nn.GELU()), nn.Linear(12, 6)
        self.how, self.reentrant = how, reentrant

    def run(self, function: Callable[..., Any], *args: Tensor) -> Any:
        return function(*args) if self.reentrant is None else checkpoint(function, *args, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        if self.how == "branch only":
            return x + self.run(lambda v: self.g(self.f(v)), x)
        if self.how == "two halves":
            h = self.run(self.f, x)
            return self.run(lambda v, h: v + self.g(h), x, h).sin()
        if self.how == "second half":
            return self.run(lambda v, h: v + self.g(h), x, self.f(x))
        scale, y, size = self.run(self.several, x)
        return scale * y * size

    def several(self, v: Tensor) -> tuple[Tensor, Tensor, int]:
        v = v.cos()
        return v, v + self.g(self.f(v)), v.shape[0]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", ["branch only", "two halves", "second half", "several values"])
def test_a_checkpoint_may_hold_a_part_of_a_block(how: str, reentrant: bool) -> None:
    x = inputs(8, 6)
    for method, compute in MODES:
        net = Split(how, reentrant)
        own = transformed(net, method, compute, x)
        net.reentrant = None
        plain = transformed(net, method, compute, x)
        assert [site.compute for site in fxsd.sites(own)] == [compute]
        for seed in range(4):
            check_equal(gradients(own, own, x, seed), gradients(plain, plain, x, seed))


@pytest.mark.parametrize("compute", ["mask", "skip"])
def test_copies_and_a_second_transform_keep_the_checkpoints(compute: str) -> None:
    x = inputs(8, 6)
    gm = transformed(Net(False), "sample", compute, x)
    expected, kept = gradients(gm, gm, x), kept_bytes(lambda: gm(x))
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    for again in (torch.load(file, weights_only=False), fxsd.transform(gm, 0.5, **_options(compute, x))):
        check_equal(gradients(again, again, x), expected)
        assert kept_bytes(lambda again=again: again(x)) == kept


def _options(compute: str, x: Tensor) -> dict[str, Any]:
    return {"compute": compute, "drop_distribution": "uniform", "scaling": "train", "example_inputs": (x.detach(),)}


def test_draws_are_restored_where_the_model_had_none_to_restore() -> None:
    class Forgets(Net):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block[1], x, use_reentrant=False, preserve_rng_state=False)
            return x

    net, x = Forgets(), inputs(8, 6)
    gm = transformed(net, "sample", "mask", x)
    gm.recompile()  # the graph; code that runs forgets, as its author asked
    plain = transformed(nn.Sequential(*[block[1] for block in net.blocks]), "sample", "mask", x)
    check_equal(gradients(gm, gm, x), gradients(plain, plain, x))


def test_a_sequential_that_is_checkpointed_in_segments() -> None:
    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*[Block() for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self.blocks, 2, x, use_reentrant=False)

    net, x = Segments(), inputs(8, 6)
    gm, plain = transformed(net, "sample", "skip", x), transformed(net.blocks, "sample", "skip", x)
    assert isinstance(gm, fx.GraphModule)
    assert kept_bytes(lambda: gm(x)) < 0.7 * kept_bytes(lambda: plain(x))
    check_equal(gradients(gm, gm, x), gradients(plain, plain, x))


def _of_class(cls: Any, config: Any, **given: Tensor) -> tuple[Callable[[], nn.Module], str, dict[str, Tensor]]:
    return lambda: cls(config(**SMALL, **OPTIONS[cls])), "activation_checkpointing_enable", given


OPTIONS: dict[Any, dict[str, Any]] = {
    ViTForImageClassification: {"image_size": 16, "patch_size": 8},
    BertForSequenceClassification: {"vocab_size": 30, "max_position_embeddings": 16},
    GPT2LMHeadModel: {"vocab_size": 30, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False},
}
IDS = {"input_ids": torch.arange(16).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
LIBRARIES = {
    "ViT": _of_class(ViTForImageClassification, ViTConfig, pixel_values=torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1])),
    "BERT": _of_class(BertForSequenceClassification, BertConfig, **IDS, labels=torch.tensor([0, 1])),
    "GPT-2": _of_class(GPT2LMHeadModel, GPT2Config, **IDS, labels=IDS["input_ids"]),
    "timm's ViT": (
        lambda: timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32, num_classes=3),
        "set_grad_checkpointing",
        {"x": torch.randn(2, 3, 32, 32)},
    ),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_switch_of_a_library_s_model_is_kept(name: str) -> None:
    make, switch, given = LIBRARIES[name]
    torch.manual_seed(0)
    model = make().train()
    plain = fxsd.transform(model, 0.5, example_inputs=given)
    getattr(model, switch)()
    own = fxsd.transform(model, 0.5, example_inputs=given)
    assert isinstance(own, fx.GraphModule)
    assert len(fxsd.sites(own)) == len(fxsd.sites(plain)) == 6
    found = []
    for gm in (plain, own):
        gm.zero_grad()
        torch.manual_seed(1)
        output = gm(**given)
        (output.sum() if isinstance(output, Tensor) else output.loss).backward()
        found.append([p.grad.clone() for p in gm.parameters() if p.grad is not None])
    check_equal(*found)
    assert kept_bytes(lambda: own(**given)) < 0.6 * kept_bytes(lambda: plain(**given))


@pytest.mark.parametrize("name", ["ViT", "timm's ViT"])
def test_a_switch_that_comes_too_late_is_an_error_where_a_graph_runs(name: str) -> None:
    make, switch, given = LIBRARIES[name]
    model = make()
    gm = fxsd.transform(model, 0.5, example_inputs=given, compute="skip")
    with pytest.raises(fxsd.FxsdError, match=r"is part of the graph .* switch it on on the original model, and transform that"):
        getattr(gm, switch)()
    getattr(model, switch)()
    gm = fxsd.transform(model, 0.5, example_inputs=given, compute="skip")
    getattr(gm, switch)()  # as trainers do
    off = "activation_checkpointing_disable" if switch.startswith("activation") else switch
    with pytest.raises(fxsd.FxsdError, match="switch it off on the original model"):
        getattr(gm, off)(*[False] * (off == switch))


@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")  # torch 2.14 asks for an argument that 2.7 has not
def test_checkpoints_that_a_graph_cannot_keep_stay_python() -> None:
    class Selective(Net):
        def forward(self, x: Tensor) -> Tensor:
            def contexts() -> Any:
                return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default])

            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            return x

    class Nested(Net):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: checkpoint(self.blocks, x, use_reentrant=False), x, use_reentrant=False)

    x = inputs(8, 6)
    nested = Nested()
    nested.blocks = nn.Sequential(*nested.blocks)
    for net, why in (
        (Selective(), "with options of its own, context_fn"),
        (nested, "inside a checkpoint"),
    ):
        assert any(why in note for note in fxsd.analyze(net, example_inputs=(x,)).notes)
        gm, plain = transformed(net, "sample", "mask", x), transformed(nn.Sequential(*net.blocks), "sample", "mask", x)
        assert not isinstance(gm, fx.GraphModule)
        assert kept_bytes(lambda gm=gm: gm(x)) < kept_bytes(lambda plain=plain: plain(x))
        check_equal(gradients(gm, gm, x), gradients(plain, plain, x))
