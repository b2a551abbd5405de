"""What is refused, and that each refusal names the rule, the value and the next step."""

from __future__ import annotations

import gc
import re
from contextlib import suppress
from fractions import Fraction

import pytest
import torch
from models import WIDTH, BareLinear, BranchRight, Gate, LongSkip, Plain, PositionEmbedding, Stack, ThreeBlocks
from torch import Tensor, nn

import fxsd

VERBS = {"transform": fxsd.transform, "analyze": fxsd.analyze}


@pytest.fixture(params=VERBS)
def verb(request: pytest.FixtureRequest):
    return VERBS[request.param]


# --- arguments ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate", [-0.1, 1.0001, float("nan"), float("inf"), True, "0.1", None, [0.1], 1j, Fraction(1, 2), torch.tensor(0.1)]
)
def test_a_rate_outside_zero_to_one_is_refused(verb, rate: object):
    with pytest.raises(fxsd.FxsdError, match=rf"^drop_rate must be a number from 0 to 1, but got {re.escape(repr(rate))}\.$"):
        verb(ThreeBlocks(), rate)


@pytest.mark.parametrize("value", ["Sample", "row", "batch", None, 1, ""])
def test_a_stochastic_method_that_is_none_is_refused(verb, value: object):
    with pytest.raises(fxsd.FxsdError, match=rf"^stochastic_method must be one of 'sample', 'block', but got {re.escape(repr(value))}\.$"):
        verb(ThreeBlocks(), stochastic_method=value)


@pytest.mark.parametrize(
    ("argument", "value", "legal"),
    [
        ("scaling", "eval", "'inference', 'train'"),
        ("scaling", True, "'inference', 'train'"),
        ("compute", "masked", "'mask', 'skip', 'auto'"),
        ("depth_by", "blocks", "'block', 'add'"),
        ("existing", "remove", "'replace', 'keep', 'error'"),
        ("existing", None, "'replace', 'keep', 'error'"),
    ],
)
def test_a_misspelt_choice_is_refused_with_the_legal_ones(verb, argument: str, value: object, legal: str):
    with pytest.raises(fxsd.FxsdError, match=f"^{argument} must be one of {legal}, but got {value!r}\\.$"):
        verb(ThreeBlocks(), **{argument: value})


@pytest.mark.parametrize("argument", ["stochastic_method", "scaling", "existing", "depth_by", "drop_distribution"])
@pytest.mark.parametrize("value", [["sample"], {"a": "b"}])
def test_a_choice_that_cannot_be_hashed_is_refused_too(verb, argument: str, value: object):
    with pytest.raises(fxsd.FxsdError, match=argument):
        verb(ThreeBlocks(), **{argument: value})


@pytest.mark.parametrize("argument", ["target_layer_name", "include", "exclude"])
@pytest.mark.parametrize("value", [3, [1], nn.Linear, {"a"}, [None]])
def test_names_must_be_strings(verb, argument: str, value: object):
    with pytest.raises(fxsd.FxsdError, match=f"^{argument} must be a string, a list of strings or None, but got {re.escape(repr(value))}"):
        verb(ThreeBlocks(), **{argument: value})


@pytest.mark.parametrize("value", ["Bottleneck", "block", ["branchright"], ""])
def test_a_target_that_names_nothing_is_refused_with_the_classes_that_would_do(verb, value: object):
    with pytest.raises(
        fxsd.FxsdError, match=r"target_layer_name must name a class.*but got .*Classes around them are BranchLeft, BranchRight"
    ):
        verb(ThreeBlocks(), target_layer_name=value)


@pytest.mark.parametrize("options", [{"exclude": "block.1"}, {"include": "block.1"}, {"target_layer_name": ["BranchRight", "Botleneck"]}])
def test_every_name_must_match_something(verb, options: dict[str, object]):
    with pytest.raises(fxsd.FxsdError, match=r"matches no module|names no"):
        verb(ThreeBlocks(), **options)


@pytest.mark.parametrize("argument", ["subset_batch_norm", "sync_ranks"])
@pytest.mark.parametrize("value", [1, "yes", None])
def test_a_flag_must_be_a_bool(verb, argument: str, value: object):
    with pytest.raises(fxsd.FxsdError, match=f"^{argument} must be .*but got {value!r}"):
        verb(ThreeBlocks(), **{argument: value})


def test_an_unknown_argument_is_a_type_error_as_in_any_python_function(verb):
    with pytest.raises(TypeError, match="drop_prob"):
        verb(ThreeBlocks(), drop_prob=0.1)


@pytest.mark.parametrize("example", ["x", 3, torch.ones(2, WIDTH), {1, 2}])
def test_example_inputs_of_another_kind_are_refused(verb, example: object):
    with pytest.raises(
        fxsd.FxsdError, match=f"example_inputs must be a tuple of args or a dict of kwargs, but got a? ?{type(example).__name__}"
    ):
        verb(ThreeBlocks(), example_inputs=example)


# --- models ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 3, "resnet50", lambda x: x, nn.Linear, [nn.Linear(2, 2)], torch.ones(2)])
def test_what_is_no_module_is_refused(verb, value: object):
    with pytest.raises(fxsd.FxsdError, match=rf"^model must be a torch\.nn\.Module, but got {type(value).__name__}\.$"):
        verb(value)


def test_a_compiled_model_is_refused(verb):
    with pytest.raises(fxsd.FxsdError, match=r"wrapped in OptimizedModule; transform the model inside it first \(Stack\), and compile"):
        verb(torch.compile(ThreeBlocks()))


