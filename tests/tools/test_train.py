"""tools/train.py and the files around it: the data, the nets, what arms share, the search and what is reported. Tiny runs; no accuracy is
expected of any."""

from __future__ import annotations

import importlib
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

import fxsd
from fxsd import FxsdError

TINY = ["--data", "digits", "--samples", "100", "--blocks", "2", "--width", "4", "--epochs", "2", "--batch", "50", "--seeds", "2"]


@pytest.fixture(autouse=True)
def _packages(tool: ModuleType):
    pytest.importorskip("sklearn")
    pytest.importorskip("scipy")


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def a_setting(**changes: object):
    source = module("trial.tasks").Source("digits", samples=100)
    return replace(module("trial.training").Setting(source, module("trial.nets").Size(2, 4), epochs=2, batch=50), **changes)


def quiet(text: str, done: int = 0) -> None:
    pass


def an_arm(compute: str = "base", rate: float | None = None, **changes: object):
    spread = None if rate is None else module("measure.stepping").Rate("uniform", rate)
    return replace(module("trial.training").Arm(compute, compute, 0.01, spread), **changes)


# --- data -----------------------------------------------------------------------------------------------------------------


def rows(data: Dataset) -> set[bytes]:
    return {data[i][0].numpy().tobytes() for i in range(len(data))}


@pytest.mark.parametrize("name", ["mnist1d", "digits"])
def test_no_sample_is_in_two_parts(name: str):
    if name == "mnist1d":
        pytest.importorskip("mnist1d")
    task = module("trial.tasks").load(module("trial.tasks").Source(name, samples=500), seed=0)
    parts = [rows(part) for part in (task.train, task.validation, task.test)]
    assert len(task.train) == 500
    assert min(map(len, parts)) >= 290
    assert len(set().union(*parts)) == sum(map(len, parts))
    assert tuple(task.train[0][0].shape) == task.shape
    assert {int(task.train[i][1]) for i in range(500)} == set(range(10))


def test_mnist1d_is_made_anew_for_each_seed_with_the_noise_asked_for():
    pytest.importorskip("mnist1d")
    tasks = module("trial.tasks")
    smooth, loud = (tasks.load(tasks.Source(noise=noise, samples=50), seed=3) for noise in ((0.0, 0.0), (0.0, 1.0)))
    other = tasks.load(tasks.Source(noise=(0.0, 0.0), samples=50), seed=4)
    assert rows(smooth.train).isdisjoint(rows(other.train))

    def roughness(task: object) -> float:
        x = task.train.tensors[0]
        return float(x.diff(dim=-1).square().mean())

    assert roughness(loud) > 3 * roughness(smooth)


def test_text_is_samples_of_characters_with_the_next_one_as_the_target():
    tasks = module("trial.tasks")
    task = tasks.load(tasks.Source("stdlib", samples=20), seed=0)
    x, y = task.train[7]
    assert x.shape == y.shape == (tasks.LENGTH,)
    assert torch.equal(x[1:], y[:-1])
    assert int(y[-1]) == int(task.train[8][0][0])
    assert task.metric == "loss"
    assert "import" in "".join(chr(code) for i in range(20) for code in task.train[i][0].tolist())


def an_image_folder(root: Path, classes: int = 2, count: int = 10) -> None:
    Image = pytest.importorskip("PIL.Image")
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 12), (100 * label, 10 * i, 0)).save(root / f"class{label}" / f"{i}.png")


@pytest.mark.parametrize(
    ("folders", "sizes"), [([""], (14, 2, 4)), (["train", "val"], (18, 2, 20)), (["train", "val", "test"], (20, 20, 20))]
)
def test_a_folder_of_images_has_the_parts_that_its_layout_says(folders: list[str], sizes: tuple[int, ...], tmp_path: Path):
    tasks = module("trial.tasks")
    for folder in folders:
        an_image_folder(tmp_path / folder)
    task = tasks.load(tasks.Source(str(tmp_path), side=8), seed=0)
    assert (len(task.train), len(task.validation), len(task.test)) == sizes
    assert task.train[0][0].shape == task.test[0][0].shape == (3, 8, 8)
    assert task.classes == 2
    run = module("trial.training").train(an_arm("mask", 0.5), 0, a_setting(source=tasks.Source(str(tmp_path), side=8), batch=4, epochs=1))
    assert 0 <= run.test <= 100


