"""Modules of torch's own that hold residual adds, or others, so that their Python is followed."""

from torch import nn

COMPOSITES = (
    nn.Sequential, nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer, nn.Transformer,
)  # fmt: skip
