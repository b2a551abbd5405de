"""Capture: what becomes a leaf, what stays live, and that the model is left alone."""

from __future__ import annotations

import math
import pickle
import re

import numpy
import pytest
import timm.layers
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import fxsd
from fxsd.capture import Part, capture
from fxsd.capture.droppath import drop_paths
from fxsd.capture.hidden import hidden_residual_adds
from fxsd.graph.graphmodule import StochasticGraphModule, build, shallow_tree


def captured(model: nn.Module, example_inputs: object = None) -> Part:
    (whole,) = capture(model, example_inputs, lambda found: set()).parts
    return whole


def rebuilt(model: nn.Module, example_inputs: object = None) -> StochasticGraphModule:
    found = captured(model, example_inputs)
    return build(shallow_tree(model, found.graphs, found.constants), *found.graphs)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(F.gelu(self.fc1(x)), 0.5, training=self.training))


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Squares(nn.Module):
    """Decides on a size, and holds no add."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        side = int(math.sqrt(x.shape[0]))
        return self.fc(x) if side * side == x.shape[0] else self.fc(-x)


class SizedBlock(Squares):
    """Decides on a size, and holds a residual add."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 100:
            x = x[:100]
        shortcut = x
        x = self.fc(x).relu()
        return x + shortcut


# --- leaves ---------------------------------------------------------------------------------------------------------------


def test_a_module_that_cannot_be_traced_and_holds_no_add_becomes_a_call():
    model = nn.Sequential(Residual(nn.Sequential(Squares(), nn.ReLU())), Residual(Mlp()))
    analysis = fxsd.analyze(model)
    assert [site.module for site in analysis.sites] == ["0", "1"]
    assert "'0.branch.0' (Squares) stopped tracing" in analysis.notes[0]
    assert "side = int(math.sqrt(x.shape[0]))" in analysis.notes[0]
    gm = fxsd.transform(model, scaling="train").eval()
    for batch in (3, 4):
        x = torch.randn(batch, 8)
        assert torch.equal(gm(x), model.eval()(x))


def test_a_module_that_cannot_be_traced_and_holds_residual_adds_is_an_error_that_names_it():
    model = nn.Sequential(Residual(Mlp()), nn.Sequential(SizedBlock(), SizedBlock()))
    where = re.escape(f"module '1.0' (SizedBlock) stopped tracing at {__file__}:")
    with pytest.raises(fxsd.CaptureError, match=where + r"\d+, `if x.shape\[0\] > 100:`.*example_inputs.*It holds 1 residual add"):
        fxsd.transform(model)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("y = self.f(x); return x + y", 1),
        ("identity = x; x = self.f(x); x += identity; return x", 1),
        ("x = x + self.f(x); x = x + self.f(x); return x", 2),
        ("identity = x\n    if self.down is not None:\n        identity = self.down(x)\n    return self.f(x) + identity", 1),
        ("scores = self.f(x) + mask; return scores", 0),
        ("h, w = x.shape[1] + 1, x.size(2) + 2; return self.f(x)", 0),
        ("return self.f(x) + self.bias", 0),
    ],
)
def test_residual_adds_are_read_from_source(source: str, count: int, tmp_path, monkeypatch):
    (tmp_path / "written.py").write_text(
        "import torch\nclass M(torch.nn.Module):\n  def forward(self, x, mask=None):\n    " + source.replace("; ", "\n    ") + "\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "written", raising=False)
    assert hidden_residual_adds(__import__("written").M()) == count


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.fc(x)


def test_a_module_that_switches_gradients_off_keeps_doing_so():
    model = Residual(nn.Sequential(nn.Linear(8, 8), NoGrad(), nn.ReLU()))
    gm = fxsd.transform(model, 0.0)
    x = torch.randn(2, 8, requires_grad=True)
    gm(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 8))  # through the shortcut alone
    assert model.branch[1].fc.weight.grad is None


def test_a_module_with_a_hook_is_called_so_that_the_hook_runs():
    model = Residual(Mlp())
    calls = []
    model.branch.register_forward_hook(lambda module, args, out: calls.append(tuple(out.shape)))
    gm = fxsd.transform(model)
    assert calls == []
    gm(torch.randn(5, 8))
    assert calls == [(5, 8)]


def test_a_parametrized_module_stays_parametrized():
    model = Residual(nn.Sequential(Mlp(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))))
    gm = fxsd.transform(model, 0.0)
    with torch.no_grad():
        model.branch[1].parametrizations.weight.original0.mul_(2)
    x = torch.randn(2, 8)
    assert torch.equal(gm.eval()(x), model.eval()(x))


class MadeInForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.Softmax(dim=-1)(self.fc(x))


def test_a_module_made_inside_a_forward_is_part_of_its_caller():
    model = Residual(MadeInForward())
    x = torch.randn(2, 8)
    assert torch.equal(fxsd.transform(model, 0.0)(x), model(x))


def test_torch_transformer_layers_are_looked_into():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    analysis = fxsd.analyze(nn.Sequential(layer, nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)))
    assert [(site.module, site.depth) for site in analysis.sites] == [("0", 0), ("0", 0), ("1", 1), ("1", 1)]


# --- constants and state --------------------------------------------------------------------------------------------------


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.plain = torch.arange(8.0)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.unused = nn.Linear(3, 3)
        self.made = torch.linspace(0, 1, 8).tolist()

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.seen = x
        return self.fc(x).relu() + self.plain * torch.ones(8) + torch.tensor(self.made)


def test_constants_buffers_and_unused_parameters_survive():
    model = Residual(Constants())
    gm = fxsd.transform(model, 0.0)
    assert list(gm.state_dict()) == list(model.state_dict())
    assert [name for name, _ in gm.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert int(model.branch.count) == 0
    x = torch.randn(2, 8)
    out = gm(x)
    assert int(model.branch.count) == 1
    assert torch.equal(out, model(x))


def test_what_a_forward_stores_while_traced_is_taken_back():
    model = Residual(Constants())
    before = set(model.branch.__dict__)
    fxsd.transform(model)
    assert set(model.branch.__dict__) == before
    assert set(vars(model)) == set(vars(Residual(Constants())))


def test_draws_in_a_forward_stay_draws():
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).relu() * torch.rand(8)

    gm = fxsd.transform(Residual(Noise()), 0.0)
    x = torch.randn(2, 8)
    assert not torch.equal(gm(x), gm(x))


def test_plain_attributes_of_the_root_carry_over():
    model = Residual(Mlp())
    model.num_classes, model.config = 10, {"name": "tiny"}
    gm = fxsd.transform(model)
    assert (gm.num_classes, gm.config) == (10, {"name": "tiny"})
    assert type(gm.branch) is Mlp


def test_the_class_has_no_training_attribute_after_success_and_failure():
    fxsd.transform(Residual(Mlp()))
    with pytest.raises(fxsd.CaptureError, match="SizedBlock"):
        fxsd.transform(nn.Sequential(SizedBlock()))
    assert "training" not in vars(nn.Module)
    assert torch.arange(3).tolist() == [0, 1, 2]


# --- live modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("traced_in_training", [True, False])
def test_functional_dropout_follows_train_and_eval(traced_in_training: bool):
    gm = fxsd.transform(Residual(Mlp()).train(traced_in_training), 0.0)
    x = torch.randn(4, 8)
    gm.train()
    assert not torch.equal(gm(x), gm(x))
    gm.eval()
    assert torch.equal(gm(x), gm(x))
    gm.train()
    gm.branch.eval()
    assert torch.equal(gm(x), gm(x))


class PickyAttention(nn.Module):
    """Branches on `self.training` in Python, and holds no add."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)


def test_attention_dropout_that_branches_on_the_mode_stays_live():
    gm = fxsd.transform(Residual(PickyAttention()).eval(), 0.0)
    x = torch.randn(2, 5, 8)
    assert torch.equal(gm(x), gm(x))
    assert not torch.equal(gm.train()(x), gm(x))


class WithAux(nn.Module):
    """Returns one thing in eval and two in training, and holds sites."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head, self.aux = Residual(Mlp()), nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.block(x)
        out = self.head(x)
        if self.training:
            return out, self.aux(x)
        return out


def test_a_model_that_is_two_programs_stays_two():
    model = WithAux()
    gm = fxsd.transform(model, 1.0)
    x = torch.randn(2, 8)
    out, aux = gm(x)
    assert torch.equal(out, model.head(x))
    assert torch.equal(aux, model.aux(x))
    single = gm.eval()(x)
    assert torch.equal(single, model.head(x))  # keep_prob is 0
    assert [site.name for site in fxsd.sites(gm)] == ["block"]
    fxsd.set_drop_rate(gm, 0.0)
    assert torch.equal(gm(x), model.eval()(x))


