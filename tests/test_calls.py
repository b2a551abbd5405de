"""Every other call than the example's: tiny Hugging Face models that were transformed with one call, in all the ways they can be called.

A call is a function of the model, so that the original and the transformed one get the same; its inputs come from a generator of its own.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

import fxsd
from fxsd.run.ops import StochasticDepth

# Libraries warn about what a tiny configuration lacks.
pytestmark = pytest.mark.filterwarnings("ignore")
Call = Callable[[Any], Any]

WORDS, LENGTH = 50, 7
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = SMALL | {"vocab_size": WORDS, "max_position_embeddings": 64, "pad_token_id": 0}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
DECODER = TEXT | SPECIAL | {"num_key_value_heads": 1}
BART = {
    "vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0, "decoder_start_token_id": 1,
    "forced_eos_token_id": None, **SPECIAL,
}  # fmt: skip
IMAGE = {"image_size": 32, "patch_size": 8}


def numbers(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(3, WORDS, (batch, length), generator=torch.Generator().manual_seed(seed + batch + length))


def padding(right: int = 0, left: int = 0) -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :left] = 0
    mask[1, LENGTH - right :] = 0
    return mask


def causal() -> Tensor:
    return torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()


def words(batch: int = 2, length: int = LENGTH) -> dict[str, Tensor]:
    return {"input_ids": tokens(batch, length), "attention_mask": torch.ones(batch, length, dtype=torch.long)}


def embedded(model: Any, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids)


# --- calls ------------------------------------------------------------------------------------------------------------------

HEADS: dict[str, Call] = {
    "hidden states": lambda model: model(**words(), output_hidden_states=True),
    "attentions": lambda model: model(**words(), output_attentions=True),
    "a tuple": lambda model: model(**words(), return_dict=False),
}
READ: dict[str, Call] = {
    "the example": lambda model: model(**words()),
    "no mask": lambda model: model(tokens()),
    "padding on the right": lambda model: model(tokens(), attention_mask=padding(right=2)),
    "padding on the left": lambda model: model(tokens(), attention_mask=padding(left=3)),
    "another length": lambda model: model(**words(2, 12)),
    "one token": lambda model: model(**words(2, 1)),
    "a batch of one": lambda model: model(**words(1)),
    "an incomplete last batch": lambda model: model(**words(3)),
    "embeddings": lambda model: model(inputs_embeds=embedded(model, tokens()), attention_mask=padding()),
    "embeddings without a mask": lambda model: model(inputs_embeds=embedded(model, tokens())),
    **HEADS,
}
ENCODE = READ | {
    "a mask of queries and keys": lambda model: model(tokens(), attention_mask=causal()),
    "a mask that is added": lambda model: model(tokens(), attention_mask=(1.0 - causal().float()) * -1e9),
}
CLASSIFY = {"labels": lambda model: model(**words(), labels=torch.tensor([0, 1]))}
GENERATE: dict[str, Call] = {
    "greedy": lambda model: generated(model, do_sample=False),
    "sampled": lambda model: generated(model, do_sample=True, top_k=20),
    "beams": lambda model: generated(model, do_sample=False, num_beams=3),
    "greedy without a cache": lambda model: generated(model, do_sample=False, use_cache=False),
}
CONTINUE: dict[str, Call] = {
    "labels": lambda model: model(**words(), labels=tokens()),
    "no cache": lambda model: model(**words(), use_cache=False),
    "an empty cache": lambda model: model(**words(), past_key_values=DynamicCache(config=model.config)),
    "a second step": lambda model: second_step(model, DynamicCache(config=model.config)),
    "a static cache": lambda model: in_static_cache(model),
    "positions": lambda model: model(**words(), position_ids=torch.arange(LENGTH).flip(0).repeat(2, 1)),
    "a mask of queries and keys": lambda model: model(tokens(), attention_mask=causal()),
    "a mask that is added": lambda model: model(tokens(), attention_mask=(1.0 - causal().float()) * -1e9),
    "the last logits": lambda model: model(**words(), logits_to_keep=1),
    "padding on the left, generated": lambda model: generated(model, attention_mask=padding(left=3), do_sample=False),
    "a static cache, generated": lambda model: generated(model, do_sample=False, cache_implementation="static", disable_compile=True),
    **GENERATE,
}
TRANSLATE: dict[str, Call] = {
    "the example": lambda model: model(**words(), labels=tokens(2, 5)),
    "decoder tokens": lambda model: model(**words(), decoder_input_ids=tokens(2, 4)),
    "no mask": lambda model: model(tokens(), decoder_input_ids=tokens(2, 4)),
    "padding on the right": lambda model: model(tokens(), attention_mask=padding(right=2), labels=tokens(2, 5)),
    "padding on the left": lambda model: model(tokens(), attention_mask=padding(left=3), labels=tokens(2, 5)),
    "a mask of the decoder": lambda model: model(
        **words(), decoder_input_ids=tokens(), decoder_attention_mask=padding(right=2), use_cache=False
    ),
    "another length": lambda model: model(**words(2, 12), labels=tokens(2, 3)),
    "a batch of one": lambda model: model(**words(1), labels=tokens(1, 5)),
    "an incomplete last batch": lambda model: model(**words(3), labels=tokens(3, 5)),
    "embeddings": lambda model: model(inputs_embeds=embedded(model, tokens()), labels=tokens(2, 5)),
    "embeddings of the decoder": lambda model: model(**words(), decoder_inputs_embeds=embedded(model, tokens(2, 4))),
    "the encoder's output": lambda model: model(
        encoder_outputs=model.get_encoder()(**words()), attention_mask=padding(), decoder_input_ids=tokens(2, 4)
    ),
    "no cache": lambda model: model(**words(), decoder_input_ids=tokens(2, 4), use_cache=False),
    "a second step": lambda model: second_step_of_two(model, **words()),
    "hidden states": lambda model: model(**words(), labels=tokens(2, 5), output_hidden_states=True),
    "attentions": lambda model: model(**words(), labels=tokens(2, 5), output_attentions=True),
    "a tuple": lambda model: model(**words(), labels=tokens(2, 5), return_dict=False),
    **GENERATE,
}
SEE: dict[str, Call] = {
    "the example": lambda model: model(numbers(2, 3, 32, 32)),
    "labels": lambda model: model(numbers(2, 3, 32, 32), labels=torch.tensor([0, 1])),
    "a batch of one": lambda model: model(numbers(1, 3, 32, 32)),
    "an incomplete last batch": lambda model: model(numbers(3, 3, 32, 32)),
    "another size": lambda model: model(numbers(2, 3, 48, 64), interpolate_pos_encoding=True),
    "hidden states": lambda model: model(numbers(2, 3, 32, 32), output_hidden_states=True),
    "attentions": lambda model: model(numbers(2, 3, 32, 32), output_attentions=True),
    "a tuple": lambda model: model(numbers(2, 3, 32, 32), return_dict=False),
}
COMPARE: dict[str, Call] = {
    "the example": lambda model: model(**words(), pixel_values=numbers(2, 3, 32, 32)),
    "no mask": lambda model: model(tokens(), numbers(2, 3, 32, 32)),
    "padding on the right": lambda model: model(tokens(), numbers(2, 3, 32, 32), attention_mask=padding(right=2)),
    "more texts than images": lambda model: model(**words(5, 9), pixel_values=numbers(1, 3, 32, 32)),
    "a loss": lambda model: model(**words(), pixel_values=numbers(2, 3, 32, 32), return_loss=True),
    "another size": lambda model: model(**words(), pixel_values=numbers(2, 3, 48, 64), interpolate_pos_encoding=True),
    "hidden states": lambda model: model(**words(), pixel_values=numbers(2, 3, 32, 32), output_hidden_states=True),
    "attentions": lambda model: model(**words(), pixel_values=numbers(2, 3, 32, 32), output_attentions=True),
    "a tuple": lambda model: model(**words(), pixel_values=numbers(2, 3, 32, 32), return_dict=False),
    "the text alone": lambda model: model.get_text_features(**words()),
    "the image alone": lambda model: model.get_image_features(numbers(2, 3, 32, 32)),
}
HEAR: dict[str, Call] = {
    "the example": lambda model: model(numbers(2, 2000)),
    "labels": lambda model: model(numbers(2, 2000), labels=tokens(2, 4)),
    "padding on the right": lambda model: model(numbers(2, 2000), attention_mask=heard(1500)),
    "another length": lambda model: model(numbers(2, 3300)),
    "a batch of one": lambda model: model(numbers(1, 2000)),
    "an incomplete last batch": lambda model: model(numbers(3, 2000)),
    "hidden states": lambda model: model(numbers(2, 2000), output_hidden_states=True),
    "attentions": lambda model: model(numbers(2, 2000), output_attentions=True),
    "a tuple": lambda model: model(numbers(2, 2000), return_dict=False),
}
WRITE_DOWN: dict[str, Call] = {
    "the example": lambda model: model(numbers(2, 16, 32), labels=tokens(2, 5)),
    "decoder tokens": lambda model: model(numbers(2, 16, 32), decoder_input_ids=tokens(2, 4)),
    "a mask of the decoder": lambda model: model(
        numbers(2, 16, 32), decoder_input_ids=tokens(), decoder_attention_mask=padding(right=2), use_cache=False
    ),
    "a batch of one": lambda model: model(numbers(1, 16, 32), labels=tokens(1, 9)),
    "an incomplete last batch": lambda model: model(numbers(3, 16, 32), labels=tokens(3, 5)),
    "embeddings of the decoder": lambda model: model(numbers(2, 16, 32), decoder_inputs_embeds=embedded(model, tokens(2, 4))),
    "the encoder's output": lambda model: model(
        encoder_outputs=model.get_encoder()(numbers(2, 16, 32)), decoder_input_ids=tokens(2, 4)
    ),
    "no cache": lambda model: model(numbers(2, 16, 32), decoder_input_ids=tokens(2, 4), use_cache=False),
    "a second step": lambda model: second_step_of_two(model, input_features=numbers(2, 16, 32)),
    "hidden states": lambda model: model(numbers(2, 16, 32), labels=tokens(2, 5), output_hidden_states=True),
    "attentions": lambda model: model(numbers(2, 16, 32), labels=tokens(2, 5), output_attentions=True),
    "a tuple": lambda model: model(numbers(2, 16, 32), labels=tokens(2, 5), return_dict=False),
    "greedy": lambda model: model.generate(numbers(2, 16, 32), **FEW, do_sample=False),
    "sampled": lambda model: model.generate(numbers(2, 16, 32), **FEW, do_sample=True, top_k=20),
    "beams": lambda model: model.generate(numbers(2, 16, 32), **FEW, do_sample=False, num_beams=3),
}  # fmt: skip
ROUTE: dict[str, Call] = {
    "router logits": lambda model: model(**words(), output_router_logits=True),
    "router logits and labels": lambda model: model(tokens(), attention_mask=padding(right=2), labels=tokens(), output_router_logits=True),
}
FEW = {"max_new_tokens": 3, "min_new_tokens": 3, "output_scores": True, "return_dict_in_generate": True}


def generated(model: Any, **options: Any) -> Any:
    return model.generate(**words() | {"attention_mask": options.pop("attention_mask", padding())}, **FEW, **options)


def second_step(model: Any, past: Any) -> Any:
    first = model(**words(), past_key_values=past, use_cache=True)
    mask = torch.ones(2, LENGTH + 1, dtype=torch.long)
    return first.logits, model(tokens(2, 1), attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)


@torch.no_grad()  # steps write into it
def in_static_cache(model: Any) -> Any:
    return second_step(model, StaticCache(config=model.config, max_cache_len=16))


def second_step_of_two(model: Any, **given: Tensor) -> Any:
    past = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    first = model(**given, decoder_input_ids=tokens(2, 4), past_key_values=past, use_cache=True)
    read = (first.encoder_last_hidden_state,)
    return first.logits, model(encoder_outputs=read, decoder_input_ids=tokens(2, 1), past_key_values=first.past_key_values, use_cache=True)


def heard(length: int) -> Tensor:
    mask = torch.ones(2, 2000, dtype=torch.long)
    mask[1, length:] = 0
    return mask


# --- models -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A model: its class and configuration, the example, its calls, and how many sites it has."""

    model: str
    config: str
    arguments: dict[str, Any]
    example: Callable[[], dict[str, Tensor]]
    calls: dict[str, Call]
    sites: int = 4


