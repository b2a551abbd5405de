"""Training scripts in the shape of torchvision's reference, timm's and nanoGPT's, each with one line changed: the transform."""

from __future__ import annotations

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import torch
import torchvision
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy, unwrap_model
from torch import Tensor, nn
from torch.nn import functional as F

import fxsd


def _loader(side: int, classes: int, batches: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(batches):
        target = torch.randint(classes, (size,), generator=generator)
        image = torch.randn(size, 3, side, side, generator=generator)
        image[:, 0] += target.view(-1, 1, 1)
        found.append((image, target))
    found.append((found[0][0][:3], found[0][1][:3]))  # an incomplete last batch
    return found


# --- torchvision/references/classification/train.py ------------------------------------------------------------------------------


def _torchvision_main(folder: Path, epochs: int, resume: bool, transformed: bool) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    data = _loader(64, 4)
    model: nn.Module = torchvision.models.resnet18(num_classes=4)
    if transformed:
        model = fxsd.transform(model, 0.5, scaling="train")  # the one line
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    decay = [p for name, p in model.named_parameters() if p.ndim > 1]
    others = [p for name, p in model.named_parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD([{"params": decay, "weight_decay": 1e-4}, {"params": others}], lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)
    model_without_ddp = model
    model_ema = torch.optim.swa_utils.AveragedModel(model_without_ddp, use_buffers=True)
    start = 0
    if resume:
        checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
        model_without_ddp.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["lr_scheduler"])
        model_ema.load_state_dict(checkpoint["model_ema"])
        start = checkpoint["epoch"] + 1
    losses = []
    for epoch in range(start, epochs):
        model.train()
        torch.manual_seed(epoch)
        for image, target in data:
            loss = criterion(model(image), target)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model_ema.update_parameters(model)
            losses.append(loss.item())
        scheduler.step()
        for each in (model, model_ema):
            each.eval()
            with torch.inference_mode():
                assert all(each(image).isfinite().all() for image, _ in data)
        checkpoint = {"model": model_without_ddp.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint |= {"lr_scheduler": scheduler.state_dict(), "model_ema": model_ema.state_dict(), "epoch": epoch}
        torch.save(checkpoint, folder / "checkpoint.pth")
    return model, losses


def test_torchvision_s_reference_script_trains_saves_and_goes_on(tmp_path: Path):
    for name in ("whole", "parts", "plain"):
        (tmp_path / name).mkdir()
    whole, losses = _torchvision_main(tmp_path / "whole", 2, False, True)
    _, first = _torchvision_main(tmp_path / "parts", 1, False, True)
    _, second = _torchvision_main(tmp_path / "parts", 2, True, True)
    assert first + second == losses
    _, plain = _torchvision_main(tmp_path / "plain", 2, False, False)
    assert plain != losses
    original = torchvision.models.resnet18(num_classes=4)
    original.load_state_dict(torch.load(tmp_path / "whole" / "checkpoint.pth", weights_only=True)["model"])
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(original.eval()(x), whole.eval()(x))


# --- timm's train.py and validate.py ----------------------------------------------------------------------------------------------


def _timm_main(folder: Path, checkpointed: bool) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    data = _loader(32, 5)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=3)
    model = fxsd.transform(model, 0.5)  # the one line
    if checkpointed:
        model.set_grad_checkpointing(enable=True)
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert {"pos_embed", "cls_token"} <= model.no_weight_decay()
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=2, warmup_epochs=1)
    ema = ModelEmaV3(model, decay=0.9)
    saver = CheckpointSaver(model=model, optimizer=optimizer, model_ema=ema, checkpoint_dir=str(folder), recovery_dir=str(folder))
    mixup = timm.data.Mixup(mixup_alpha=0.8, num_classes=5)
    losses = []
    for epoch in range(2):
        model.train()
        for image, target in data:
            if len(image) % 2 == 0:
                image, target = mixup(image, target)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = timm.loss.SoftTargetCrossEntropy()(model(image), target if target.ndim > 1 else F.one_hot(target, 5).float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            losses.append(loss.item())
        model.eval()
        with torch.inference_mode():
            top = accuracy(model(data[0][0]), data[0][1])[0].item()
        scheduler.step(epoch + 1, top)
        saver.save_checkpoint(epoch, metric=top)
    return model, losses


def test_timm_s_script_trains_validates_and_saves(tmp_path: Path):
    import numpy

    folders = [tmp_path / name for name in ("a", "b")]
    runs = []
    for folder, checkpointed in zip(folders, (False, True), strict=True):
        folder.mkdir()
        numpy.random.seed(0)
        runs.append(_timm_main(folder, checkpointed))
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-2), "what is checkpointed draws again what it drew"
    model = runs[0][0]
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=3)
    timm.models.load_checkpoint(plain, str(folders[0] / "last.pth.tar"), use_ema=False, weights_only=False)
    x = torch.randn(2, 3, 32, 32)
    fxsd.set_drop_rate(model, 0.0)  # evaluation is the original's
    assert torch.equal(plain.eval()(x), model.eval()(x))
    assert torch.equal(plain.forward_head(plain.forward_features(x), pre_logits=True), model.forward_head(model.forward_features(x), True))
    assert unwrap_model(model) is model


