"""Composer's arguments and its Trainer: against its formulas, and where Composer is installed against its own StochasticDepth."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxsd
from fxsd import FxsdError
from fxsd.integrations import composer as ours
from fxsd.integrations.composer import StochasticDepth, apply_stochastic_depth
from fxsd.run.ops import StochasticDepth as Op


def bottlenecks(classes: int = 5) -> torchvision.models.ResNet:
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], num_classes=classes)
    for block in model.modules():
        if isinstance(block, torchvision.models.resnet.Bottleneck):
            nn.init.uniform_(block.bn3.weight)
    return model


def rates(model: nn.Module) -> list[float]:
    """In float32, as Composer keeps them."""
    return [op.drop_rate.item() for op in model.modules() if isinstance(op, Op)]


# --- without Composer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.2, 0.37, 1.0])
def test_rates_are_those_that_composer_sets(p: float) -> None:
    resnet = apply_stochastic_depth(torchvision.models.resnet50(), "ResNetBottleneck", drop_rate=p)
    assert rates(resnet) == [torch.tensor(((index + 1) / 16) * p).item() for index in range(16)]
    same = apply_stochastic_depth(bottlenecks(), "ResNetBottleneck", drop_rate=p, drop_distribution="uniform")
    assert rates(same) == [torch.tensor(p).item()] * 5


def test_the_arguments_are_composer_s_in_its_order_with_its_defaults() -> None:
    shared = {"target_layer_name": inspect.Parameter.empty, "stochastic_method": "block", "drop_rate": 0.2, "drop_distribution": "linear"}
    of_model = {"model": inspect.Parameter.empty, **shared}
    for function, expected in ((apply_stochastic_depth, of_model), (StochasticDepth, {**shared, "drop_warmup": 0.0})):
        parameters = inspect.signature(function).parameters.values()
        positional = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}
        assert list(positional.items()) == list(expected.items())


def test_the_model_itself_becomes_what_transform_makes_of_it() -> None:
    model, x = bottlenecks(), torch.randn(3, 3, 32, 32)
    expected = fxsd.transform(copy.deepcopy(model), 0.3, drop_distribution="huang", stochastic_method="block")
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    assert apply_stochastic_depth(model, "Bottleneck", drop_rate=0.3) is model
    assert isinstance(model, torchvision.models.ResNet)
    assert list(model.state_dict()) == list(before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.graph.owning_module is model
    for mode in (True, False):
        outputs = []
        for each in (model.train(mode), expected.train(mode)):
            torch.manual_seed(1)
            outputs.append(each(x))
        assert torch.equal(*outputs)
    again = copy.deepcopy(model)
    assert torch.equal(again(x), model(x))
    fxsd.set_drop_rate(model, 0.0)
    assert set(rates(model)) == {0.0}
    assert max(rates(again)) == pytest.approx(0.3)


def test_what_refers_to_the_model_stays_good() -> None:
    model = bottlenecks()
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    around = nn.Sequential(model, nn.Softmax(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    apply_stochastic_depth(model, "ResNetBottleneck")
    before = [p.clone() for p in model.parameters()]
    around(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert calls == [1]
    handle.remove()
    around(torch.randn(4, 3, 32, 32))
    assert calls == [1]
    assert len(fxsd.sites(around)) == 5


class Chooses(nn.Module):
    """Python that decides on values, around two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = bottlenecks(8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y[:, None]) if y.sum() < 1e9 else y


def test_a_model_that_cannot_be_one_graph_is_changed_in_place_too() -> None:
    model, x = Chooses(), torch.randn(2, 3, 32, 32)
    targets = ["Bottleneck", "TransformerEncoderLayer"]
    apply_stochastic_depth(model, targets, "sample", 0.6, example_inputs=(x,))
    assert type(model) is Chooses
    assert [site.drop_rate for site in fxsd.sites(model)] == pytest.approx([0.6 * (i + 1) / 7 for i in range(7)])
    model(x).sum().backward()


