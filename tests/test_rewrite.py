"""The rewritten model against hand-written ones, and the original left as it was."""

from __future__ import annotations

import copy
import io
import pickle
import textwrap
from collections.abc import Callable

import pytest
import timm.layers
import torch
import torchvision
from models import (
    CASES,
    WIDTH,
    AlphaOnBranch,
    AuxiliaryHead,
    BareLinear,
    BranchRight,
    CalledTwice,
    Case,
    ConvBnShortcut,
    FunctionalDropout,
    Gate,
    Hand,
    LongSkip,
    PlainUNet,
    PreNorm,
    Stack,
    ThreeBlocks,
    assert_equal,
    gradients,
    images,
    outputs,
    rows,
    tokens,
)  # fmt: skip
from torch import Tensor, nn

import fxsd
from fxsd.run.ops import StochasticDepth

WITH_SITES = [pytest.param(c, id=c.name) for c in CASES if c.sites and not c.known_failure]
HALF = {"drop_rate": 0.5, "drop_distribution": "uniform"}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pair(case: Case, **options: object) -> tuple[nn.Module, nn.Module]:
    """A model and a transformed copy of it that shares nothing with it."""
    torch.manual_seed(0)
    model = case.factory()
    return model, fxsd.transform(copy.deepcopy(model), **options)


# --- what the rewritten model computes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["inference", "train"])
@pytest.mark.parametrize("method", ["sample", "block"])
@pytest.mark.parametrize("case", WITH_SITES)
def test_the_rewritten_model_is_the_hand_written_one(case: Case, method: str, scaling: str):
    model, gm = pair(case, **HALF, stochastic_method=method, scaling=scaling)
    hand = Hand(model, 0.5, method, scaling)
    gm.graph.lint()
    for seed in range(3):
        inputs = case.inputs(6)
        expected, actual = outputs(hand.train(), inputs, seed), outputs(gm.train(), inputs, seed)
        assert_equal(actual, expected)
        assert_equal(gradients(gm, actual), gradients(model, expected))
        assert_equal(outputs(gm.eval(), inputs), outputs(hand.eval(), inputs))


@pytest.mark.parametrize("case", WITH_SITES)
def test_at_rate_zero_training_is_the_original_bit_for_bit(case: Case):
    model, gm = pair(case, drop_rate=0.0)
    for training in (True, False):
        inputs = case.inputs(5)
        expected, actual = outputs(model.train(training), inputs), outputs(gm.train(training), inputs)
        assert_equal(actual, expected)
        assert_equal(gradients(gm, actual), gradients(model, expected))
    assert_equal(tuple(gm.state_dict().values()), tuple(model.state_dict().values()))


@pytest.mark.parametrize("case", WITH_SITES)
def test_with_scaling_in_training_evaluation_is_the_original_bit_for_bit(case: Case):
    model, gm = pair(case, drop_rate=0.7, scaling="train")
    for batch in (1, 4):
        inputs = case.inputs(batch)
        assert_equal(outputs(gm.eval(), inputs), outputs(model.eval(), inputs))


@pytest.mark.parametrize("scaling", ["inference", "train"])
@pytest.mark.parametrize("case", WITH_SITES)
def test_at_rate_one_training_is_the_shortcut_alone(case: Case, scaling: str):
    model, gm = pair(case, drop_rate=1.0, drop_distribution="uniform", scaling=scaling)
    inputs = case.inputs(4)
    shortcut_only = Hand(model, 1.0)
    shortcut_only.drop = torch.zeros_like
    assert_equal(outputs(gm.train(), inputs), outputs(shortcut_only.train(), inputs))