def test_cifar10_is_read_from_the_folder_that_torchvision_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torchvision import datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    tasks = module("trial.tasks")
    with pytest.raises(FxsdError, match=r"CIFAR-10 in .* cannot be read"):
        tasks.load(tasks.Source(str(tmp_path)), seed=0)
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda self: None)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        entry = {"data": torch.randint(256, (1100, 3072), dtype=torch.uint8).numpy(), "labels": [i % 10 for i in range(1100)]}
        (folder / name).write_bytes(pickle.dumps(entry))
    task = tasks.load(tasks.Source(str(tmp_path), samples=200), seed=0)
    assert (len(task.train), len(task.validation), len(task.test)) == (200, 5000, 1100)
    assert task.train[0][0].shape == (3, 32, 32)


# --- nets and runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_resnet_has_a_site_for_each_block_and_halves_the_sides_between_stages(norm: str):
    nets = module("trial.nets")
    net = nets.ConvNet(3, 2, 10, nets.Size(5, 4, stages=2, norm=norm))
    assert len(fxsd.sites(fxsd.transform(net))) == 5
    assert [len(stage) for stage in net.stages] == [3, 3]  # with what halves
    assert net.stages[1](torch.randn(2, 4, 8, 8)).shape == (2, 4, 4, 4)
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_the_transformer_sees_no_later_character_and_has_two_sites_a_block():
    nets = module("trial.nets")
    net = nets.CharTransformer(128, 16, nets.Size(3, 32)).eval()
    a, b = torch.randint(128, (2, 16)), torch.randint(128, (2, 16))
    b[:, :9] = a[:, :9]
    torch.testing.assert_close(net(a)[:, :9], net(b)[:, :9])
    assert not torch.equal(net(a)[:, 9:], net(b)[:, 9:])
    gm = fxsd.transform(net.train(), compute="skip", example_inputs=(a,))
    assert [site.compute for site in fxsd.sites(gm)] == ["skip"] * 6


def test_arms_of_one_seed_share_data_start_and_order():
    training = module("trial.training")
    base, other_seed = (training.train(an_arm(), seed, a_setting()) for seed in (0, 1))
    at_zero = training.train(an_arm("mask", 0.0), 0, a_setting())
    assert at_zero.train_loss == base.train_loss
    assert at_zero.test == base.test
    assert other_seed.train_loss != base.train_loss
    assert training.train(an_arm("mask", 0.5), 0, a_setting()).train_loss != base.train_loss
    assert len(base.train_loss) == len(base.validation) == len(base.seconds) == 2


def test_a_long_run_is_evaluated_at_some_epochs_and_the_last(monkeypatch: pytest.MonkeyPatch):
    training = module("trial.training")
    monkeypatch.setattr(training, "POINTS", 3)
    run = training.train(an_arm(), 0, a_setting(epochs=8))
    assert run.validated == [3, 6, 8]
    assert len(run.validation) == 3
    (curve,) = module("trial.trials").learning_curves([run])
    assert curve[1] == run.validated


def test_a_compiled_run_trains_as_an_eager_one():
    training = module("trial.training")
    eager, compiled = (training.train(an_arm(), 0, a_setting(compile=backend, epochs=1)) for backend in ("", "aot_eager"))
    assert compiled.train_loss == pytest.approx(eager.train_loss, rel=1e-4)


# --- search and report ----------------------------------------------------------------------------------------------------


def a_run(arm: object, seed: int, metric: str = "accuracy", validation: float = 0.0, test: float = 0.0, seconds: float = 1.0):
    return module("trial.training").Run(arm, seed, metric, [0.0], [validation], [1], [seconds], 0.0, test)


