"""Whole models: torchvision's zoo by count, parity with the original, and what the field's libraries hold.

The counts pin behaviour: a change that loses or invents a site on a real model is seen here.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from agreement import check_code_and_graph
from torch import nn

import fxsd

# model -> (sites, depths)
SITES = {
    "alexnet": (0, 0), "convnext_base": (36, 36), "convnext_large": (36, 36), "convnext_small": (36, 36), "convnext_tiny": (18, 18),
    "densenet121": (0, 0), "densenet161": (0, 0), "densenet169": (0, 0), "densenet201": (0, 0),
    "efficientnet_b0": (9, 9), "efficientnet_b1": (16, 16), "efficientnet_b2": (16, 16), "efficientnet_b3": (19, 19),
    "efficientnet_b4": (25, 25), "efficientnet_b5": (32, 32), "efficientnet_b6": (38, 38), "efficientnet_b7": (48, 48),
    "efficientnet_v2_l": (73, 73), "efficientnet_v2_m": (51, 51), "efficientnet_v2_s": (35, 35),
    "googlenet": (0, 0), "inception_v3": (0, 0), "maxvit_t": (55, 11),
    "mnasnet0_5": (10, 10), "mnasnet0_75": (10, 10), "mnasnet1_0": (10, 10), "mnasnet1_3": (10, 10),
    "mobilenet_v2": (10, 10), "mobilenet_v3_large": (10, 10), "mobilenet_v3_small": (6, 6),
    "regnet_x_16gf": (22, 22), "regnet_x_1_6gf": (18, 18), "regnet_x_32gf": (23, 23), "regnet_x_3_2gf": (25, 25),
    "regnet_x_400mf": (22, 22), "regnet_x_800mf": (16, 16), "regnet_x_8gf": (23, 23), "regnet_y_128gf": (27, 27),
    "regnet_y_16gf": (18, 18), "regnet_y_1_6gf": (27, 27), "regnet_y_32gf": (20, 20), "regnet_y_3_2gf": (21, 21),
    "regnet_y_400mf": (16, 16), "regnet_y_800mf": (14, 14), "regnet_y_8gf": (17, 17),
    "resnet101": (33, 33), "resnet152": (50, 50), "resnet18": (8, 8), "resnet34": (16, 16), "resnet50": (16, 16),
    "resnext101_32x8d": (33, 33), "resnext101_64x4d": (33, 33), "resnext50_32x4d": (16, 16),
    "shufflenet_v2_x0_5": (0, 0), "shufflenet_v2_x1_0": (0, 0), "shufflenet_v2_x1_5": (0, 0), "shufflenet_v2_x2_0": (0, 0),
    "squeezenet1_0": (0, 0), "squeezenet1_1": (0, 0),
    "swin_b": (48, 24), "swin_s": (48, 24), "swin_t": (24, 12), "swin_v2_b": (48, 24), "swin_v2_s": (48, 24), "swin_v2_t": (24, 12),
    "vgg11": (0, 0), "vgg11_bn": (0, 0), "vgg13": (0, 0), "vgg13_bn": (0, 0), "vgg16": (0, 0), "vgg16_bn": (0, 0), "vgg19": (0, 0),
    "vgg19_bn": (0, 0), "vit_b_16": (24, 12), "vit_b_32": (24, 12), "vit_h_14": (64, 32), "vit_l_16": (48, 24), "vit_l_32": (48, 24),
    "wide_resnet101_2": (33, 33), "wide_resnet50_2": (16, 16),
    # segmentation
    "deeplabv3_mobilenet_v3_large": (10, 10), "deeplabv3_resnet101": (33, 33), "deeplabv3_resnet50": (16, 16),
    "fcn_resnet101": (33, 33), "fcn_resnet50": (16, 16), "lraspp_mobilenet_v3_large": (10, 10),
    # video
    "mc3_18": (8, 8), "mvit_v1_b": (32, 16), "mvit_v2_s": (32, 16), "r2plus1d_18": (8, 8), "r3d_18": (8, 8), "s3d": (0, 0),
    "swin3d_b": (48, 24), "swin3d_s": (48, 24), "swin3d_t": (24, 12),
    # quantization, before it is prepared: adds are methods of modules
    "quantized_googlenet": (0, 0), "quantized_inception_v3": (0, 0), "quantized_mobilenet_v2": (10, 10),
    "quantized_mobilenet_v3_large": (10, 10), "quantized_resnet18": (8, 8), "quantized_resnet50": (16, 16),
    "quantized_resnext101_32x8d": (33, 33), "quantized_resnext101_64x4d": (33, 33), "quantized_shufflenet_v2_x0_5": (0, 0),
    "quantized_shufflenet_v2_x1_0": (0, 0), "quantized_shufflenet_v2_x1_5": (0, 0), "quantized_shufflenet_v2_x2_0": (0, 0),
}  # fmt: skip

QUICK = [
    "resnet50", "resnet18", "resnet152", "wide_resnet50_2", "regnet_y_400mf", "mobilenet_v2", "mobilenet_v3_large", "mnasnet1_0",
    "vit_b_16", "convnext_tiny", "swin_t", "efficientnet_b0", "densenet121", "vgg11", "alexnet", "googlenet", "inception_v3",
    "shufflenet_v2_x0_5", "squeezenet1_0", "deeplabv3_resnet50", "mvit_v1_b", "swin3d_t",
]  # fmt: skip

TIMM = {
    "beit_base_patch16_224": 24, "cait_xxs24_224": 52, "coat_lite_small": 32, "convit_small": 24, "convnext_atto": 12,
    "cs3darknet_focus_l": 21, "davit_tiny": 24, "deit3_small_patch16_224": 24, "dm_nfnet_f0": 12, "edgenext_small": 21,
    "focalnet_small_lrf": 48, "hiera_small_224": 32, "caformer_s18": 36, "mambaout_femto": 18, "pvt_v2_b0": 16, "regnetx_004_tv": 22,
    "res2net50_26w_4s": 16, "resnetv2_50": 16, "rexnet_100": 11, "skresnet18": 8, "swinv2_small_window16_256": 48,
    "tnt_b_patch16_224": 48, "tresnet_l": 30, "twins_pcpvt_small": 32, "vit_tiny_patch16_224": 24, "volo_d1_224": 40,
    "xcit_nano_12_p16_224": 40, "inception_resnet_v2": 40, "inception_v4": 0, "rdnet_tiny": 0,
}  # fmt: skip


def build(name: str) -> nn.Module:
    extra = {"weights_backbone": None} if name in torchvision.models.list_models(torchvision.models.segmentation) else {}
    if name.endswith(("googlenet", "inception_v3")):
        extra = {"init_weights": False}
    return torchvision.models.get_model(name, weights=None, **extra)


def example(name: str, batch: int) -> torch.Tensor:
    if name in torchvision.models.list_models(torchvision.models.video):
        side = 224 if name.startswith(("mvit", "s3d")) else 112
        return torch.randn(batch, 3, 16, side, side)
    side = 299 if name.endswith("inception_v3") else 224
    return torch.randn(batch, 3, side, side)


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("name", QUICK)
def test_a_torchvision_model_has_its_sites(name: str):
    found = fxsd.analyze(build(name))
    assert (len(found.sites), len({site.depth for site in found.sites})) == SITES[name]
    assert len({site.name for site in found.sites}) == len(found.sites)


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("name", ["densenet121", "squeezenet1_0", "googlenet"])
def test_a_model_without_residual_adds_is_told_so(name: str):
    with pytest.raises(fxsd.FxsdError, match="has no residual add to drop the branch of"):
        fxsd.transform(build(name))


def check_parity(model: nn.Module, x: torch.Tensor) -> None:
    """Keys in order; eval bit for bit; training at rate 0 under one seed: outputs, gradients and running statistics."""
    theirs, ours = model, fxsd.transform(copy.deepcopy(model), 0.0, scaling="train", existing="keep")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        expected, got = theirs.eval()(x), ours.eval()(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    theirs.train()
    ours.train()
    for each in (theirs, ours):
        torch.manual_seed(0)
        out = each(x)
        leaves = torch.utils._pytree.tree_leaves(dict(out) if isinstance(out, dict) else out)
        sum(leaf.float().square().mean() for leaf in leaves).backward()
    compared = 0
    for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=name)
        compared += a.grad is not None
    assert compared > 0
    for (name, a), (_, b) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "swin_t"])
def test_code_and_graph_of_a_small_model_agree(name: str):
    check_code_and_graph(build(name), (torch.randn(3, 3, 64, 64),))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_a_small_model_is_the_original_at_rate_0(name: str):
    check_parity(build(name), torch.randn(2, 3, 64, 64))


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("name", SITES)
def test_every_torchvision_model_has_its_sites_keys_and_eval_output(name: str):
    model = build(name).eval()
    found = fxsd.analyze(model)
    assert (len(found.sites), len({site.depth for site in found.sites})) == SITES[name]
    if found.sites:
        gm = fxsd.transform(model, scaling="train")
        assert list(gm.state_dict()) == list(model.state_dict())
        x = example(name, 2)
        with torch.no_grad():
            torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)
        del gm
        if name in QUICK:  # a step of each of the others takes long
            check_code_and_graph(model, (x,))


@pytest.mark.zoo
@pytest.mark.parametrize(
    "name", ["resnet50", "vit_b_16", "swin_t", "convnext_tiny", "efficientnet_b0", "regnet_y_400mf", "mnasnet1_0", "deeplabv3_resnet50"]
)
def test_a_torchvision_model_is_the_original_at_rate_0(name: str):
    # With its own stochastic depth kept, a model that has it everywhere would have no site left.
    model = build(name)
    for part in model.modules():
        if isinstance(part, torchvision.ops.StochasticDepth):
            part.p = 0.0
    check_parity(model, example(name, 2))


@pytest.mark.zoo
@pytest.mark.parametrize("name", TIMM)
def test_a_timm_model_has_its_sites_keys_and_eval_output(name: str):
    model = timm.create_model(name).eval()
    found = fxsd.analyze(model)
    assert len(found.sites) == TIMM[name]
    if found.sites:
        gm = fxsd.transform(model, scaling="train")
        assert list(gm.state_dict()) == list(model.state_dict())
        x = torch.randn(2, *model.default_cfg["input_size"])
        with torch.no_grad():
            torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)
        del gm
        check_code_and_graph(model, (x,))