@pytest.mark.parametrize("case", WITH_SITES)
def test_a_site_that_is_in_the_graph_twice_or_not_at_all_would_be_seen(case: Case):
    _, gm = pair(case, **HALF)
    ops = [module for module in gm.modules() if isinstance(module, StochasticDepth)]
    called = [
        node.target for node in gm.graph.nodes if node.op == "call_module" and isinstance(gm.get_submodule(node.target), StochasticDepth)
    ]
    assert len(ops) == len(set(called)) == len(case.sites)
    assert len(called) == (2 if case.factory is CalledTwice else len(case.sites))


def test_a_dropped_sample_has_exactly_zero_gradient_through_its_branch():
    model = BranchRight()
    gm = fxsd.transform(model, **HALF)
    seen = []
    model.f[2].register_full_backward_hook(lambda module, into, out_of: seen.append(out_of[0]))
    x = torch.randn(64, WIDTH, requires_grad=True)
    y = gm(x)
    dropped = (y == x).all(1)
    assert 16 < int(dropped.sum()) < 48
    y.sin().sum().backward()
    assert torch.equal(seen[0][dropped], torch.zeros(int(dropped.sum()), WIDTH))
    assert (seen[0][~dropped] != 0).all()
    assert torch.equal(x.grad[dropped], x.detach()[dropped].cos())


def test_at_rate_one_no_parameter_of_a_branch_gets_a_gradient():
    gm = fxsd.transform(ThreeBlocks(), 1.0, drop_distribution="uniform", scaling="train")
    gm(*rows(4)).sum().backward()
    parameters = list(gm.parameters())
    assert len(parameters) == 12
    for parameter in parameters:
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.xfail(strict=True, reason="0 * inf is nan: a branch that overflows reaches the samples that drop it")
def test_a_dropped_sample_is_its_shortcut_even_where_the_branch_overflows():
    model = BranchRight()
    with torch.no_grad():
        model.f[2].bias.fill_(torch.inf)
    x = torch.randn(3, WIDTH)
    assert torch.equal(fxsd.transform(model, 1.0)(x), x)


def test_the_block_method_drops_a_branch_for_all_samples_or_for_none():
    gm = fxsd.transform(BranchRight(), **HALF, stochastic_method="block")
    x = torch.randn(6, WIDTH)
    counts = [int((gm(x) == x).all(1).sum()) for _ in range(40)]
    assert set(counts) == {0, 6}


def test_each_site_draws_for_itself():
    gm = fxsd.transform(nn.Sequential(Tagged(1.0), Tagged(2.0)), **HALF)
    found = gm(torch.zeros(64, 2))[:, 0]
    assert sorted(set(found.tolist())) == [0.0, 1.0, 2.0, 3.0]