def test_an_interval_is_that_of_students_t():
    interval = module("trial.trials").Interval.of([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t(.975, 2) from a table, s = 1
    assert module("trial.trials").Interval.of([1.0]).half is None


@pytest.mark.parametrize(("metric", "order"), [("accuracy", [0.3, 0.2, 0.1]), ("loss", [0.1, 0.2, 0.3])])
def test_the_best_candidate_has_the_highest_accuracy_or_the_lowest_loss(metric: str, order: list[float]):
    arms = [an_arm(lr=lr) for lr in (0.1, 0.2, 0.3)]
    runs = [a_run(arm, seed, metric, validation=arm.lr + jitter) for arm in arms for seed, jitter in enumerate((-0.5, 0.5))]
    assert [candidate.arm.lr for candidate in module("trial.trials").best(arms, runs)] == order


def test_differences_and_times_are_to_the_base_under_the_same_seed():
    base, skip = an_arm(), an_arm("skip", 0.5)
    runs = [a_run(skip, seed, test=10 * seed + seed % 2, seconds=seconds) for seed, seconds in ((2, 1.0), (0, 2.0), (1, 8.0))]
    runs += [a_run(base, seed, test=10 * seed, seconds=4.0) for seed in range(3)]
    first, second = module("trial.trials").summarize(runs)
    assert (first.arm, first.difference, first.time_ratio) == (base, None, None)
    assert second.difference.mean == pytest.approx(1 / 3)
    assert second.difference.half == pytest.approx(4.302653 / 3, rel=1e-6)  # s = 1 / sqrt(3)
    assert second.time_ratio == 0.5
    assert module("trial.trials").for_equal_time(skip, runs).epochs_of == 2.0


def test_nothing_is_tested_on_before_the_search_is_over(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    training = module("trial.training")
    asked: list[tuple[str, int]] = []
    real = training.score

    def score(model: object, data: Dataset, metric: str, device: object) -> float:
        asked.append(("test" if len(data) == 500 else "other", len(asked)))
        return real(model, data, metric, device)

    monkeypatch.setattr(training, "score", score)
    seen: list[int] = []

    def best(candidates: object, runs: object) -> object:
        seen.append(len(asked))
        return real_best(candidates, runs)

    real_best = module("trial.trials").best
    monkeypatch.setattr(tool, "best", best)
    assert tool.main([*TINY, "--lr", ".01", ".001", "--search-seeds", "1"]) == 0
    searched = asked[: seen[0]]
    assert searched
    assert [place for kind, place in searched if kind == "test"] == []
    assert [kind for kind, _ in asked].count("test") == 4


def test_the_command_searches_trains_and_writes_all_it_promises(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture):
    options = ["--rate", "uniform:.5", "linear:.2", "--compute", "mask", "skip", "--equal-time", "--search-seeds", "1", "--jobs", "1"]
    files = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    assert tool.main([*TINY, *options, *files]) == 0
    out = capsys.readouterr().out
    assert "Search" in out
    for label in ("base", "fxsd mask", "fxsd skip", "equal time"):
        assert label in out
    figures = json.loads((tmp_path / "r.json").read_text())
    assert len(figures["runs"]) == 8
    assert {run["seed"] for run in figures["runs"]} == {0, 1}
    assert [len(candidates) for candidates in figures["search"]] == [2]
    assert len(figures["summaries"]) == 4
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_runs_in_several_processes_are_those_of_one():
    trials, arms = module("trial.trials"), [an_arm(), an_arm("skip", 0.5)]
    several = list(trials.run_all([(seed, arms) for seed in (3, 4)], a_setting(), 2, quiet))
    assert sorted(runs[0].seed for runs in several) == [3, 4]
    for runs in several:
        assert {run.arm for run in runs} == set(arms)
        for run in runs:
            assert run.train_loss == pytest.approx(module("trial.training").train(run.arm, run.seed, a_setting()).train_loss)


def test_an_interrupted_run_reports_the_seeds_it_has(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    trials = module("trial.trials")
    real = trials.train

    def train(arm: object, seed: int, *rest: object) -> object:
        if seed == 1:
            raise KeyboardInterrupt
        return real(arm, seed, *rest)

    monkeypatch.setattr(trials, "train", train)
    assert tool.main(TINY) == 0
    assert "fxsd skip" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "--data must be one of mnist1d, digits, stdlib or a folder"),
        (["--data", "digits", "--model", "transformer"], "--model must be 'transformer' for text"),
        (["--data", "digits", "--json", "no/such/file.json"], "--json must be a file in a folder that exists"),
        (["--data", "digits", "--device", "cuda"], "--device cuda needs a GPU"),
    ],
)
def test_wrong_arguments_are_one_line(tool: ModuleType, options: list[str], message: str, capsys: pytest.CaptureFixture):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tool.main(options) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_tensor_data_sets_keep_their_rows_together():
    data = TensorDataset(torch.arange(10.0)[:, None], torch.arange(10))
    batches = list(module("trial.training")._batches(data, 3, torch.Generator().manual_seed(0)))
    assert [len(x) for x, _ in batches] == [3, 3, 3]
    assert all(torch.equal(x[:, 0], y.float()) for x, y in batches)
    assert [int(y[0]) for y in torch.cat([y for _, y in batches])[:, None]] != sorted(range(9))
