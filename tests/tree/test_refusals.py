"""Where adds stand in modules: what is written there does what it should, and what cannot be written is refused with the reason."""

from __future__ import annotations

import copy
import functools
import importlib.util
import linecache
import operator
import pickle
import re
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import check_code_and_graph
from models import WIDTH, BranchRight, WithBranch, WithTwoBranches, mlp
from torch import Tensor, nn

import fxsd

UNIFORM = {"drop_distribution": "uniform"}


def rows(batch: int = 16) -> Tensor:
    return torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(0))


# --- where adds stand -----------------------------------------------------------------------------------------------------------


class Asserts(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        assert self.f is not None, "pytest rewrites this"
        y = x + self.f(x)
        assert isinstance(self.f, nn.Module)
        return y


class AssertsInPlace(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        assert self.f is not None
        out += x
        return out


def around(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(self: nn.Module, *args: Tensor) -> Tensor:
        return function(self, *args)

    return wrapper


def residual(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(self: nn.Module, x: Tensor) -> Tensor:
        return function(self, x) + x

    return wrapper


def scaled(by: float) -> Callable[..., Any]:
    def decorator(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda self, x: by * function(self, x)

    return decorator


class Decorated(WithBranch):
    @around
    @scaled(3.0)
    @around
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class DecoratedWithTheAdd(WithBranch):
    @around
    @residual
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class Processor:
    """As attention has them in diffusers."""

    def __call__(self, attention: ByProcessor, x: Tensor) -> Tensor:
        return attention.f(x) + x


class ByProcessor(WithBranch):
    def __init__(self) -> None:
        super().__init__()
        self.processor = Processor()

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


def dropout_add(x: Tensor, residual: Tensor) -> Tensor:
    out = nn.functional.dropout(x, 0.0)
    out = residual + out
    return out  # noqa: RET504


def dropout_add_inside(x: Tensor, residual: Tensor, scale: float = 1.0, *, inside: Callable[..., Tensor] = dropout_add) -> Tensor:
    """Adds by another function."""
    return dropout_add(x * scale, residual)


class ByHelper(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return dropout_add(self.f(x), x)


class ByHelperOfHelper(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return dropout_add_inside(self.f(x), residual=x)


class ByHelperTwice(WithTwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        x = dropout_add(self.f(x), x)
        return dropout_add(self.g(x), x)


class ByMethod(WithBranch):
    def connect(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def forward(self, x: Tensor) -> Tensor:
        return self.connect(x, self.f(x))


class ByStaticMethod(WithBranch):
    @staticmethod
    def connect(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def forward(self, x: Tensor) -> Tensor:
        return self.connect(x, self.f(x))


def patched_forward(self: nn.Module, x: Tensor) -> Tensor:
    return self.f(x) + x


def Patched() -> nn.Module:
    model = BranchRight()
    model.forward = types.MethodType(patched_forward, model)
    return model


def patched_from_outside(module: WithBranch, x: Tensor) -> Tensor:
    return x + module.f(x)


def PatchedByPartial() -> nn.Module:
    model = BranchRight()
    model.forward = functools.partial(patched_from_outside, model)
    return model


class Lambda(WithBranch):
    forward = lambda self, x: x + self.f(x)  # noqa: E731


class SecondOfTwoLambdas(WithBranch):
    # fmt: off
    other, forward = lambda self, x: x - self.f(x), lambda self, x: x + self.f(x)
    # fmt: on


class Plain(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class BySuper(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Overridden(BranchRight):
    """The add is in the function that this one calls by `super()`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.0


class ResidualSequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def ResidualMlp() -> nn.Module:
    return ResidualSequential(*mlp())


class Nested(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            return y + self.f(y)

        return (lambda y: inner(y))(x)


class InComprehension(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([y + self.f(y) for y in [x]])


class PrivateNames(WithBranch):
    def __init__(self) -> None:
        super().__init__()
        self.__branch = self.f

    def forward(self, x: Tensor) -> Tensor:
        __x = x
        return __x + self.__branch(__x)


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([mlp() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class LoopOfHelper(Loop):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = dropout_add(block(x), x)
        return x


class SumOfTwo(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return sum([self.f(x), x])


class SumOfThree(WithTwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        return sum([self.f(x), self.g(x), x])


class SumOfThreeShortcutFirst(WithTwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        return sum((x, self.f(x), self.g(x)))


class SumWithStart(WithTwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        return sum((self.f(x), self.g(x)), x)


class SumWithBranchAsStart(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return sum([x], self.f(x))


class SumOfGenerator(WithTwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        return x + sum(branch(x) for branch in (self.f, self.g))


class BranchInBranch(WithTwoBranches):
    def forward(self, x: Tensor) -> Tensor:
        h = self.g(x)
        return self.f(h) + h + x


class OfItem(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        h = [x]
        h[0] = h[0] * 1.0
        h[0] += self.f(x)
        return h[0]


class InPlaceIntoAlias(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        r = self.f(x)
        y = r
        y.add_(x)
        return r


class AssignedToTwo(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        out = r = self.f(x)
        out += x
        return r


class AliasInAList(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        kept = [out]
        out += x
        return kept[0]


class IaddDiscarded(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        operator.iadd(h, x)
        return h


class InPlaceOfClosure(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)

        def inner() -> Tensor:
            return h.add_(x)

        return inner()


# What is left where every branch is dropped is x.
PLACES: dict[str, Callable[[], nn.Module]] = {
    made.__name__: made
    for made in (
        *(Asserts, AssertsInPlace, DecoratedWithTheAdd, ByProcessor, ByHelper, ByHelperTwice, ByMethod),
        *(Patched, PatchedByPartial, Lambda, SecondOfTwoLambdas, BySuper, Overridden, ResidualMlp, Nested, InComprehension),
        *(PrivateNames, Loop, LoopOfHelper, SumOfTwo, SumOfThree, SumOfThreeShortcutFirst, SumWithStart, SumWithBranchAsStart),
        *(SumOfGenerator, BranchInBranch, OfItem, InPlaceIntoAlias, AssignedToTwo, AliasInAList, IaddDiscarded, InPlaceOfClosure),
    )
}
SITES = {"ByHelperTwice": 2, "Loop": 3, "LoopOfHelper": 3, "BranchInBranch": 2}


def places() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("place", PLACES)


@places()
def test_at_rate_one_the_shortcut_alone_is_left(place: str):
    gm = fxsd.transform(PLACES[place](), 1.0, **UNIFORM)
    x = rows()
    assert torch.equal(gm(x.clone()), x)


@places()
def test_with_training_scaling_evaluation_is_the_model_bit_for_bit(place: str):
    model = PLACES[place]()
    gm = fxsd.transform(model, 0.5, scaling="train", **UNIFORM).eval()
    x = rows()
    assert torch.equal(gm(x.clone()), model.eval()(x.clone()))


@places()
def test_two_seeds_differ_and_one_does_not(place: str):
    gm = fxsd.transform(PLACES[place](), 0.5, **UNIFORM)
    x = rows()

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return gm(x.clone())

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


@places()
def test_each_sample_is_the_shortcut_or_what_the_model_gives(place: str):
    if SITES.get(place, 1) > 1:
        pytest.skip("the sites draw by themselves")
    model = PLACES[place]()
    gm = fxsd.transform(model, 0.5, **UNIFORM)
    x = rows(64)
    torch.manual_seed(0)
    drawn, whole = gm(x.clone()), model(x.clone())
    kept = (drawn - whole).abs().amax(1) < 1e-5
    dropped = (drawn - x).abs().amax(1) < 1e-5
    if "Three" in place or "Start" in place or "Generator" in place:
        assert dropped.any()
        return
    assert (kept | dropped).all()
    assert kept.any()
    assert dropped.any()


@places()
def test_the_code_and_the_graph_beside_it_agree(place: str):
    check_code_and_graph(PLACES[place](), (rows(),))


@places()
def test_a_transformed_model_can_be_transformed_again(place: str):
    model = PLACES[place]()
    x = rows()
    first = fxsd.transform(model, 0.5, **UNIFORM)
    again = fxsd.transform(first, 1.0, **UNIFORM)
    assert len(fxsd.sites(again)) == len(fxsd.sites(first)) >= SITES.get(place, 1)
    assert torch.equal(again(x.clone()), x)
    assert torch.equal(fxsd.transform(again, 0.0)(x.clone()), model(x.clone()))
    assert {site.drop_rate for site in fxsd.sites(first)} == {0.5}


def _check_copy(place: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    gm = fxsd.transform(PLACES[place](), 1.0, **UNIFORM)
    other = copied(gm)
    x = rows()
    fxsd.set_drop_rate(gm, 0.0)
    whole = gm(x.clone())
    assert not torch.equal(whole, x)
    assert torch.equal(other(x.clone()), x)
    assert torch.equal(gm(x.clone()), whole)
    fxsd.set_drop_rate(other, 0.0)
    assert torch.equal(other(x.clone()), whole)
    assert not {id(p) for p in gm.parameters()} & {id(p) for p in other.parameters()}


@places()
def test_a_deep_copy_of_a_transformed_model_drops_by_itself(place: str):
    _check_copy(place, copy.deepcopy)


@places()
def test_a_pickled_transformed_model_drops_by_itself(place: str):
    if place == "Patched":
        pytest.skip("torch's modules with a method of another file are not pickled themselves")
    _check_copy(place, lambda gm: pickle.loads(pickle.dumps(gm)))


@places()
def test_the_model_itself_is_left_as_it_is(place: str):
    model = PLACES[place]()
    x = rows()
    before, attributes, cls = model(x.clone()), dict(vars(model)), type(model)
    fxsd.transform(model, 1.0, **UNIFORM)(x.clone())
    assert torch.equal(model(x.clone()), before)
    assert type(model) is cls
    assert vars(model).keys() == attributes.keys()


@places()
def test_the_source_is_python_and_calls_each_op(place: str):
    gm = fxsd.transform(PLACES[place](), 0.5, **UNIFORM)
    path = fxsd.sites(gm)[0].module
    text = fxsd.source(gm, path)
    compile(f"class Block:\n    def around(self):\n        if True:\n            pass\n{_indented(text)}", "text", "exec")
    assert "stochastic_depth" in text


def _indented(text: str) -> str:
    return "".join("    " + line for line in text.splitlines(keepends=True))


def test_the_op_in_the_code_of_an_object_is_a_module_of_the_model():
    gm = nn.Sequential(fxsd.transform(ByProcessor(), 0.5, **UNIFORM))
    assert [name for name, _ in gm.named_modules() if "stochastic_depth" in name] == ["0.stochastic_depth"]


def test_the_op_in_the_code_of_an_object_follows_train_and_eval():
    gm = fxsd.transform(ByProcessor(), 0.5, **UNIFORM)
    x = rows()
    assert torch.equal(gm.eval()(x), gm(x))
    assert not torch.equal(gm.train()(x), gm(x))


def test_the_op_in_the_code_of_an_object_follows_the_rate():
    gm = fxsd.transform(ByProcessor(), 1.0, **UNIFORM)
    x = rows()
    fxsd.set_drop_rate(gm, 0.0)
    assert not torch.equal(gm(x), x)


# --- runs and calls -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["Loop", "LoopOfHelper"])
def test_the_runs_of_a_loop_have_rates_of_their_own(place: str):
    model = PLACES[place]()
    gm = fxsd.transform(model, drop_distribution=[0.0, 1.0, 0.0])
    x = rows()
    first = x + model.blocks[0](x)
    assert torch.allclose(gm(x), first + model.blocks[2](first))
    assert [site.drop_rate for site in fxsd.sites(gm)] == [0.0, 1.0, 0.0]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = BranchRight()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


def test_a_module_that_is_called_twice_has_one_op():
    gm = fxsd.transform(Twice(), 1.0, **UNIFORM)
    assert [name for name, _ in gm.named_modules() if "stochastic_depth" in name] == ["block.stochastic_depth"]
    x = rows()
    assert torch.equal(gm(x), x)
    fxsd.set_drop_rate(gm, 0.5)
    torch.manual_seed(0)
    block, twice = gm.block(x), gm(x)
    dropped = (block == x).all(1)
    assert dropped.any()
    assert not dropped.all()
    assert not torch.equal(twice, block)


def test_the_op_of_a_sequential_is_not_run_as_one_of_its_children():
    model = ResidualMlp()
    gm = fxsd.transform(model, 1.0, **UNIFORM)
    assert len(gm) == len(model)
    assert list(gm._modules) == list(model._modules)
    assert gm.state_dict().keys() == model.state_dict().keys()
    assert any(isinstance(module, type(gm.stochastic_depth)) for module in gm.modules())
    x = rows()
    assert torch.equal(gm(x), x)
    assert torch.equal(gm[:](x), model(x))
    assert type(gm[:]) is ResidualSequential


def test_a_decorated_forward_keeps_what_is_around_it():
    model = Decorated()
    gm = fxsd.transform(model, 1.0, **UNIFORM)
    x = rows()
    assert torch.equal(gm(x), 3.0 * x)
    fxsd.set_drop_rate(gm, 0.0)
    assert torch.equal(gm(x), model(x))
    assert Decorated.forward is type(model).forward


def test_an_assert_of_the_model_still_fails():
    class Checked(WithBranch):
        allowed = True

        def forward(self, x: Tensor) -> Tensor:
            assert self.allowed, "not allowed"
            return x + self.f(x)

    gm = fxsd.transform(Checked(), 1.0, **UNIFORM)
    x = rows()
    assert torch.equal(gm(x), x)
    gm.allowed = False
    with pytest.raises(AssertionError, match="not allowed"):
        gm(x)


def stochastic_depth(x: Tensor) -> Tensor:
    return x * 2.0


def doubled_add(x: Tensor, y: Tensor) -> Tensor:
    return x + stochastic_depth(y)


class ByHelperWithTheName(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return doubled_add(x, self.f(x))


def test_a_helper_that_calls_a_function_by_the_name_of_the_op_still_calls_it():
    model = ByHelperWithTheName()
    x = rows()
    assert torch.equal(fxsd.transform(model, 1.0, **UNIFORM)(x), x)
    assert torch.equal(fxsd.transform(model, 0.0)(x), x + 2.0 * model.f(x))


# --- what cannot be written -----------------------------------------------------------------------------------------------------

MADE = """
from models import WithBranch

class Made(WithBranch):
    def forward(self, x):
        return x + self.f(x)
"""


def _made(file: str = "<made>") -> type[nn.Module]:
    namespace: dict[str, Any] = {"__name__": "made"}
    exec(compile(MADE, file, "exec"), namespace)
    return namespace["Made"]


def _imported(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    found: type[nn.Module] = module.Made
    return found


class Reduced(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(operator.add, [x, self.f(x)])


class IntoItem(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        h = [self.f(x)]
        h[0] += x
        return h[0]


def outside(x: Tensor, y: Tensor) -> Tensor:
    return x + y


class HandedIn(WithBranch):
    def __init__(self) -> None:
        super().__init__()
        self.by = {"add": outside}

    def forward(self, x: Tensor) -> Tensor:
        return self.by["add"](x, self.f(x))


class Stars(WithBranch):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(*(x, self.f(x)))


def _line(cls: type[nn.Module], text: str, method: str = "forward") -> str:
    """file:line of a text in a method of a class."""
    code = getattr(cls, method).__code__
    file, first = code.co_filename, code.co_firstlineno
    lines = linecache.getlines(file)
    return f"{file}:{next(n for n, line in enumerate(lines, 1) if n >= first and text in line)}"


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, Callable[[], str]]] = {
    "exec": (lambda: _made()(), "source cannot be read", lambda: "<made>:6"),
    "reduce": (Reduced, "adds inside of what it calls", lambda: _line(Reduced, "reduce")),
    "item": (IntoItem, "in place to an item", lambda: _line(IntoItem, "+=")),
    "handed in": (HandedIn, "is not called there by a name of its file", lambda: f"{__file__}:{outside.__code__.co_firstlineno + 1}"),
    "static": (ByStaticMethod, "`connect` is not called there by a name of its file", lambda: _line(ByStaticMethod, "x + y", "connect")),
    "stars": (Stars, "which operand is the branch cannot be told", lambda: _line(Stars, "torch.add")),
}
refused = pytest.mark.parametrize("case", REFUSED)


@refused
def test_an_only_add_that_no_op_can_be_written_at_is_an_error_with_the_place_and_the_reason(case: str):
    make, reason, place = REFUSED[case]
    with pytest.raises(fxsd.FxsdError, match=f"no op can be written.*{re.escape(place())}.*{reason}"):
        fxsd.transform(make(), 0.5)


@refused
def test_an_add_that_no_op_can_be_written_at_is_told_where_others_are_rewritten(case: str):
    make, reason, place = REFUSED[case]
    hard, plain = make(), BranchRight()
    model = nn.Sequential(hard, plain)
    with pytest.warns(UserWarning, match=f"1 residual adds were rewritten, and 1 stay as they are.*{re.escape(place())}.*{reason}"):
        gm = fxsd.transform(model, 1.0, **UNIFORM)
    x = rows()
    assert torch.equal(gm(x.clone()), hard(x.clone()))
    analysis = fxsd.analyze(model, 1.0, **UNIFORM)
    assert [site.module for site in analysis.sites] == ["1"]
    (rejected,) = [each for each in analysis.rejected if each.module == "0"]
    assert place() in rejected.reason
    assert re.search(reason, rejected.reason)


@refused
def test_an_add_that_is_left_out_by_name_is_not_warned_of(case: str):
    make, _, _ = REFUSED[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = fxsd.transform(nn.Sequential(make(), BranchRight()), 0.5, exclude="0")
    assert [site.module for site in fxsd.sites(gm)] == ["1"]


def test_a_file_that_was_changed_after_the_import_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "changed_later.py"
    path.write_text(MADE)
    model = _imported(path, "changed_later", monkeypatch)()
    path.write_text(MADE.replace("x + self.f(x)", "x + 2.0 * self.f(x)"))
    linecache.checkcache(str(path))
    with pytest.raises(fxsd.FxsdError, match=f"{re.escape(str(path))}.*is not what runs"):
        fxsd.transform(model, 0.5)
    with pytest.warns(UserWarning, match="is not what runs"):
        gm = fxsd.transform(nn.Sequential(model, BranchRight()), 0.5)
    assert [site.module for site in fxsd.sites(gm)] == ["1"]


def test_a_file_that_was_moved_on_by_a_line_after_the_import_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "moved_later.py"
    path.write_text(MADE)
    model = _imported(path, "moved_later", monkeypatch)()
    path.write_text("\n" + MADE)
    linecache.checkcache(str(path))
    with pytest.raises(fxsd.FxsdError, match="is not what runs"):
        fxsd.transform(model, 0.5)


def test_a_file_that_was_changed_in_what_does_not_run_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "commented_later.py"
    path.write_text(MADE)
    model = _imported(path, "commented_later", monkeypatch)()
    path.write_text(MADE.replace("self.f(x)", "self.f(x)  # the branch") + "\n# the end\n")
    linecache.checkcache(str(path))
    gm = fxsd.transform(model, 1.0, **UNIFORM)
    x = rows()
    assert torch.equal(gm(x), x)
    assert "self.stochastic_depth(self.f(x))  # the branch" in fxsd.source(gm)


def test_a_file_that_was_removed_after_the_import_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "removed_later.py"
    path.write_text(MADE)
    model = _imported(path, "removed_later", monkeypatch)()
    path.unlink()
    linecache.checkcache(str(path))
    with pytest.raises(fxsd.FxsdError, match=f"there is no file.*{re.escape(str(path))}"):
        fxsd.transform(model, 0.5)


def test_source_that_linecache_holds_is_enough():
    linecache.cache["<held>"] = (len(MADE), None, MADE.splitlines(keepends=True), "<held>")
    gm = fxsd.transform(_made("<held>")(), 1.0, **UNIFORM)
    x = rows()
    assert torch.equal(gm(x), x)