class Tagged(nn.Module):
    """A residual block whose branch gives one constant."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        nn.init.zeros_(self.fc.weight)
        nn.init.constant_(self.fc.bias, value)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x).relu()


# --- golden text ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "code"),
    [
        (
            BranchRight,
            """
            def forward(self, x):
                f_0 = getattr(self.f, "0")(x)
                f_1 = getattr(self.f, "1")(f_0);  f_0 = None
                f_2 = getattr(self.f, "2")(f_1);  f_1 = None
                stochastic_depth = self.stochastic_depth(f_2);  f_2 = None
                add = x + stochastic_depth;  x = stochastic_depth = None
                return add
            """,
        ),
        (
            AlphaOnBranch,
            """
            def forward(self, x):
                f_0 = getattr(self.f, "0")(x)
                f_1 = getattr(self.f, "1")(f_0);  f_0 = None
                f_2 = getattr(self.f, "2")(f_1);  f_1 = None
                stochastic_depth = self.stochastic_depth(f_2);  f_2 = None
                add = torch.add(x, stochastic_depth, alpha = 2);  x = stochastic_depth = None
                return add
            """,
        ),
        (
            ConvBnShortcut,
            """
            def forward(self, x):
                branch_0 = getattr(self.branch, "0")(x)
                branch_1 = getattr(self.branch, "1")(branch_0);  branch_0 = None
                branch_2 = getattr(self.branch, "2")(branch_1);  branch_1 = None
                branch_3 = getattr(self.branch, "3")(branch_2);  branch_2 = None
                branch_4 = getattr(self.branch, "4")(branch_3);  branch_3 = None
                shortcut_0 = getattr(self.shortcut, "0")(x);  x = None
                shortcut_1 = getattr(self.shortcut, "1")(shortcut_0);  shortcut_0 = None
                stochastic_depth = self.stochastic_depth(branch_4);  branch_4 = None
                add = stochastic_depth + shortcut_1;  stochastic_depth = shortcut_1 = None
                relu = add.relu();  add = None
                return relu
            """,
        ),
        (
            CalledTwice,
            """
            def forward(self, x):
                block_f_0 = getattr(self.block.f, "0")(x)
                block_f_1 = getattr(self.block.f, "1")(block_f_0);  block_f_0 = None
                block_f_2 = getattr(self.block.f, "2")(block_f_1);  block_f_1 = None
                block_stochastic_depth = self.block.stochastic_depth(block_f_2);  block_f_2 = None
                add = x + block_stochastic_depth;  x = block_stochastic_depth = None
                block_f_3 = getattr(self.block.f, "0")(add)
                block_f_4 = getattr(self.block.f, "1")(block_f_3);  block_f_3 = None
                block_f_5 = getattr(self.block.f, "2")(block_f_4);  block_f_4 = None
                block_stochastic_depth_1 = self.block.stochastic_depth(block_f_5);  block_f_5 = None
                add_1 = add + block_stochastic_depth_1;  add = block_stochastic_depth_1 = None
                return add_1
            """,
        ),
    ],
)
def test_the_generated_code_reads_as_expected(factory: Callable[[], nn.Module], code: str):
    assert fxsd.transform(factory()).code.strip() == textwrap.dedent(code).strip()


# --- the model and its copies ---------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything of a model that a transform could disturb."""
    seen: dict[str, object] = {"rng": torch.get_rng_state().tolist(), "class": sorted(vars(nn.Module))}
    for path, module in model.named_modules(remove_duplicate=False):
        seen[path] = (id(module), type(module), module.training)
        for name, value in module.__dict__.items():
            inside = {key: id(item) for key, item in value.items()} if isinstance(value, dict) else None
            seen[f"{path}:{name}"] = (id(value), inside, list(value) if isinstance(value, list) else None)
    for name, tensor in model.state_dict(keep_vars=True).items():
        seen[f"tensor {name}"] = (id(tensor), tensor._version, tensor.data_ptr(), tensor.tolist(), tensor.requires_grad, tensor.grad)
    return seen


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.f, self.calls = BranchRight(), nn.Linear(WIDTH, WIDTH), []

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        self.seen = x
        self.calls.append(x)
        if x.sum() > 0:
            x = x + self.f(x).relu()
        return x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", WITH_SITES)
def test_a_model_is_unchanged_by_a_transform(case: Case, training: bool):
    model = case.factory().train(training)
    next(model.children()).train(not training)
    before = snapshot(model)
    gm = fxsd.transform(model, 0.3)
    fxsd.set_drop_rate(gm, 0.5)
    assert len(fxsd.analyze(model).sites) == len(case.sites)
    assert snapshot(model) == before


def test_a_model_with_hooks_is_unchanged_by_a_transform():
    model = ThreeBlocks()
    model.register_forward_hook(lambda module, args, out: None)
    model.blocks[0].register_forward_pre_hook(lambda module, args: None)
    model.blocks[1].f.register_full_backward_hook(lambda module, into, out_of: None)
    before = snapshot(model)
    fxsd.transform(model, exclude="blocks.0")
    assert snapshot(model) == before