class WithAuxAndTable(WithAux):
    """Two programs; training alone uses a tensor that is no attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = [torch.rand(2)]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        found = super().forward(x)
        return (found[0] * self.tables[0], found[1]) if self.training else found


def test_a_constant_that_only_training_uses_is_kept():
    model = WithAuxAndTable()
    gm = fxsd.transform(model, 1.0, drop_distribution="uniform")
    x = torch.rand(2, 8)
    assert torch.equal(gm(x)[0], model.head(x) * model.tables[0])
    assert torch.equal(gm.eval()(x), model.head(x))


class Remembers(WithAux):
    """Two programs, a part that must be a leaf, and a value kept on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.seen = PickyAttention(), None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.seen is None:
            self.seen = x.mean()
        return super().forward(self.attention(x) * self.seen)


def test_each_trace_starts_from_the_model_as_it_was():
    model = Remembers()
    gm = fxsd.transform(model, 1.0, drop_distribution="uniform").eval()
    x = torch.rand(2, 5, 8)
    assert torch.equal(gm(x), model.head(model.eval().attention(x) * x.mean()))
    assert model.seen is None


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_of_torchvision_are_live(name: str):
    model = torchvision.models.get_model(name, weights=None, init_weights=False).eval()
    gm = rebuilt(model)
    x = torch.randn(2, 3, 299, 299)
    with torch.no_grad():
        assert torch.equal(gm(x), model(x))
        gm.train()
        torch.manual_seed(0)
        ours = gm(x)
        torch.manual_seed(0)
        theirs = model.train()(x)
    assert type(ours) is type(theirs)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


# --- stochastic depth that is there already ---------------------------------------------------------------------------------


class OwnDrop(nn.Module):
    def __init__(self, p: float, rescale: bool) -> None:
        super().__init__()
        self.p, self.rescale = p, rescale

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        mask = (torch.rand(len(x), *[1] * (x.dim() - 1)) >= self.p).to(x)
        return x * mask / (1 - self.p) if self.rescale else x * mask


class ElementDrop(OwnDrop):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


class Doubler(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if self.training else x


@pytest.mark.parametrize(
    ("module", "is_one"),
    [
        (OwnDrop(0.1, True), True),
        (OwnDrop(0.1, False), True),
        (OwnDrop(0.0, True), False),
        (torchvision.ops.StochasticDepth(0.1, "row"), True),
        (torchvision.ops.StochasticDepth(0.3, "batch"), True),
        (timm.layers.DropPath(0.01), True),
        (timm.layers.DropPath(0.0), False),
        (ElementDrop(0.1, True), False),
        (nn.Dropout(0.1), False),
        (nn.Dropout2d(0.1), False),
        (nn.Identity(), False),
        (nn.ReLU(), False),
    ],
    ids=lambda value: repr(value) if isinstance(value, nn.Module) else "",
)
def test_stochastic_depth_is_told_by_what_it_does(module: nn.Module, is_one: bool):
    for mode in (True, False):
        module.train(mode)
        assert (module in drop_paths(nn.Sequential(module))) == is_one
        assert module.training == mode


def test_keeping_all_the_stochastic_depth_there_is_leaves_nothing_to_do():
    block = Residual(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), OwnDrop(0.1, True)))
    with pytest.raises(fxsd.FxsdError, match=r"existing='keep'.*every residual add has.*branch\.2.*Nothing is left to do"):
        fxsd.transform(block, existing="keep")
    assert len(fxsd.sites(fxsd.transform(block, existing="replace"))) == 1


# --- signatures -----------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        y = self.mlp(x) * scale
        if mask is not None:
            y = y * mask
        return x + y


def test_the_graph_keeps_the_default_of_an_optional_argument_and_refuses_others():
    model = Masked().eval()
    gm = fxsd.transform(model, scaling="train")
    x = torch.randn(2, 8)
    assert torch.equal(gm(x, torch.full((8,), 3.0), scale=2.0), model(x, torch.full((8,), 3.0), scale=2.0))
    gm.recompile()
    assert torch.equal(gm(x), model(x))
    assert torch.equal(gm(x, None, scale=1.0), model(x))
    with pytest.raises(fxsd.FxsdError, match=r"captured with mask=None.*example_inputs with mask"):
        gm(x, torch.ones(8))
    with pytest.raises(fxsd.FxsdError, match=r"captured with scale=1\.0"):
        gm(x, scale=2.0)


