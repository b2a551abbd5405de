"""What Python asks of the values of a trace, and where a forward puts them: answered as the values themselves would, or refused."""

from __future__ import annotations

import copy
import functools
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import einops
import einops.layers.torch
import numpy
import pytest
import torch
from torch import Tensor, nn

import fxsd
from fxsd.capture.leftovers import take_out
from fxsd.capture.proxies import Value

WIDTH = 8


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


class Asks(nn.Module):
    """A residual block, and what `ask` does with its output."""

    def __init__(self, ask: Callable[[Asks, Tensor], Tensor]) -> None:
        super().__init__()
        self.ask, self.branch = ask, mlp()
        self.weight = nn.Parameter(torch.rand(WIDTH))
        self.register_buffer("state", torch.zeros(WIDTH))
        self.constant = torch.arange(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.split = einops.layers.torch.Rearrange("b (h d) -> b h d", h=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.ask(self, x + self.branch(x))


def check(ask: Callable[[Any, Tensor], Tensor], batches: tuple[int, ...] = (4, 3), examples: bool = True) -> fxsd.StochasticGraphModule:
    """One graph, at rate 0 the original at every batch size, in what it returns and in what it leaves in its buffers."""
    torch.manual_seed(0)
    model = Asks(ask)
    gm = fxsd.transform(copy.deepcopy(model), 0.0, example_inputs=(torch.rand(4, WIDTH),) if examples else None)
    assert isinstance(gm, torch.fx.GraphModule)
    for batch in batches:
        x = torch.rand(batch, WIDTH)
        for mode in (True, False):
            result = model.train(mode)(x)
            assert type(result) is Tensor, "the original is as it was"
            torch.testing.assert_close(gm.train(mode)(x), result, rtol=0, atol=0)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(gm.state_dict()[key], value, rtol=0, atol=0, msg=key)
    return gm


# --- lookups ----------------------------------------------------------------------------------------------------------------

TABLE = {2: 2.0, 3: 3.0}
LOOKUPS = {
    "dims as a key": lambda m, x: x * TABLE[x.ndim],
    "dims by method": lambda m, x: x * TABLE[x.dim()],
    "dims, get": lambda m, x: x * TABLE.get(x.ndim, 5.0),
    "dims of a parameter": lambda m, x: x * {1: 2.0}[m.weight.ndim],
    "dims in a set": lambda m, x: x * 2 if x.ndim in {2, 4} else x,
    "dims not in a set": lambda m, x: x * 2 if x.ndim in {3, 4} else x,
    "size in a set": lambda m, x: x * 2 if x.shape[-1] in {WIDTH, 9} else x,
    "size not in a set": lambda m, x: x * 2 if x.shape[-1] in {9} else x,
    "size as a key": lambda m, x: x * {WIDTH: 3.0}[x.shape[1]],
    "shape as a key": lambda m, x: x * {(WIDTH,): 3.0}[x.shape[1:]],
    "dtype": lambda m, x: x * {torch.float32: 2.0, torch.float64: 3.0}[x.dtype],
    "dtype, get": lambda m, x: x * {torch.float32: 2.0}.get(x.dtype, 3.0),
    "dtype in a set": lambda m, x: x * 2 if x.dtype in {torch.float32} else x,
    "device": lambda m, x: x * {"cpu": 2.0, "cuda": 3.0}[x.device.type],
    "mode": lambda m, x: x * {True: 1.0, False: 2.0}[m.training],
    "mode, equal": lambda m, x: x * 2 if m.training == False else x,  # noqa: E712
    "tensor in a dictionary": lambda m, x: x * {x: 2.0}[x],
    "parameter in a set": lambda m, x: x * 2 if m.weight in {m.weight} else x,
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_values_are_looked_up_as_what_they_stand_for(name: str):
    check(LOOKUPS[name])


def test_a_size_that_was_looked_up_is_checked():
    gm = check(lambda m, x: x * 2 if x.shape[0] in {4, 5} else x, batches=(4, 5))
    gm.recompile()
    with pytest.raises(fxsd.FxsdError, match="was 4 then and is 5 now"):
        gm(torch.rand(5, WIDTH))


def test_a_dtype_that_was_looked_up_is_checked():
    gm = check(LOOKUPS["dtype"])
    gm.recompile()
    with pytest.raises(fxsd.FxsdError, match=r"torch\.float32 then and is torch\.float64 now"):
        gm.double()(torch.rand(4, WIDTH, dtype=torch.float64))


@functools.lru_cache
def ramp(size: int) -> Tensor:
    return torch.arange(size).float()


@pytest.mark.parametrize("ran", [False, True], ids=["", "after a run"])
def test_a_cached_function_of_the_batch_leaves_it_live(ran: bool):
    ramp.cache_clear()
    if ran:
        ramp(4)
    check(lambda m, x: x + ramp(x.shape[0])[:, None])


# --- types, lengths, other libraries ----------------------------------------------------------------------------------------


def unpacked(m: Any, x: Tensor) -> Tensor:
    a, b, *_ = x.chunk(4, -1)
    first, *rest = x.shape
    (c, d), e = x.chunk(2, -1), len(x)
    return torch.cat([b, a, c, d], -1).reshape(first, -1) * e + sum(rest)


def sets_properties(m: Any, x: Tensor) -> Tensor:
    y, z = x.clone(), x.detach()
    y.data = x.data * 2
    z.requires_grad = True
    return y + z


OTHERS = {
    "parameter is a tensor": lambda m, x: x * m.weight if isinstance(m.weight, Tensor) and torch.is_tensor(m.weight) else x,
    "parameter is one": lambda m, x: x * m.weight if isinstance(m.weight, nn.Parameter) and not isinstance(x, nn.Parameter) else x,
    "size of a parameter": lambda m, x: x.reshape(-1, m.weight.size(0)) * m.state.size(-1),
    "callable": lambda m, x: x if callable(x) else x * 2,
    "callable method": lambda m, x: x * 2 if callable(x.view) else x,
    "length": lambda m, x: x[: len(x) - 1] * len(x),
    "length of a shape": lambda m, x: x * 2 if len(x.shape) == 2 else x,
    "unpacked": unpacked,
    "divmod": lambda m, x: x * divmod(x.shape[0], 3)[0] + divmod(x.shape[0], 3)[1],
    "properties": sets_properties,
    "numpy, function": lambda m, x: x * float(numpy.sqrt(x.shape[-1])),
    "numpy, operator": lambda m, x: x * float(numpy.float32(2.0) * x.shape[-1]),
    "numpy, rounded": lambda m, x: x[:, : numpy.ceil(numpy.log1p(x.shape[-1])).astype("int").item()],
    "numpy, product": lambda m, x: x.reshape(int(numpy.prod(x.shape[1:])), -1) * numpy.prod(x.shape),
    "numpy, array": lambda m, x: x + torch.as_tensor(numpy.linspace(0, 1, WIDTH), dtype=torch.float32),
    "einops": lambda m, x: einops.rearrange(x, "b (h d) -> b h d", h=2).flatten(1),
    "einops, layer": lambda m, x: m.split(x).flatten(1),
    "einops, parameter": lambda m, x: x + einops.repeat(m.weight, "d -> b d", b=x.shape[0]),
    "einops, reduce": lambda m, x: x + einops.reduce(x, "b (h d) -> b d", "mean", h=2).repeat(1, 2),
    "math": lambda m, x: x * math.ceil(math.log2(x.shape[-1])) / math.prod(x.shape[1:]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_values_answer_as_what_they_stand_for(name: str):
    check(OTHERS[name])


TYPES = {
    "input": lambda m, x: x * 2 if isinstance(x, Tensor) and not isinstance(x, (list, tuple, int)) else x,
    "parameter": lambda m, x: x * m.weight if torch.is_tensor(m.weight) else x,
    "output of a torch module": lambda m, x: x * 2 if isinstance(m.branch[0](x), Tensor) else x,
    "a module": lambda m, x: x * 2 if isinstance(x.shape, nn.Module) else x,
}


@pytest.mark.parametrize("name", TYPES)
def test_without_examples_types_are_told_where_they_are_certain(name: str):
    check(TYPES[name], examples=False)


@pytest.mark.parametrize(
    "ask",
    [
        lambda m, x: x * 2 if isinstance(x.shape[0], int) else x,
        lambda m, x: x * 2 if isinstance(m.attention(x, x, x), tuple) else x,
        lambda m, x: x * 2 if x.ndim in {2} else x,
        lambda m, x: x * TABLE[x.ndim],
    ],
    ids=["size", "output", "in a set", "in a dictionary"],
)
def test_without_examples_what_is_not_certain_asks_for_them(ask: Any):
    with pytest.raises(fxsd.CaptureError, match="Pass example_inputs"):
        check(ask, examples=False)


SIZED = {
    "reshape": lambda m, x: torch.reshape(x, (x.shape[0], -1)),
    "reshape, list": lambda m, x: torch.reshape(x, [x.shape[0], WIDTH]),
    "broadcast": lambda m, x: torch.broadcast_to(x[:1], (x.shape[0], WIDTH)),
    "tile": lambda m, x: torch.tile(x[:1], (x.shape[0], 1)),
    "unflatten": lambda m, x: torch.unflatten(x.flatten(), 0, (x.shape[0], WIDTH)),
    "narrow": lambda m, x: torch.narrow(x, 0, 1, x.shape[0] - 1),
    "select": lambda m, x: x + torch.select(x, 0, x.shape[0] - 1),
    "roll": lambda m, x: torch.roll(x, x.shape[0] - 1, 0),
    "topk": lambda m, x: torch.topk(x, x.shape[0], 0)[0],
    "of what is no value": lambda m, x: x + torch.broadcast_to(m.constant, (x.shape[0], WIDTH)),
    "dtypes": lambda m, x: x.to(torch.promote_types(x.dtype, m.weight.dtype)),
    "join": lambda m, x: torch.vstack(x.chunk(x.shape[0])),
}


@pytest.mark.parametrize("name", SIZED)
def test_functions_of_torch_take_live_sizes(name: str):
    assert "check_decision" not in check(SIZED[name]).code


def test_the_length_of_a_tensor_stays_live():
    assert "check_decision" not in check(lambda m, x: x[: len(x) - 1]).code


def test_what_is_only_read_is_left_out():
    def reads(m: Any, x: Tensor) -> Tensor:
        batch, _ = x.shape
        x.view(batch, 2, -1).transpose(1, 2).clone()
        return x

    assert [node.name for node in check(reads).graph.nodes if node.op != "call_module"] == ["x", "add", "output"]


# --- what a forward keeps outside of the model -------------------------------------------------------------------------------

CACHE: dict[Any, Any] = {}
LIST: list[Tensor] = []
KEPT: Any = None


class Holder:
    ramp: Any = None


class Starts:
    def __init__(self) -> None:
        self.ramp: Any = None


HOLDER = Starts()


@functools.cache
def ramps(size: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    return torch.arange(size).to(dtype), size


def in_dictionary(m: Any, x: Tensor) -> Tensor:
    if "ramp" not in CACHE:
        CACHE["ramp"] = torch.arange(WIDTH).float()
    return x + CACHE["ramp"]


def by_size(m: Any, x: Tensor) -> Tensor:
    if x.shape[-1] not in CACHE:
        CACHE[x.shape[-1]] = torch.arange(x.shape[-1]).float()
    return x + CACHE[x.shape[-1]]


def in_list(m: Any, x: Tensor) -> Tensor:
    if not LIST:
        LIST.append(torch.arange(WIDTH).float())
    return x + LIST[0]


def in_file(m: Any, x: Tensor) -> Tensor:
    global KEPT
    if KEPT is None:
        KEPT = torch.arange(WIDTH).float()
    return x + KEPT


def in_class(m: Any, x: Tensor) -> Tensor:
    if Holder.ramp is None:
        Holder.ramp = torch.arange(WIDTH).float()
    return x + Holder.ramp


def in_object(m: Any, x: Tensor) -> Tensor:
    if HOLDER.ramp is None:
        HOLDER.ramp = torch.arange(WIDTH).float()
    return x + HOLDER.ramp


def in_function(m: Any, x: Tensor) -> Tensor:
    if not hasattr(in_function, "ramp"):
        in_function.ramp = torch.arange(WIDTH).float()  # type: ignore[attr-defined]
    return x + in_function.ramp  # type: ignore[attr-defined]


def closure() -> Callable[[Any, Tensor], Tensor]:
    kept = None

    def in_closure(m: Any, x: Tensor) -> Tensor:
        nonlocal kept
        if kept is None:
            kept = torch.arange(WIDTH).float()
        return x + kept

    return in_closure


CACHES = {
    "cached": lambda m, x: x + ramp(WIDTH),
    "cached for good": lambda m, x: x + ramps(WIDTH, x.dtype)[0],
    "dictionary": in_dictionary,
    "by size": by_size,
    "list": in_list,
    "file": in_file,
    "class": in_class,
    "object": in_object,
    "function": in_function,
    "closure": closure(),
}


@pytest.mark.parametrize("name", CACHES)
def test_no_value_of_a_trace_is_left_in_a_cache(name: str):
    ramp.cache_clear()
    ramps.cache_clear()
    CACHE.clear()
    check(CACHES[name])
    check(CACHES[name])  # with the cache filled by the original


@functools.lru_cache
def grid(size: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(size).to(dtype)


class Grid(nn.Module):
    """Cannot be traced, and has its result, or what it is computed from, from a cached function."""

    def __init__(self, factor: int | None) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            found = grid(x.shape[-1], x.dtype)
        return found if self.factor is None else found * self.factor


@pytest.mark.parametrize("compute", ["mask", "skip"])
@pytest.mark.parametrize("factor", [None, 2])
def test_no_tensor_without_data_is_left_in_a_cache(factor: int | None, compute: str):
    grid.cache_clear()
    model = Asks(lambda m, x: x + m.branch(x + m.grid(x)) if m.grid(x).shape[0] > 4 else x)
    model.grid = Grid(factor)
    gm = fxsd.transform(copy.deepcopy(model), 0.1, scaling="train", compute=compute, example_inputs=(torch.rand(4, WIDTH),))
    x = torch.rand(4, WIDTH)
    assert type(model(x)) is Tensor
    torch.testing.assert_close(gm.eval()(x), model(x), rtol=0, atol=0)


def test_values_are_freed_when_a_trace_is_over():
    made: list[weakref.ref[Any]] = []
    before = Value.__init__

    def noted(self: Any, *args: Any) -> None:
        before(self, *args)
        made.append(weakref.ref(self))

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Value, "__init__", noted)
            check(unpacked)
        assert made
        assert not any(ref() for ref in made)
    finally:
        gc.enable()


def test_what_else_is_in_a_container_stays():
    class Kept:
        pass

    value, other = Kept(), Kept()
    holders: list[Any] = [{1: value, 2: other, value: 3}, [value, other, (value, 1)], {value, other}, Starts()]
    holders[3].ramp, holders[3].other = (1, value), other
    take_out([value])
    assert holders[0] == {2: other}
    assert holders[1] == [other]
    assert holders[2] == {other}
    assert vars(holders[3]) == {"ramp": None, "other": other}


# --- what a module keeps for its next call -----------------------------------------------------------------------------------


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.fc = 0, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) * self.calls


class Averages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + x.detach().mean(0)
        return x - self.mean


class Remembers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.last, self.seen, self.scale = x, x.shape, WIDTH**-0.5
        return x * self.scale


class Then(nn.Module):
    def __init__(self, then: nn.Module) -> None:
        super().__init__()
        self.branch, self.then = mlp(), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(x + self.branch(x))


class Bias(nn.Module):
    """Keeps a bias for the longest input so far, as ALiBi does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slope", torch.tensor(0.5))
        self.register_buffer("bias", None, persistent=False)

    def forward(self, length: int) -> Tensor:
        if self.bias is None or self.bias.shape[0] < length:
            self.register_buffer("bias", torch.arange(length) * self.slope, persistent=False)
        return self.bias[:length]


class Biased(Then):
    def __init__(self) -> None:
        super().__init__(Then(nn.Identity()))
        self.bias = Bias()

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias(x.shape[-1])
        if bias.shape[0] != x.shape[1]:
            bias = bias[:1]
        return self.then(x + self.branch(x) + bias)


class CountsItself(Then):
    uses = True

    def __init__(self) -> None:
        super().__init__(Then(nn.Identity()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.then(x + self.branch(x) * (self.calls if self.uses else 1))


class CountsForOthers(CountsItself):
    uses = False


class AveragesItself(Then):
    def __init__(self) -> None:
        super().__init__(Then(nn.Identity()))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + x.detach().mean(0)
        return self.then(x + self.branch(x) - self.mean)


class Starting(Then):
    def __init__(self) -> None:
        super().__init__(Then(nn.Identity()))
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.ready, x = True, x * 2
        return self.then(x + self.branch(x))


def check_calls(model: nn.Module, gm: nn.Module) -> None:
    """Several calls, one after the other, give what those of the original give, in buffers too."""
    torch.manual_seed(0)
    for mode in (True, True, False):
        x = torch.rand(3, WIDTH)
        torch.testing.assert_close(gm.train(mode)(x), model.train(mode)(x), rtol=0, atol=0)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(gm.state_dict()[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("examples", [None, (torch.rand(4, WIDTH),)], ids=["", "examples"])
@pytest.mark.parametrize("kind", [Counts, Averages, Remembers])
def test_a_module_that_computes_with_what_it_kept_stays_a_call(kind: type[nn.Module], examples: Any):
    model = Then(kind())
    gm = fxsd.transform(copy.deepcopy(model), 0.0, example_inputs=examples)
    assert isinstance(gm, torch.fx.GraphModule)
    assert len(fxsd.sites(gm)) == 1
    check_calls(model, gm)


def test_a_module_that_keeps_what_it_computed_from_sizes_stays_a_call():
    model = Biased()
    gm = fxsd.transform(copy.deepcopy(model), 0.0, example_inputs=(torch.rand(4, WIDTH),))
    assert isinstance(gm, torch.fx.GraphModule)
    assert len(fxsd.sites(gm)) == 2
    assert gm.bias.bias is None
    check_calls(model, gm)


@pytest.mark.parametrize("kind", [CountsItself, AveragesItself, Starting])
def test_a_model_that_computes_with_what_it_kept_stays_python(kind: type[nn.Module]):
    model = kind()
    gm = fxsd.transform(copy.deepcopy(model), 0.0, example_inputs=(torch.rand(4, WIDTH),))
    assert not isinstance(gm, torch.fx.GraphModule)
    assert [site.module for site in fxsd.sites(gm)] == ["", "then"]
    check_calls(model, gm)


def test_without_examples_it_is_an_error_that_names_what_is_kept():
    with pytest.raises(fxsd.CaptureError, match="keeps 'calls' for its next call"):
        fxsd.transform(CountsItself())


def test_a_count_that_nothing_is_computed_with_is_no_matter():
    model = CountsForOthers()
    gm = fxsd.transform(copy.deepcopy(model), 0.0, example_inputs=(torch.rand(4, WIDTH),))
    assert isinstance(gm, torch.fx.GraphModule)
    assert model.calls == 0
    check_calls(model, gm)


def test_buffers_are_written_in_place():
    def writes(m: Any, x: Tensor) -> Tensor:
        m.state += x.detach().mean(0)
        m.state[:2] = 1.0
        m.state[2:] *= 0.5
        return x + m.state

    check(writes)


# --- what others read from attributes ----------------------------------------------------------------------------------------


class Maps(nn.Module):
    """Keeps an attention map, of what its output is computed from or not."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside, self.f = inside, mlp()

    def forward(self, x: Tensor) -> Tensor:
        self.map = x * 2
        return self.f(self.map if self.inside else x)


class Keeps(nn.Module):
    """A block that keeps its output, and computes with what a module inside it has kept."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.maps, self.f = Maps(inside), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.maps(x)
        self.output = x + self.f(x) * self.maps.map.mean(-1, keepdim=True)
        return self.output


@pytest.mark.parametrize("examples", [False, True], ids=["", "examples"])
@pytest.mark.parametrize("inside", [False, True], ids=["", "inside"])
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_tensors_in_attributes_are_those_of_the_last_call(inside: bool, examples: bool, compiled: bool):
    torch.manual_seed(0)
    model = nn.Sequential(Keeps(inside), Keeps(inside))
    gm = fxsd.transform(copy.deepcopy(model), 0.0, example_inputs=(torch.rand(4, WIDTH),) if examples else None)
    run = torch.compile(gm, fullgraph=True, backend="aot_eager") if compiled else gm
    for batch in (3, 2):
        x = torch.rand(batch, WIDTH)
        torch.testing.assert_close(run(x), model(x))
        for ours, theirs in zip(gm.children(), model, strict=True):
            torch.testing.assert_close(ours.output, theirs.output)
            torch.testing.assert_close(ours.maps.map, theirs.maps.map)
        ours.output.sum().backward()
    assert not hasattr(copy.deepcopy(fxsd.transform(nn.Sequential(Keeps(inside))))[0], "output")


class Attends(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.maps = Maps(inside)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.maps(x)


@pytest.mark.parametrize("inside", [False, True], ids=["", "inside"])
def test_what_others_read_from_an_attribute_has_all_rows(inside: bool):
    gm = fxsd.transform(
        nn.Sequential(Attends(inside)), 0.5, drop_distribution="uniform", compute="skip", example_inputs=(torch.rand(4, WIDTH),)
    )
    assert fxsd.sites(gm)[0].compute == "skip"
    x = torch.rand(4, WIDTH)
    gm(x)
    assert torch.equal(gm[0].maps.map, x * 2)
