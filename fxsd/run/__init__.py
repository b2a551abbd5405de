"""The op of a site, and what it needs while a model runs. Nothing here reads a graph.

In: the branch of a residual add, and where skipped, what enters it. Out: the branch scaled or dropped by sample, or the rows that are kept.
Above: every other room. Below: nothing but errors and versions.
"""

from fxsd.run.ops import METHODS, SCALINGS, StochasticDepth
from fxsd.run.skip import SkipStochasticDepth

__all__ = ["METHODS", "SCALINGS", "SkipStochasticDepth", "StochasticDepth"]