def translated() -> dict[str, Tensor]:
    return words() | {"labels": tokens(2, 5)}


MODELS = {
    "BERT": Known("BertForSequenceClassification", "BertConfig", TEXT, words, ENCODE | CLASSIFY),
    "RoBERTa": Known(
        "RobertaForMaskedLM", "RobertaConfig", TEXT, words, ENCODE | {"labels": lambda model: model(**words(), labels=tokens())}
    ),
    "DistilBERT": Known(
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": WORDS, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "seq_classif_dropout": 0.0}, words,
        ENCODE | CLASSIFY,
    ),
    "GPT2": Known(
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, **SPECIAL}, words,
        READ | CONTINUE,
    ),
    "Llama": Known("LlamaForCausalLM", "LlamaConfig", DECODER, words, READ | CONTINUE),
    "Qwen2": Known("Qwen2ForCausalLM", "Qwen2Config", DECODER, words, READ | CONTINUE),
    "Mixtral": Known(
        "MixtralForCausalLM", "MixtralConfig", DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}, words, READ | CONTINUE | ROUTE
    ),
    "T5": Known(
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": WORDS, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
        translated, TRANSLATE, 10,
    ),
    "BART": Known("BartForConditionalGeneration", "BartConfig", BART | {"max_position_embeddings": 64}, translated, TRANSLATE, 10),
    "ViT": Known(
        "ViTForImageClassification", "ViTConfig", IMAGE | SMALL, lambda: {"pixel_values": numbers(2, 3, 32, 32)}, SEE
    ),
    "Swin": Known(
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        lambda: {"pixel_values": numbers(2, 3, 32, 32)}, SEE, 8,
    ),
    "CLIP": Known(
        "CLIPModel", "CLIPConfig",
        {"text_config": TEXT | SPECIAL | {"eos_token_id": 49}, "vision_config": IMAGE | SMALL, "projection_dim": 16},
        lambda: words() | {"pixel_values": numbers(2, 3, 32, 32)}, COMPARE, 8,
    ),
    "Whisper": Known(
        "WhisperForConditionalGeneration", "WhisperConfig",
        BART | {
            "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 32, "begin_suppress_tokens": None,
            "apply_spec_augment": False,
        },
        lambda: {"input_features": numbers(2, 16, 32), "labels": tokens(2, 5)}, WRITE_DOWN, 10,
    ),
    "Wav2Vec2": Known(
        "Wav2Vec2ForCTC", "Wav2Vec2Config",
        SMALL | {
            "vocab_size": WORDS, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0,
            "ctc_loss_reduction": "mean",
        },
        lambda: {"input_values": numbers(2, 2000)}, HEAR, 4,
    ),
}  # fmt: skip
FAST = ("BERT", "Llama", "T5", "ViT")