def test_a_block_that_is_shared_with_a_part_kept_as_a_call_is_unchanged():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = BranchRight()
            self.hooked = nn.Sequential(self.block)
            self.hooked.register_forward_hook(lambda module, args, out: None)

        def forward(self, x: Tensor) -> Tensor:
            return self.hooked(self.block(x))

    model = Shared()
    before = snapshot(model)
    fxsd.transform(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (Untraceable, {}, "stopped tracing"),
        (lambda: nn.Sequential(ThreeBlocks(), Untraceable()), {}, "stopped tracing"),
        (Gate, {}, "has no residual add"),
        (BareLinear, {}, "has no residual add"),
        (ThreeBlocks, {"drop_rate": 2}, "drop_rate must be"),
        (ThreeBlocks, {"drop_distribution": {"nothing": 0.1}}, "matches no site"),
        (ThreeBlocks, {"drop_distribution": [0.1]}, "one rate a depth"),
        (ThreeBlocks, {"target_layer_name": "Missing"}, "target_layer_name must name"),
        (lambda: Stack(WithOwn(0.5)), {"existing": "error"}, "stochastic depth of its own"),
        (BranchRight, {"example_inputs": (1, 2, 3)}, "do not fit"),
    ],
)
def test_a_model_is_unchanged_by_a_transform_that_fails(factory: Callable[[], nn.Module], options: dict[str, object], message: str):
    model = factory()
    next(model.children()).eval()
    before = snapshot(model)
    with pytest.raises(fxsd.FxsdError, match=message):
        fxsd.transform(model, **options)
    assert snapshot(model) == before


@pytest.mark.parametrize("case", WITH_SITES)
def test_state_dicts_have_the_same_keys_in_the_same_order_and_load_both_ways(case: Case):
    model, gm = pair(case, **HALF)
    assert list(gm.state_dict()) == list(model.state_dict())
    assert [name for name, _ in gm.named_parameters()] == [name for name, _ in model.named_parameters()]
    other = case.factory()
    gm.load_state_dict(other.state_dict())
    inputs = case.inputs(2)
    model.load_state_dict(gm.state_dict())
    assert_equal(outputs(model.eval(), inputs), outputs(other.eval(), inputs))


def test_the_result_shares_parameters_with_the_model():
    model = ThreeBlocks()
    gm = fxsd.transform(model)
    assert len(list(model.parameters())) == 12
    for ours, theirs in zip(gm.parameters(), model.parameters(), strict=True):
        assert ours is theirs


def saved_and_loaded(gm: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda gm: pickle.loads(pickle.dumps(gm)), "save": saved_and_loaded}
SOME = [c for c in CASES if c.name in {"AuxiliaryHead", "FunctionalDropout", "KeywordCalls", "PreNorm", "SdpaInBlock", "PreActivation"}]


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_a_copy_draws_switches_modes_and_reports_sites_as_the_first_does(case: Case, how: str):
    _, gm = pair(case, drop_rate=0.5, drop_distribution="huang")
    other = COPIES[how](gm)
    inputs = case.inputs(6)
    trained, evaluated = outputs(gm.train(), inputs), outputs(gm.eval(), inputs)
    again, still = outputs(gm.train(), inputs, seed=1), outputs(gm.eval(), inputs)
    assert not torch.equal(again[0], trained[0])
    for seed, expected_train, expected_eval in ((0, trained, evaluated), (1, again, still)):
        if how == "copy" and case.name == "PreActivation":
            break  # shares running statistics, which training has moved
        assert_equal(outputs(other.train(), inputs, seed), expected_train)
        assert_equal(outputs(other.eval(), inputs), expected_eval)
    assert other.graph is not gm.graph or how == "copy"
    other.graph.lint()
    assert [(s.name, s.depth, s.drop_rate, s.kind, str(s.add), str(s.fork)) for s in fxsd.sites(other)] == [
        (s.name, s.depth, s.drop_rate, s.kind, str(s.add), str(s.fork)) for s in fxsd.sites(gm)
    ]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_a_copy_has_rates_of_its_own(how: str):
    gm = fxsd.transform(ThreeBlocks(), 0.5)
    other = COPIES[how](gm)
    fxsd.set_drop_rate(other, 0.1)
    assert [site.drop_rate for site in fxsd.sites(gm)] == [0.0, 0.25, 0.5]
    assert [site.drop_rate for site in fxsd.sites(other)] == [0.0, 0.05, 0.1]


