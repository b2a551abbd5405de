"""Data to train on: generated, part of a package or of Python itself, or the user's own. Nothing is downloaded."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from fxsd import FxsdError

MNIST1D, DIGITS, STDLIB = "mnist1d", "digits", "stdlib"
ACCURACY, LOSS = "accuracy", "loss"
LENGTH = 128  # characters of a sample of text
_SPLIT = 0  # the seed of splits that do not depend on the run: what is tested on is never trained on


@dataclass(frozen=True)
class Source:
    """Where data come from.

    Attributes:
        name: `"mnist1d"`, `"digits"`, `"stdlib"`, or the path of a folder with CIFAR-10 or images.
        noise: of MNIST-1D, the scales of its correlated and its independent noise; the package's own are .25 and .02.
        samples: how many to train on at most.
        side: to which images from a folder are cut.
    """

    name: str = MNIST1D
    noise: tuple[float, float] = (0.25, 0.02)
    samples: int | None = None
    side: int = 64


@dataclass(frozen=True)
class Task:
    """Data in three parts, and what is asked of them.

    Attributes:
        shape: of a sample.
        classes: what is told apart; characters, for text.
        metric: `"accuracy"`, or `"loss"` where less is better.
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    shape: tuple[int, ...]
    classes: int
    metric: str = ACCURACY


def load(source: Source, seed: int) -> Task:
    """Loads or makes the data of a run.

    Args:
        seed: of the run. MNIST-1D is made anew for each; other data are the same, split in the same way.

    Raises:
        FxsdError: the data are not there, or the package that has them is not.
    """
    makers: dict[str, Callable[[Source, int], Task]] = {MNIST1D: _mnist1d, DIGITS: _digits, STDLIB: _stdlib}
    return makers.get(source.name, _images)(source, seed)


def _mnist1d(source: Source, seed: int) -> Task:
    data = _package("mnist1d.data", "mnist1d")
    counts = [source.samples or 4000, 1000, 5000]
    options = data.get_dataset_args()
    total = sum(counts)
    options.num_samples, options.seed = total + -total % 10, seed  # as many of each class
    options.corr_noise_scale, options.iid_noise_scale = source.noise
    before = random.getstate()
    made = data.make_dataset(options)
    random.setstate(before)
    x, y = (torch.cat([torch.as_tensor(made[key]), torch.as_tensor(made[f"{key}_test"])])[:total] for key in ("x", "y"))
    x = x.float()[:, None]
    train, validation, test = _cut(x, y, counts)
    return Task(train, validation, test, tuple(x.shape[1:]), 10)


def _digits(source: Source, seed: int) -> Task:
    digits = _package("sklearn.datasets", "scikit-learn").load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(_SPLIT))
    parts = _cut(x[order], y[order], [1000, 297, 500])
    return Task(_first(parts[0], source.samples), parts[1], parts[2], tuple(x.shape[1:]), 10)


def _stdlib(source: Source, seed: int) -> Task:
    """The source of Python's standard library, in samples of `LENGTH` characters; files are in one part each."""
    files = sorted(path for path in Path(sysconfig.get_path("stdlib")).rglob("*.py") if "site-packages" not in path.parts)
    texts = [text for path in files if (text := path.read_text(encoding="utf-8", errors="ignore")).isascii()]
    if not texts:
        raise FxsdError(f"the source of Python's standard library is not in {sysconfig.get_path('stdlib')!r}.")
    random.Random(_SPLIT).shuffle(texts)
    tenth = len(texts) // 10

    def samples(texts: Sequence[str], most: int) -> TensorDataset:
        codes = torch.frombuffer(bytearray("".join(texts), "ascii"), dtype=torch.uint8).long()
        count = min((len(codes) - 1) // LENGTH, most)
        cut = [codes[start : start + count * LENGTH].view(count, LENGTH) for start in (0, 1)]
        return TensorDataset(*cut)

    test, validation, train = samples(texts[:tenth], 1000), samples(texts[tenth : 2 * tenth], 300), texts[2 * tenth :]
    return Task(samples(train, source.samples or 4000), validation, test, (LENGTH,), 128, LOSS)


def _images(source: Source, seed: int) -> Task:
    """CIFAR-10 as torchvision unpacks it, or a folder of images: `train/` and `val/` or `test/`, or classes only, which are split."""
    from torchvision import datasets
    from torchvision.transforms import v2 as T

    folder = Path(source.name)
    if not folder.is_dir():
        known = ", ".join((MNIST1D, DIGITS, STDLIB))
        raise FxsdError(f"--data must be one of {known} or a folder with CIFAR-10 or images, but got {source.name!r}.")
    floats = [T.ToImage(), T.ToDtype(torch.float32, scale=True), T.Normalize([0.5] * 3, [0.25] * 3)]
    if (folder / "cifar-10-batches-py").is_dir():
        moved = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), *floats])
        try:
            train, plain = (datasets.CIFAR10(folder, True, transform) for transform in (moved, T.Compose(floats)))
            test = datasets.CIFAR10(folder, False, T.Compose(floats))
        except RuntimeError as error:
            raise FxsdError(f"CIFAR-10 in {source.name!r} cannot be read: {error}") from error
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(_SPLIT)).tolist()
        return Task(Subset(train, order[5000:][: source.samples]), Subset(plain, order[:5000]), test, (3, 32, 32), 10)
    side = source.side
    moved = T.Compose([T.RandomResizedCrop(side), T.RandomHorizontalFlip(), *floats])
    still = T.Compose([T.Resize(side), T.CenterCrop(side), *floats])
    parts = [folder / name for name in ("train", "val", "test") if (folder / name).is_dir()]
    root = parts[0] if len(parts) > 1 else folder
    try:
        train, plain = (datasets.ImageFolder(root, transform) for transform in (moved, still))
        tests = [datasets.ImageFolder(part, still) for part in parts[1:]]
    except FileNotFoundError as error:
        raise FxsdError(f"--data must be a folder with CIFAR-10, or with a folder of images for each class: {error}") from error
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(_SPLIT)).tolist()
    tenth = len(order) // 10
    classes = len(train.classes)
    if len(tests) == 2:
        return Task(Subset(train, order[: source.samples]), tests[0], tests[1], (3, side, side), classes)
    validation = Subset(plain, order[:tenth])
    test = tests[0] if tests else Subset(plain, order[tenth : 3 * tenth])
    rest = order[tenth:] if tests else order[3 * tenth :]
    return Task(Subset(train, rest[: source.samples]), validation, test, (3, side, side), classes)


def _package(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise FxsdError(f"these data need the package {name}: pip install {name}") from error


def _cut(x: Tensor, y: Tensor, counts: Sequence[int]) -> list[TensorDataset]:
    return [TensorDataset(*part) for part in zip(torch.split(x, list(counts)), torch.split(y, list(counts)), strict=True)]


def _first(data: TensorDataset, count: int | None) -> TensorDataset:
    return TensorDataset(*data[:count])