def of_models(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.zoo) for name in names])


each = of_models(*MODELS)
CALLS = [
    pytest.param(name, call, marks=() if name in FAST else pytest.mark.zoo, id=f"{name}: {call}")
    for name, known in MODELS.items()
    for call in known.calls
]
each_call = pytest.mark.parametrize(("name", "call"), CALLS)
# What a sampled call gives depends on the draws before it.
each_quiet_call = pytest.mark.parametrize(("name", "call"), [row for row in CALLS if row.values[1] != "sampled"])


def built(name: str, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    known = MODELS[name]
    config = getattr(transformers, known.config)(**known.arguments)
    for part in (config, *(getattr(config, key) for key in config.sub_configs)):
        for key in list(vars(part)):
            if "drop" in key and key != "layerdrop" and "layer" not in key and isinstance(getattr(part, key), float):
                setattr(part, key, dropout if "path" not in key else 0.0)
    return getattr(transformers, known.model)(config)


@cache
def original(name: str, dropout: float = 0.0) -> Any:
    return built(name, dropout)


@cache
def made(name: str, rate: float = 0.5, scaling: str = "train", dropout: float = 0.0) -> nn.Module:
    return fxsd.transform(
        copy.deepcopy(original(name, dropout)), rate, drop_distribution="uniform", scaling=scaling, example_inputs=MODELS[name].example()
    )


def at(rate: float, model: nn.Module) -> nn.Module:
    fxsd.set_drop_rate(model, rate)
    return model


def one(name: str) -> nn.Module:
    return made(name, 1.0, "inference")


def run(model: nn.Module, call: Call, training: bool, seed: int = 0) -> list[Any]:
    torch.manual_seed(seed)
    with torch.no_grad():
        return list(parts(call(model.train(training))))


def gradients(model: nn.Module, found: list[Any]) -> dict[str, Tensor]:
    of = [part.square().mean() for part in found if isinstance(part, Tensor) and part.requires_grad]
    if not of:  # generated
        return {}
    names, parameters = zip(*((key, p) for key, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(torch.stack(of).sum(), parameters, materialize_grads=True), strict=True))


def doubled(called: Call, model: nn.Module) -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        return called(model)
    finally:
        torch.set_default_dtype(torch.float32)


def parts(value: Any) -> Iterator[Any]:
    """The tensors in an output of any class, caches included, and of what class each thing in it is."""
    yield type(value)
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from parts(item)
    elif isinstance(value, dict) or hasattr(value, "__dict__"):
        for key, item in (value if isinstance(value, dict) else vars(value)).items():
            yield key
            if not isinstance(item, (type, transformers.PreTrainedConfig)):
                yield from parts(item)


def is_equal(found: list[Any], expected: list[Any]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(b, Tensor) else a == b for a, b in zip(found, expected, strict=True)
    )


# --- every call -------------------------------------------------------------------------------------------------------------


@each_call
def test_evaluation_is_the_original_bit_for_bit(name: str, call: str):
    called = MODELS[name].calls[call]
    expected = run(original(name), called, training=False)
    assert any(isinstance(part, Tensor) for part in expected)
    assert is_equal(run(at(0.5, made(name)), called, training=False), expected)


@each_call
def test_training_at_rate_zero_is_the_original_bit_for_bit(name: str, call: str):
    called, results = MODELS[name].calls[call], []
    for model in (at(0.0, made(name)), original(name)):
        torch.manual_seed(0)
        found = list(parts(called(model.train())))
        results.append(found + list(parts(gradients(model, found))))
    assert is_equal(*results)


@each_quiet_call
def test_at_rate_one_every_draw_is_the_same(name: str, call: str):
    called = MODELS[name].calls[call]
    first, second = (run(at(1.0, made(name)), called, True, seed) for seed in (0, 1))
    assert is_equal(first, second)
    assert is_equal(first, run(one(name), called, True, 2))
    assert not is_equal(first, run(original(name), called, True))


@each_quiet_call
def test_at_rate_one_evaluation_scales_every_branch_to_zero(name: str, call: str):
    called = MODELS[name].calls[call]
    evaluated, trained = (run(one(name), called, training) for training in (False, True))
    assert is_equal(evaluated, trained)


@each_quiet_call
def test_seeds_drop_different_branches(name: str, call: str):
    called = MODELS[name].calls[call]
    first, *others = (run(at(0.5, made(name)), called, True, seed) for seed in range(6))
    assert is_equal(run(made(name), called, True, 0), first)
    assert not all(is_equal(other, first) for other in others)


@each_quiet_call
def test_every_op_runs_that_its_module_runs_for(name: str, call: str):
    """Which code a call takes does not matter: in each run of a module that adds, its ops run."""
    gm, ran = made(name), set[str]()
    ops = {path: module for path, module in gm.named_modules() if isinstance(module, StochasticDepth)}
    around = {path.rpartition(".")[0] for path in ops}
    watched = [(path, gm.get_submodule(path)) for path in (*ops, *around)]
    hooks = [module.register_forward_hook(lambda *_, path=path: ran.add(path)) for path, module in watched]
    try:
        run(gm, MODELS[name].calls[call], True)
    finally:
        for hook in hooks:
            hook.remove()
    assert ran & ops.keys()
    assert ran & ops.keys() == {path for path in ops if path.rpartition(".")[0] in ran}


# --- every model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *[name if name in FAST else pytest.param(name, marks=pytest.mark.zoo) for name in MODELS if name != "Wav2Vec2"],
        pytest.param(
            "Wav2Vec2",
            marks=[pytest.mark.zoo, pytest.mark.xfail(strict=True, reason="the name `wav2vec2` is taken for that of a numbered block")],
        ),
    ],
)
def test_a_model_has_its_sites(name: str):
    assert len(fxsd.sites(made(name))) == MODELS[name].sites
    assert len(fxsd.analyze(original(name), example_inputs=MODELS[name].example()).sites) == MODELS[name].sites