# --- once more ------------------------------------------------------------------------------------------------------------------


def test_a_transform_of_a_transformed_model_gives_new_rates_and_no_second_op():
    model = Stack(BranchRight(), PreNorm(), BranchRight())
    first = fxsd.transform(copy.deepcopy(model), 0.1)
    second = fxsd.transform(first, **HALF, scaling="train", stochastic_method="block")
    fresh = fxsd.transform(model, **HALF, scaling="train", stochastic_method="block")
    assert [(s.name, s.depth, s.drop_rate, s.kind) for s in fxsd.sites(second)] == [
        (s.name, s.depth, s.drop_rate, s.kind) for s in fxsd.sites(fresh)
    ]
    assert sum(isinstance(module, StochasticDepth) for module in second.modules()) == 4
    assert [str(node.target) for node in second.graph.nodes] == [str(node.target) for node in fresh.graph.nodes]
    assert list(second.state_dict()) == list(model.state_dict())
    inputs = tokens(6)
    for training in (True, False):
        assert_equal(outputs(second.train(training), inputs), outputs(fresh.train(training), inputs))
    assert [round(s.drop_rate, 3) for s in fxsd.sites(first)] == [0.0, 0.05, 0.05, 0.1]


def test_a_transform_of_a_transformed_model_leaves_the_first_one_running():
    gm = fxsd.transform(ThreeBlocks(), 0.5, drop_distribution="uniform")
    x, code = rows(6), gm.code
    before = outputs(gm, x)
    fxsd.set_drop_rate(fxsd.transform(gm, 1.0), 0.9)
    assert gm.code == code
    assert_equal(outputs(gm, x), before)


def test_a_model_of_two_programs_can_be_transformed_again():
    gm = fxsd.transform(fxsd.transform(AuxiliaryHead(), 0.1), 1.0, drop_distribution="uniform")
    (x,) = rows(3)
    kept, auxiliary = gm(x)
    assert_equal((kept,), (x,))
    assert auxiliary.shape == (3, 2)
    assert torch.equal(gm.eval()(x), x)
    assert [(s.name, s.drop_rate) for s in fxsd.sites(gm)] == [("block", 1.0), ("0", 1.0)]


def test_sites_that_a_second_transform_leaves_out_are_not_shared_with_the_first_model():
    first = fxsd.transform(ThreeBlocks(), 0.3, drop_distribution="uniform")
    fxsd.set_drop_rate(fxsd.transform(first, 0.6, exclude="blocks.1"), 0.9)
    assert {site.drop_rate for site in fxsd.sites(first)} == {fxsd.sites(first)[0].drop_rate}


# --- stochastic depth that is there already -------------------------------------------------------------------------------------


class OwnDropPath(nn.Module):
    def __init__(self, p: float, rescale: bool = True, batch: bool = False) -> None:
        super().__init__()
        self.p, self.rescale, self.batch = p, rescale, batch

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        mask = (torch.rand(1 if self.batch else len(x), *[1] * (x.dim() - 1)) >= self.p).to(x)
        return x * mask / (1 - self.p) if self.rescale else x * mask


class WithOwn(BranchRight):
    """A block with stochastic depth of its own behind the branch."""

    def __init__(self, drop_path: float | nn.Module) -> None:
        super().__init__()
        self.drop_path = drop_path if isinstance(drop_path, nn.Module) else OwnDropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(x))


