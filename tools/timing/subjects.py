"""The models that are measured: by name, with the shape of their input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from measure.measuring import quiet
from torch import nn
from torchvision import models
from visualize import load

from fxsd import FxsdError
from fxsd.capture.droppath import drop_paths

# name -> builder, and the side of an image and a batch that are quick on a CPU. Torch's convolutions are slow there under 16 samples.
SMALL: Mapping[str, tuple[Callable[[], nn.Module], int, int]] = {
    "vit": (lambda: models.VisionTransformer(96, 8, 12, 3, 192, 768, num_classes=10), 96, 16),
    "swin_t": (lambda: models.SwinTransformer([4, 4], 96, [2, 2, 6, 2], [3, 6, 12, 24], [7, 7], stochastic_depth_prob=0.0), 112, 8),
    "convnext_tiny": (lambda: models.convnext_tiny(weights=None, stochastic_depth_prob=0.0), 96, 32),
    "resnet50": (lambda: models.resnet50(weights=None), 96, 32),
}


def example_shape(name: str, model: nn.Module) -> tuple[int, ...] | None:
    """The shape of an input for two samples; None where the name of the model does not tell."""
    source, _, item = name.partition(":")
    if source == "timm":
        size: Any = getattr(model, "default_cfg", {}).get("input_size")
        return size and (2, *size)
    if source != "torchvision":
        return None
    if item in models.list_models(models.video):
        side = 224 if item.startswith(("mvit", "s3d")) else 112
        return 2, 3, 16, side, side
    if item in (*models.list_models(models.detection), *models.list_models(models.optical_flow)):
        return None  # they take lists of images, or two at a time
    side = 299 if item.startswith("inception") else 224
    return 2, 3, side, side


def build(name: str) -> nn.Module:
    """Builds a model by its name, as `visualize.load` does, without a word."""
    with quiet():
        return load(name)


def trainable(name: str, shape: tuple[int, ...] | None) -> tuple[nn.Module, tuple[int, ...]]:
    """A model to train, without the stochastic depth it may have by itself, and the shape of one sample.

    Args:
        name: one of `SMALL`, or as for `visualize.load`.
        shape: of one sample, where the name does not tell.

    Raises:
        FxsdError: there is no such model, or nothing tells the shape.
    """
    if name in SMALL:
        make, side, _ = SMALL[name]
        return make().train(), (3, side, side)
    model = build(name).train()
    own = drop_paths(model)
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if child in own:
                setattr(module, child_name, nn.Identity())
    known = example_shape(name, model)
    found = known[1:] if known else shape
    if not found:
        raise FxsdError(f"--shape must say the shape of a sample of {name}, such as 3x224x224.")
    return model, found