@each
def test_the_signature_and_the_class_are_the_originals(name: str):
    gm, model = made(name), original(name)
    assert isinstance(gm, type(model))
    for method in ("__call__", "forward", "get_input_embeddings"):
        assert inspect.signature(getattr(gm, method)) == inspect.signature(getattr(model, method))
    assert gm.main_input_name == model.main_input_name
    assert gm.config.to_dict() == model.config.to_dict()


@each
def test_the_original_class_loads_what_a_transformed_model_saves(name: str, tmp_path: Path):
    made(name).save_pretrained(tmp_path)
    loaded = type(original(name)).from_pretrained(tmp_path)
    assert type(loaded) is type(original(name))
    assert list(loaded.state_dict()) == list(original(name).state_dict())
    called = MODELS[name].calls["the example"]
    assert is_equal(run(loaded, called, False), run(original(name), called, False))


@each
def test_with_dropout_of_its_own_training_at_rate_zero_is_the_original(name: str):
    gm = made(name, 0.0, dropout=0.1)
    for called in MODELS[name].calls.values():
        assert is_equal(run(gm, called, True), run(original(name, 0.1), called, True))


@of_models(*(name for name in MODELS if name != "Mixtral"))  # torch._grouped_mm takes no double
def test_in_double_every_call_is_the_original(name: str):
    gm, model = (copy.deepcopy(each).double() for each in (made(name), original(name)))
    for called in MODELS[name].calls.values():
        in_double = partial(doubled, called)
        assert is_equal(run(gm, in_double, False), run(model, in_double, False))
        assert not is_equal(run(at(1.0, gm), in_double, True), run(model, in_double, True))
        at(0.5, gm)