NATIVE = {
    "own": lambda: OwnDropPath(0.5),
    "own unscaled": lambda: OwnDropPath(0.5, rescale=False),
    "own batch": lambda: OwnDropPath(0.5, batch=True),
    "torchvision row": lambda: torchvision.ops.StochasticDepth(0.5, "row"),
    "torchvision batch": lambda: torchvision.ops.StochasticDepth(0.5, "batch"),
    "timm": lambda: timm.layers.DropPath(0.5),
    "timm unscaled": lambda: timm.layers.DropPath(0.5, scale_by_keep=False),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("native", NATIVE)
def test_existing_stochastic_depth_is_replaced(native: str, training: bool):
    model = Stack(WithOwn(NATIVE[native]()), BranchRight()).train(training)
    hand = Stack(BranchRight(), BranchRight())
    hand.load_state_dict(model.state_dict())
    gm = fxsd.transform(model, **HALF)
    assert [site.module for site in fxsd.sites(gm)] == ["blocks.0", "blocks.1"]
    assert not [node for node in gm.graph.nodes if "drop_path" in str(node.target)]
    assert gm.training == training
    inputs = rows(6)
    for mode in (True, False):
        assert_equal(outputs(gm.train(mode), inputs), outputs(Hand(hand, 0.5).train(mode), inputs))
    (x,) = rows(64)
    (expected,) = outputs(model.train(), (x,))
    assert any(not torch.equal(model(x), expected) for _ in range(20))  # the model keeps its own


@pytest.mark.parametrize("native", NATIVE)
def test_existing_stochastic_depth_is_kept(native: str):
    model = Stack(WithOwn(NATIVE[native]()), BranchRight())
    gm = fxsd.transform(model, 1.0, drop_distribution="uniform", existing="keep")
    assert [site.module for site in fxsd.sites(gm)] == ["blocks.1"]
    analysis = fxsd.analyze(model, existing="keep")
    assert "sites that keep the stochastic depth they have: blocks.0.drop_path" in analysis.notes
    inputs = rows(6)
    assert_equal(outputs(gm, inputs), outputs(model.blocks[0], inputs))


@pytest.mark.parametrize("native", NATIVE)
def test_existing_stochastic_depth_is_an_error_on_request(native: str):
    model = Stack(WithOwn(NATIVE[native]()), BranchRight()).eval()
    with pytest.raises(fxsd.FxsdError, match=r"existing='error'.*blocks\.0\.drop_path"):
        fxsd.transform(model, existing="error")
    assert len(fxsd.sites(fxsd.transform(ThreeBlocks(), existing="error"))) == 3


def test_depths_count_the_sites_that_keep_their_own_stochastic_depth():
    gm = fxsd.transform(Stack(BranchRight(), WithOwn(0.5), BranchRight()), 0.4, existing="keep")
    assert [(site.module, site.drop_rate) for site in fxsd.sites(gm)] == [("blocks.0", 0.0), ("blocks.2", 0.4)]


def test_existing_stochastic_depth_behind_layer_scale_and_before_a_norm_is_replaced():
    class Scaled(WithOwn):
        def __init__(self, norm_last: bool) -> None:
            super().__init__(0.5)
            self.gamma, self.norm, self.norm_last = nn.Parameter(torch.rand(WIDTH)), nn.LayerNorm(WIDTH), norm_last

        def forward(self, x: Tensor) -> Tensor:
            return x + (self.norm(self.drop_path(self.f(x))) if self.norm_last else self.gamma * self.drop_path(self.f(x)))

    gm = fxsd.transform(Stack(Scaled(True), Scaled(False)), 1.0, drop_distribution="uniform")
    assert not [node for node in gm.graph.nodes if "drop_path" in str(node.target)]
    (x,) = rows(4)
    assert torch.equal(gm(x), x)


# --- modes, dtypes, layouts -----------------------------------------------------------------------------------------------------


def test_a_frozen_submodule_is_quiet_and_the_rest_is_not():
    gm = fxsd.transform(Stack(FunctionalDropout(), FunctionalDropout()), **HALF)
    x = torch.randn(32, WIDTH)
    gm.blocks[0].eval()
    gm.blocks[1].eval()
    assert torch.equal(gm(x), gm(x))
    frozen = gm(x)
    assert torch.equal(frozen, gm.eval()(x))
    gm.train()
    gm.blocks[1].eval()
    first, second = gm(x), gm(x)
    assert not torch.equal(first, second)
    gm.blocks[0].eval()
    assert torch.equal(gm(x), frozen)


def test_a_submodule_frozen_before_the_transform_is_quiet_after_it():
    model = Stack(FunctionalDropout(), FunctionalDropout())
    for block in model.blocks:
        block.eval()
    gm = fxsd.transform(model, **HALF)
    x = torch.randn(8, WIDTH)
    assert gm.training
    assert torch.equal(gm(x), gm.eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_the_result_has_the_mode_of_the_model(training: bool):
    gm = fxsd.transform(ThreeBlocks().train(training))
    modes = {module.training for module in gm.modules()}
    assert modes == {training}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cast_first", [True, False])
def test_a_cast_model_stays_in_its_dtype_and_keeps_its_rates(dtype: torch.dtype, cast_first: bool):
    model = ThreeBlocks()
    gm = fxsd.transform(model.to(dtype), 0.1) if cast_first else fxsd.transform(model, 0.1).to(dtype)
    hand = copy.deepcopy(model).to(dtype)
    x = torch.randn(6, WIDTH, dtype=dtype)
    for training in (True, False):
        assert gm.train(training)(x).dtype == dtype
    assert [site.drop_rate for site in fxsd.sites(gm)] == [0.0, 0.05, 0.1]
    fxsd.set_drop_rate(gm, 0.0)
    assert torch.equal(gm.train()(x), hand(x))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in {"PreNorm", "ConvBnShortcut", "LayerScale", "Broadcast"}], ids=lambda c: c.name
)
def test_under_autocast_dtypes_and_values_are_those_of_the_hand_written_model(case: Case):
    model, gm = pair(case, **HALF)
    hand = Hand(model, 0.5)
    inputs = case.inputs(6)
    with torch.autocast("cpu", torch.bfloat16):
        for training in (True, False):
            assert_equal(outputs(gm.train(training), inputs), outputs(hand.train(training), inputs))