def test_of_a_composer_model_the_network_is_changed() -> None:
    class ComposerModel(nn.Module):
        """As Composer's, in what matters here: its forward takes a batch apart."""

        def __init__(self) -> None:
            super().__init__()
            self.module, self.metric = bottlenecks(), nn.Identity()

        def forward(self, batch: Any) -> Tensor:
            return self.module(batch["image"] if type(batch) is dict else batch[0])

    model, x = ComposerModel().eval(), torch.randn(2, 3, 32, 32)
    network = model.module
    apply_stochastic_depth(model, "ResNetBottleneck")
    assert type(model) is ComposerModel
    assert model.module is network
    assert len(fxsd.sites(network)) == 5
    assert torch.equal(model({"image": x}), model((x, None)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stochastic_method": "layer"}, "stochastic_method must be one of 'sample', 'block', but got 'layer'"),
        ({"drop_rate": 1.2}, r"drop_rate must be a number from 0 to 1, but got 1\.2"),
        ({"drop_distribution": "quadratic"}, "drop_distribution must be one of"),
        ({"target_layer_name": "BasicBlock"}, "but got 'BasicBlock', which names none.*Classes around them are .*Bottleneck"),
    ],
)
def test_bad_arguments_are_told_and_leave_the_model(arguments: dict[str, Any], message: str) -> None:
    model = bottlenecks()
    before = vars(model).copy()
    with pytest.raises(FxsdError, match=message):
        apply_stochastic_depth(model, **{"target_layer_name": "ResNetBottleneck", **arguments})
    assert type(model) is torchvision.models.ResNet
    assert vars(model) == before


def test_without_composer_the_algorithm_says_so_and_the_function_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_missing", ImportError("No module named 'composer'"))
    with pytest.raises(FxsdError, match=r"StochasticDepth needs Composer \(pip install mosaicml\).*No module named 'composer'"):
        StochasticDepth("ResNetBottleneck")
    assert len(fxsd.sites(apply_stochastic_depth(bottlenecks(), "ResNetBottleneck"))) == 5


def test_importing_fxsd_imports_no_other_library() -> None:
    code = "import fxsd, sys; print([name for name in ('composer', 'fxsd.integrations') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- with Composer --------------------------------------------------------------------------------------------------------


@pytest.fixture
def composer() -> Any:
    return pytest.importorskip("composer", reason="needs mosaicml")


def classifier(whole: bool = False) -> Any:
    from composer.models import ComposerClassifier

    torch.manual_seed(0)
    return ComposerClassifier(torchvision.models.resnet50(num_classes=5) if whole else bottlenecks(), num_classes=5)


def trainer(model: Any, algorithms: list[Any], duration: str = "6ba", **options: Any) -> tuple[Any, list[list[float]]]:
    """A Trainer on a few small images, and the rates of the sites, or of Composer's layers, after each batch."""
    from composer import Callback, Trainer

    seen: list[list[float]] = []

    class Spy(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            layers = [m for m in state.model.modules() if isinstance(m, torchvision.models.resnet.Bottleneck) and hasattr(m, "drop_rate")]
            seen.append([float(layer.drop_rate) for layer in layers] or rates(state.model))

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 3, 32, 32), torch.randint(0, 5, (12,)))
    made = Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_size=4),
        optimizers=torch.optim.SGD(model.parameters(), 0.01, momentum=0.9),
        max_duration=duration,
        algorithms=algorithms,
        callbacks=[Spy()],
        device="cpu",
        progress_bar=False,
        seed=7,
        **options,
    )
    return made, seen