@each
def test_a_copy_takes_every_call(name: str):
    gm = fxsd.transform(built(name), 0.5, drop_distribution="uniform", example_inputs=MODELS[name].example())
    copies = [copy.deepcopy(gm)]
    if name != "Wav2Vec2":  # torch pickles no parametrized modules
        copies.append(pickle.loads(pickle.dumps(gm)))
    for each in copies:
        for called in MODELS[name].calls.values():
            assert is_equal(run(each, called, True, 1), run(at(0.5, made(name, scaling="inference")), called, True, 1))


@each
def test_the_example_that_was_transformed_with_does_not_matter(name: str):
    """One seed, one call: the same drops."""
    known = MODELS[name]
    few = {key: value[:1] if isinstance(value, Tensor) else value for key, value in known.example().items() if key != "attention_mask"}
    other = fxsd.transform(copy.deepcopy(original(name)), 0.5, drop_distribution="uniform", scaling="train", example_inputs=few)
    assert [site.name for site in fxsd.sites(other)] == [site.name for site in fxsd.sites(made(name))]
    for called in known.calls.values():
        assert is_equal(run(other, called, True, 1), run(at(0.5, made(name)), called, True, 1))


@of_models("BERT", "RoBERTa", "GPT2", "Llama", "Qwen2", "Mixtral", "BART", "ViT", "CLIP", "Whisper", "Wav2Vec2")
def test_another_attention_may_be_set_afterwards(name: str):
    gm, model = (copy.deepcopy(each) for each in (made(name), original(name)))
    for each in (gm, model):
        each.set_attn_implementation("eager")
    called = MODELS[name].calls["attentions"]
    assert is_equal(run(gm, called, False), run(model, called, False))
    assert not is_equal(run(at(1.0, gm), called, True), run(model, called, True))