def test_a_data_parallel_model_is_refused(verb):
    with pytest.raises(fxsd.FxsdError, match=r"wrapped in DataParallel; transform the model inside it first \(Stack\)"):
        verb(nn.DataParallel(ThreeBlocks()))


def test_a_distributed_model_is_refused(verb):
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(ThreeBlocks())
        with pytest.raises(fxsd.FxsdError, match=r"wrapped in DistributedDataParallel; transform the model inside it first \(Stack\)"):
            verb(wrapped)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # that is what the test is about
def test_a_script_module_is_refused(verb):
    with pytest.raises(fxsd.FxsdError, match=r"a ScriptModule has no Python left to trace; transform the model before torch\.jit\.script"):
        verb(torch.jit.script(BranchRight()))


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (Plain, None),
        (Gate, None),
        (BareLinear, "1 x its branch is a single linear op"),
        (lambda: Stack(BareLinear(), BareLinear()), "2 x its branch is a single linear op"),
    ],
)
def test_a_model_without_residual_adds_is_refused_with_what_was_looked_at(factory, reason: str | None):
    model = factory()
    message = f"^{type(model).__name__} has no residual add to drop the branch of\\..*fxsd\\.analyze\\(model\\)\\.print\\(\\) shows"
    with pytest.raises(fxsd.FxsdError, match=message) as error:
        fxsd.transform(model)
    assert ("Adds that were looked at" in str(error.value)) == (reason is not None)
    assert (reason or "") in str(error.value)
    assert fxsd.analyze(model).sites == ()


@pytest.mark.parametrize("model", [Plain(), ThreeBlocks()], ids=["a failure", "a success"])
@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_on_or_off_as_before(model: nn.Module, enabled: bool):
    try:
        if not enabled:
            gc.disable()
        with suppress(fxsd.FxsdError):
            fxsd.transform(model)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_excluding_every_site_leaves_nothing_and_says_why():
    with pytest.raises(fxsd.FxsdError, match="3 x exclude names its module"):
        fxsd.transform(ThreeBlocks(), exclude="*")
    assert fxsd.analyze(ThreeBlocks(), exclude="*").sites == ()


class OnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + self.f(x).relu()
        return x


def test_an_untraceable_part_with_sites_is_named_with_its_line_and_its_cause(verb):
    model = nn.Sequential(ThreeBlocks(), Stack(OnValues()))
    where = rf"module '1\.blocks\.0' \(OnValues\) stopped tracing at {re.escape(__file__)}:\d+, `if x\.sum\(\) > 0:`: .*"
    with pytest.raises(fxsd.CaptureError, match=where + r".*It holds 1 residual add, which could not be rewritten\."):
        verb(model)


def test_an_untraceable_root_is_named_with_its_line(verb):
    with pytest.raises(
        fxsd.CaptureError, match=rf"the model \(OnValues\) stopped tracing at {re.escape(__file__)}:\d+, `if x\.sum\(\) > 0:`"
    ):
        verb(OnValues())
    assert issubclass(fxsd.CaptureError, fxsd.FxsdError)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_part_with_sites_is_refused_by_name(verb, wrap):
    model = nn.Sequential(nn.Linear(8, 8), wrap(Stack(ThreeBlocks())))
    with pytest.raises(fxsd.FxsdError, match=r"module '1' is wrapped in (DataParallel|OptimizedModule) and holds \d+ residual adds"):
        verb(model)
    harmless = nn.Sequential(wrap(nn.Linear(8, 8)), Stack(ThreeBlocks()))
    assert verb(harmless)


def test_a_forward_that_raises_is_an_error_with_its_own_words(verb):
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("the moon is full")

    with pytest.raises(fxsd.CaptureError, match=r"Broken.*the moon is full"):
        verb(Broken())


# --- transformed models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [nn.Linear(2, 2), ThreeBlocks(), None, 3, "gm"])
def test_sites_and_rates_need_a_transformed_model(value: object):
    message = rf"there is no transformed model in this {type(value).__name__}; fxsd\.transform\(model\) makes one"
    with pytest.raises(fxsd.FxsdError, match=message):
        fxsd.sites(value)
    with pytest.raises(fxsd.FxsdError, match=message):
        fxsd.set_drop_rate(value, 0.1)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), "0.1", None, True])
def test_a_new_rate_must_be_a_rate_and_a_bad_one_changes_nothing(rate: object):
    gm = fxsd.transform(ThreeBlocks(), 0.5)
    with pytest.raises(fxsd.FxsdError, match=rf"^drop_rate must be a number from 0 to 1, but got {re.escape(repr(rate))}\.$"):
        fxsd.set_drop_rate(gm, rate)
    assert [site.drop_rate for site in fxsd.sites(gm)] == [0.0, 0.25, 0.5]


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel, torch.compile])
def test_sites_and_rates_are_reached_through_a_wrapper(wrap):
    wrapped = wrap(fxsd.transform(PositionEmbedding(), 0.5))
    assert [site.drop_rate for site in fxsd.sites(wrapped)] == [0.5]
    fxsd.set_drop_rate(wrapped, 0.25)
    assert [site.drop_rate for site in fxsd.sites(wrapped)] == [0.25]


def test_two_transformed_models_in_one_module_are_both_listed():
    both = nn.Sequential(fxsd.transform(LongSkip(2), 0.5), fxsd.transform(BranchRight(), 0.5))
    assert len(fxsd.sites(both)) == 3
    fxsd.set_drop_rate(both, 1.0)
    assert [site.drop_rate for site in fxsd.sites(both)] == [0.0, 1.0, 1.0]
