"""Whole models of other libraries, and torchvision's that are no one graph: sites by count, keys, outputs and gradients.

Hugging Face models are tiny, random, and called with their usual keyword arguments; what they return by default, caches included, is
compared.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import diffusers
import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
import transformers
from agreement import check_code_and_graph
from draws import at_random, forced, results
from torch import Tensor, nn

import fxsd

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]


def parts(value: Any) -> list[Any]:
    """The tensors and plain values in an output of any class, in order."""
    if isinstance(value, dict):
        return [key for item in value.items() for key in (item[0], *parts(item[1]))]
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in parts(item)]
    if is_dataclass(value):
        return [part for field in fields(value) for part in parts(getattr(value, field.name))]
    if hasattr(value, "__dict__") and not isinstance(value, (Tensor, type)):
        return [type(value), *parts(vars(value))]
    return [value]


def check_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    ours, theirs = parts(found), parts(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        else:
            assert a == b


def check(model: nn.Module, inputs: Callable[[int], Any], sites: int, whole: bool = True) -> None:
    """Sites, keys, class, evaluation bit for bit at two batch sizes, training at rate 0 under one seed."""
    gm = fxsd.transform(copy.deepcopy(model), 0.0, scaling="train", existing="keep", example_inputs=inputs(2))
    assert len(fxsd.analyze(model, example_inputs=inputs(2)).sites) == sites
    assert isinstance(gm, type(model))
    assert isinstance(gm, torch.fx.GraphModule) is whole
    assert list(gm.state_dict()) == list(model.state_dict())
    for batch in (2, 3):
        given = inputs(batch)
        with torch.no_grad():
            check_equal(run(gm.eval(), given), run(model.eval(), given))
    given, gradients = inputs(2), []
    for each in (model.train(), gm.train()):
        torch.manual_seed(0)
        floats = [part for part in parts(run(each, given)) if isinstance(part, Tensor) and part.requires_grad]
        torch.stack([part.square().mean() for part in floats]).sum().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0, msg=name)
    if whole:  # a graph of transformers may attend with a mask where the code has none
        check_code_and_graph(model, given, rtol=1e-4, atol=1e-5)


def run(model: nn.Module, given: Any) -> Any:
    return model(**given) if isinstance(given, dict) else model(*given)


# --- torchvision ------------------------------------------------------------------------------------------------------------

DETECTORS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": 10, "fasterrcnn_mobilenet_v3_large_fpn": 10, "fasterrcnn_resnet50_fpn": 16,
    "fasterrcnn_resnet50_fpn_v2": 16, "fcos_resnet50_fpn": 16, "keypointrcnn_resnet50_fpn": 16, "maskrcnn_resnet50_fpn": 16,
    "maskrcnn_resnet50_fpn_v2": 16, "retinanet_resnet50_fpn": 16, "retinanet_resnet50_fpn_v2": 16, "ssd300_vgg16": 0,
    "ssdlite320_mobilenet_v3_large": 10,
}  # fmt: skip


def test_every_detector_of_torchvision_is_in_the_table():
    assert set(DETECTORS) == set(torchvision.models.list_models(torchvision.models.detection))


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_has_the_sites_of_its_backbone(name: str):
    torch.manual_seed(0)
    sizes = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 96}
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **sizes)
    images = [torch.rand(3, 64, 96), torch.rand(3, 96, 64)]
    if not DETECTORS[name]:
        with pytest.raises(fxsd.FxsdError, match="has no residual add"):
            fxsd.transform(model, example_inputs=(images,))
        return
    gm = fxsd.transform(model, scaling="train", example_inputs=(images,))
    assert len(fxsd.sites(gm)) == DETECTORS[name]
    assert [site.depth for site in fxsd.sites(gm)] == list(range(DETECTORS[name]))
    assert list(gm.state_dict()) == list(model.state_dict())
    check_equal(gm.eval()(images), model.eval()(images))


@pytest.mark.parametrize("name", ["raft_small", "raft_large"])
def test_optical_flow(name: str):
    model = torchvision.models.get_model(name, weights=None).eval()
    images = (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    gm = fxsd.transform(model, scaling="train", example_inputs=images)
    assert len(fxsd.sites(gm)) == 12
    with torch.no_grad():
        check_equal(gm(*images), model(*images))


# --- Hugging Face -----------------------------------------------------------------------------------------------------------

IMAGE = {"image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.1}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = SMALL | {"vocab_size": 50}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "drop_path_rate": 0.0,
}  # fmt: skip
SOUND = {
    "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0,
}  # fmt: skip


def pixels(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def tokens(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 50, (batch, 7)), "attention_mask": torch.ones(batch, 7, dtype=torch.long)}


def sound(batch: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, 2000)}


# class, configuration, its arguments, inputs, sites: two a transformer layer
MODELS = [
    ("ViTModel", "ViTConfig", IMAGE | SMALL, pixels, 4),
    ("BeitModel", "BeitConfig", IMAGE | SMALL | {"drop_path_rate": 0.0}, pixels, 4),
    ("SwinModel", "SwinConfig", SWIN, pixels, 8),
    ("ConvNextModel", "ConvNextConfig", {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2}, pixels, 4),
    ("Dinov2Model", "Dinov2Config", {"image_size": 32, "patch_size": 8, **SMALL}, pixels, 4),
    ("BertModel", "BertConfig", WORDS, tokens, 4),
    ("RobertaModel", "RobertaConfig", WORDS, tokens, 4),
    ("GPT2Model", "GPT2Config", {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}, tokens, 4),
    ("LlamaModel", "LlamaConfig", WORDS, tokens, 4),
    ("PhiModel", "PhiConfig", WORDS, tokens, 4),
    ("BloomModel", "BloomConfig", {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 2}, tokens, 4),
    ("T5EncoderModel", "T5Config", T5, tokens, 4),
    ("Wav2Vec2Model", "Wav2Vec2Config", WORDS | SOUND, sound, 4),
]


@pytest.mark.parametrize(("model", "config", "arguments", "inputs", "sites"), MODELS, ids=[row[0] for row in MODELS])
def test_a_transformer_has_two_sites_a_layer(model: str, config: str, arguments: dict[str, Any], inputs: Any, sites: int):
    torch.manual_seed(0)
    check(getattr(transformers, model)(getattr(transformers, config)(**arguments)), inputs, sites)


LANGUAGE = ["LlamaModel", "PhiModel", "GPT2Model"]
CACHE = [("BertModel", {}), ("ViTModel", {}), ("Dinov2Model", {})]
CACHE += [(name, {"use_cache": False}) for name in LANGUAGE] + [(name, {}) for name in LANGUAGE[:2]]


@pytest.mark.parametrize(("name", "cache"), CACHE)
def test_every_site_of_a_transformer_skips(name: str, cache: dict[str, bool]):
    torch.manual_seed(0)
    model, config, arguments, inputs, count = next(row for row in MODELS if row[0] == name)
    quiet = dict.fromkeys(("attention_probs_dropout_prob", "hidden_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    original = getattr(transformers, model)(getattr(transformers, config)(**arguments | quiet))

    def given(batch: int) -> dict[str, Any]:
        return inputs(batch) | cache

    made = {
        compute: fxsd.transform(original, 0.5, drop_distribution="uniform", compute=compute, example_inputs=given(2))
        for compute in ("skip", "mask")
    }
    assert [site.compute for site in fxsd.sites(made["skip"])] == ["skip"] * count
    for batch in (2, 5):
        call = given(batch)
        with forced(at_random(batch)):
            skipped, masked = (results(made[compute].train(), call) for compute in ("skip", "mask"))
        for a, b in zip(skipped, masked, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- segmentation and diffusion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3Plus", "UPerNet"])
def test_a_segmentation_model_has_the_sites_of_its_encoder(name: str):
    torch.manual_seed(0)
    model = getattr(smp, name)("resnet18", encoder_weights=None)
    check(model, lambda batch: (torch.randn(batch, 3, 64, 64),), {"PSPNet": 4, "MAnet": 9}.get(name, 8))


DIFFUSION: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], int]] = {
    "UNet2DModel": (
        lambda: diffusers.UNet2DModel(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        lambda batch: (torch.randn(batch, 3, 16, 16), torch.arange(batch)),
        12,
    ),
    "AutoencoderKL": (
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8, layers_per_block=1,
        ),
        lambda batch: (torch.randn(batch, 3, 16, 16),),
        12,
    ),
    "DiTTransformer2DModel": (
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10
        ),
        lambda batch: {
            "hidden_states": torch.randn(batch, 4, 8, 8), "timestep": torch.arange(batch), "class_labels": torch.arange(batch),
        },
        4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFUSION)
def test_a_diffusion_model(name: str):
    torch.manual_seed(0)
    build, inputs, sites = DIFFUSION[name]
    check(build(), inputs, sites)


# --- models full of einops --------------------------------------------------------------------------------------------------

VIT = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 64}
VITS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("ViT", VIT, 4),
    "simple_vit": ("SimpleViT", VIT, 4),
    "deepvit": ("DeepViT", VIT, 4),
    "cait": ("CaiT", VIT | {"cls_depth": 1}, 6),
    "parallel_vit": ("ViT", VIT | {"num_parallel_branches": 2}, 4),
    "vit_for_small_dataset": ("ViT", VIT, 4),
    "rvt": ("RvT", VIT, 4),
    "vit_with_patch_dropout": ("ViT", VIT | {"patch_dropout": 0.25}, 4),
    "jumbo_vit": ("JumboViT", VIT | {"num_jumbo_cls": 1, "jumbo_cls_k": 2, "jumbo_ff_mult": 1}, 5),
    "pit": ("PiT", VIT | {"depth": (1, 1)}, 4),
    "nest": (
        "NesT",
        {"image_size": 32, "patch_size": 4, "dim": 16, "heads": 2, "num_hierarchies": 2, "block_repeats": (1, 2), "num_classes": 5},
        6,
    ),
    "regionvit": ("RegionViT", {"dim": (16, 16, 16, 16), "depth": (1, 1, 1, 1), "window_size": 2, "num_classes": 5}, 12),
}  # fmt: skip


@pytest.mark.parametrize("name", VITS)
def test_a_transformer_written_with_einops(name: str):
    torch.manual_seed(0)
    cls, arguments, sites = VITS[name]
    size = 64 if name == "regionvit" else 32
    check(
        getattr(importlib.import_module(f"vit_pytorch.{name}"), cls)(**arguments), lambda batch: (torch.randn(batch, 3, size, size),), sites
    )
