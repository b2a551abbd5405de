"""Callbacks in the trainers of other libraries: real runs of tiny models, whole and interrupted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from ranks import Block
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import fxsd
from fxsd.integrations.lightning import DropRateCallback as LightningCallback
from fxsd.integrations.transformers import DropRateCallback as TransformersCallback

CALLBACKS = [LightningCallback, TransformersCallback]


def rate_of(model: nn.Module) -> float:
    return max(site.drop_rate for site in fxsd.sites(model))


# --- Hugging Face ---------------------------------------------------------------------------------------------------------------


IDS = torch.randint(30, (24, 8), generator=torch.Generator().manual_seed(0))
EXAMPLE = {"input_ids": IDS[:2], "labels": torch.tensor([0, 1])}


class Sentences(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[index], "labels": torch.tensor(index % 3)}


class Rates(TrainerCallback):
    """Notes the rate of each forward's step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(rate_of(model))


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(**small, vocab_size=30, max_position_embeddings=8))


def transformed(**options: Any) -> Any:
    return fxsd.transform(bert(), 0.4, example_inputs=EXAMPLE, **options)


def hugging_face(gm: nn.Module, folder: Path, callback: Any, **options: Any) -> tuple[Trainer, Rates]:
    rates = Rates()
    arguments = {"max_steps": 8, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    args = TrainingArguments(str(folder), use_cpu=True, seed=3, dataloader_pin_memory=False, **{**arguments, **options})
    return Trainer(model=gm, args=args, train_dataset=Sentences(), callbacks=[callback, rates]), rates


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("method", "compute"), [("sample", "mask"), ("block", "skip")])
def test_hugging_face_resumes_exactly(method: str, compute: str, tmp_path: Path) -> None:
    options = {"stochastic_method": method, "compute": compute}
    whole, rates = hugging_face(transformed(**options), tmp_path / "whole", TransformersCallback("linear"), save_steps=3)
    whole.train()
    assert rates.seen == pytest.approx([0.4 * step / 8 for step in range(8)], abs=1e-6)
    logged = [entry["drop_rate"] for entry in whole.state.log_history if "loss" in entry]
    assert logged == pytest.approx([0.4 * step / 8 for step in range(1, 9)])

    rest, rates = hugging_face(transformed(**options), tmp_path / "rest", TransformersCallback("linear"), save_steps=3)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert rates.seen == pytest.approx([0.4 * step / 8 for step in range(3, 8)], abs=1e-6)
    assert losses(rest) == losses(whole)  # those of the first steps come from the checkpoint
    for a, b in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_hugging_face_counts_optimizer_steps(tmp_path: Path) -> None:
    callback = TransformersCallback(lambda step: 0.1 * step)
    trainer, rates = hugging_face(transformed(), tmp_path, callback, max_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    assert rates.seen == pytest.approx([0.0, 0.1, 0.2])


def test_a_second_run_of_hugging_face_s_trainer_begins_anew(tmp_path: Path) -> None:
    trainer, rates = hugging_face(transformed(), tmp_path, TransformersCallback("early", steps=1), max_steps=2)
    trainer.train()
    trainer.train()
    assert rates.seen == pytest.approx([0.4, 0.0, 0.4, 0.0])


def test_hugging_face_s_trainer_saves_what_the_original_class_loads(tmp_path: Path) -> None:
    gm = transformed()
    trainer, _ = hugging_face(gm, tmp_path, TransformersCallback(), max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert '"BertForSequenceClassification"' in (tmp_path / "saved" / "config.json").read_text()
    again = BertForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    fxsd.set_drop_rate(gm, 0.0)  # evaluation is the original's
    torch.testing.assert_close(again(**EXAMPLE).logits, gm.eval()(**EXAMPLE).logits)


def test_hugging_face_s_trainer_checkpoints_activations_where_the_original_did(tmp_path: Path) -> None:
    original = bert()
    original.activation_checkpointing_enable()
    gm = fxsd.transform(original, 0.4, example_inputs=EXAMPLE)
    found = []
    switched_on = {"activation_checkpointing": True}
    for each, options in ((transformed(), {}), (gm, switched_on), (transformed(), switched_on)):
        trainer, _ = hugging_face(each, tmp_path, TransformersCallback(), max_steps=3, **options)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1] == found[2]


# --- Lightning --------------------------------------------------------------------------------------------------------------------


class Module(lightning.LightningModule):
    def __init__(self, method: str = "sample", compute: str = "mask") -> None:
        super().__init__()
        self.options = {"stochastic_method": method, "compute": compute, "example_inputs": (torch.ones(4, 6),)}
        self.seen: list[float] = []
        self.losses: list[float] = []

    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.model = fxsd.transform(nn.Sequential(*[Block() for _ in range(3)]), 0.4, **self.options)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append(rate_of(self))
        torch.manual_seed(1000 + self.trainer.current_epoch * 10 + batch_idx)  # Lightning's checkpoints hold no state of generators
        loss = self.model(batch[0]).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), 0.01)


