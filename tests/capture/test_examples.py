"""Shape-aware capture: with an example call, Python may decide on sizes, and the graph checks what was decided."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsd


class Windows(nn.Module):
    """Attention in windows, padded where the size asks for it; holds the residual add itself."""

    def __init__(self, side: int = 4) -> None:
        super().__init__()
        self.side, self.norm, self.fc = side, nn.BatchNorm2d(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        s = self.side
        y = self.norm(x)
        right, below = (s - W % s) % s, (s - H % s) % s
        if right > 0 or below > 0:
            y = F.pad(y, (0, right, 0, below))
        rows, columns = math.ceil(H / s), math.ceil(W / s)
        y = y.view(B, C, rows, s, columns, s).permute(0, 2, 4, 3, 5, 1).reshape(-1, s * s, C)
        y = self.fc(y).softmax(1)
        y = y.view(B, rows, columns, s, s, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, rows * s, columns * s)
        return x + y[:, :, :H, :W]


@pytest.mark.parametrize("side", [8, 6])
def test_control_flow_on_sizes_is_followed_and_the_batch_stays_live(side: int):
    model = nn.Sequential(Windows(), Windows())
    gm = fxsd.transform(model, scaling="train", example_inputs=(torch.randn(2, 8, side, side),))
    assert [site.module for site in fxsd.sites(gm)] == ["0", "1"]
    gm.eval()
    for batch in (1, 2, 3, 7):
        x = torch.randn(batch, 8, side, side)
        assert torch.equal(gm(x), model.eval()(x))


def test_without_an_example_the_same_model_is_an_error_that_asks_for_one():
    with pytest.raises(fxsd.CaptureError, match=r"module '0' \(Windows\).*if right > 0 or below > 0.*Pass example_inputs.*1 residual add"):
        fxsd.transform(nn.Sequential(Windows()))


def test_the_graph_refuses_another_size_where_a_decision_would_have_gone_the_other_way():
    gm = fxsd.transform(Windows(), scaling="train", example_inputs=(torch.randn(2, 8, 8, 8),)).eval()
    x = torch.randn(2, 8, 12, 4)  # no padding either: the decisions hold
    plain = gm(torch.randn(2, 8, 7, 8))
    assert plain.shape == (2, 8, 7, 8), "code decides anew"
    gm.recompile()
    assert torch.equal(gm(x), Windows.forward(gm, x))
    with pytest.raises(fxsd.FxsdError, match=r"inputs of another size: `if right > 0 or below > 0:`.*was False then and is True now"):
        gm(torch.randn(2, 8, 7, 8))


def test_the_example_call_runs_nothing_of_the_model():
    model = Windows()
    fxsd.transform(model, example_inputs=(torch.full((2, 8, 7, 7), 9.0),))
    assert int(model.norm.num_batches_tracked) == 0
    assert torch.equal(model.norm.running_mean, torch.zeros(8))


class Curious(nn.Module):
    """Asks Python for a value in every way there is."""

    def __init__(self, ask) -> None:
        super().__init__()
        self.fc, self.ask = nn.Linear(6, 6), ask

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).relu()
        return x + y * self.ask(x)


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: int(x.shape[1]),
        lambda x: len(x.shape),
        lambda x: float(x.size(1)),
        lambda x: sum(1 for _ in range(x.shape[1])),
        lambda x: max(x.shape[1], 3),
        lambda x: round(x.shape[1] / 4),
        lambda x: math.floor(x.shape[1] / 4) + math.ceil(x.shape[1] / 4),
        lambda x: 2 if 6 in x.shape else 3,
        lambda x: sum(x.shape[1:]),
        lambda x: 2 if isinstance(x, Tensor) else 3,
        lambda x: 2 if isinstance(x.shape[1], int) else 3,
        lambda x: 2 if x.dtype == torch.float32 and x.device.type == "cpu" and x.ndim == 2 else 3,
        lambda x: torch.arange(x.shape[1]) + torch.zeros(x.shape[1], dtype=x.dtype),
        lambda x: torch.stack(list(x.t())).sum(0).unsqueeze(-1),
        lambda x: [2, 3, 4, 5, 6, 7, 8][x.shape[1]],
        lambda x: 2 if x is not None and not x.is_nested else 3,
    ],
)
def test_python_may_ask_for_sizes_in_any_way(ask):
    model = Curious(ask).eval()
    gm = fxsd.transform(model, scaling="train", example_inputs=(torch.randn(2, 6),))
    for batch in (2, 3):
        x = torch.randn(batch, 6)
        assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize("ask", [lambda x: 2 if x.sum() > 0 else 3, lambda x: int(x.sum())])
def test_what_decides_on_the_values_of_tensors_stays_python(ask):
    net = nn.Sequential(Curious(ask))
    gm = fxsd.transform(net, scaling="train", example_inputs=(torch.ones(2, 6),)).eval()
    assert len(fxsd.sites(gm)) == 1
    assert [node.op for node in gm.graph.nodes] == ["placeholder", "call_module", "output"]
    notes = fxsd.analyze(net, example_inputs=(torch.ones(2, 6),)).notes
    assert "module '0' (Curious) stopped tracing" in notes[0]
    assert "of a tensor: it decides on values" in notes[0]
    for x in (torch.ones(2, 6), -torch.ones(3, 6)):
        assert torch.equal(gm(x), net.eval()(x))


def test_a_number_taken_out_of_a_tensor_stays_live():
    model = Curious(lambda x: x.sum().item())
    gm = fxsd.transform(model, scaling="train", example_inputs=(torch.ones(2, 6),)).eval()
    x = torch.randn(2, 6)
    assert torch.equal(gm(x), model.eval()(x))


class Assigns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_zeros(x.shape[0], 6)
        y[:, 1:] = self.fc(x).relu()[:, 1:]
        y.mul_(2)
        return x + y


def test_what_is_written_into_a_tensor_is_part_of_the_branch():
    model = Assigns().eval()
    gm = fxsd.transform(model, 1.0, scaling="train")
    x = torch.randn(4, 6)
    assert torch.equal(gm(x), model(x))
    assert torch.equal(gm.train()(x), x)


def counted(x: Tensor) -> Tensor:
    rows = width = x.shape[1]
    rows += 1
    rows *= 2
    y = z = x.new_ones(1, 6)
    y += width
    y *= rows
    return y - z + width  # one tensor under two names; two numbers


def test_in_place_operators_write_into_tensors_and_rename_numbers():
    model = Curious(lambda x: 1 + counted(x)).eval()
    x = torch.randn(2, 6)
    for example in (None, (x,)):
        gm = fxsd.transform(model, scaling="train", example_inputs=example)
        assert torch.equal(gm(x), model(x))
    assert torch.equal(counted(x), torch.full((1, 6), 6.0))


class Output(OrderedDict):
    pass


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor, **options: Tensor) -> Output:
        y = x + self.fc(x).relu() * options["gain"]
        return Output(last=y, all=(x, y))


def test_outputs_keep_their_class_and_keywords_their_names():
    model = Named().eval()
    gm = fxsd.transform(model, scaling="train", example_inputs={"x": torch.ones(1, 6), "gain": torch.ones(6)})
    x, gain = torch.randn(2, 6), torch.randn(6)
    ours, theirs = gm(x=x, gain=gain), model(x=x, gain=gain)
    assert type(ours) is Output
    assert list(ours) == ["last", "all"]
    assert torch.equal(ours["last"], theirs["last"])
    assert torch.equal(ours["all"][1], theirs["last"])


class Wrapped(nn.Module):
    """A decorator that tells an argument left out from one given, as libraries' wrappers do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, *args, **kwargs):
        kwargs.setdefault("scale", 2.0)
        return self.run(*args, **kwargs)

    def run(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + self.fc(x).relu() * scale


def test_an_argument_that_the_call_leaves_out_stays_left_out():
    model = Wrapped().eval()
    x = torch.randn(2, 6)
    for example in ((x,), {"x": x}):
        gm = fxsd.transform(model, scaling="train", example_inputs=example)
        assert torch.equal(gm(x), model(x))


class Remembers(nn.Module):
    """Keeps a size on the module, and then decides on values: the second attempt must not see the first one's."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.fc = None, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.size is None:
            self.size = x.shape[0]
        return self.fc(x) if x.sum() > self.size else self.fc(-x)


def test_a_failed_attempt_leaves_nothing_for_the_next():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Remembers()

        def forward(self, x: Tensor) -> Tensor:
            return x + F.relu(self.part(x)) * (1 if self.part.size is None else self.part.size)

    model = Net().eval()
    x = torch.randn(3, 6)
    gm = fxsd.transform(model, scaling="train", example_inputs=(x,))
    assert model.part.size is None
    gm.graph.lint()
    assert gm(x).shape == x.shape


def test_a_torch_transformer_encoder_is_captured_whole():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    gm = fxsd.transform(model, 1.0, drop_distribution="uniform", example_inputs=(torch.randn(2, 5, 16),))
    assert [site.depth for site in fxsd.sites(gm)] == [0, 0, 1, 1, 2, 2]
    x = torch.randn(4, 7, 16)
    expected = x
    for each in model.layers:
        expected = each.norm2(each.norm1(expected))
    assert torch.allclose(gm(x), expected, atol=1e-6)


class Decoder(nn.Module):
    """Gives all its levels in training, and the last one in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for layer in self.layers:
            x = x + layer(x)
            levels.append(x)
        return torch.stack(levels if self.training else levels[-1:])


class Detector(nn.Module):
    """Takes the best of what the decoder gives, as many as there are, in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()

    def forward(self, x: Tensor) -> Tensor:
        found = self.decoder(x).squeeze(0)
        if self.training:
            return found
        return found.flatten(1).topk(min(20, found.shape[1] * 8), dim=1)[0]


@pytest.mark.parametrize("training", [True, False])
def test_what_a_module_gives_in_a_mode_is_what_decisions_in_that_mode_see(training: bool):
    model = Detector().train(training)
    gm = fxsd.transform(model, scaling="train", example_inputs=(torch.randn(2, 5, 8),))
    assert len(fxsd.sites(gm)) == 3
    fxsd.set_drop_rate(gm, 0.0)
    for batch in (2, 4):
        x = torch.randn(batch, 5, 8)
        for mode in (True, False):
            assert torch.equal(gm.train(mode)(x), model.train(mode)(x))
