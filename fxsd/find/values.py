"""What the nodes of a graph are to a residual add: activations or not, and which kind of op made them.

Kinds are told by torch's own ops and layer base classes (`isinstance`), never by the name of a user's class.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Set
from enum import Enum, auto
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import activation, batchnorm, conv, dropout, padding, pixelshuffle, pooling, rnn

from fxsd.run.ops import StochasticDepth


class Kind(Enum):
    """What a node does to the activation that enters it."""

    INPUT = auto()  # a placeholder
    CONSTANT = auto()  # a parameter, a buffer, or computed from these alone
    SHAPE = auto()  # sizes, dtypes, flags and arithmetic on them: no tensor of the model
    VIEW = auto()  # the same values: reshape, slice, permute, cast, identity
    SCALE = auto()  # times, or plus, something that is no activation
    DROP = auto()  # stochastic depth that the model already has
    NORM = auto()
    POOL = auto()
    PAD = auto()
    RESIZE = auto()  # interpolation, transposed convolution, pixel shuffle
    LINEAR = auto()  # conv, linear, matmul with a parameter
    ADD = auto()  # sum or difference of two activations
    JOIN = auto()  # cat, stack
    NONLINEAR = auto()  # elementwise, without parameters
    MIX = auto()  # products of activations over positions or channels: attention, matmul
    OPAQUE = auto()  # a call whose inside is not in the graph

    __hash__ = object.__hash__  # that of Enum is written in Python, and kinds are looked up more than anything else


_INACTIVE = (Kind.CONSTANT, Kind.SHAPE)

_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "ravel", "permute", "transpose", "t", "T", "mT", "H", "swapaxes", "swapdims", "movedim",
    "moveaxis", "contiguous", "squeeze", "unsqueeze", "expand", "expand_as", "view_as", "reshape_as", "to", "type", "type_as", "float",
    "half", "bfloat16", "double", "clone", "detach", "getitem", "narrow", "select", "slice", "chunk", "split", "tensor_split", "unbind",
    "roll", "flip", "alias", "identity", "pos", "dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d",
    "dropout3d", "as_tensor", "asarray", "data", "real", "requires_grad", "split_with_sizes", "unsafe_chunk", "_to_copy", "tuple", "list",
}  # fmt: skip
_SHAPES = {
    "size", "dim", "numel", "nelement", "ndim", "ndimension", "shape", "dtype", "device", "layout", "stride", "storage_offset",
    "element_size", "get_device", "is_cuda", "is_cpu", "is_mps", "is_contiguous", "is_floating_point", "is_complex", "len", "sym_size",
    "names", "itemsize", "nbytes", "is_meta", "contains",
}  # fmt: skip
_FACTORIES = {
    "zeros", "ones", "full", "empty", "arange", "range", "linspace", "logspace", "eye", "rand", "randn", "randint", "randperm", "normal",
    "tensor", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like", "new_zeros",
    "new_ones", "new_full", "new_empty", "new_tensor", "finfo", "iinfo", "meshgrid", "bernoulli", "tril_indices", "triu_indices",
    "check_bound", "check_decision", "check_given", "set_attribute",
}  # fmt: skip
# Their outputs carry no gradient: masks and indices, not activations.
_DECISIONS = {
    "eq", "ne", "lt", "le", "gt", "ge", "equal", "isnan", "isinf", "isfinite", "isclose", "logical_not", "logical_and", "logical_or",
    "logical_xor", "bool", "long", "int", "argmax", "argmin", "argsort", "nonzero", "bucketize", "searchsorted", "sign",
}  # fmt: skip
_CASTS = {"long", "int"}  # decisions too, but of an input only its type
_NORMS = {
    "layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm", "normalize", "local_response_norm", "native_layer_norm",
    "native_group_norm", "native_batch_norm",
}  # fmt: skip
_POOLS = {"max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "lp_pool", "fractional_max_pool"}
_PADS = {"pad", "constant_pad_nd", "reflection_pad", "replication_pad", "zero_pad"}
_RESIZES = {
    "interpolate", "upsample", "upsample_nearest", "upsample_bilinear", "pixel_shuffle", "conv_transpose", "grid_sample", "max_unpool",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
}  # fmt: skip
_LINEARS = {"conv", "convolution", "linear", "conv1d", "conv2d", "conv3d", "bilinear"}
_PRODUCTS = {
    "matmul", "bmm", "mm", "mv", "einsum", "baddbmm", "addmm", "addbmm", "tensordot", "chain_matmul", "rmatmul",
    "scaled_dot_product_attention", "multi_head_attention_forward", "unfold", "fold", "fft", "ifft", "fft2", "ifft2", "rfft", "irfft",
    "rfft2", "irfft2", "fftn", "ifftn", "embedding", "outer", "cumsum", "gather", "index_select", "stft", "istft", "deform_conv2d",
}  # fmt: skip
_ADDS = {"add", "radd", "iadd", "sub", "rsub", "isub", "subtract"}
_MULTIPLIES = {"mul", "rmul", "imul", "multiply", "div", "truediv", "rtruediv", "itruediv", "divide", "true_divide", "neg", "negative"}
_JOINS = {"assign_item", "assign_property", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"}
_ASSIGNMENTS = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift", "irshift", "setitem",
    "assign_item", "assign_property",
}  # fmt: skip
_TORCH = ("torch", "_operator", "builtins", "math", "operator")

_MODULES: tuple[tuple[Any, Kind], ...] = (
    (StochasticDepth, Kind.DROP),
    ((nn.Identity, dropout._DropoutNd, nn.Flatten, nn.Unflatten), Kind.VIEW),
    ((batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d), Kind.NORM),
    (
        (
            pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._AdaptiveMaxPoolNd, pooling._AdaptiveAvgPoolNd, pooling._LPPoolNd,
            nn.FractionalMaxPool2d, nn.FractionalMaxPool3d,
        ),
        Kind.POOL,
    ),
    (
        (
            padding._ConstantPadNd, padding._ReflectionPadNd, padding._ReplicationPadNd, nn.CircularPad1d, nn.CircularPad2d,
            nn.CircularPad3d,
        ),
        Kind.PAD,
    ),
    ((nn.Upsample, pixelshuffle.PixelShuffle, conv._ConvTransposeNd, nn.MaxUnpool2d), Kind.RESIZE),
    ((conv._ConvNd, nn.Linear, nn.Bilinear), Kind.LINEAR),
    ((nn.MultiheadAttention, rnn.RNNBase, rnn.RNNCellBase, nn.Fold, nn.Unfold, nn.Embedding, nn.EmbeddingBag), Kind.MIX),
)  # fmt: skip


def op_name(node: fx.Node) -> str:
    """`add` for `operator.add`, `torch.add`, `Tensor.add_`, `__radd__` and `aten.add.Tensor`; attributes by their own name."""
    return _stem(_full_name(node))


def _stem(name: str) -> str:
    return name[2:-2] if name.startswith("__") and name.endswith("__") else name.rstrip("_")


def _full_name(node: fx.Node) -> str:
    target = node.target
    if node.op != "call_function":
        return str(target)
    if target is getattr and len(node.args) > 1:
        return str(node.args[1])
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    return str(getattr(packet, "__name__", type(packet).__name__))


def is_plain_add(node: fx.Node) -> bool:
    """Is `node` the sum of two values, with no factor besides?"""
    return op_name(node) in ("add", "radd", "iadd") and len(node.args) == 2 and not node.kwargs


def written(node: fx.Node) -> fx.Node | None:
    """The value that `node` changes in place, if it does: `y += x`, `y[0] = x`, `y.copy_(x)`, `torch.relu_(y)`."""
    if node.op not in ("call_function", "call_method") or not (args := node.args) or not isinstance(args[0], fx.Node):
        return None
    name = _full_name(node)
    method = name.endswith("_") and not name.endswith("__") and getattr(node.target, "__module__", "") != operator.and_.__module__
    return args[0] if method or _stem(name) in _ASSIGNMENTS else None


def bases(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Whose memory each node may share: that of the value that it is a view of, or the result of writing into; else its own."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        is_view = node.op in ("call_function", "call_method") and op_name(node) in _VIEWS
        base = next(iter(node.all_input_nodes), None) if is_view else written(node)
        found[node] = node if base is None else found[base]
    return found


def kinds(graph: fx.Graph, module: Callable[[str], nn.Module], drop_paths: Set[str]) -> dict[fx.Node, Kind]:
    """The kind of every node, in graph order."""
    found: dict[fx.Node, Kind] = {}
    for node in graph.nodes:
        found[node] = _kind(node, found, module, drop_paths)
    filled = _filled(graph, found)
    if filled:
        found = {}
        for node in graph.nodes:
            found[node] = Kind.JOIN if node in filled else _kind(node, found, module, drop_paths)
    return found


def _filled(graph: fx.Graph, kinds: dict[fx.Node, Kind]) -> set[fx.Node]:
    """The new tensors that activations are written into and that are read by another name than the write's: a batch of padded images."""
    written_to = [(node, target) for node in graph.nodes if is_activation(kinds[node]) and (target := written(node)) is not None]
    base, found = bases(graph) if written_to else {}, set()
    for node, target in written_to:
        new = base[target]
        if (target is not new or not node.users) and new.op != "get_attr" and kinds[new] is Kind.CONSTANT:
            found.add(new)
    return found