class Two(Module):
    """Steps two optimizers by hand in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.model[i].parameters(), 0.01) for i in (0, 1)]


class Logged(lightning.loggers.logger.Logger):
    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int, float]] = []

    name = version = ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "drop_rate" in metrics:
            self.metrics.append((step or 0, metrics["drop_rate"]))


def fit(module: Module, folder: Path, callback: Any, ckpt_path: str | None = None, **options: Any) -> tuple[Any, Logged]:
    folder = folder / str(len(list(folder.glob("*"))))
    saved = lightning.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    logger = Logged()
    defaults = {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1}
    trainer = lightning.Trainer(
        callbacks=[saved, callback] if options.pop("save", True) else [callback],
        logger=logger,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **options},
    )
    rows = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    trainer.fit(module, DataLoader(TensorDataset(rows), 4), ckpt_path=ckpt_path, weights_only=False)
    return trainer, logger


# Loaders in this process are what is meant.
quiet = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*treespec.*:FutureWarning", "ignore:The dirpath has changed"
)


@quiet
@pytest.mark.parametrize(("method", "compute"), [("sample", "mask"), ("block", "skip")])
def test_lightning_resumes_exactly(method: str, compute: str, tmp_path: Path) -> None:
    whole = Module(method, compute)
    _, logger = fit(whole, tmp_path, LightningCallback("linear"))
    expected = [0.4 * step / 8 for step in range(8)]
    assert whole.seen == pytest.approx(expected, abs=1e-6)
    assert logger.metrics == [(step, pytest.approx(rate, abs=1e-6)) for step, rate in enumerate(expected)]

    rest = Module(method, compute)
    fit(rest, tmp_path, LightningCallback("cosine", 0.1), ckpt_path=str(tmp_path / "0" / "step=4.ckpt"))  # the checkpoint decides
    assert rest.seen == pytest.approx(expected[4:], abs=1e-6)
    assert rest.losses == whole.losses[4:]
    for a, b in zip(rest.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


@quiet
def test_lightning_counts_optimizer_steps(tmp_path: Path) -> None:
    module, callback = Module(), LightningCallback(lambda step: 0.1 * step)
    for _ in range(2):
        fit(module, tmp_path, callback, accumulate_grad_batches=2)
    assert module.seen == pytest.approx([0.1 * (batch // 2) for batch in range(16)])


@quiet
def test_two_optimizers_in_a_batch_of_lightning_are_one_step(tmp_path: Path) -> None:
    module = Two()
    fit(module, tmp_path, LightningCallback("linear", steps=8), save=False, enable_checkpointing=False)
    assert module.seen == pytest.approx([0.4 * step / 8 for step in range(8)], abs=1e-6)


@quiet
def test_a_second_fit_of_lightning_goes_on(tmp_path: Path) -> None:
    module, callback = Module(), LightningCallback("early", steps=10)
    fit(module, tmp_path, callback)
    fit(module, tmp_path, callback, max_epochs=1)
    assert module.seen == pytest.approx([0.4] * 10 + [0.0] * 2)


# --- both -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("callback", CALLBACKS)
def test_bad_arguments_are_told_at_once(callback: Callable[..., Any]) -> None:
    with pytest.raises(fxsd.FxsdError, match="schedule must be one of"):
        callback("sideways")
    with pytest.raises(fxsd.FxsdError, match="steps must be a positive whole number"):
        callback("linear", steps=0)


@quiet
def test_a_model_that_was_not_transformed_is_told_when_training_begins(tmp_path: Path) -> None:
    class Plain(Module):
        def configure_model(self) -> None:
            self.model = nn.Linear(6, 6)

    with pytest.raises(fxsd.FxsdError, match="there is no transformed model in this Plain"):
        fit(Plain(), tmp_path, LightningCallback())
    trainer, _ = hugging_face(bert(), tmp_path, TransformersCallback())
    with pytest.raises(fxsd.FxsdError, match="there is no transformed model in this BertForSequenceClassification"):
        trainer.train()


def test_the_package_imports_no_trainer_and_says_what_to_install() -> None:
    code = """
import sys
import fxsd
assert not {"transformers", "accelerate", "lightning", "pytorch_lightning"} & sys.modules.keys()
for name in ("transformers", "lightning", "pytorch_lightning"):
    sys.modules[name] = None
for name in ("transformers", "lightning"):
    try:
        __import__(f"fxsd.integrations.{name}")
    except fxsd.FxsdError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert [line.rpartition(": ")[2] for line in result.stdout.splitlines()] == [
        "pip install transformers accelerate",
        "pip install lightning",
    ]