def test_an_optional_argument_that_was_given_cannot_be_left_out_of_the_graph():
    class Attending(Masked):
        def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
            x = x if mask is None else x * 2  # without the check, this would be doubled without a mask, which attention can do without
            y = self.mlp(x)[None]
            return x + F.scaled_dot_product_attention(y, y, y, mask)[0]

    x, mask = torch.randn(2, 8), torch.ones(2, 2)
    model = Attending().eval()
    gm = fxsd.transform(model, scaling="train", example_inputs=(x, mask))
    assert torch.equal(gm(x), model(x))
    gm.recompile()
    assert torch.equal(gm(x, mask), model(x, mask))
    for call in (lambda: gm(x), lambda: gm(x, None), lambda: torch.compile(gm, backend="eager")(x)):
        with pytest.raises(fxsd.FxsdError, match=r"captured with mask given.*example_inputs without mask"):
            call()


def test_a_default_that_is_a_tuple_is_checked_too():
    class Sliced(Masked):
        def forward(self, x: Tensor, columns: tuple[int, int] = (0, 4)) -> Tensor:
            y = self.mlp(x)
            return x + F.pad(y[:, columns[0] : columns[1]], (0, 4))

    model = Sliced().eval()
    gm = fxsd.transform(model, scaling="train")
    x = torch.randn(2, 8)
    assert torch.equal(gm(x, (1, 5)), model(x, (1, 5)))
    gm.recompile()
    assert torch.equal(gm(x, (0, 4)), model(x))
    with pytest.raises(fxsd.FxsdError, match=r"captured with columns=\(0, 4\)"):
        gm(x, (1, 5))


@pytest.mark.parametrize("example", [(torch.ones(2, 8), torch.ones(8)), {"x": torch.ones(2, 8), "mask": torch.ones(8)}])
def test_example_inputs_say_which_arguments_are_given(example: object):
    model = Masked().eval()
    gm = fxsd.transform(model, scaling="train", example_inputs=example)
    x, mask = torch.randn(3, 8), torch.rand(8)
    assert torch.equal(gm(x, mask), model(x, mask))
    assert torch.equal(gm(x=x, mask=mask), model(x, mask))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.ones(2, 8), r"write \(x,\)"),
        (3, "must be a tuple of args or a dict of kwargs, but got int"),
        ((1, 2, 3, 4), "do not fit the model's forward.*too many positional"),
        ({"y": 1}, "do not fit the model's forward"),
    ],
)
def test_example_inputs_that_do_not_fit_are_refused(example: object, message: str):
    with pytest.raises(fxsd.FxsdError, match=message):
        fxsd.transform(Masked(), example_inputs=example)


def test_variable_arguments_need_an_example():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mlp()

        def forward(self, *xs: Tensor) -> Tensor:
            return xs[0] + self.mlp(xs[0]) * xs[1]

    with pytest.raises(fxsd.FxsdError, match=r"takes \*xs; pass example_inputs"):
        fxsd.transform(Sum())
    model = Sum().eval()
    x = torch.randn(2, 8)
    assert torch.equal(fxsd.transform(model, scaling="train", example_inputs=(x, x))(x, x), model(x, x))


class Rounds(torch.autograd.Function):
    """A step forward, the identity backward."""

    @staticmethod
    def forward(ctx, x: Tensor, levels: int) -> Tensor:
        return (x * levels).round() / levels

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return Rounds.apply(self.fc(x), 4).relu()


@pytest.mark.parametrize("example_inputs", [None, (torch.zeros(2, 8),)])
def test_the_backward_of_an_autograd_function_stays(example_inputs):
    torch.manual_seed(0)
    model = nn.Sequential(Residual(Quantised()), Residual(Quantised()))
    gm = fxsd.transform(model, 0.0, example_inputs=example_inputs)
    x = torch.randn(3, 8)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for again in (gm, pickle.loads(pickle.dumps(gm)), torch.compile(gm, fullgraph=True, backend="eager")):
        found = torch.autograd.grad(again(x).square().sum(), list(again.parameters()))
        assert all(g.abs().sum() > 0 for g in found)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


class SizesByNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if (numpy.array(x.shape[1:]) % 4).any():
            raise ValueError("sizes must be multiples of 4")
        return x + self.fc(x).relu()


def test_numpy_may_look_at_sizes():
    model = SizesByNumpy().eval()
    gm = fxsd.transform(model, scaling="train", example_inputs=(torch.randn(2, 4, 8),))
    for batch in (2, 3):
        x = torch.randn(batch, 4, 8)
        assert torch.equal(gm(x), model(x))
    with pytest.raises(ValueError, match="multiples of 4"):
        gm(torch.randn(2, 5, 8))
    gm.recompile()
    with pytest.raises(fxsd.FxsdError, match="captured for inputs of another size"):
        gm(torch.randn(2, 5, 8))