@pytest.mark.usefixtures("composer")
@pytest.mark.filterwarnings("ignore")  # of Composer and the versions of its libraries
class TestWithComposer:
    @pytest.mark.parametrize("method", ["block", "sample"])
    @pytest.mark.parametrize("distribution", ["linear", "uniform"])
    def test_rates_and_evaluation_are_those_of_composer_s_own(self, method: str, distribution: str) -> None:
        from composer.algorithms import StochasticDepth as Theirs

        model = classifier(whole=True)
        for block in model.modules():
            if isinstance(block, torchvision.models.resnet.Bottleneck):
                nn.init.uniform_(block.bn3.weight)
        twin = copy.deepcopy(model)
        keys = list(model.state_dict())
        trainer(model, [StochasticDepth("ResNetBottleneck", method, 0.3, distribution)])
        trainer(twin, [Theirs("ResNetBottleneck", method, 0.3, distribution)])
        assert rates(model) == [float(m.drop_rate) for m in twin.modules() if isinstance(m, torchvision.models.resnet.Bottleneck)]
        assert len(rates(model)) == 16
        batch = (torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
        torch.testing.assert_close(model.eval()(batch), twin.eval()(batch), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.eval_forward(batch), twin.eval_forward(batch), rtol=1e-5, atol=1e-6)
        assert list(model.state_dict()) == keys == list(twin.state_dict())

    @pytest.mark.parametrize("method", ["block", "sample"])
    def test_the_trainer_trains_resnet_50(self, method: str) -> None:
        from composer.loggers import InMemoryLogger

        model = classifier(whole=True)
        before, keys = model.module.fc.weight.clone(), list(model.state_dict())
        logger = InMemoryLogger()
        made, seen = trainer(model, [StochasticDepth("ResNetBottleneck", method, drop_warmup=0.5)], loggers=[logger])
        made.fit()
        last = [row[-1] for row in seen]
        assert last == pytest.approx([0, 0.2 / 3, 0.4 / 3, 0.2, 0.2, 0.2])
        assert not torch.equal(made.state.model.module.fc.weight, before)
        assert list(made.state.model.state_dict()) == keys
        logged = [float(value) for _, value in logger.data["stochastic_depth/drop_rate"]]
        assert logged == pytest.approx(last)
        assert [int(value) for _, value in logger.data["stochastic_depth/num_stochastic_layers"]] == [16]

    @pytest.mark.parametrize("warmup", ["3ba", "1ep", "12sp", "0.5dur", 0.5])
    def test_a_warm_up_may_be_any_time(self, warmup: Any) -> None:
        made, seen = trainer(classifier(), [StochasticDepth("ResNetBottleneck", "sample", 0.3, "uniform", warmup)])
        made.fit()
        steps = [0, 0.1, 0.2, 0.3, 0.3, 0.3] if warmup != "1ep" else [0, 0, 0, 0.3, 0.3, 0.3]
        assert [row[0] for row in seen] == pytest.approx(steps)

    def test_composer_s_own_warm_up_stops_a_step_short_and_ours_does_not(self) -> None:
        from composer.algorithms import StochasticDepth as Theirs

        made, theirs = trainer(classifier(), [Theirs("ResNetBottleneck", "block", 0.3, "uniform", 0.5)])
        made.fit()
        assert [row[0] for row in theirs] == pytest.approx([0, 0.1, 0.2, 0.2, 0.2, 0.2])

    def test_a_warm_up_below_zero_is_told(self) -> None:
        with pytest.raises(FxsdError, match=r"drop_warmup must be a time of 0 or more, but got -0\.5"):
            StochasticDepth("ResNetBottleneck", drop_warmup=-0.5)

    def test_a_checkpoint_resumes_where_it_was(self, tmp_path: Path) -> None:
        def algorithms() -> list[Any]:
            return [StochasticDepth("ResNetBottleneck", "block", 0.4, "uniform", "8ba")]

        whole, seen = trainer(classifier(), algorithms(), "6ba", save_folder=str(tmp_path), save_interval="3ba")
        whole.fit()
        (saved,) = tmp_path.glob("*ba3-*")
        resumed, after = trainer(classifier(), algorithms(), "6ba", load_path=str(saved))
        assert [type(algorithm) for algorithm in resumed.state.algorithms] == [StochasticDepth]
        resumed.fit()
        assert after == seen[3:]
        for a, b in zip(resumed.state.model.parameters(), whole.state.model.parameters(), strict=True):
            torch.testing.assert_close(a, b)

    def test_a_checkpoint_of_composer_s_own_loads(self, tmp_path: Path) -> None:
        from composer.algorithms import StochasticDepth as Theirs

        made, _ = trainer(classifier(), [Theirs("ResNetBottleneck")], "3ba", save_folder=str(tmp_path), save_interval="3ba")
        made.fit()
        (saved,) = tmp_path.glob("*ba3-*")
        mine = [StochasticDepth("ResNetBottleneck")]
        resumed, seen = trainer(classifier(), mine, "6ba", load_path=str(saved), load_exclude_algorithms=["StochasticDepth"])
        assert [type(algorithm) for algorithm in resumed.state.algorithms] == [StochasticDepth]
        for a, b in zip(resumed.state.model.parameters(), made.state.model.parameters(), strict=True):
            torch.testing.assert_close(a, b)
        resumed.fit()
        assert len(seen) == 3