def is_size(node: fx.Node) -> bool:
    """Is `node` a size, a flag, or arithmetic on these: a Python value and no tensor?"""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        name = op_name(current)
        if name in _SHAPES or (current.op == "get_attr" and name.endswith("training")):
            continue
        if current.op != "call_function" or name in _FACTORIES or not current.all_input_nodes:
            return False
        pending.extend(arg for arg in current.all_input_nodes if arg not in seen)
        seen.update(current.all_input_nodes)
    return True


def is_flag(node: fx.Node) -> bool:
    """Does `node` read the `training` of a module?"""
    return node.op == "get_attr" and str(node.target).rpartition(".")[2] == "training"


def is_reading(node: fx.Node) -> bool:
    """Does `node` only read a value in another form, so that nothing is lost without it if nobody uses it?"""
    name = _full_name(node)
    reads = name in _SHAPES or (name in _VIEWS and "dropout" not in name)
    return is_flag(node) or (reads and (node.op == "call_method" or (node.op == "call_function" and _torch_function(node.target))))


def is_activation(kind: Kind) -> bool:
    return kind not in _INACTIVE


def _kind(node: fx.Node, known: dict[fx.Node, Kind], module: Callable[[str], nn.Module], drop_paths: Any) -> Kind:
    if node.op == "placeholder":
        return Kind.INPUT
    if node.op == "get_attr":
        return Kind.SHAPE if is_flag(node) else Kind.CONSTANT
    if node.op == "output":
        return Kind.SHAPE
    inputs = [known[arg] for arg in node.all_input_nodes]
    alive = sum(is_activation(kind) for kind in inputs)
    if node.op == "call_module":
        if not alive:
            return Kind.CONSTANT
        return Kind.DROP if node.target in drop_paths else _module_kind(module(str(node.target)))
    name = op_name(node)
    if name in _SHAPES:
        return Kind.SHAPE
    if name in _CASTS and _is_given(node.all_input_nodes[0], known):
        return Kind.VIEW
    if name in _FACTORIES or (name in _DECISIONS and (alive or Kind.CONSTANT in inputs)):
        return Kind.CONSTANT
    if not alive:
        return Kind.CONSTANT if Kind.CONSTANT in inputs else Kind.SHAPE
    return _function_kind(node, name, alive)