@pytest.mark.xfail(strict=True, reason="transformers hooks modules at the first such call, and models share those without ops")
@of_models("BERT", "GPT2", "Llama", "ViT", "Mixtral")
def test_what_a_call_records_is_the_same_in_both_models_of_the_same_modules(name: str):
    model = built(name)
    model.set_attn_implementation("eager")
    gm = fxsd.transform(model, 0.5, scaling="train", example_inputs=MODELS[name].example())
    called = MODELS[name].calls["attentions"]
    expected = run(copy.deepcopy(model), called, False)
    assert is_equal(run(gm, called, False), expected)
    assert is_equal(run(model, called, False), expected)


# --- what no model of the table does --------------------------------------------------------------------------------------------


@of_models("BERT", "ViT")
def test_an_empty_batch_raises_what_the_original_raises(name: str):
    empty = {key: value[:0] for key, value in MODELS[name].example().items()}
    for training in (True, False):
        with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
            original(name).train(training)(**empty)
        with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
            made(name).train(training)(**empty)


@pytest.mark.parametrize("method", ["sample", "block"])
def test_an_empty_batch_is_taken_where_the_original_takes_one(method: str):
    net = torchvision.models.convnext_tiny(num_classes=5)
    net.features = net.features[:2]
    net.classifier = nn.Identity()
    gm = fxsd.transform(net, 0.5, scaling="train", stochastic_method=method, drop_distribution="uniform")
    given = torch.zeros(0, 3, 32, 32)
    for training in (True, False):
        assert torch.equal(gm.train(training)(given), net.train(training)(given))
        assert gm(given).shape == (0, 96, 1, 1)


def test_a_call_that_the_original_refuses_is_refused_alike():
    for model in (original("BERT"), made("BERT")):
        with pytest.raises(ValueError, match=r"specify both input_ids and inputs_embeds|specify exactly one"):
            model(tokens(), inputs_embeds=numbers(2, LENGTH, 32))
        with pytest.raises(TypeError, match="unexpected keyword argument 'images'"):
            model.get_input_embeddings()(tokens(), images=None)