@pytest.mark.parametrize("scaling", ["inference", "train"])
def test_channels_last_is_preserved(scaling: str):
    gm = fxsd.transform(ConvBnShortcut(), **HALF, scaling=scaling).to(memory_format=torch.channels_last)
    x = images(4)[0].to(memory_format=torch.channels_last)
    for training in (True, False):
        y = gm.train(training)(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert not y.is_contiguous()


def test_the_batch_size_is_read_at_run_time():
    gm = fxsd.transform(PreNorm(), **HALF)
    for batch in (7, 1, 3, 0):
        assert gm(torch.randn(batch, 5, WIDTH)).shape == (batch, 5, WIDTH)


def test_a_model_on_the_meta_device_keeps_its_rates_when_it_is_materialised():
    with torch.device("meta"):
        model = ThreeBlocks()
    gm = fxsd.transform(model, 0.4).to_empty(device="cpu")
    gm.load_state_dict(ThreeBlocks().state_dict())
    assert [site.drop_rate for site in fxsd.sites(gm)] == [0.0, 0.2, 0.4]
    assert gm(torch.randn(2, WIDTH)).isfinite().all()


def test_long_skips_and_resolution_merges_are_left_whole():
    gm = fxsd.transform(LongSkip(2), 1.0, drop_distribution="uniform")
    (x,) = rows(3)
    head, tail = gm.head(x), gm.body[2]
    assert torch.equal(gm(x), head + tail(head))
    with pytest.raises(fxsd.FxsdError, match="no residual add"):
        fxsd.transform(nn.Sequential(PlainUNet().enter, PlainUNet().leave))