# --- nanoGPT's model.py, train.py and sample.py -----------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.register_buffer("bias", torch.tril(torch.ones(length, length)).view(1, 1, length, length))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = F.softmax(att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf")), dim=-1)
        return self.c_proj((att @ v).transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, length)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int = 20, width: int = 16, heads: int = 2, layers: int = 3, length: int = 12) -> None:
        super().__init__()
        self.length = length
        blocks = nn.ModuleList(Block(width, heads, length) for _ in range(layers))
        parts = {"wte": nn.Embedding(vocabulary, width), "wpe": nn.Embedding(length, width), "h": blocks, "ln_f": nn.LayerNorm(width)}
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        _, t = idx.size()
        assert t <= self.length, f"Cannot forward sequence of length {t}, block size is only {self.length}"
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(0, t, dtype=torch.long, device=idx.device))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is not None:
            logits = self.lm_head(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        else:
            logits, loss = self.lm_head(x[:, [-1], :]), None
        return logits, loss

    def crop_block_size(self, length: int) -> None:
        self.length = length
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:length])
        for block in self.transformer.h:
            block.attn.bias = block.attn.bias[:, :, :length, :length]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        named = {name: p for name, p in self.named_parameters() if p.requires_grad}
        decay, others = [p for p in named.values() if p.dim() >= 2], [p for p in named.values() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        assert "fused" in inspect.signature(torch.optim.AdamW).parameters
        return torch.optim.AdamW(groups, lr=1e-2)

    @torch.no_grad()
    def generate(self, idx: Tensor, new: int) -> Tensor:
        for _ in range(new):
            logits, _ = self(idx[:, -self.length :])
            idx = torch.cat((idx, logits[:, -1, :].argmax(-1, keepdim=True)), dim=1)
        return idx


@pytest.mark.parametrize("compiled", [False, True])
def test_nanogpt_s_script_trains_saves_and_samples(tmp_path: Path, compiled: bool):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = fxsd.transform(GPT(), 0.5, scaling="train")  # the one line
    model.crop_block_size(10)
    optimizer = model.configure_optimizers()
    runs = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    ids = torch.randint(20, (8, 11))
    model.train()
    losses = []
    for _ in range(30):
        for micro in range(2):
            _, loss = runs(ids[micro::2, :-1].contiguous(), ids[micro::2, 1:].contiguous())
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    torch.save({"model": model.state_dict(), "model_args": {"length": 10}}, tmp_path / "ckpt.pt")
    model.eval()
    sampled = model.generate(ids[:1, :4], 12)
    original = GPT(length=10)
    original.load_state_dict(torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"])
    assert torch.equal(original.eval().generate(ids[:1, :4], 12), sampled)
    model.train()
    drawn = [copy.deepcopy(model)(ids[:, :7])[0] for _ in range(2)]
    assert not torch.equal(*drawn), "without targets it drops too"