def _is_given(node: fx.Node, known: dict[fx.Node, Kind]) -> bool:
    """Is `node` an input, or a view of one: the indices of an embedding, say?"""
    while known[node] is Kind.VIEW:
        node = node.all_input_nodes[0]
    return known[node] is Kind.INPUT


def _function_kind(node: fx.Node, name: str, alive: int) -> Kind:
    name = name.removeprefix("fft_")  # torch.fft.fftn
    if name in _VIEWS:
        return Kind.VIEW
    if name in _ADDS:
        return Kind.ADD if alive > 1 or (len(node.all_input_nodes) == 1 and _twice(node)) else Kind.SCALE
    if name in _MULTIPLIES:
        divides_by_it = name in ("div", "truediv", "divide", "true_divide", "rtruediv", "itruediv") and not isinstance(
            node.args[0], fx.Node
        )
        return Kind.NONLINEAR if alive > 1 or divides_by_it else Kind.SCALE
    if name in _NORMS:
        return Kind.NORM
    stem = name.rstrip("123d")
    if name in _PADS or stem in _PADS:
        return Kind.PAD
    if name in _POOLS or stem in _POOLS:
        return Kind.POOL
    if name in _RESIZES or stem in _RESIZES:
        return Kind.RESIZE
    if name in _LINEARS or stem in _LINEARS:
        return Kind.LINEAR if alive == 1 else Kind.MIX
    if name in _PRODUCTS:
        return Kind.LINEAR if alive == 1 and name in ("matmul", "bmm", "mm", "einsum", "addmm", "tensordot") else Kind.MIX
    if name in _JOINS:
        return Kind.JOIN
    if node.op == "call_function" and not _torch_function(node.target):
        return Kind.OPAQUE
    return Kind.NONLINEAR


def _twice(node: fx.Node) -> bool:
    """x + x: one input node in two places."""
    return sum(isinstance(arg, fx.Node) for arg in (*node.args, *node.kwargs.values())) > 1


def _torch_function(target: Any) -> bool:
    home = getattr(target, "__module__", None) or type(target).__module__
    return target is getattr or target in vars(operator).values() or home.split(".")[0] in _TORCH


def _module_kind(module: nn.Module) -> Kind:
    for classes, kind in _MODULES:
        if isinstance(module, classes):
            # A norm with its activation inside is more than a norm.
            acts = kind is Kind.NORM and any(type(child).__module__ == activation.__name__ for child in module.children())
            return Kind.NONLINEAR if acts else kind
    if type(module).__module__ == activation.__name__:
        return Kind.NONLINEAR
    return Kind.OPAQUE
